"""A ViT in the style of big_vision: its own `update_fn`, masks by regular expression, averaged parameters."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro


class MlpBlock(nn.Module):
    mlp_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inits = dict(kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.normal(1e-6))
        d = x.shape[-1]
        return nn.Dense(d, **inits)(nn.gelu(nn.Dense(self.mlp_dim, **inits)(x)))


class Encoder1DBlock(nn.Module):
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.num_heads, deterministic=True)(y, y)
        return x + MlpBlock(self.mlp_dim)(nn.LayerNorm()(x))


class MAPHead(nn.Module):
    """Multi-head attention pooling."""

    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, _, d = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d))
        x = nn.MultiHeadDotProductAttention(num_heads=self.num_heads)(jnp.tile(probe, (n, 1, 1)), x)
        return (x + MlpBlock(self.mlp_dim)(nn.LayerNorm()(x)))[:, 0]


class Model(nn.Module):
    num_classes: int = 3
    width: int = 26
    depth: int = 1
    mlp_dim: int = 51
    num_heads: int = 2

    @nn.compact
    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        out = {}
        x = nn.Conv(self.width, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(image)
        n, h, w, c = x.shape
        x = jnp.reshape(x, (n, h * w, c))
        x = x + self.param("pos_embedding", nn.initializers.normal(1 / c**0.5), (1, h * w, c))
        for lyr in range(self.depth):
            x = Encoder1DBlock(self.mlp_dim, self.num_heads, name=f"encoderblock_{lyr}")(x)
        x = out["pre_logits"] = MAPHead(self.mlp_dim, self.num_heads)(nn.LayerNorm()(x))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(x), out


decay_mask = lro.linen.path_mask(r".*/kernel$")  # lowrank_optax


def make_optimizer(total_steps: int = 20) -> Any:
    schedule = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 2, total_steps, 1e-3)
    rule = optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.scale_by_adam(b2=0.99, mu_dtype=jnp.float32),
        optax.add_decayed_weights(1e-2, decay_mask),
        optax.masked(optax.scale(0.5), lro.linen.path_mask(r"^head/.*")),  # lowrank_optax
        optax.scale_by_learning_rate(schedule),
    )
    return lro.fixed_rank(rule)  # lowrank_optax


model, tx = Model(), make_optimizer()


@functools.partial(jax.jit, donate_argnums=0)
@lro.linen.factored()  # lowrank_optax
def update_fn(train_state: Any, batch: Any) -> tuple[Any, Any]:
    images, labels = batch["image"], batch["labels"]

    def loss_fn(params: Any) -> jax.Array:
        logits, _ = model.apply({"params": params}, images)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels).sum(axis=-1))

    params, opt = train_state["params"], train_state["opt"]
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt = tx.update(grads, opt, params)
    params = optax.apply_updates(params, updates)
    ema = lro.incremental_update(params, train_state["ema"], 0.1)  # lowrank_optax
    measurements = {"training_loss": loss, "l2_grads": optax.tree.norm(grads)}
    return {"params": params, "opt": opt, "ema": ema}, measurements


def start(rank: float | None) -> dict[str, Any]:
    params = jax.jit(model.init)(jax.random.key(0), BATCH["image"])["params"]
    if rank is not None:
        params = lro.factorize(params, rank, where=lro.linen.kernels(model, BATCH["image"]))  # lowrank_optax
    return {"params": params, "opt": tx.init(params), "ema": jax.tree.map(jnp.copy, params)}


def step(train_state: Any, batch: Any) -> tuple[Any, jax.Array]:
    train_state, measurements = update_fn(train_state, batch)
    return train_state, measurements["training_loss"]


@jax.jit
@lro.linen.factored()  # lowrank_optax
def forward(train_state: Any, batch: Any) -> jax.Array:
    """Before the head, which starts at zero."""
    return model.apply({"params": train_state["params"]}, batch["image"])[1]["pre_logits"]


def params(train_state: Any) -> Any:
    return train_state["params"]


def reasons() -> dict[str, str]:
    return lro.linen.kernels(model, BATCH["image"]).reasons


rng = np.random.default_rng(0)
BATCH = {
    "image": rng.standard_normal((8, 12, 12, 3)).astype(np.float32),
    "labels": np.eye(3, dtype=np.float32)[rng.integers(0, 3, 8)],
}
RANK = 4
ATTENTION = [f"MultiHeadDotProductAttention_0/{name}/kernel" for name in ("query", "key", "value", "out")]
FACTORED = {"embedding/kernel"} | {
    f"{block}/{name}"
    for block in ("encoderblock_0", "MAPHead_0")
    for name in (*ATTENTION, "MlpBlock_0/Dense_0/kernel", "MlpBlock_0/Dense_1/kernel")
}
HEADS = [f"{block}/MultiHeadDotProductAttention_0" for block in ("encoderblock_0", "MAPHead_0")]
DENSE = {
    "pos_embedding": "nothing is registered for its layer, Model",
    "MAPHead_0/probe": "nothing is registered for its layer, MAPHead",
    "head/kernel": "min(m, n) = 3",
    **{f"{m}/{name}/bias": "it is no kernel of its layer" for m in HEADS for name in ("query", "key", "value")},
}
