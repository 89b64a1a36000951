"""The two halves of a step of one kernel, before and after the inner transformation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.layout.fusion import fusion_barrier
from lowrank_optax.projected.base import Refreshing, key_of
from lowrank_optax.projected.carry import Change
from lowrank_optax.projected.leaves import Leaf
from lowrank_optax.projected.method import Method
from lowrank_optax.projected.residuals import Projection


class Prepared(NamedTuple):
    """The numbers of one kernel between the two halves of a step; all have its batch axes in front."""

    gradient: jax.Array
    projected: jax.Array
    basis: Any
    stored: Any
    rank: jax.Array
    clock: Any
    moments: tuple[jax.Array, ...]
    dropped: Any


def over(leaf: Leaf, f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` of one matrix, mapped over the batch axes of a kernel."""
    for _ in leaf.batch:
        f = jax.vmap(f)
    return f


def keys_of(data: jax.Array, leaf: Leaf) -> jax.Array:
    """Key data for every matrix of a kernel."""
    return jax.random.key_data(jax.random.split(key_of(data), leaf.batch)) if leaf.batch else data


def _norm(x: jax.Array) -> jax.Array:
    return linalg.norm(x.reshape(1, -1))


class Halves:
    """The halves of a step with one method, compiled once for all kernels of equal shape."""

    def __init__(self, method: Method):
        self.method = method
        # Equal bound methods are equal keys of the cache.
        self.prepare_compiled = jax.jit(self.prepare, static_argnums=(0, 1))
        self.project_compiled = jax.jit(self.project, static_argnums=0)
        self.finish_compiled = jax.jit(self.finish, static_argnums=(0, 1))

    @linalg.highest_precision
    def prepare(
        self,
        leaf: Leaf,
        static: tuple[tuple[int | None, ...], int],
        grad: jax.Array,
        error: Any,
        stored: Any,
        rank: jax.Array,
        clock: Any,
        moments: tuple[jax.Array, ...],
        key: jax.Array,
        count: jax.Array,
        places: jax.Array,
    ) -> Prepared:
        """Everything before the inner transformation: the gradient with its error, bases, carried moments."""
        degrees, number = static
        a = leaf.matrices(grad)
        if self.method.residual.feeds:
            a = a + error.astype(a.dtype)
        if self.method.residual.looks:
            # A factor in the code of the gradient, fused into A - P R, would leave rounding where that is zero.
            a = fusion_barrier(a)
        leaf = leaf.of_width(stored)
        key = jax.random.fold_in(jax.random.fold_in(key_of(key), places[0]), count)
        keys = keys_of(jax.random.key_data(key), leaf)

        def missing() -> jax.Array:
            return jnp.any((rank == 0) & over(leaf, lambda x: jnp.any(x != 0))(a))

        # In a branch, because it reads the whole gradient, and bases are missing in the first step only.
        first = jax.lax.cond(jnp.any(rank == 0), missing, lambda: jnp.zeros((), bool))

        def coordinates(stored: Any) -> tuple[Any, jax.Array]:
            def one(stored: Any, a: jax.Array) -> tuple[Any, jax.Array]:
                basis = self.method.projector.basis(stored, a, leaf.rank)
                return basis, self.method.projector.down(basis, a)

            basis, projected = over(leaf, one)(stored, a)
            return basis, projected

        due = self.method.refresh.due(clock, count, places[1], number, lambda: _norm(coordinates(stored)[1]))
        dropped = jnp.zeros_like(a) if self.method.residual.drops else ()
        movable = moments if self.method.carry.moment is not None else ()

        def refreshed(x: Any) -> Any:
            stored, rank, _, overlap, dropped = x
            one = functools.partial(self._refresh, leaf, degrees, due, first, count)
            return over(leaf, one)(a, keys, stored, rank, moments, overlap, dropped)

        overlap = jnp.ones(leaf.batch, a.dtype)
        x = stored, rank, movable, overlap, dropped
        x = refreshed(x) if due is True else jax.lax.cond(due | first, refreshed, lambda x: x, x)
        stored, rank, movable, overlap, dropped = x
        basis, projected = coordinates(stored)
        if self.method.refresh.observes:
            size = _norm(projected)
            # A gradient of zeros makes no basis.
            clock = self.method.refresh.after(clock, (due | first) & (size > 0), count, jnp.mean(overlap), size)
        return Prepared(a, projected, basis, stored, rank, clock, movable, dropped)

    def _refresh(
        self,
        leaf: Leaf,
        degrees: tuple[int | None, ...],
        due: Any,
        first: jax.Array,
        count: jax.Array,
        a: jax.Array,
        key: jax.Array,
        stored: Any,
        rank: jax.Array,
        moments: tuple[jax.Array, ...],
        overlap: jax.Array,
        dropped: Any,
    ) -> Any:
        """A new basis of one matrix, and moments in it. A gradient of zeros changes nothing."""
        projector, r = self.method.projector, leaf.rank
        working = [m.astype(a.dtype) for m in moments]
        firsts = [m for m, degree in zip(working, degrees, strict=True) if degree == 1]
        momentum = firsts[0] if firsts else jnp.zeros(leaf.projected_shape, a.dtype)
        new = projector.refresh(stored, Refreshing(a, momentum, key_of(key), count, first, int(leaf.side == "right")))
        new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, stored)
        old_basis, basis = (projector.basis(x, a, r) for x in (stored, new))
        active = jnp.asarray(r, jnp.int32)
        if self.method.adapt_rank is not None:
            active = self.method.adapt_rank(projector.down(basis, a), a).astype(jnp.int32)
            new = linalg.first_columns(new, active)
            basis = projector.basis(new, a, r)
        take = jnp.any(a != 0) & (due | (rank == 0))

        def lift(x: jax.Array) -> jax.Array:
            return projector.down(basis, projector.up(old_basis, x, a.shape[0]))

        change = Change(lambda: projector.overlap(old_basis, basis), lift, momentum, count)
        carried = []
        if self.method.carry.moment is not None:
            for m, degree, old in zip(working, degrees, moments, strict=True):
                moved = m if degree is None else self.method.carry.moment(change, m, degree)
                carried.append(jnp.where(take, moved, m).astype(old.dtype))
        if self.method.residual.drops:
            after = [m for m, degree in zip(carried, degrees, strict=False) if degree == 1]
            after_momentum = after[0].astype(a.dtype) if after else momentum
            lost = projector.up(old_basis, momentum, a.shape[0]) - projector.up(basis, after_momentum, a.shape[0])
            dropped = jnp.where(take, lost, 0)
        if self.method.refresh.observes:
            overlap = jnp.abs(change.overlap()[0, 0]).astype(a.dtype)
        kept = jax.tree.map(lambda x, y: jnp.where(take, x, y), new, stored)
        return kept, jnp.where(take, active, rank), tuple(carried), overlap, dropped

    @linalg.highest_precision
    def project(self, leaf: Leaf, basis: Any, weight: jax.Array) -> jax.Array:
        """The weight in coordinates, which the inner transformation gets as parameter."""
        return over(leaf, self.method.projector.down)(basis, leaf.matrices(weight))

    @linalg.highest_precision
    def finish(self, leaf: Leaf, dtype: Any, x: Prepared, step: jax.Array, residual: Any, count: jax.Array) -> Any:
        """Everything after the inner transformation: the update, the stored basis and the state of the residual."""
        rows = leaf.matrix_shape[0]

        def one(x: Any, step: jax.Array, residual: Any) -> Any:
            a, projected, basis, stored, dropped = x
            inside = lambda: self.method.projector.up(basis, projected, rows)  # noqa: E731
            outside = lambda: self.method.projector.outside(basis, a, inside())  # noqa: E731
            step = step.astype(a.dtype)
            direction, residual = self.method.residual.apply(
                residual, Projection(a, inside, outside, projected, step, dropped)
            )
            if not self.method.residual.replaces:
                lifted = self.method.scale_of(leaf) * self.method.projector.up(basis, step, rows)
                direction = lifted if direction is None else lifted + direction
            return direction, self.method.projector.after(stored, basis, a, projected, count), residual

        parts = (x.gradient, x.projected, x.basis, x.stored, x.dropped)
        direction, stored, residual = over(leaf, one)(parts, step, residual)
        return leaf.leaf(direction, dtype), stored, residual
