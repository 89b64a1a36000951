"""A transformer in the style of deepmind-gemma: an `Einsum` of its own, a cache handed from call to call, a sampler."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

Cache = dict[str, Any]


class Einsum(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
        w = self.param("w", nn.initializers.normal(0.2), self.shape)
        return jnp.einsum(eqn, x, w)


class FeedForward(nn.Module):
    features: int
    hidden_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w_gating = self.param("gating_einsum", nn.initializers.normal(0.2), (2, self.features, self.hidden_dim))
        w_linear = self.param("linear", nn.initializers.normal(0.2), (self.hidden_dim, self.features))
        return jnp.dot(nn.gelu(jnp.dot(x, w_gating[0])) * jnp.dot(x, w_gating[1]), w_linear)


def feed_forward(module: Any, w_gating: Any, w_linear: Any, x: jax.Array) -> jax.Array:  # lowrank_optax
    return (nn.gelu(x @ w_gating[0]) * (x @ w_gating[1])) @ w_linear  # lowrank_optax


lro.linen.register(  # lowrank_optax
    Einsum,
    leaf="w",
    axes=lambda module, eqn, x: lro.einsum_axes(eqn),
    forward=lambda module, W, eqn, x: lro.einsum(eqn, x, W),
)
lro.linen.register(  # lowrank_optax
    FeedForward,
    leaf=("gating_einsum", "linear"),
    axes=(lro.Axes(1, 1), lro.Axes(0, 1)),
    forward=feed_forward,
)


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1]))
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + scale)


class Embedder(nn.Module):
    vocab_size: int
    embed_dim: int

    def setup(self) -> None:
        init = nn.initializers.normal(0.2)
        self.input_embedding_table = self.param("input_embedding", init, (self.vocab_size, self.embed_dim))

    def encode(self, x: jax.Array) -> jax.Array:
        return self.input_embedding_table[x] * jnp.sqrt(self.embed_dim).astype(jnp.float32)

    def decode(self, x: jax.Array) -> jax.Array:
        return jnp.dot(x, self.input_embedding_table.T)


def apply_rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Turns the first two numbers of every head by the position."""
    angle = positions[..., None].astype(x.dtype)
    first, second = x[..., 0], x[..., 1]
    turned = (first * jnp.cos(angle) - second * jnp.sin(angle), first * jnp.sin(angle) + second * jnp.cos(angle))
    return jnp.concatenate([jnp.stack(turned, axis=-1), x[..., 2:]], axis=-1)


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


class Attention(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, cache: Cache | None, mask: jax.Array) -> Any:
        c = self.config
        q = Einsum((c.num_heads, c.embed_dim, c.head_dim), name="q_einsum")("BTD,NDH->BTNH", x)
        kv_shape = (2, c.num_kv_heads, c.embed_dim, c.head_dim)
        k, v = Einsum(kv_shape, name="kv_einsum")("BSD,CKDH->CBSKH", x)
        q, k = apply_rope(q, positions) * c.head_dim**-0.5, apply_rope(k, positions)
        if cache is not None:
            at = (0, cache["end_index"], 0, 0)
            k, v = (jax.lax.dynamic_update_slice(cache[name], new, at) for name, new in (("k", k), ("v", v)))
            cache = {"k": k, "v": v, "end_index": cache["end_index"] + x.shape[1]}
        k, v = (jnp.repeat(y, c.num_heads // c.num_kv_heads, axis=2) for y in (k, v))
        logits = jnp.where(mask[:, None], jnp.einsum("BTNH,BSNH->BNTS", q, k), -1e9)
        encoded = jnp.einsum("BNTS,BSNH->BTNH", nn.softmax(logits), v)
        out = Einsum((c.num_heads, c.head_dim, c.embed_dim), name="attn_vec_einsum")("BTNH,NHD->BTD", encoded)
        return out, cache


class Transformer(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, cache: Any, mask: jax.Array) -> Any:
        c, new_cache = self.config, {}
        embedder = Embedder(c.num_embed, c.embed_dim, name="embedder")
        x = embedder.encode(tokens)
        for i in range(c.num_layers):
            name, of_layer = f"layer_{i}", None if cache is None else cache[f"layer_{i}"]
            attention = Attention(c, name=f"{name}_attn")
            y, new_cache[name] = attention(RMSNorm(name=f"{name}_pre_norm")(x), positions, of_layer, mask)
            x = x + y
            x = x + FeedForward(c.embed_dim, c.hidden_dim, name=f"{name}_mlp")(RMSNorm(name=f"{name}_ffw_norm")(x))
        return embedder.decode(RMSNorm(name="final_norm")(x)), new_cache


model = Transformer(TransformerConfig())
tx = lro.lowrank_adam(2e-2)  # lowrank_optax


def inputs_of(tokens: jax.Array) -> tuple[Any, ...]:
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return tokens, positions, None, jnp.tril(jnp.ones((batch, length, length), bool))


@jax.jit
def train_step(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
    def loss_fn(params: Any) -> jax.Array:
        logits, _ = model.apply({"params": params}, *inputs_of(tokens))
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def start(rank: float | None) -> tuple[Any, Any]:
    params = jax.jit(model.init)(jax.random.key(0), *inputs_of(BATCH))["params"]
    if rank is not None:
        params = lro.factorize(params, rank, where=lro.linen.kernels(model, *inputs_of(BATCH)))  # lowrank_optax
    return params, tx.init(params)


@lro.linen.factored()  # lowrank_optax
def step(state: tuple[Any, Any], batch: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
    params, opt_state, loss = train_step(*state, batch)
    return (params, opt_state), loss


@jax.jit
@lro.linen.factored()  # lowrank_optax
def forward(state: tuple[Any, Any], batch: jax.Array) -> jax.Array:
    return model.apply({"params": state[0]}, *inputs_of(batch))[0]


def params(state: tuple[Any, Any]) -> Any:
    return state[0]


def reasons() -> dict[str, str]:
    return lro.linen.kernels(model, *inputs_of(BATCH)).reasons


@lro.linen.factored()  # lowrank_optax
def decode(state: tuple[Any, Any], batch: jax.Array) -> jax.Array:
    """The logits of the sampler's steps, for given tokens."""
    c, (n, length) = model.config, batch.shape
    empty = jnp.zeros((n, c.cache_length, c.num_kv_heads, c.head_dim))
    cache = {f"layer_{i}": {"k": empty, "v": empty, "end_index": jnp.int32(0)} for i in range(c.num_layers)}

    @jax.jit
    def sample_step(cache: Any, tokens: jax.Array, t: jax.Array) -> Any:
        mask = jnp.broadcast_to(jnp.arange(c.cache_length) <= t, (n, 1, c.cache_length))
        return model.apply({"params": state[0]}, tokens, jnp.full((n, 1), t), cache, mask)

    logits = []
    for t in range(length):
        y, cache = sample_step(cache, batch[:, t : t + 1], t)
        logits.append(y)
    return jnp.concatenate(logits, axis=1)


BATCH = np.random.default_rng(0).integers(1, 57, (4, 8)).astype(np.int32)
RANK = 4
KERNELS = ("attn/q_einsum/w", "attn/kv_einsum/w", "attn/attn_vec_einsum/w", "mlp/gating_einsum", "mlp/linear")
FACTORED = {f"layer_0_{name}" for name in KERNELS}
DENSE = {"embedder/input_embedding": "nothing is registered for its layer, Embedder"}
