"""Kernels kept in other forms than U S V^T: a plain pair of factors, and a change of a frozen kernel."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro


@flax.struct.dataclass
class Pair:
    """W = A B, with A (inputs..., r) and B (r, outputs...): low rank without geometry."""

    A: jax.Array
    B: jax.Array


def is_factored(x: Any) -> bool:
    """Whether `x` stands for one kernel and is no plain array."""
    return lro.is_lowrank(x) or isinstance(x, Pair | lro.adapters.Adapted | lro.adapters.Change)


def balanced(W: lro.LowRank) -> Pair:
    """A and B of a kernel from an SVD, its singular values shared evenly."""
    root = jnp.sqrt(jnp.diagonal(W.S))
    return Pair(W.U * root, jnp.moveaxis(W.V * root, -1, 0))


def zero_pair(key: jax.Array, W: lro.LowRank) -> Pair:
    """LoRA's start: A random with unit gain, B = 0."""
    fan_in = W.U.size // W.width
    A = jax.random.normal(key, W.U.shape, W.dtype) / jnp.sqrt(fan_in)
    return Pair(A, jnp.zeros((W.width, *W.out_shape), W.dtype))


def zero_change(key: jax.Array, W: lro.LowRank) -> lro.adapters.LoRA:
    """That pair as a change of a frozen kernel."""
    pair = zero_pair(key, W)
    return lro.adapters.LoRA(pair.A, pair.B, jnp.ones(W.batch_shape, W.dtype))


def zero_lowrank(key: jax.Array, W: lro.LowRank) -> lro.LowRank:
    """S = 0 between random orthonormal bases: the first gradient of S is not zero, so the first step counts."""
    split = lro.Axes(len(W.batch_shape), len(W.in_shape))
    W = lro.lowrank_init(W.width, axes=split)(key, W.shape, W.dtype)
    return lro.LowRank(W.U, jnp.zeros_like(W.S), W.V)


def width(x: Any) -> int | None:
    """The number of columns of a pair of factors or of a change; None where there are none."""
    if isinstance(x, lro.adapters.Magnitude):
        return width(x.change)
    return x.A.shape[-1] if isinstance(x, Pair | lro.adapters.LoRA) else None


def singular_values(x: Any) -> np.ndarray | None:
    """Those of a kernel or of a change that is a pair: `(kernels, count)`, NaN if it is not finite. None of others."""
    if isinstance(x, lro.adapters.LoRA):
        return singular_values(Pair(x.A, x.scale[..., None, None] * x.B))
    if isinstance(x, lro.adapters.Change):
        return None
    if lro.is_lowrank(x):
        small = np.asarray(x.S, np.float32).reshape(-1, x.width, x.width)
    elif isinstance(x, Pair):
        rank = x.A.shape[-1]
        factors = x.A.reshape(-1, rank), x.B.reshape(rank, -1).T
        left, right = (np.linalg.qr(np.asarray(y, np.float32), "r") for y in factors)
        small = left @ right.T
    else:
        small = np.asarray(x.reshape(-1, x.shape[-1]), np.float32)
    if not np.isfinite(small).all():
        return np.full((1, min(small.shape[-2:])), np.nan)
    return np.atleast_2d(np.linalg.svd(small, compute_uv=False))


def apply(model: nn.Module) -> Callable[..., Any]:
    """`lro.linen.apply` in which a layer may hold a Pair, or an adapted kernel whose change is a `LowRank`."""
    factored = lro.linen.apply(model)

    def applied(variables: Any, *args: Any, **kwargs: Any) -> Any:
        params = jax.tree.map(_as_lowrank, variables["params"], is_leaf=is_factored)
        return factored({**variables, "params": params}, *args, **kwargs)

    return applied


def _as_lowrank(x: Any) -> Any:
    if isinstance(x, lro.adapters.Adapted):
        return lro.adapters.Adapted(x.base, lro.adapters.LowRankChange(x.change)) if lro.is_lowrank(x.change) else x
    if not isinstance(x, Pair):
        return x
    return lro.LowRank(x.A, jnp.eye(x.A.shape[-1], dtype=x.A.dtype), jnp.moveaxis(x.B, 0, -1))
