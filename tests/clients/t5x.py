"""A decoder in the style of T5X: layers of its own with named axes, `nn.scan` over layers, accumulated microbatches."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import partitioning

import lowrank_optax as lro

param_with_axes = partitioning.param_with_axes
EMBED, HEADS, HEAD_DIM, MLP, VOCAB, LAYERS, BUCKETS = 26, 2, 11, 51, 57, 3, 6


def _canonicalize_tuple(x: int | Iterable[int]) -> tuple[int, ...]:
    return tuple(x) if isinstance(x, Iterable) else (x,)


class DenseGeneral(nn.Module):
    """A dense layer of several axes whose kernel is stored as a matrix, as T5X stores it for Adafactor."""

    features: int | tuple[int, ...]
    kernel_axes: tuple[str, ...]
    axis: int | tuple[int, ...] = -1

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        features = _canonicalize_tuple(self.features)
        axis = tuple(a % inputs.ndim for a in _canonicalize_tuple(self.axis))
        shape = tuple(inputs.shape[a] for a in axis) + features
        flat = (int(np.prod(shape[: len(axis)])), int(np.prod(features)))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel = param_with_axes("kernel", init, flat, jnp.float32, axes=self.kernel_axes)
        return jax.lax.dot_general(inputs, kernel.reshape(shape), ((axis, tuple(range(len(axis)))), ((), ())))


def dense_general(module: Any, W: lro.LowRank, inputs: jax.Array) -> jax.Array:  # lowrank_optax
    y = inputs.reshape(*inputs.shape[: inputs.ndim - len(_canonicalize_tuple(module.axis))], -1) @ W  # lowrank_optax
    return y.reshape(*y.shape[:-1], *_canonicalize_tuple(module.features))  # lowrank_optax


lro.linen.register(DenseGeneral, axes=lro.Axes(0, 1), forward=dense_general)  # lowrank_optax


class RelativePositionBiases(nn.Module):
    @nn.compact
    def __call__(self, length: int) -> jax.Array:
        distance = np.arange(length)[:, None] - np.arange(length)[None]
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = param_with_axes("rel_embedding", init, (HEADS, BUCKETS), jnp.float32, axes=("heads", "relpos_buckets"))
        one_hot = jax.nn.one_hot(np.clip(distance, 0, BUCKETS - 1), BUCKETS)
        return jnp.einsum("hb,qkb->hqk", table, one_hot)[None]


class LayerNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param_with_axes("scale", nn.initializers.ones, x.shape[-1:], jnp.float32, axes=("embed",))
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


class DecoderLayer(nn.Module):
    @nn.compact
    def __call__(self, inputs: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        x = LayerNorm(name="pre_self_attention_layer_norm")(inputs)
        project = functools.partial(DenseGeneral, (HEADS, HEAD_DIM), ("embed", "joined_kv"))
        q, k, v = (project(name=name)(x) for name in ("query", "key", "value"))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = inputs + DenseGeneral(EMBED, ("joined_kv", "embed"), axis=(-2, -1), name="out")(y)
        y = LayerNorm(name="pre_mlp_layer_norm")(x)
        gate, up = (DenseGeneral(MLP, ("embed", "mlp"), name=name)(y) for name in ("wi_0", "wi_1"))
        return x + DenseGeneral(EMBED, ("mlp", "embed"), name="wo")(nn.gelu(gate) * up), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        init = nn.initializers.normal(1.0)
        embedding = param_with_axes("embedding", init, (VOCAB, EMBED), jnp.float32, axes=("vocab", "embed"))
        bias = RelativePositionBiases(name="relpos_bias")(tokens.shape[1])
        bias = jnp.where(np.tril(np.ones(bias.shape[-2:], bool)), bias, -1e9)
        layers = partitioning.scan_with_axes(
            partitioning.remat(DecoderLayer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=LAYERS,
            axis_name="layers",
        )
        y, _ = layers(name="layers")(embedding[tokens], bias)
        return DenseGeneral(VOCAB, ("embed", "vocab"), name="logits_dense")(LayerNorm(name="decoder_norm")(y))


class DecoderOnlyModel:
    """What a T5X trainer gets: a module, and the loss of a batch."""

    def __init__(self, module: nn.Module):
        self.module = module

    def loss_fn(self, params: Any, batch: Any) -> jax.Array:
        logits = self.module.apply({"params": params}, batch["decoder_input_tokens"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["decoder_target_tokens"])
        return losses.mean()


def accumulate_grads_microbatched(model: Any, params: Any, batch: Any, num_microbatches: int) -> tuple[Any, Any]:
    """Loss and gradients, microbatch by microbatch within a loop on the device."""
    size = batch["decoder_input_tokens"].shape[0] // num_microbatches

    def per_microbatch(i: Any, state: Any) -> Any:
        micro = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size), batch)
        loss, grads = jax.value_and_grad(model.loss_fn)(params, micro)
        return jax.tree.map(jnp.add, state, (loss, grads))

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.tree.map(lambda x: x / num_microbatches, jax.lax.fori_loop(0, num_microbatches, per_microbatch, zeros))


model = DecoderOnlyModel(Decoder())
tx = lro.lowrank_adam(3e-2)  # lowrank_optax


@functools.partial(jax.jit, static_argnames="num_microbatches")
@lro.linen.factored()  # lowrank_optax
def train_step(state: Any, batch: Any, num_microbatches: int = 2) -> tuple[Any, jax.Array]:
    params, opt_state = state
    loss, grads = accumulate_grads_microbatched(model, params, batch, num_microbatches)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


def start(rank: float | None) -> tuple[Any, Any]:
    params = jax.jit(model.module.init)(jax.random.key(0), BATCH["decoder_input_tokens"])["params"]
    if rank is not None:
        where = lro.linen.kernels(model.module, BATCH["decoder_input_tokens"])  # lowrank_optax
        params = lro.factorize(params, rank, where=where)  # lowrank_optax
    return params, tx.init(params)


step = train_step


@jax.jit
@lro.linen.factored()  # lowrank_optax
def forward(state: Any, batch: Any) -> jax.Array:
    return model.module.apply({"params": state[0]}, batch["decoder_input_tokens"])


def params(state: Any) -> Any:
    return state[0]


def reasons() -> dict[str, str]:
    return lro.linen.kernels(model.module, BATCH["decoder_input_tokens"]).reasons


_tokens = np.random.default_rng(0).integers(1, VOCAB, (4, 9)).astype(np.int32)
BATCH = {"decoder_input_tokens": _tokens[:, :-1], "decoder_target_tokens": _tokens[:, 1:]}
RANK = 4
FACTORED = {"logits_dense/kernel"} | {
    f"layers/{name}/kernel" for name in ("query", "key", "value", "out", "wi_0", "wi_1", "wo")
}
DENSE = {
    "embedding": "nothing is registered for its layer, Decoder",
    "relpos_bias/rel_embedding": "nothing is registered for its layer, RelativePositionBiases",
    **{
        f"layers/{name}_layer_norm/scale": "nothing is registered for its layer, LayerNorm"
        for name in ("pre_self_attention", "pre_mlp")
    },
}
