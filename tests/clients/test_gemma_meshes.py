"""Do the tests of `gemma_on_eight_devices.py` pass in a process with eight devices?"""

import pathlib
import subprocess
import sys

import pytest

from tests import distributed as d

ROOT = pathlib.Path(__file__).parents[2]
FILE = "tests/clients/gemma_on_eight_devices.py"


@pytest.mark.slow
def test_on_eight_devices():
    """The number of devices is fixed when JAX starts."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", FILE]
    run = subprocess.run(command, cwd=ROOT, env=d.environment(8), text=True, capture_output=True, timeout=540)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
