"""Moves the state of an arbitrary Optax transformation from one basis to another.

Leaves of the inner state that mirror a kernel are found with `optax.tree.map_params`, as in any tool that maps
over optimizer states; first moments among them move linearly, second moments by the square-root congruence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import manifold as mf
from lowrank_optax.linalg import transpose
from lowrank_optax.lowrank import LowRank, cast_like, is_lowrank

# Fields of the states in Optax that hold squares of gradients, per coordinate.
SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares", "e_g", "e_x", "n")

Change = Callable[[Any, bool], Any]


@dataclasses.dataclass(frozen=True)
class _Tagged:
    """A leaf of an optimizer state with what its path says about it; opaque to JAX."""

    value: Any
    squared: bool


def stay(x: Any, squared: bool) -> Any:
    """The change of a leaf that no basis concerns."""
    del squared
    return x


def coefficient_change(left: jax.Array, right: jax.Array) -> Change:
    """`x -> left x right^T` on the coefficient matrices of one kernel."""

    def change(x: jax.Array, squared: bool) -> jax.Array:
        carry = mf.congruence_squared if squared else mf.congruence
        return carry(x.astype(left.dtype), left, right).astype(x.dtype)

    return change


def rotation_change(p: jax.Array, q: jax.Array) -> Change:
    """The change of tangent triples when the bases turn to U P and V Q."""

    def change(x: LowRank, squared: bool) -> LowRank:
        y = x.astype(p.dtype)
        if squared:
            y = mf.rotate_tangent(_map(lambda a: jnp.sqrt(jnp.maximum(a, 0.0)), y), p, q)
            return cast_like(_map(jnp.square, y), x)
        return cast_like(mf.rotate_tangent(y, p, q), x)

    return change


def transport_change(old: LowRank, new: LowRank, active: jax.Array) -> Change:
    """The change of tangent triples when the kernel moves from `old` to `new`."""

    def change(x: LowRank, squared: bool) -> LowRank:
        move = mf.transport_squared if squared else mf.transport
        return cast_like(move(x.astype(old.U.dtype), old, new, active), x)

    return change


def gauge_change(tangent: bool, p: jax.Array, q: jax.Array) -> Change:
    """The change to the bases U P and V Q in either coordinate system."""
    return rotation_change(p, q) if tangent else coefficient_change(transpose(p), transpose(q))


def carry(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    changes: Any,
    second_moments: tuple[str, ...],
) -> optax.OptState:
    """Applies to every leaf of `state` that mirrors a parameter the change of that parameter.

    Args:
      inner: the transformation whose state it is.
      state: its state.
      changes: a tree like the parameters that `inner` sees, with a `Change` at each of them.
      second_moments: names of the state fields to carry as second moments.

    Returns:
      The state in the new bases. A mirror without axes (a norm per kernel, say) stays.
    """

    def tag(path: Any, value: Any) -> _Tagged:
        names = (k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey))
        return _Tagged(value, any(name in second_moments for name in names))

    def untag(node: Any) -> Any:
        return jax.tree.map(lambda t: t.value, node)

    def move(node: Any, change: Change) -> Any:
        if isinstance(node, optax.MaskedNode):
            return node
        value = untag(node)
        if any(jnp.ndim(x) == 0 for x in jax.tree.leaves(value)):
            return value
        squared = any(t.squared for t in jax.tree.leaves(node))
        return change(value, squared)

    return optax.tree.map_params(
        inner,
        move,
        jax.tree_util.tree_map_with_path(tag, state),
        changes,
        transform_non_params=untag,
        is_leaf=lambda x: is_lowrank(x) or isinstance(x, optax.MaskedNode),
    )


def keep_kernels(
    inner: optax.GradientTransformation,
    old: optax.OptState,
    new: optax.OptState,
    kernels: Any,
) -> optax.OptState:
    """The state `new` with the leaves that mirror kernels (True in `kernels`) taken from `old`."""
    pairs = jax.tree.map(lambda a, b: _Pair(a, b), old, new)
    return optax.tree.map_params(
        inner,
        lambda x, kernel: x if isinstance(x, optax.MaskedNode) else (x.old if kernel else x.new),
        pairs,
        kernels,
        transform_non_params=lambda node: jax.tree.map(lambda x: x.new, node),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A leaf of two states; opaque to JAX."""

    old: Any
    new: Any


def check_carries(inner: optax.GradientTransformation, state: optax.OptState, views: Any) -> None:
    """Raises if `inner` keeps state for kernels that no change of basis can act on."""

    def expect(view: Any) -> Change:
        shapes = jax.tree.map(jnp.shape, view)

        def change(x: Any, squared: bool) -> Any:
            del squared
            if jax.tree.map(jnp.shape, x) != shapes:
                raise ValueError(
                    f"it holds an array of shape {jax.tree.map(jnp.shape, x)} for a kernel whose "
                    f"coordinates have shape {shapes}"
                )
            return x

        return change

    try:
        carry(inner, state, jax.tree.map(expect, views, is_leaf=is_lowrank), ())
    except (ValueError, TypeError) as error:
        raise ValueError(
            "fixed_rank cannot carry the state of this inner transformation between bases: its leaves must "
            "mirror the parameters in shape, or be scalars. Factored second moments (adafactor, sm3) do not; "
            f"use adam, rmsprop, lion, sgd or another elementwise transformation. Cause: {error}"
        ) from error


def _map(f: Callable[[jax.Array], jax.Array], x: LowRank) -> LowRank:
    return LowRank(f(x.U), f(x.S), f(x.V))
