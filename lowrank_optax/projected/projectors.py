"""Projectors: how the subspace of one matrix is chosen, stored and used.

Every function here sees one matrix A of shape (p, q), whose p rows are projected, in float32 or better. A basis P has
shape (p, r). `down` gives the coordinates :math:`P^\\top A`, of shape (r, q), and `up` goes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg


class Refreshing(NamedTuple):
    """The numbers that a projector may look at when it makes a new basis.

    Attributes:
      gradient: A, `(p, q)`, the gradient with the error that a residual has fed back.
      momentum: `(r, q)`, the first moment of the inner transformation in the old basis; zeros if it has none.
      key: random key of this matrix and step.
      count: number of steps before this one, int32.
      first: whether some matrix of the stack has no basis yet. One boolean for all of them, so that `jax.lax.cond`
        stays a branch in a batch.
    """

    gradient: jax.Array
    momentum: jax.Array
    key: jax.Array
    count: jax.Array
    first: jax.Array


def _zeros(key: jax.Array, shape: tuple[int, int], rank: int, dtype: Any) -> jax.Array:
    return jnp.zeros((shape[0], rank), dtype)


def _stored(stored: Any, gradient: jax.Array, rank: int) -> Any:
    return stored


def _down(basis: Any, x: jax.Array) -> jax.Array:
    return jnp.matmul(basis.T, x)


def _up(basis: Any, x: jax.Array, rows: int) -> jax.Array:
    return jnp.matmul(basis, x)


def _overlap(old: Any, new: Any) -> jax.Array:
    return jnp.matmul(new.T, old)


def _unmoved(stored: Any, basis: Any, gradient: jax.Array, projected: jax.Array, count: jax.Array) -> Any:
    return stored


class Projector(NamedTuple):
    """Functions of one matrix. All but `refresh` have defaults, for a stored basis with orthonormal columns.

    Attributes:
      refresh: `refresh(stored, at)` returns a new basis as it is stored; `at` is a `Refreshing`.
      init: `init(key, (p, q), rank, dtype)` returns the stored form before the first step. Default: zeros (p, r).
      basis: `basis(stored, gradient, rank)` returns the basis in use, an argument of `down` and `up`. Default: as
        stored.
      down: `down(basis, x)` returns coordinates `(r, q)`.
      up: `up(basis, x, p)` returns `(p, q)`.
      overlap: `overlap(old, new)` returns C `(r, r)`, with which `rotate` carries moments.
      after: `after(stored, basis, gradient, projected, count)` returns the stored form for the next step, for bases
        that move after they have been used.
      coordinates: whether bases are sets of rows, which may be more than there are columns.
      momentum: whether `refresh` looks at the first moment.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> first_rows = lro.projectors.Projector(lambda stored, at: jnp.eye(*stored.shape))
      >>> tx = lro.subspace(optax.scale_by_adam(), first_rows, rank=2)
      >>> updates, state = tx.update(jnp.ones((4, 6)), tx.init(jnp.ones((4, 6))))
      >>> updates[:, 0].round(3).tolist()
      [1.0, 1.0, 0.0, 0.0]
    """

    refresh: Callable[..., Any]
    init: Callable[..., Any] = _zeros
    basis: Callable[..., Any] = _stored
    down: Callable[..., jax.Array] = _down
    up: Callable[..., jax.Array] = _up
    overlap: Callable[..., jax.Array] = _overlap
    after: Callable[..., Any] = _unmoved
    coordinates: bool = False
    momentum: bool = False


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
    return jnp.where(jnp.sum(old * new, axis=0) < 0, -new, new)


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


def key_of(data: jax.Array) -> jax.Array:
    """The random key of stored key data."""
    return jax.random.wrap_key_data(data, impl="threefry2x32")


# --- fixed dictionaries and coordinates -------------------------------------------------


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
        lambda old, new: _same(old.indices, new.indices, new.matrix.dtype),
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
        overlap=lambda old, new: _same(old, new, jnp.float32),
        coordinates=True,
    )


def _indices(key: jax.Array, shape: tuple[int, int], rank: int, dtype: Any) -> jax.Array:
    return jnp.arange(rank, dtype=jnp.int32)


def _same(old: jax.Array, new: jax.Array, dtype: Any) -> jax.Array:
    return (new[:, None] == old[None, :]).astype(dtype)


# --- both sides ---------------------------------------------------------------------------


def both_sides(projector: Projector) -> Projector:
    r"""One basis for rows and one for columns: the coordinates :math:`P^\top A Q` are (r, r)."""

    def refresh(stored: tuple[Any, Any], at: Refreshing) -> tuple[Any, Any]:
        keys = jax.random.split(at.key)
        each = (at.gradient, at.gradient.T)
        return tuple(  # type: ignore[return-value]
            projector.refresh(x, at._replace(gradient=a, key=key))
            for x, a, key in zip(stored, each, keys, strict=True)
        )

    def init(key: jax.Array, shape: tuple[int, int], rank: int, dtype: Any) -> tuple[Any, Any]:
        left, right = jax.random.split(key)
        return projector.init(left, shape, rank, dtype), projector.init(right, shape[::-1], rank, dtype)

    def basis(stored: tuple[Any, Any], gradient: jax.Array, rank: int) -> tuple[Any, Any]:
        left, right = stored
        return projector.basis(left, gradient, rank), projector.basis(right, gradient.T, rank)

    def down(basis: tuple[Any, Any], x: jax.Array) -> jax.Array:
        return projector.down(basis[1], projector.down(basis[0], x).T).T

    def up(basis: tuple[Any, Any], x: jax.Array, rows: int) -> jax.Array:
        return projector.up(basis[0], projector.up(basis[1], x.T, basis[1].shape[0]).T, rows)

    return Projector(refresh, init, basis, down, up, lambda old, new: projector.overlap(old[0], new[0]))
