"""A small training problem and the layouts in which many devices run it."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro

BATCH, WIDTH, OUTPUTS, LAYERS, RANK = 64, 32, 8, 2, 4

# Adam divides by sqrt(v) + eps. Coefficients that are zero but for rounding get steps of the order of the learning rate
# with the default eps, and any two summation orders part within a few steps; this eps, near the size of the gradients,
# makes the step a smooth function of them.
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adam": lambda: lro.lowrank_adam(5e-3, eps=3e-3, geometry=lro.Coefficient()),
    "adam-balanced": lambda: lro.lowrank_adam(5e-3, eps=3e-3),
    "adam-tangent": lambda: lro.lowrank_adam(5e-3, eps=3e-3, geometry=lro.Tangent()),
    "muon": lambda: lro.lowrank_muon(0.01, adam_learning_rate=1e-3, geometry=lro.Coefficient()),
    "muon-balanced": lambda: lro.lowrank_muon(0.01, adam_learning_rate=1e-3),
    "muon-tangent": lambda: lro.lowrank_muon(0.01, adam_learning_rate=1e-3, geometry=lro.Tangent()),
}


@functools.cache
def params(stacked: bool = False) -> Any:
    """A residual network in host memory: two factored kernels, apart or stacked, a dense head."""
    stack = lro.lowrank_init(RANK, axes=lro.Axes(1, 1))(jax.random.key(0), (LAYERS, WIDTH, WIDTH))
    kernels = {"kernel": stack} if stacked else {str(i): {"kernel": stack[i]} for i in range(LAYERS)}
    head = jax.nn.initializers.lecun_normal()(jax.random.key(1), (WIDTH, OUTPUTS))
    return jax.device_get({"blocks": kernels, "head": {"kernel": head, "bias": jnp.zeros(OUTPUTS)}})


def data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, a smooth function of them."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((BATCH, WIDTH)).astype(np.float32)
    return x, np.tanh(x @ rng.standard_normal((WIDTH, OUTPUTS)).astype(np.float32) / 6)


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    h, blocks = x, params["blocks"]
    for i in range(LAYERS):
        h = h + jnp.tanh(h @ (blocks["kernel"][i] if "kernel" in blocks else blocks[str(i)]["kernel"]))
    return jnp.mean((h @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)


def step(tx: Any, params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
    value, grads = jax.value_and_grad(loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of eight devices and a rule for dense kernels.

    Attributes:
      axes: sizes of the mesh axes.
      batch: mesh axis of the batch.
      kernel: dense spec of a factored kernel.
      stage: mesh axis of stacked kernels, None if they are apart.
    """

    axes: dict[str, int]
    batch: str
    kernel: P
    stage: str | None = None

    def rule(self, path: str, shape: tuple[int, ...]) -> P:
        if not path.startswith("blocks"):
            return P()
        return P(self.stage, *self.kernel) if self.stage else self.kernel

    def mesh(self, mode: AxisType) -> jax.sharding.Mesh:
        return jax.make_mesh(tuple(self.axes.values()), tuple(self.axes), axis_types=(mode,) * len(self.axes))


LAYOUTS = {
    "data": Layout({"data": 8}, "data", P()),
    # A rule may name an axis twice: U and V are two arrays.
    "fsdp": Layout({"fsdp": 8}, "fsdp", P("fsdp", "fsdp")),
    "tensor": Layout({"data": 2, "tensor": 4}, "data", P(None, "tensor")),
    "fsdp-tensor": Layout({"fsdp": 4, "tensor": 2}, "fsdp", P("fsdp", "tensor")),
    "layers": Layout({"stage": 2, "data": 4}, "data", P(None, "data"), stage="stage"),
}


def shardings(mesh: jax.sharding.Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def placed(layout: Layout, mesh: jax.sharding.Mesh, tx: Any) -> tuple[Any, Any, Any]:
    """Parameters, optimizer state and data on the mesh."""
    start = params(stacked=layout.stage is not None)
    state = jax.device_get(tx.init(start))
    specs = lro.partition_specs(start, layout.rule)
    placed_state = jax.device_put(state, shardings(mesh, lro.state_specs(state, start, specs)))
    placed_data = jax.device_put(data(), NamedSharding(mesh, P(layout.batch)))
    return jax.device_put(start, shardings(mesh, specs)), placed_state, placed_data


def run_on_eight_devices(*files: str) -> None:
    """Runs the tests of files in a process of their own: the number of devices is fixed when JAX starts."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    root = pathlib.Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, env=environment(8), text=True, capture_output=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def environment(devices: int) -> dict[str, str]:
    """Environment of a process with so many virtual CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    # A virtual device waits for the others on a thread of the pool that also computes: there must be more threads than
    # waiting collectives, however few cores there are.
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": str(4 * devices)}
