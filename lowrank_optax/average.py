"""Moving averages of factored parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.boxes import unwrapped
from lowrank_optax.layout import map_kernel
from lowrank_optax.lowrank import LowRank, is_lowrank


def incremental_update(new: Any, old: Any, step_size: float | jax.Array) -> Any:
    r"""`optax.incremental_update` for factored parameters: a moving average that stays on the manifold.

    .. math:: W \leftarrow R\big(t\,W_{\mathrm{new}} + (1 - t)\,W_{\mathrm{old}}\big)

    with R the truncation to the larger of both ranks. `optax.ema`, lookahead and schedule-free average U, S and V leaf
    by leaf, which leaves the manifold, because equal kernels may have different bases.

    Args:
      new: parameters after a step.
      old: the average so far, of the same structure.
      step_size: weight t of `new`.

    Returns:
      The new average, in the dtypes of the old one: keep it in float32 beside bfloat16 parameters, whose rounding is
      larger than a small step. Its factors are as wide as the wider of both.

    Raises:
      NotImplementedError: for derivatives.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> a, b = (lro.factorize({"kernel": c * jnp.eye(4)}, 4) for c in (1.0, 3.0))
      >>> bool(jnp.allclose(lro.incremental_update(a, b, 0.5)["kernel"].to_dense(), 2 * jnp.eye(4), atol=1e-5))
      True
    """

    def one(a: Any, b: Any) -> Any:
        if is_lowrank(a):
            t = jnp.broadcast_to(jnp.asarray(step_size), b.stack_shape)
            return map_kernel(_mean, b, a, t, width=max(a.width, b.width))
        return jnp.asarray(optax.incremental_update(a, b, step_size), jnp.result_type(b))

    (new, _), (old, rebox) = map(unwrapped, (new, old))
    return rebox(jax.tree.map(one, new, old, is_leaf=is_lowrank))


def _mean(old: LowRank, new: LowRank, t: jax.Array, width: int) -> LowRank:
    u, ru = linalg.orthonormalize(jnp.concatenate([old.U, new.U], axis=1))
    v, rv = linalg.orthonormalize(jnp.concatenate([old.V, new.V], axis=1))
    r = old.width
    s = (1 - t) * (ru[:, :r] @ old.S @ rv[:, :r].T) + t * (ru[:, r:] @ new.S @ rv[:, r:].T)
    p, sigma, q = linalg.svd(s.astype(u.dtype), toward=ru[:, :r])
    rank = jnp.maximum(mf.rank(old.S), mf.rank(new.S))
    sigma = jnp.where(linalg.rank_mask(rank, width), sigma[:width], 0.0)
    return LowRank(u @ p[:, :width], linalg.diagonal(sigma), v @ q[:, :width])
