"""Projectors on rows of a fixed dictionary: cosines, rows of the matrix, blocks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.projected.base import Projector, Refreshing


def dct(kind: int = 2, norm: int = 1) -> Projector:
    """The rows of the discrete cosine transform that the gradient projects on most; only their indices are stored.

    Args:
      kind: 2 or 3, the type of the transform. The fast path of the authors' code has kind 2, its products kind 3.
      norm: 1 or 2, the norm of a row of coordinates by which it is chosen.

    References:
      Modoranu et al., `arXiv:2505.17967 <https://arxiv.org/abs/2505.17967>`_, 2025, section 3.
    """
    if kind not in (2, 3):
        raise ValueError(f"the discrete cosine transform has kind 2 or 3, got {kind}")

    def refresh(stored: jax.Array, at: Refreshing) -> jax.Array:
        # Kind 3 is the transpose of kind 2.
        transform = jax.scipy.fft.dct if kind == 2 else jax.scipy.fft.idct
        scores = jnp.sum(jnp.abs(transform(at.gradient, axis=0, norm="ortho")) ** norm, axis=1)
        return jnp.sort(jax.lax.top_k(scores, stored.shape[0])[1]).astype(stored.dtype)

    def basis(stored: jax.Array, gradient: jax.Array, rank: int) -> Dictionary:
        p = gradient.shape[0]
        place = jnp.arange(p)
        frequency, at = (stored[None], place[:, None]) if kind == 2 else (place[:, None], stored[None])
        # The product is an integer: taken modulo the period before it is rounded to a floating angle.
        angle = jnp.pi / (2 * p) * ((frequency * (2 * at + 1)) % (4 * p)).astype(gradient.dtype)
        size = jnp.where(frequency == 0, 1 / p, 2 / p).astype(gradient.dtype)
        return Dictionary(stored, jnp.sqrt(size) * jnp.cos(angle))

    return Projector(
        refresh,
        _indices,
        basis,
        lambda basis, x: basis.matrix.T @ x,
        lambda basis, x, rows: basis.matrix @ x,
        overlap=lambda old, new: _same(old.indices, new.indices, new.matrix.dtype),
    )


class Dictionary(NamedTuple):
    """Columns of a fixed orthogonal matrix. The overlap of two choices is exactly 0 or 1."""

    indices: jax.Array
    matrix: jax.Array


def rows() -> Projector:
    """Random rows of the matrix; only their indices are stored.

    References:
      Zmushko et al., FRUGAL, `arXiv:2411.07837 <https://arxiv.org/abs/2411.07837>`_, 2024, section 3.
    """

    def refresh(stored: jax.Array, at: Refreshing) -> jax.Array:
        chosen = jax.random.permutation(at.key, at.gradient.shape[0])[: stored.shape[0]]
        return jnp.sort(chosen).astype(stored.dtype)

    return coordinates(refresh)


def blocks(order: str = "random") -> Projector:
    """One block of `rank` adjoining rows at a time; the blocks take turns.

    Args:
      order: "ascending" or "descending", or "random": another order in each round.

    References:
      Luo, Yu, Li, BAdam, `arXiv:2404.02827 <https://arxiv.org/abs/2404.02827>`_, 2024; FRUGAL, section 3.
    """
    if order not in ("ascending", "descending", "random"):
        raise ValueError(f"the order of blocks is 'ascending', 'descending' or 'random', got {order!r}")

    def refresh(stored: jax.Array, at: Refreshing) -> jax.Array:
        r = stored.shape[0] - 2
        number = -(-at.gradient.shape[0] // r)
        turn, seed = stored[r], stored[r + 1]
        place = turn % number
        if order == "descending":
            place = number - 1 - place
        if order == "random":
            seed = jnp.where(place == 0, jax.random.bits(at.key).astype(jnp.int32), seed)
            place = jax.random.permutation(jax.random.key(seed, impl="threefry2x32"), number)[place]
        start = jnp.minimum(place.astype(jnp.int32) * r, at.gradient.shape[0] - r)  # the last block may overlap
        return jnp.concatenate([start + jnp.arange(r, dtype=jnp.int32), jnp.stack([turn + 1, seed])])

    def init(key: jax.Array, shape: tuple[int, int], rank: int, dtype: Any) -> jax.Array:
        return jnp.zeros(rank + 2, jnp.int32)

    return coordinates(refresh)._replace(init=init, basis=lambda stored, gradient, rank: stored[:rank])


def coordinates(refresh: Callable[..., Any]) -> Projector:
    """The projector of the rows whose indices `refresh` returns, int32, `(r,)`."""
    return Projector(
        refresh,
        _indices,
        down=lambda basis, x: x[basis],
        up=lambda basis, x, rows: jnp.zeros((rows, x.shape[1]), x.dtype).at[basis].set(x),
        outside=lambda basis, x, inside: x.at[basis].set(0),  # exactly, so that signs are 0 there
        overlap=lambda old, new: _same(old, new, jnp.float32),
        coordinates=True,
    )


def _indices(key: jax.Array, shape: tuple[int, int], rank: int, dtype: Any) -> jax.Array:
    return jnp.arange(rank, dtype=jnp.int32)


def _same(old: jax.Array, new: jax.Array, dtype: Any) -> jax.Array:
    return (new[:, None] == old[None, :]).astype(dtype)
