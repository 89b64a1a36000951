"""Stacks and slices, and barriers that keep XLA from fusing code across them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata


@jax.jit  # so that it is traced once for each shape, and compiled once for eager calls, as the functions below
def fusion_barrier(tree: Any) -> Any:
    """The same arrays; on CPU code that uses them is not fused with code that makes them.

    XLA on CPU fuses the code of a small array into every loop over a large one that reads it. It fuses a slice into
    every user, together with the code that made the stack. Masks are then computed again at every element. XLA's own
    barriers are gone before it fuses; a call that is not inlined stays.
    """
    if not jax.tree.leaves(tree):
        return tree
    return jax.lax.platform_dependent(tree, cpu=_call, default=lambda tree: tree)


def _call(tree: Any) -> Any:
    with set_xla_metadata(inlineable="false"):
        return _same(tree)


@jax.jit
def _same(tree: Any) -> Any:
    return tree


@jax.jit
def _with_positions(tree: Any, positions: Any) -> Any:
    """A barrier that positions of slices share with an array, because XLA folds a call on constants alone."""
    default = lambda tree, positions: (tree, jax.lax.optimization_barrier(positions))  # noqa: E731
    return jax.lax.platform_dependent(tree, positions, cpu=lambda *args: _call(args), default=default)


@jax.jit
def stack(trees: Sequence[Any]) -> Any:
    """Equal trees along a new first axis."""
    return jax.tree.map(lambda *xs: jax.lax.concatenate([jax.lax.expand_dims(x, (0,)) for x in xs], 0), *trees)


def unstack(stacks: Sequence[tuple[Any, int]]) -> list[list[Any]]:
    """The inverse of `stack` for several stacks and the numbers of trees in them.

    Positions behind a barrier (on accelerators XLA's own) are values and not constants, so all slices of one shape are
    the same compiled code. Positions are unsigned, because signed ones need code that counts from the end.
    """
    filled = [tree for tree, _ in stacks if jax.tree.leaves(tree)]
    if not filled:
        return [[tree] * count for tree, count in stacks]
    numbers = [jnp.uint32(i) for i in range(max(count for _, count in stacks))]
    first, positions = _with_positions(filled[0], numbers)
    trees = [first if tree is filled[0] else fusion_barrier(tree) for tree, _ in stacks]
    counts = [count for _, count in stacks]
    return [[_slice(tree, i) for i in positions[:count]] for tree, count in zip(trees, counts, strict=True)]


@jax.jit
def _slice(tree: Any, i: jax.Array) -> Any:
    def one(x: jax.Array) -> jax.Array:
        at = [i] + [jnp.zeros_like(i)] * (x.ndim - 1)
        return jax.lax.reshape(jax.lax.dynamic_slice(x, at, (1, *x.shape[1:])), x.shape[1:])

    return jax.tree.map(one, tree)
