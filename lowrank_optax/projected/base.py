"""The protocol of projectors: how the subspace of one matrix is chosen, stored and used.

Every function here sees one matrix A of shape (p, q), whose p rows are projected, in float32 or better. A basis P has
shape (p, r). `down` gives the coordinates :math:`P^\\top A`, of shape (r, q), and `up` goes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Refreshing(NamedTuple):
    """The numbers that a projector may look at when it makes a new basis.

    Attributes:
      gradient: A, `(p, q)`, the gradient with the error that a residual has fed back.
      momentum: `(r, q)`, the first moment of the inner transformation in the old basis; zeros if it has none.
      key: random key of this matrix and step.
      count: number of steps before this one, int32.
      inputs: the axis of A along which the inputs of the kernel lie, 0 or 1.
      first: whether some matrix of the stack has no basis yet. One boolean for all of them, so that `jax.lax.cond`
        stays a branch in a batch.
    """

    gradient: jax.Array
    momentum: jax.Array
    key: jax.Array
    count: jax.Array  # type: ignore[assignment]
    first: jax.Array
    inputs: int = 0


def _zeros(key: jax.Array, shape: tuple[int, int], rank: int, dtype: Any) -> jax.Array:
    return jnp.zeros((shape[0], rank), dtype)


def _stored(stored: Any, gradient: jax.Array, rank: int) -> Any:
    return stored


def _down(basis: Any, x: jax.Array) -> jax.Array:
    return jnp.matmul(basis.T, x)


def _up(basis: Any, x: jax.Array, rows: int) -> jax.Array:
    return jnp.matmul(basis, x)


def _outside(basis: Any, x: jax.Array, inside: jax.Array) -> jax.Array:
    return x - inside


def _overlap(old: Any, new: Any) -> jax.Array:
    return jnp.matmul(new.T, old)


def unmoved(stored: Any, basis: Any, gradient: jax.Array, projected: jax.Array, count: jax.Array) -> Any:
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
      outside: `outside(basis, x, inside)` returns the rest of x, given the part that goes down and up.
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
    outside: Callable[..., jax.Array] = _outside
    overlap: Callable[..., jax.Array] = _overlap
    after: Callable[..., Any] = unmoved
    coordinates: bool = False
    momentum: bool = False


def both_sides(projector: Projector) -> Projector:
    r"""One basis for rows and one for columns: the coordinates :math:`P^\top A Q` are (r, r)."""

    def refresh(stored: tuple[Any, Any], at: Refreshing) -> tuple[Any, Any]:
        keys = jax.random.split(at.key)
        each = (at.gradient, at.gradient.T)
        return tuple(
            projector.refresh(x, at._replace(gradient=a, key=key)) for x, a, key in zip(stored, each, keys, strict=True)
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

    return Projector(refresh, init, basis, down, up, overlap=lambda old, new: projector.overlap(old[0], new[0]))


def key_of(data: jax.Array) -> jax.Array:
    """The random key of stored key data."""
    return jax.random.wrap_key_data(data, impl="threefry2x32")
