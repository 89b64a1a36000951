"""Moves the state of an arbitrary Optax transformation from one basis to another.

Leaves of the inner state that mirror a kernel are found with `optax.tree.map_params`, as in any tool that maps
over optimizer states; first moments among them move linearly, second moments so that they stay non-negative.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax import balanced
from lowrank_optax import manifold as mf
from lowrank_optax.linalg import all_finite, transpose
from lowrank_optax.lowrank import LowRank, cast_like, is_lowrank
from lowrank_optax.transforms.split import Place, Split
from lowrank_optax.xla import apply_if

# Fields of the states in Optax that hold squares of gradients, per coordinate.
SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares", "e_g", "e_x", "n")


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of basis of one group of kernels.

    Attributes:
      apply: `(arrays, x, squared) -> x'`, with any number of batch axes.
      arrays: what describes the change; with the stacking axis of the group, if it has one.
    """

    apply: Callable[[Any, Any, bool], Any]
    arrays: Any


def coefficient_change(left: jax.Array, right: jax.Array) -> Change:
    """`x -> left x right^T` on coefficient matrices."""

    def apply(arrays: Any, x: jax.Array, squared: bool) -> jax.Array:
        left, right = arrays
        move = mf.congruence_squared if squared else mf.congruence
        return move(x.astype(left.dtype), left, right).astype(x.dtype)

    return Change(apply, (left, right))


def gauge_change(momentum: str, p: jax.Array, q: jax.Array) -> Change:
    """The change to the bases U P and V Q, for moments of any kind."""
    if momentum == "coefficient":
        return coefficient_change(transpose(p), transpose(q))
    return turn_change(mf.rotate_tangent if momentum == "tangent" else balanced.turn, p, q)


def turn_change(turn: Callable[[LowRank, jax.Array, jax.Array], LowRank], p: jax.Array, q: jax.Array) -> Change:
    """The change of triples by `turn(x, p, q)`: to the bases U P and V Q, or to the pair A P, B Q.

    Weights of second moments are squared, so with columns of norm 1 each new moment is a weighted mean of the old. The
    square-root congruence of the paper, `(sqrt(v) Q)^2`, may cancel instead: where singular values are close and bases
    turn fast it leaves second moments near zero beside first moments that are not, and steps explode.
    """

    def apply(arrays: Any, x: LowRank, squared: bool) -> LowRank:
        p, q = (jnp.square(y) if squared else y for y in arrays)
        return cast_like(turn(x.astype(p.dtype), p, q), x)

    return Change(apply, (p, q))


def transport_change(old: LowRank, new: LowRank) -> Change:
    """The change of tangent triples when a kernel moves from `old` to `new`, both without padded columns."""

    def apply(arrays: Any, x: LowRank, squared: bool) -> LowRank:
        old, new = arrays
        move = mf.transport_squared if squared else mf.transport
        return cast_like(move(x.astype(old.U.dtype), old, new), x)

    return Change(apply, (old, new))


