"""Do subspaces of sharded gradients need no gathered gradient, and are they those of one device?"""

import pytest

from tests.distributed import run_on_eight_devices


@pytest.mark.slow
def test_on_eight_devices():
    run_on_eight_devices("tests/subspace/on_eight_devices.py")
