"""Gemma in the style of flax/examples/gemma: `nnx.Einsum` attention, a cache of arrays, gradients added as trees."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lowrank_optax as lro

Cache = dict[str, dict[str, jax.Array]]
State = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    num_embed: int = 57
    embed_dim: int = 26
    hidden_dim: int = 51
    num_heads: int = 2
    head_dim: int = 11
    num_kv_heads: int = 1
    num_layers: int = 1
    cache_length: int = 8


class RMSNorm(nnx.Module):
    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + self.scale[...])


class Embedder(nnx.Module):
    def __init__(self, vocab_size: int, embed_dim: int, *, rngs: nnx.Rngs):
        self.input_embedding = nnx.Param(nnx.initializers.normal(0.2)(rngs.params(), (vocab_size, embed_dim)))

    def encode(self, x: jax.Array) -> jax.Array:
        table = self.input_embedding[...]
        return table[x] * table.shape[1] ** 0.5

    def decode(self, x: jax.Array) -> jax.Array:
        return jnp.dot(x, self.input_embedding[...].T)


class Attention(nnx.Module):
    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        init = nnx.initializers.normal(0.2)
        q_shape, kv_shape = (c.num_heads, c.embed_dim, c.head_dim), (2, c.num_kv_heads, c.embed_dim, c.head_dim)
        self.q_einsum = nnx.Einsum("BTD,NDH->BTNH", q_shape, kernel_init=init, rngs=rngs)
        self.kv_einsum = nnx.Einsum("BSD,CKDH->CBSKH", kv_shape, kernel_init=init, rngs=rngs)
        out_shape = (c.num_heads, c.head_dim, c.embed_dim)
        self.attn_vec_einsum = nnx.Einsum("BTNH,NHD->BTD", out_shape, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array, cache: Any, mask: jax.Array) -> tuple[jax.Array, Any]:
        c = self.config
        q = self.q_einsum(x) * c.head_dim**-0.5
        k, v = self.kv_einsum(x)
        if cache is not None:
            at = (0, cache["end_index"], 0, 0)
            k, v = (jax.lax.dynamic_update_slice(cache[name], new, at) for name, new in (("k", k), ("v", v)))
            cache = {"k": k, "v": v, "end_index": cache["end_index"] + x.shape[1]}
        k, v = (jnp.repeat(y, c.num_heads // c.num_kv_heads, axis=2) for y in (k, v))
        logits = jnp.where(mask, jnp.einsum("BTNH,BSNH->BNTS", q, k), -1e9)
        return self.attn_vec_einsum(jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits), v)), cache


class FeedForward(nnx.Module):
    def __init__(self, features: int, hidden_dim: int, *, rngs: nnx.Rngs):
        self.gate_proj = nnx.Linear(features, hidden_dim, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(features, hidden_dim, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(hidden_dim, features, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.pre_attention_norm, self.pre_ffw_norm = RMSNorm(config.embed_dim), RMSNorm(config.embed_dim)
        self.attn = Attention(config, rngs=rngs)
        self.mlp = FeedForward(config.embed_dim, config.hidden_dim, rngs=rngs)

    def __call__(self, x: jax.Array, cache: Any, mask: jax.Array) -> tuple[jax.Array, Any]:
        y, cache = self.attn(self.pre_attention_norm(x), cache, mask)
        x = x + y
        return x + self.mlp(self.pre_ffw_norm(x)), cache


class Transformer(nnx.Module):
    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedder = Embedder(config.num_embed, config.embed_dim, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim)

    def __call__(self, tokens: jax.Array, cache: Cache | None = None, mask: Any = None) -> tuple[jax.Array, Cache]:
        length = tokens.shape[1]
        mask = jnp.tril(jnp.ones((1, 1, length, length), bool)) if mask is None else mask
        x, new_cache = self.embedder.encode(tokens), {}
        for i, layer in enumerate(self.layers):
            name = f"layer_{i}"
            x, new_cache[name] = layer(x, None if cache is None else cache[name], mask)
        return self.embedder.decode(self.final_norm(x)), new_cache


def loss_fn(model: Transformer, tokens: jax.Array) -> jax.Array:
    logits, _ = model(tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


class Trainer:
    """After tunix's trainer: the gradients of several calls are added before the optimizer sees them."""

    def __init__(self, model: Transformer, optimizer: nnx.Optimizer[Any], accumulate: int = 2):
        self.model, self.optimizer, self.accumulate = model, optimizer, accumulate

    def gradients(self, tokens: jax.Array) -> tuple[jax.Array, Any]:
        total, losses = None, []
        for microbatch in jnp.split(tokens, self.accumulate):
            loss, grads = value_and_grad(self.model, microbatch)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            losses.append(loss)
        return sum(losses) / len(losses), jax.tree.map(lambda g: g / len(losses), total)

    def train_step(self, tokens: jax.Array) -> jax.Array:
        loss, grads = self.gradients(tokens)
        apply_gradients(self.model, self.optimizer, grads)
        return loss


@nnx.jit
def value_and_grad(model: Transformer, tokens: jax.Array) -> tuple[jax.Array, Any]:
    return nnx.value_and_grad(loss_fn)(model, tokens)


@nnx.jit
def apply_gradients(model: Transformer, optimizer: nnx.Optimizer[Any], grads: Any) -> None:
    optimizer.update(model, grads)


def start(rank: float | None) -> State:
    model = Transformer(TransformerConfig(), rngs=nnx.Rngs(0))
    if rank is not None:
        lro.nnx.factorize(model, rank)  # lowrank_optax
    return model, nnx.Optimizer(model, lro.lowrank_adam(2e-2), wrt=nnx.Param)  # lowrank_optax


def step(state: State, batch: jax.Array) -> tuple[State, jax.Array]:
    return state, Trainer(*state).train_step(batch)


def forward(state: State, batch: jax.Array) -> jax.Array:
    return state[0](batch)[0]


def params(state: State) -> Any:
    return nnx.state(state[0], nnx.Param)


def reasons() -> dict[str, str]:
    return lro.nnx.kernels(Transformer(TransformerConfig(), rngs=nnx.Rngs(0)), RANK).reasons


def decode(state: State, batch: jax.Array) -> jax.Array:
    """The logits of one token after the other, with a cache."""
    model, c, (n, length) = state[0], state[0].config, batch.shape
    empty = jnp.zeros((n, c.cache_length, c.num_kv_heads, c.head_dim))
    cache = {f"layer_{i}": {"k": empty, "v": empty, "end_index": jnp.int32(0)} for i in range(c.num_layers)}

    @nnx.jit
    def sample_step(model: Transformer, cache: Any, tokens: jax.Array, t: jax.Array) -> Any:
        return model(tokens, cache, (jnp.arange(c.cache_length) <= t)[None, None, None])

    logits = []
    for t in range(length):
        y, cache = sample_step(model, cache, batch[:, t : t + 1], t)
        logits.append(y)
    return jnp.concatenate(logits, axis=1)


BATCH = np.random.default_rng(0).integers(1, 57, (4, 8)).astype(np.int32)
RANK = 4
KERNELS = [f"attn/{name}_einsum" for name in ("q", "kv", "attn_vec")] + [
    f"mlp/{k}_proj" for k in ("gate", "up", "down")
]
FACTORED = {f"layers/0/{name}/kernel" for name in KERNELS}
DENSE = {"embedder/input_embedding": "Embedder is no Linear"}