@dataclasses.dataclass(frozen=True)
class _Tagged:
    """A leaf of an optimizer state with what its path says about it; opaque to JAX."""

    value: Any
    squared: bool


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands for a mirror of a kernel that is being moved; opaque to JAX."""

    index: int


def _untag(node: Any) -> Any:
    return jax.tree.map(lambda tagged: tagged.value, node)


def _is_node(x: Any) -> bool:
    return is_lowrank(x) or isinstance(x, optax.MaskedNode)


def _lift(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    split: Split,
    second_moments: tuple[str, ...],
) -> tuple[Any, list[tuple[Place, bool, Any]]]:
    """The state with a `_Slot` at every mirror of a kernel, and the mirrors: place, whether squared, value.

    A mirror without axes (a norm per kernel, say) depends on no basis and stays in the state.
    """
    slots: list[tuple[Place, bool, Any]] = []

    def tag(path: Any, value: Any) -> _Tagged:
        names = (k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey))
        return _Tagged(value, any(name in second_moments for name in names))

    def lift(node: Any, place: Any) -> Any:
        if isinstance(node, optax.MaskedNode):
            return node
        value = _untag(node)
        if not isinstance(place, Place) or any(jnp.ndim(x) == 0 for x in jax.tree.leaves(value)):
            return value
        slots.append((place, any(t.squared for t in jax.tree.leaves(node)), value))
        return _Slot(len(slots) - 1)

    tagged = jax.tree_util.tree_map_with_path(tag, state)
    shell = optax.tree.map_params(inner, lift, tagged, split.places(), transform_non_params=_untag, is_leaf=_is_node)
    return shell, slots


def _lower(shell: Any, values: Sequence[Any]) -> Any:
    """Puts values in the place of the slots."""
    return jax.tree.map(lambda x: values[x.index] if isinstance(x, _Slot) else x, shell)


def carry(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    split: Split,
    changes: Sequence[Change],
    second_moments: tuple[str, ...],
    when: jax.Array | None = None,
) -> tuple[optax.OptState, list[Any]]:
    """Applies to every leaf of `state` that mirrors a kernel the change of that kernel.

    Args:
      inner: the transformation whose state it is.
      state: its state.
      split: places of the kernels.
      changes: the change of every group.
      second_moments: names of the state fields to carry as second moments.
      when: whether to do so, by default true.

    Returns:
      The state in the new bases, and what moved: a few large arrays rather than one of each kernel where it can be.
    """
    shell, slots = _lift(inner, state, split, second_moments)
    # Mirrors of a group go together: those of one copy of the parameters (mu, say) are met in order.
    batches: dict[Any, list[int]] = {}
    copies: dict[Any, int] = {}
    for i, (place, squared, _) in enumerate(slots):
        copy = copies[place] = copies.get(place, -1) + 1
        batches.setdefault((place.group, squared, copy), []).append(i)
    sizes = split.sizes()

    def move(values: list[Any]) -> tuple[list[Any], list[Any]]:
        groups = [group for group, _, _ in batches]
        stacks = split.stack([[values[i] for i in indices] for indices in batches.values()], groups)
        moved = []
        for (group, squared, _), indices, stacked in zip(batches, batches.values(), stacks, strict=True):
            arrays = changes[group].arrays
            if len(indices) < sizes[group]:  # Some kernels of the group are masked out.
                members = [slots[i][0].member for i in indices]
                arrays = jax.tree.map(lambda x: x[np.array(members)], arrays)  # noqa: B023
            moved.append(changes[group].apply(arrays, stacked, squared))
        apart = split.unstack(moved, [len(indices) for indices in batches.values()], groups)
        order = [i for indices in batches.values() for i in indices]
        by_slot = dict(zip(order, (x for parts in apart for x in parts), strict=True))
        return [by_slot[i] for i in range(len(slots))], moved

    values = [value for _, _, value in slots]
    if when is None:
        values, moved = move(values)
    else:
        values = moved = apply_if(when, lambda old: move(old)[0], values)
    return _lower(shell, values), moved


def mirrors_finite(inner: optax.GradientTransformation, state: optax.OptState, split: Split) -> jax.Array:
    """Whether every leaf of `state` that mirrors a kernel is finite."""
    _, slots = _lift(inner, state, split, ())
    return all_finite([value for _, _, value in slots])


def rest_finite(
    inner: optax.GradientTransformation, old: optax.OptState, new: optax.OptState, split: Split
) -> jax.Array:
    """Whether the leaves of the state that mirror no kernel have stayed finite."""
    return stayed_finite(*(_lift(inner, state, split, ())[0] for state in (old, new)))


def stayed_finite(old: Any, new: Any) -> jax.Array:
    """Whether no leaf has become infinite or NaN. State may hold infinities on purpose, a best value so far, say."""
    finite = jnp.ones((), bool)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if not isinstance(a, _Slot):
            finite &= all_finite(b) | ~all_finite(a)
    return finite


def map_mirrors(
    f: Callable[..., Any], inner: optax.GradientTransformation, split: Split, *states: optax.OptState
) -> optax.OptState:
    """The first state with `f` of the values in all states at every place that mirrors a kernel."""
    shells, slots = zip(*(_lift(inner, state, split, ()) for state in states), strict=True)
    values = ([value for _, _, value in each] for each in slots)
    return _lower(shells[0], list(map(f, *values)))


def check_carries(inner: optax.GradientTransformation, state: optax.OptState, split: Split, views: Any) -> None:
    """Raises ValueError if the mirrors of kernels in `state` have not the shapes of the coordinates `views`."""
    shapes = functools.partial(jax.tree.map, jnp.shape)
    pairs = zip(split.each(split.places()), split.each(views), strict=True)
    expected = {place: shapes(view) for place, view in pairs}
    try:
        _, slots = _lift(inner, state, split, ())
    except (ValueError, TypeError) as error:
        raise ValueError(f"its leaves do not mirror the parameters: {error}") from error
    for place, _, value in slots:
        if shapes(value) != expected[place]:
            raise ValueError(
                f"it holds an array of shape {shapes(value)} for a kernel whose coordinates have shape "
                f"{expected[place]}"
            )
