"""One of several processes that train together; `tests/devices/test_processes.py` starts them.

    python -m tests.process START PROCESS COUNT PORT [die]

START is a pickle of parameters and optimizer state. Process 0 prints the losses of the common run and of a run of its
own on one device, and the largest difference of their parameters. With `die`, the last process then kills itself, and
the others carry on.
"""

import functools
import json
import os
import pathlib
import pickle
import signal
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests import distributed as d

STEPS = 100
OPTIMIZER = "adam"
LAYOUT = d.Layout({"fsdp": 2, "tensor": 2}, "fsdp", P("fsdp", "tensor"))


def main(start_file: str, process: int, count: int, port: str, die: bool) -> None:
    jax.distributed.initialize(
        f"127.0.0.1:{port}", count, process, initialization_timeout=60, heartbeat_timeout_seconds=10
    )
    tx = d.OPTIMIZERS[OPTIMIZER]()
    start, state = pickle.loads(pathlib.Path(start_file).read_bytes())
    mesh = LAYOUT.mesh(AxisType.Auto)
    specs = lro.partition_specs(start, LAYOUT.rule)
    state_specs = lro.state_specs(state, start, specs)
    whole = functools.partial(jax.tree.map, lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]))
    params = whole(start, d.shardings(mesh, specs))
    global_state = whole(state, d.shardings(mesh, state_specs))
    data = whole(d.data(), (NamedSharding(mesh, P("fsdp")),) * 2)
    out = (d.shardings(mesh, specs), d.shardings(mesh, state_specs), NamedSharding(mesh, P()))
    step = jax.jit(functools.partial(d.step, tx), out_shardings=out)

    losses = []
    for _ in range(STEPS):
        params, global_state, loss = step(params, global_state, *data)
        losses.append(float(loss))
    dense = jax.jit(lro.densify, out_shardings=NamedSharding(mesh, P()))(params)
    if process == 0:
        alone, own_losses = start, []
        one = jax.jit(functools.partial(d.step, tx))
        for _ in range(STEPS):
            alone, state, loss = one(alone, state, *d.data())
            own_losses.append(float(loss))
        pairs = zip(jax.tree.leaves(dense), jax.tree.leaves(lro.densify(alone)), strict=True)
        difference = max(float(np.max(np.abs(np.asarray(a.addressable_data(0)) - b))) for a, b in pairs)
        report = {"devices": jax.device_count(), "losses": losses, "alone": own_losses, "difference": difference}
        print(json.dumps(report), flush=True)
    jax.experimental.multihost_utils.sync_global_devices("trained")
    if die and process == count - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while die:
        params, global_state, loss = step(params, global_state, *data)
        float(loss)


if __name__ == "__main__":
    import jax.experimental.multihost_utils

    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], "die" in sys.argv[5:])
