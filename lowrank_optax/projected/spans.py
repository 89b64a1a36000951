"""Projectors on singular vectors and on random subspaces."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.projected.base import Projector, Refreshing, key_of

# --- singular vectors -------------------------------------------------------------------


def svd(*, largest: int = 2048) -> Projector:
    """The leading left singular vectors of the gradient, with signs that follow the old basis.

    The sign of a singular vector is a choice of LAPACK. Moments that are kept at a refresh would depend on it, so that
    each new vector points along the old one of the same place.

    Args:
      largest: matrices whose shorter side is longer than this get `randomized()`, which takes less time and memory.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.subspace(optax.scale_by_adam(), lro.projectors.svd(), rank=2)
      >>> state = tx.init({"kernel": jnp.ones((4, 6))})

    References:
      Zhao et al., GaLore, `arXiv:2403.03507 <https://arxiv.org/abs/2403.03507>`_, 2024, equation 10.
    """
    sketch = randomized()

    def refresh(stored: jax.Array, at: Refreshing) -> jax.Array:
        if min(at.gradient.shape) > largest:
            return sketch.refresh(stored, at)
        return toward(stored, leading(at.gradient, stored.shape[1]))

    return Projector(refresh)


def randomized(power: int = 1, oversample: int = 8) -> Projector:
    """Leading left singular vectors from a randomized range finder, with signs that follow the old basis.

    Args:
      power: power iterations; each multiplies by A twice and sharpens the spectrum.
      oversample: columns of the sketch beyond the rank.

    References:
      Halko, Martinsson, Tropp, `arXiv:0909.4061 <https://arxiv.org/abs/0909.4061>`_, 2011, algorithm 4.4.
    """

    def refresh(stored: jax.Array, at: Refreshing) -> jax.Array:
        a, r = at.gradient, stored.shape[1]
        width = min(r + oversample, *a.shape)
        q, _ = linalg.orthonormalize(a @ jax.random.normal(at.key, (a.shape[1], width), a.dtype))
        for _ in range(power):
            z, _ = linalg.orthonormalize(a.T @ q)
            q, _ = linalg.orthonormalize(a @ z)
        return toward(stored, q @ leading(q.T @ a, r))

    return Projector(refresh)


def leading(a: jax.Array, rank: int) -> jax.Array:
    """The first `rank` left singular vectors."""
    return linalg.svd(a)[0][:, :rank]


def toward(old: jax.Array, new: jax.Array) -> jax.Array:
    """The new basis with each column turned to the side of the old one."""
    return jnp.where(jnp.sum(old * new, axis=0, keepdims=True) < 0, -new, new)


def switch(first: Projector, second: Projector, at: int | jax.Array) -> Projector:
    """Refreshes by `first` before step `at` and by `second` from then on; both store a matrix.

    References:
      He et al., GoLore, `arXiv:2410.11289 <https://arxiv.org/abs/2410.11289>`_, 2024.
    """

    def refresh(stored: jax.Array, now: Refreshing) -> jax.Array:
        return jax.lax.cond(now.count < at, lambda: first.refresh(stored, now), lambda: second.refresh(stored, now))

    return Projector(refresh)


# --- random subspaces -------------------------------------------------------------------


def gaussian() -> Projector:
    r"""A random matrix with entries N(0, 1/r), drawn again from its key whenever it is used; only the key is stored.

    :math:`E\,[P P^\top] = I`, but P has no orthonormal columns: `up(down(.))` is unbiased and no projection.

    References:
      Hao, Cao, Mou, Flora, `arXiv:2402.03293 <https://arxiv.org/abs/2402.03293>`_, 2024, section 2.3.
    """

    def draw(stored: jax.Array, gradient: jax.Array, rank: int) -> jax.Array:
        shape = gradient.shape[0], rank
        return jax.random.normal(key_of(stored), shape, gradient.dtype) / jnp.sqrt(jnp.asarray(rank, gradient.dtype))

    return Projector(_new_key, _key_data, draw)


def orthogonal() -> Projector:
    """A random basis with orthonormal columns, uniform over all subspaces.

    References:
      Zmushko et al., FRUGAL, `arXiv:2411.07837 <https://arxiv.org/abs/2411.07837>`_, 2024, section 3.
    """

    def refresh(stored: jax.Array, at: Refreshing) -> jax.Array:
        return linalg.orthonormalize(jax.random.normal(at.key, stored.shape, stored.dtype))[0]

    return Projector(refresh)


def _key_data(key: jax.Array, shape: tuple[int, int], rank: int, dtype: Any) -> jax.Array:
    return jax.random.key_data(key)


def _new_key(stored: jax.Array, at: Refreshing) -> jax.Array:
    return jax.random.key_data(at.key)
