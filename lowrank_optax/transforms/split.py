"""Takes parameter trees apart into kernels and ordinary leaves, and puts them together again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import explicit
from lowrank_optax.lowrank import LowRank, is_lowrank
from lowrank_optax.xla import apart, barrier


class Place(NamedTuple):
    """Where a kernel is kept: the number of its group and its position there."""

    group: int
    member: int


class Split:
    """The kernels of a parameter tree in groups of equal shape, each group one stacked kernel.

    A network has many kernels of few shapes. One call for each shape, and not for each kernel, keeps the compiled
    step small. With `vectors` ordinary vectors (biases, scales) are treated as kernels are. Kernels of a tree that is
    `stacked` have the axis of their group already, and each is a group.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> a, b = lro.factorize([jnp.eye(4), 2 * jnp.eye(4)], 2, where=lambda path, shape: True)
      >>> split = Split({"a": a, "b": b, "bias": jnp.zeros(4)})
      >>> [group.shape for group in split.kernels({"a": a.S, "b": b.S, "bias": None})]
      [(2, 2, 2)]
      >>> split.merge([jnp.arange(2)], ["c"])
      {'a': Array(0, dtype=int32), 'b': Array(1, dtype=int32), 'bias': 'c'}
    """

    def __init__(self, params: Any, vectors: bool = False, stacked: bool = False):
        treedef: Any
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_kernel)
        groups: dict[Any, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if is_kernel(leaf):
                groups.setdefault(i if stacked else _key(leaf), []).append(i)
            elif vectors and jnp.ndim(leaf) == 1:
                groups.setdefault((jnp.shape(leaf), jnp.result_type(leaf)), []).append(i)
        self._treedef, self._stacked = treedef, stacked
        self._groups = list(groups.values())
        self._alone = [len(group) == 1 and not _batch_shape(leaves[group[0]]) for group in self._groups]
        grouped = {i for group in self._groups for i in group}
        self._ordinary = [i for i in range(len(leaves)) if i not in grouped]

    def __bool__(self) -> bool:
        return bool(self._groups)

    def each(self, tree: Any) -> list[Any]:
        """What `tree`, of the structure of the parameters, holds at every kernel."""
        leaves = self._treedef.flatten_up_to(tree)
        return [leaves[i] for group in self._groups for i in group]

    def kernels(self, tree: Any) -> list[Any]:
        """What `tree` holds at the kernels, stacked group by group."""
        return self.stack(self.groups(tree))

    def stack(self, trees: list[list[Any]], groups: Sequence[int] | None = None) -> list[Any]:
        """Stacks the leaves of equal trees along a new first axis: those of each group, or of each in `groups`.

        A kernel that is alone in its group and has no batch axes gets none: to the compiler a product of matrices is
        less than a batch of one.
        """
        if self._stacked:
            return [tree for (tree,) in trees]
        rows = zip(self._all(groups), trees, strict=True)
        return [barrier(_stack(x)) if self._goes_together(g, x) else x[0] for g, x in rows]

    def unstack(
        self, trees: list[Any], sizes: list[int] | None = None, groups: Sequence[int] | None = None
    ) -> list[list[Any]]:
        """The inverse of `stack`; `sizes` tells how many trees there are of each group, by default all."""
        sizes = self.sizes() if sizes is None else sizes
        if self._stacked:
            return [[tree] for tree in trees]
        rows = list(zip(self._all(groups), trees, sizes, strict=True))
        parts = iter(apart([(tree, [()] * size) for g, tree, size in rows if self._goes_together(g, tree)]))
        return [next(parts) if self._goes_together(g, tree) else [tree] * size for g, tree, size in rows]

    def _goes_together(self, group: int, tree: Any) -> bool:
        return not self._alone[group] and _holds_arrays(tree)

    def _all(self, groups: Sequence[int] | None) -> Sequence[int]:
        return range(len(self._groups)) if groups is None else groups

    def ordinary(self, tree: Any) -> list[Any]:
        """What `tree` holds at the other leaves."""
        leaves = self._treedef.flatten_up_to(tree)
        return [leaves[i] for i in self._ordinary]

    def merge(self, kernels: Iterable[Any], ordinary: Iterable[Any]) -> Any:
        """The tree with the stacked `kernels` in their places and `ordinary` at the other leaves."""
        apart = self.unstack(list(kernels))
        return self.merge_each((x for group in apart for x in group), ordinary)

    def merge_each(self, kernels: Iterable[Any], ordinary: Iterable[Any]) -> Any:
        """The same with one value for every kernel, in the order of `each`."""
        leaves: list[Any] = [None] * (len(self._ordinary) + sum(map(len, self._groups)))
        for i, x in zip((i for group in self._groups for i in group), kernels, strict=True):
            leaves[i] = x
        for i, x in zip(self._ordinary, ordinary, strict=True):
            leaves[i] = x
        return self._treedef.unflatten(leaves)

    def groups(self, tree: Any) -> list[list[Any]]:
        """What `tree` holds at the kernels, group by group."""
        leaves = self._treedef.flatten_up_to(tree)
        return [[leaves[i] for i in group] for group in self._groups]

    def first(self, groups: Iterable[Any], ordinary: Iterable[Any]) -> Any:
        """The tree with one value for each group in the place of its first kernel, and None in those of the others."""
        values = ([x] + [None] * (size - 1) for x, size in zip(groups, self.sizes(), strict=True))
        return self.merge_each((x for group in values for x in group), ordinary)

    def places(self) -> Any:
        """The tree with the `Place` of every kernel, and an empty tuple at the other leaves."""
        places = (Place(g, j) for g, group in enumerate(self._groups) for j in range(len(group)))
        return self.merge_each(places, (() for _ in self._ordinary))

    @property
    def ordinary_count(self) -> int:
        """The number of leaves that are not kernels."""
        return len(self._ordinary)

    def sizes(self) -> list[int]:
        """The number of kernels in every group."""
        return [len(group) for group in self._groups]


def _key(W: LowRank) -> Any:
    """What flattened kernels must share to be stacked; on an explicit mesh also the sharding of their rows."""
    factors = W.U, W.S, W.V
    dtypes = (jnp.result_type(x) for x in factors)
    return math.prod(W.in_shape), math.prod(W.out_shape), W.S.shape, *dtypes, *map(explicit.spec, factors)


def _holds_arrays(tree: Any) -> bool:
    """False for what stands in the place of a leaf in some states: None, `optax.MaskedNode`."""
    return bool(jax.tree.leaves(tree))


def is_kernel(x: Any) -> bool:
    """True for a `LowRank` of arrays. One of `optax.MaskedNode`, which a mask leaves behind, is no kernel."""
    return is_lowrank(x) and not any(isinstance(y, optax.MaskedNode) for y in (x.U, x.S, x.V))


def _batch_shape(leaf: Any) -> tuple[int, ...]:
    return leaf.batch_shape if is_kernel(leaf) else ()


@jax.jit  # traced once for each shape
def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jax.lax.concatenate([jax.lax.expand_dims(x, (0,)) for x in xs], 0), *trees)
