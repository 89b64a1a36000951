"""A decoder in the style of nanodo: layers from partial functions, a closure for the step, MultiSteps."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro


@dataclasses.dataclass(frozen=True)
class DoConfig:
    D: int = 26  # model dimension
    H: int = 2  # heads
    L: int = 8  # length of a sequence
    N: int = 1  # blocks
    V: int = 57  # vocabulary
    F: int = 51  # hidden dimension of the MLP
    K: int = 11  # dimension of a head


class Mlp(nn.Module):
    cfg: DoConfig

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        linear = functools.partial(nn.Dense, kernel_init=nn.initializers.lecun_normal(), use_bias=False)
        x_BxLxF = nn.gelu(linear(self.cfg.F)(x_BxLxD))
        return linear(x_BxLxD.shape[-1])(x_BxLxF)


class CausalAttn(nn.Module):
    cfg: DoConfig

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        cfg = self.cfg
        multilinear = functools.partial(nn.DenseGeneral, axis=-1, features=(cfg.H, cfg.K), use_bias=False)
        q_BxLxHxK, k_BxLxHxK, v_BxLxHxK = (multilinear(name=name)(x_BxLxD) for name in ("query", "key", "value"))
        att_BxHxLxL = jnp.einsum("blhk,bmhk->bhlm", q_BxLxHxK / cfg.K**0.5, k_BxLxHxK)
        causal = jnp.tril(jnp.ones((1, 1, cfg.L, cfg.L), bool))
        att_BxHxLxL = nn.softmax(jnp.where(causal, att_BxHxLxL, -1e9))
        out_BxLxHxK = jnp.einsum("bhlm,bmhk->blhk", att_BxHxLxL, v_BxLxHxK)
        out = nn.Einsum((cfg.H, cfg.K, cfg.D), "blhk,hkd->bld", use_bias=False, name="attn_out_proj")
        return out(out_BxLxHxK)


class TBlock(nn.Module):
    cfg: DoConfig

    @nn.compact
    def __call__(self, in_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD = in_BxLxD + CausalAttn(self.cfg)(nn.LayerNorm(use_bias=False)(in_BxLxD))
        return x_BxLxD + Mlp(self.cfg)(nn.LayerNorm(use_bias=False)(x_BxLxD))


class TransformerDo(nn.Module):
    cfg: DoConfig

    def setup(self) -> None:
        self.embed = nn.Embed(self.cfg.V, self.cfg.D, embedding_init=nn.initializers.normal(0.1))
        self.pos_embed = nn.Embed(self.cfg.L, self.cfg.D, embedding_init=nn.initializers.normal(0.1))
        self.blocks = [TBlock(self.cfg) for _ in range(self.cfg.N)]
        self.out_ln = nn.LayerNorm(use_bias=False)

    def __call__(self, y_BxL: jax.Array) -> jax.Array:
        y_BxLxD = self.embed(y_BxL) + self.pos_embed(jnp.arange(y_BxL.shape[1]))[None]
        for block in self.blocks:
            y_BxLxD = block(y_BxLxD)
        return self.embed.attend(self.out_ln(y_BxLxD))


model = TransformerDo(DoConfig())
apply = lro.linen.apply(model)  # lowrank_optax


def get_in_out(batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.pad(batch[:, :-1], ((0, 0), (1, 0))), batch


def get_train_step(tx: Any) -> Any:
    """The step, closed over the model and the optimizer; each sequence for itself under `vmap`."""

    def loss_of_one(params: Any, x_L: jax.Array, y_L: jax.Array) -> jax.Array:
        logits_LxV = apply({"params": params}, x_L[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits_LxV, y_L).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: tuple[Any, Any], batch: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, opt_state = state
        x, y = get_in_out(batch)
        loss, grads = jax.value_and_grad(lambda p: jax.vmap(loss_of_one, (None, 0, 0))(p, x, y).mean())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step


single = lro.lowrank_adamw(3e-2, b2=0.98, weight_decay=1e-4)  # lowrank_optax
tx = optax.MultiSteps(single, every_k_schedule=2)
step = get_train_step(tx)


def start(rank: float | None, tx: Any = tx) -> tuple[Any, Any]:
    params = jax.jit(model.init)(jax.random.key(0), BATCH)["params"]
    if rank is not None:
        params = lro.factorize(params, rank, where=lro.linen.kernels(model, BATCH))  # lowrank_optax
    return params, tx.init(params)


@jax.jit
def forward(state: tuple[Any, Any], batch: jax.Array) -> jax.Array:
    return apply({"params": state[0]}, get_in_out(batch)[0])


def params(state: tuple[Any, Any]) -> Any:
    return state[0]


def reasons() -> dict[str, str]:
    return lro.linen.kernels(model, BATCH).reasons


BATCH = np.random.default_rng(0).integers(1, 57, (4, 8)).astype(np.int32)
RANK = 4
KERNELS = [f"CausalAttn_0/{name}/kernel" for name in ("query", "key", "value", "attn_out_proj")]
FACTORED = {f"blocks_0/{name}" for name in (*KERNELS, "Mlp_0/Dense_0/kernel", "Mlp_0/Dense_1/kernel")}
DENSE = {f"{name}/embedding": "nothing is registered for its layer, Embed" for name in ("embed", "pos_embed")}
