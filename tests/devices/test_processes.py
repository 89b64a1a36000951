"""Several processes that train one model with `jax.distributed`, on one machine."""

import json
import pathlib
import pickle
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests import distributed as d
from tests.process import OPTIMIZER

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 600  # Seconds after which every process is killed: no test hangs.


@pytest.fixture(scope="module")
def start(tmp_path_factory, settings_of_a_user):
    """A file with parameters and optimizer state, made once: making them compiles more than training does."""
    params = d.params()
    path = tmp_path_factory.mktemp("processes") / "start.pickle"
    path.write_bytes(pickle.dumps((params, jax.device_get(d.OPTIMIZERS[OPTIMIZER]().init(params)))))
    return path


def train_together(start: pathlib.Path, count: int, *options: str) -> list[tuple[int, str, str, float]]:
    """Exit code, output, errors and running time of each of `count` processes with four devices between them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = d.environment(4 // count)
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.process", str(start), str(i), str(count), str(port), *options],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]
    try:
        ended = []
        for p in reversed(processes):  # The last one may kill itself: then the others follow.
            out, err = p.communicate(timeout=max(1.0, began + LIMIT - time.monotonic()))
            ended.append((p.returncode, out, err, time.monotonic() - began))
        return ended[::-1]
    finally:
        for p in processes:
            p.kill()
            p.wait()


def assert_one_run(out: str) -> None:
    report = json.loads(next(line for line in out.splitlines() if line.startswith("{")))  # Gloo prints to stdout too.
    assert report["devices"] == 4
    np.testing.assert_allclose(report["losses"], report["alone"], rtol=1e-5)
    assert report["difference"] < 1e-5


@pytest.mark.slow
def test_four_processes_train_as_one_device(start):
    ended = train_together(start, 4)
    assert [code for code, *_ in ended] == [0] * 4, [err[-2000:] for _, _, err, _ in ended]
    assert_one_run(ended[0][1])


@pytest.mark.slow
def test_two_processes_train_as_one_device_and_end_together(start):
    """When one is killed the other does not wait for it: it ends, with an error that says what happened."""
    (code, out, err, end), (killed, _, _, death) = train_together(start, 2, "die")
    assert out, err[-2000:]
    assert_one_run(out)
    assert killed == -9
    assert code != 0
    assert re.search("another task died|connection closed by peer|connection reset", err, re.IGNORECASE), err[-2000:]
    assert end - death < 60  # The heartbeat of these processes times out after 10 seconds.
