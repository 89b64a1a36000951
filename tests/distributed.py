"""A small training problem and the layouts in which many devices run it."""

from __future__ import annotations

import dataclasses
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
    "adam": lambda: lro.lowrank_adam(5e-3, eps=3e-3),
    "adam-tangent": lambda: lro.lowrank_adam(5e-3, eps=3e-3, momentum="tangent"),
    "muon": lambda: lro.lowrank_muon(0.01, adam_learning_rate=1e-3),
    "muon-tangent": lambda: lro.lowrank_muon(0.01, adam_learning_rate=1e-3, momentum="tangent"),
}


def params() -> Any:
    """A residual network on one device: two stacked kernels, a third one, a bias."""
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "blocks": {"kernel": lro.lowrank_init(RANK, axes=lro.Axes(1, 1))(keys[0], (LAYERS, WIDTH, WIDTH))},
        "head": {"kernel": lro.lowrank_init(RANK)(keys[1], (WIDTH, OUTPUTS)), "bias": jnp.zeros(OUTPUTS)},
    }


def data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, a smooth function of them."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((BATCH, WIDTH)).astype(np.float32)
    return x, np.tanh(x @ rng.standard_normal((WIDTH, OUTPUTS)).astype(np.float32) / 6)


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    h = x
    for i in range(LAYERS):
        h = h + jnp.tanh(h @ params["blocks"]["kernel"][i])
    error = h @ params["head"]["kernel"] + params["head"]["bias"] - y
    return jnp.mean(error**2)


def step(tx: Any, params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
    value, grads = jax.value_and_grad(loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of eight devices and a rule for dense kernels.

    Attributes:
      axes: sizes of the mesh axes.
      batch: mesh axes of the batch.
      blocks: dense spec of the stacked kernels.
      head: dense spec of the head; its bias follows the tensor axis.
    """

    axes: dict[str, int]
    batch: Any
    blocks: P
    head: P

    def rule(self, path: str, shape: tuple[int, ...]) -> P:
        if path == "head/bias":
            return P(*(axis for axis in self.head[1:] if axis == "tensor"))
        return self.blocks if path.startswith("blocks") else self.head

    def mesh(self, mode: AxisType) -> jax.sharding.Mesh:
        return jax.make_mesh(tuple(self.axes.values()), tuple(self.axes), axis_types=(mode,) * len(self.axes))


LAYOUTS = {
    "data": Layout({"data": 8}, "data", P(), P()),
    # A rule may name an axis twice: U and V are two arrays.
    "fsdp": Layout({"fsdp": 8}, "fsdp", P(None, "fsdp", "fsdp"), P("fsdp", "fsdp")),
    "tensor": Layout({"data": 2, "tensor": 4}, "data", P(None, None, "tensor"), P("tensor", None)),
    "fsdp-tensor": Layout({"fsdp": 4, "tensor": 2}, "fsdp", P(None, "fsdp", "tensor"), P("tensor", "fsdp")),
    "layers": Layout({"stage": 2, "data": 4}, "data", P("stage"), P()),
}


def shardings(mesh: jax.sharding.Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def placed(layout: Layout, mesh: jax.sharding.Mesh, tx: Any) -> tuple[Any, Any, Any]:
    """Parameters, optimizer state and data on the mesh."""
    start = params()
    specs = lro.partition_specs(start, layout.rule)
    abstract = jax.eval_shape(tx.init, start)
    start = jax.device_put(start, shardings(mesh, specs))
    state = jax.jit(tx.init, out_shardings=shardings(mesh, lro.state_specs(abstract, start, specs)))(start)
    return start, state, jax.device_put(data(), NamedSharding(mesh, P(layout.batch)))
