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

BATCH, INPUTS, WIDTH, OUTPUTS, LAYERS, RANK = 64, 16, 32, 8, 4, 4

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: lro.lowrank_adam(3e-3, eps=1e-3),
    "adam-tangent": lambda: lro.lowrank_adam(3e-3, eps=1e-3, momentum="tangent"),
    "muon": lambda: lro.lowrank_muon(0.01, adam_learning_rate=1e-3),
    "muon-tangent": lambda: lro.lowrank_muon(0.01, adam_learning_rate=1e-3, momentum="tangent"),
}


def params() -> Any:
    """A residual network on one device: two kernels, four stacked ones, biases."""
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "up": {"kernel": lro.lowrank_init(RANK)(keys[0], (INPUTS, WIDTH)), "bias": jnp.zeros(WIDTH)},
        "blocks": {"kernel": lro.lowrank_init(RANK, axes=lro.Axes(1, 1))(keys[1], (LAYERS, WIDTH, WIDTH))},
        "down": {"kernel": lro.lowrank_init(RANK)(keys[2], (WIDTH, OUTPUTS)), "bias": jnp.zeros(OUTPUTS)},
    }


def data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, a smooth function of them."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((BATCH, INPUTS)).astype(np.float32)
    return x, np.tanh(x @ rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float32) / 4)


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    for i in range(LAYERS):
        h = h + jnp.tanh(h @ params["blocks"]["kernel"][i]) / LAYERS
    error = h @ params["down"]["kernel"] + params["down"]["bias"] - y
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
      kernels: dense specs of up, blocks, down; those of the biases follow from their outputs.
    """

    axes: dict[str, int]
    batch: Any
    kernels: dict[str, P]

    def rule(self, path: str, shape: tuple[int, ...]) -> P:
        spec = self.kernels[path.split("/")[0]]
        return spec if path.endswith("kernel") else P(*(axis for axis in spec[1:] if axis == "tensor"))

    def mesh(self, mode: AxisType) -> jax.sharding.Mesh:
        return jax.make_mesh(tuple(self.axes.values()), tuple(self.axes), axis_types=(mode,) * len(self.axes))


def same(spec: P) -> dict[str, P]:
    return {"up": spec, "blocks": P(None, *spec), "down": spec}


LAYOUTS = {
    "data": Layout({"data": 8}, "data", same(P())),
    # A rule may name an axis twice: U and V are two arrays.
    "fsdp": Layout({"fsdp": 8}, "fsdp", same(P("fsdp", "fsdp"))),
    "tensor": Layout(
        {"data": 2, "tensor": 4},
        "data",
        {"up": P(None, "tensor"), "blocks": P(None, "tensor", "tensor"), "down": P("tensor", None)},
    ),
    "fsdp-tensor": Layout(
        {"fsdp": 4, "tensor": 2},
        "fsdp",
        {"up": P("fsdp", "tensor"), "blocks": P(None, "fsdp", "tensor"), "down": P("tensor", "fsdp")},
    ),
    "layers": Layout({"stage": 4, "data": 2}, "data", {"up": P(), "blocks": P("stage"), "down": P()}),
}


def shardings(mesh: jax.sharding.Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def placed(layout: Layout, mesh: jax.sharding.Mesh, tx: Any) -> tuple[Any, Any, Any]:
    """Parameters, optimizer state and data on the mesh."""
    start = params()
    specs = lro.partition_specs(start, layout.rule)
    start = jax.device_put(start, shardings(mesh, specs))
    abstract = jax.eval_shape(tx.init, params())
    state = jax.jit(tx.init, out_shardings=shardings(mesh, lro.state_specs(abstract, start, specs)))(start)
    return start, state, jax.device_put(data(), NamedSharding(mesh, P(layout.batch)))
