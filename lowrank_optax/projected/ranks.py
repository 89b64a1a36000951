"""How many columns of a basis are in use, by the energy of the gradient that they hold."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

RankRule = Callable[[jax.Array, jax.Array], jax.Array]


def energy(lost: float | jax.Array = 0.04, min_rank: int = 1) -> RankRule:
    r"""The smallest rank whose subspace loses at most a share of the energy of the gradient.

    .. math:: k = \min \{ k : |A|_F^2 - \sum_{j \le k} |p_j^\top A|^2 \le \text{lost} \cdot |A|_F^2 \}

    Columns of the basis are taken in their order, by singular values with `svd` and `randomized`.

    Args:
      lost: share of the squared norm, in (0, 1).
      min_rank: least rank.

    Returns:
      A function of R `(r, q)` and A `(p, q)` that returns the rank, int32.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> A = jnp.diag(jnp.array([3.0, 1.0, 0.1]))
      >>> int(lro.projected.energy(0.2)(A, A)), int(lro.projected.energy(0.01)(A, A))
      (1, 2)

    References:
      Refael, Svirsky, Shustin, Huleihel, Lindenbaum, AdaRankGrad,
      `arXiv:2410.17881 <https://arxiv.org/abs/2410.17881>`_, 2024, definition of the approximated rank.
    """

    def rule(projected: jax.Array, gradient: jax.Array) -> jax.Array:
        # Relative to the largest entry, so that squares neither overflow nor vanish.
        top = jnp.max(jnp.abs(gradient))
        held, whole = (jnp.square(x / jnp.where(top > 0, top, 1)) for x in (projected, gradient))
        left = jnp.sum(whole) - jnp.cumsum(jnp.sum(held, axis=1))
        rank = 1 + jnp.sum(left > lost * jnp.sum(whole), dtype=jnp.int32)
        return jnp.clip(rank, min(min_rank, projected.shape[0]), projected.shape[0]).astype(jnp.int32)

    return rule
