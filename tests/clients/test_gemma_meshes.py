"""Do the tests of `gemma_on_eight_devices.py` pass in a process with eight devices?"""

import pytest

from tests import distributed as d


@pytest.mark.slow
def test_on_eight_devices():
    d.run_on_eight_devices("tests/clients/gemma_on_eight_devices.py")
