"""Kernels apart from other leaves, for transformations that are not `subspace` and have state of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.axes import Rank, Where, check_where
from lowrank_optax.guard import Guarded, limit_of, skip_not_finite, without_guard
from lowrank_optax.projected.leaves import Leaf, chosen_leaves
from lowrank_optax.projected.projectors import Projector, svd


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The options by which `chosen_leaves` chooses."""

    rank: Rank
    where: Where | None
    side: str = "short"
    projector: Projector = dataclasses.field(default_factory=svd)


def kernels_and_others(
    kernels: optax.GradientTransformation, others: optax.GradientTransformation, rank: Rank, where: Where | None
) -> Guarded:
    """One transformation for the kernels that `subspace` would project, and one for other leaves, in one guard."""
    check_where(where)

    def labels(tree: Any) -> Any:
        leaves, treedef, chosen = chosen_leaves(tree, Choice(rank, where))
        return treedef.unflatten(["kernel" if i in chosen else "ordinary" for i in range(len(leaves))])

    parts = {"kernel": without_guard(kernels), "ordinary": without_guard(others)}
    return skip_not_finite(optax.partition(parts, labels), limit_of(kernels, others))


def over_kernels(
    f: Callable[..., tuple[Any, Any]], tree: Any, state: Any, rank: Rank, where: Where | None
) -> tuple[Any, Any]:
    """`f(leaf, gradient, state)` for every kernel of a tree: the updates and the new states.

    Args:
      f: function of the leaf, its matrices (p, q), and its entry in the tree of states.
      tree: of gradients, of kernels only.
      state: a tree with one entry in the place of every kernel.
      rank: see `subspace`.
      where: see `subspace`.
    """
    leaves, treedef, chosen = chosen_leaves(tree, Choice(rank, where))
    if not leaves:
        return tree, state
    entries = zip(leaves, treedef.flatten_up_to(state), strict=True)
    rows = [f(chosen[i], chosen[i].matrices(x), entry) for i, (x, entry) in enumerate(entries)]
    updates = [chosen[i].leaf(u, leaves[i].dtype) for i, (u, _) in enumerate(rows)]
    return treedef.unflatten(updates), treedef.unflatten([s for _, s in rows])


def start_kernels(f: Callable[[Leaf, Any], Any], tree: Any, rank: Rank, where: Where | None) -> Any:
    """A tree with `f(leaf, dtype)` in the place of every kernel; a number where there is none."""
    leaves, treedef, chosen = chosen_leaves(tree, Choice(rank, where))
    if not leaves:
        return jnp.zeros((), jnp.int32)
    return treedef.unflatten([f(chosen[i], x) for i, x in enumerate(leaves)])


def numbers(leaf: Leaf, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros for every matrix of a kernel."""
    return jnp.zeros((*leaf.batch, *shape), dtype)
