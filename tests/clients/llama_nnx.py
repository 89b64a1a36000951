"""Llama and Qwen3 in the style of tunix and bonsai: `nnx.Linear` without bias, grouped queries, rotated positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lowrank_optax as lro

DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, LAYERS = 26, 4, 2, 11, 51, 57, 1


def apply_rope(x: jax.Array, theta: float = 100.0) -> jax.Array:
    """Turns the pairs of each head; the last number of an odd head stays."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
    sin, cos = (f(angles).astype(x.dtype)[None, :, None] for f in (jnp.sin, jnp.cos))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos, rest], axis=-1)


class Attention(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.q_proj = nnx.Linear(DIM, HEADS * HEAD_DIM, use_bias=False, rngs=rngs)
        self.k_proj = nnx.Linear(DIM, KV_HEADS * HEAD_DIM, use_bias=False, rngs=rngs)
        self.v_proj = nnx.Linear(DIM, KV_HEADS * HEAD_DIM, use_bias=False, rngs=rngs)
        self.o_proj = nnx.Linear(HEADS * HEAD_DIM, DIM, use_bias=False, rngs=rngs)
        self.q_norm, self.k_norm = (nnx.RMSNorm(HEAD_DIM, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        q = apply_rope(self.q_norm(self.q_proj(x).reshape(b, t, HEADS, HEAD_DIM)))
        k = apply_rope(self.k_norm(self.k_proj(x).reshape(b, t, KV_HEADS, HEAD_DIM)))
        v = self.v_proj(x).reshape(b, t, KV_HEADS, HEAD_DIM)
        grouped = q.reshape(b, t, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k) / HEAD_DIM**0.5
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        y = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), v)
        return self.o_proj(y.reshape(b, t, HEADS * HEAD_DIM))


class MLP(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.gate_proj = nnx.Linear(DIM, HIDDEN, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(DIM, HIDDEN, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(HIDDEN, DIM, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.input_layernorm, self.post_attention_layernorm = (nnx.RMSNorm(DIM, rngs=rngs) for _ in range(2))
        self.self_attn, self.mlp = Attention(rngs=rngs), MLP(rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(VOCAB, DIM, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(rngs=rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(DIM, rngs=rngs)
        self.lm_head = nnx.Linear(DIM, VOCAB, use_bias=False, rngs=rngs)

    @nnx.jit
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = nnx.remat(DecoderLayer.__call__)(layer, x)
        return self.lm_head(self.norm(x))


@nnx.jit
def train_step(model: Llama, optimizer: Any, metrics: nnx.Metric, tokens: jax.Array) -> jax.Array:
    def loss_fn(model: Llama) -> jax.Array:
        logits = model(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    metrics.update(loss=loss)
    return loss


def start(rank: float | None, every: int = 2) -> tuple[Llama, Any, nnx.Metric]:
    model = Llama(rngs=nnx.Rngs(0))
    if rank is not None:
        lro.nnx.factorize(model, rank)  # lowrank_optax
    tx = optax.MultiSteps(lro.lowrank_adam(3e-2), every_k_schedule=every)  # lowrank_optax
    optimizer = lro.nnx.Optimizer(model, tx, wrt=nnx.Param)  # lowrank_optax
    return model, optimizer, nnx.metrics.Average("loss")


def step(state: tuple[Llama, Any, nnx.Metric], batch: jax.Array) -> tuple[Any, jax.Array]:
    return state, train_step(*state, batch)


def forward(state: tuple[Llama, Any, nnx.Metric], batch: jax.Array) -> jax.Array:
    return state[0](batch)


def params(state: tuple[Llama, Any, nnx.Metric]) -> Any:
    return nnx.state(state[0], nnx.Param)


def reasons() -> dict[str, str]:
    return lro.nnx.kernels(Llama(rngs=nnx.Rngs(0)), RANK).reasons


BATCH = np.random.default_rng(0).integers(1, VOCAB, (4, 8)).astype(np.int32)
RANK = 4
KERNELS = [f"self_attn/{k}_proj" for k in "qkvo"] + [f"mlp/{k}_proj" for k in ("gate", "up", "down")]
FACTORED = {"lm_head/kernel"} | {f"layers/0/{name}/kernel" for name in KERNELS}
DENSE = {"embed_tokens/embedding": "Embed is no Linear"}
