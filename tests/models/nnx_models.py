"""nnx layers of every kind, and the comparison of a factored model with its dense twin."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowrank_optax as lro

layer = functools.partial
attention = layer(nnx.MultiHeadAttention, 2, 8, decode=False)

# For each layer its constructor, the shape of its input, and for each kernel its stacked and input axes.
LAYERS: dict[str, tuple[Any, tuple[int, ...], dict[str, lro.Axes]]] = {
    "linear": (layer(nnx.Linear, 8, 6), (4, 3, 8), {"kernel": lro.Axes(0, 1)}),
    "linear, no bias": (layer(nnx.Linear, 8, 6, use_bias=False), (4, 8), {"kernel": lro.Axes(0, 1)}),
    "general": (layer(nnx.LinearGeneral, (4, 6), (2, 5), axis=(1, -1)), (3, 4, 2, 6), {"kernel": lro.Axes(0, 2)}),
    "general, batch": (layer(nnx.LinearGeneral, 6, (2, 4), batch_axis={0: 3}), (3, 5, 6), {"kernel": lro.Axes(1, 1)}),
    "conv": (layer(nnx.Conv, 3, 8, (3, 3), strides=2, padding="CIRCULAR"), (2, 7, 6, 3), {"kernel": lro.Axes(0, 3)}),
    "conv causal": (layer(nnx.Conv, 4, 8, 3, padding="CAUSAL"), (2, 9, 4), {"kernel": lro.Axes(0, 2)}),
    "einsum, heads out": (layer(nnx.Einsum, "btd,ndh->btnh", (2, 8, 6)), (2, 5, 8), {"kernel": lro.Axes(1, 1)}),
    "einsum, bias": (layer(nnx.Einsum, "btd,dnh->btnh", (8, 2, 4), (2, 4)), (2, 5, 8), {"kernel": lro.Axes(0, 1)}),
    "einsum, heads in": (
        layer(nnx.Einsum, "...nh,nhd->...d", (2, 4, 6), (6,)),
        (2, 5, 2, 4),
        {"kernel": lro.Axes(0, 2)},
    ),
    "einsum, experts": (layer(nnx.Einsum, "ebd,edf->ebf", (3, 8, 6), (3, 6)), (3, 5, 8), {"kernel": lro.Axes(1, 1)}),
    "attention": (
        attention,
        (2, 5, 8),
        {f"{k}/kernel": lro.Axes(0, 2 if k == "out" else 1) for k in ("key", "out", "query", "value")},
    ),
    "attention, grouped queries": (
        layer(nnx.MultiHeadAttention, 4, 8, num_kv_heads=2, normalize_qk=True, decode=False),
        (2, 5, 8),
        {f"{k}/kernel": lro.Axes(0, 2 if k == "out" else 1) for k in ("key", "out", "query", "value")},
    ),
    "lora": (layer(nnx.LoRALinear, 8, 6, lora_rank=2), (4, 8), {"kernel": lro.Axes(0, 1)}),
    "lstm": (
        lambda rngs: Recurrent(nnx.OptimizedLSTMCell(4, 4, param_dtype=jnp.float64, rngs=rngs), rngs),
        (2, 3, 4),
        {f"rnn/cell/{k}/kernel": lro.Axes(0, 1) for k in ("dense_h", "dense_i")},
    ),
    "gru": (
        lambda rngs: Recurrent(nnx.GRUCell(4, 4, param_dtype=jnp.float64, rngs=rngs), rngs),
        (2, 3, 4),
        {f"rnn/cell/{k}/kernel": lro.Axes(0, 1) for k in ("dense_h", "dense_i")},
    ),
    "vmapped linear": (
        lambda rngs: Stacked(layer(nnx.Linear, 6, 6), rngs),
        (2, 6),
        {"layers/kernel": lro.Axes(1, 1)},
    ),
    "vmapped einsum": (
        lambda rngs: Stacked(layer(nnx.Einsum, "ba,ac->bc", (6, 6), (6,)), rngs),
        (2, 6),
        {"layers/kernel": lro.Axes(1, 1)},
    ),
    "vmapped conv": (
        lambda rngs: Stacked(layer(nnx.Conv, 6, 6, 3), rngs),
        (2, 5, 6),
        {"layers/kernel": lro.Axes(1, 2)},
    ),
    "vmapped attention": (
        lambda rngs: Stacked(attention, rngs),
        (2, 5, 8),
        {f"layers/{k}/kernel": lro.Axes(1, 2 if k == "out" else 1) for k in ("key", "out", "query", "value")},
    ),
}


class Recurrent(nnx.Module):
    """A cell over time, and nothing of its random streams."""

    def __init__(self, cell: Any, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(cell, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.rnn(x)


class Stacked(nnx.Module):
    """Layers that nnx.vmap makes and nnx.scan runs."""

    def __init__(self, make: Any, rngs: nnx.Rngs, length: int = 3):
        @nnx.split_rngs(splits=length)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs: nnx.Rngs) -> Any:
            return make(rngs=rngs)

        self.layers = layers(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer: Any, x: Any) -> Any:
            return x + jnp.sin(layer(x))

        return run(self.layers, x)


class Net(nnx.Module):
    """A convolution, an einsum, heads and a linear layer, in a row."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(5, 8, (3,), rngs=rngs)
        self.mix = nnx.Einsum("btd,dnh->btnh", (8, 2, 4), (2, 4), rngs=rngs)
        self.heads = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.head = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(nnx.relu(self.heads(nnx.relu(self.mix(nnx.relu(self.conv(x)))))))


def draw(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def kernels(model: Any) -> dict[str, lro.LowRank]:
    """The factored kernels of a model by path."""
    state = nnx.to_pure_dict(nnx.state(model))
    leaves = jax.tree.leaves_with_path(state, is_leaf=lro.is_lowrank)
    return {"/".join(str(k.key) for k in path): x for path, x in leaves if lro.is_lowrank(x)}


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


def twins(build: Any) -> tuple[Any, Any]:
    """Two models with the same parameters, in double precision."""
    models = build(rngs=nnx.Rngs(0)), build(rngs=nnx.Rngs(0))
    for model in models:
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float64), state))
    return models
