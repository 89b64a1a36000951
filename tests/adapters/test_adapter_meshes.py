"""Adapters on many devices: the tests of `adapters_on_eight_devices.py`, in a process that has them."""

import pytest

from tests import distributed as d


@pytest.mark.slow
def test_on_eight_devices() -> None:
    d.run_on_eight_devices("tests/adapters/adapters_on_eight_devices.py")
