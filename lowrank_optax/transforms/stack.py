"""Lets a step see the kernels of equal shape as one kernel with a batch axis.

What is done leaf by leaf costs compile time for every leaf: an Adam step of 48 transformer blocks more than the network
itself. On stacks it is compiled once a shape; what grows with depth is one place in a stack and one slice a leaf.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import optax

from lowrank_optax.lowrank import flatten, unflatten
from lowrank_optax.transforms.split import Split, is_kernel


class Stacks:
    """Stacks the kernels of parameter trees, and of trees and optimizer states of their structure.

    A stacked tree has the structure of the parameters. A stack is in the place of its first kernel, flattened and with
    a new first axis, `None` in the places of the others.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> a, b = lro.factorize([jnp.eye(4), 2 * jnp.eye(4)], 2, where=lambda path, shape: True)
      >>> params = {"a": a, "b": b, "bias": jnp.zeros(4)}
      >>> tree = Stacks(optax.sgd(0.1), Split(params), params).stack(params)
      >>> tree["a"].shape, tree["b"], tree["bias"].shape
      ((2, 4, 4), None, (4,))
    """

    def __init__(self, inner: optax.GradientTransformation, split: Split, params: Any):
        self._inner, self._split, self._params = inner, split, params
        # What each stack was made of, by its identity; the stack is kept too, so that no other array gets that.
        self._parts: dict[int, tuple[jax.Array, list[jax.Array]]] = {}

    def stack(self, tree: Any) -> Any:
        """A tree of parameters, or of their gradients, with its kernels in stacks."""
        return self._gather(jax.tree.map(lambda x: flatten(x) if is_kernel(x) else x, tree, is_leaf=is_kernel))

    def unstack(self, tree: Any) -> Any:
        """The inverse of `stack`."""
        (tree,) = self._scatter([tree])
        return self._unflatten(tree)

    def stack_state(self, state: Any) -> Any:
        """A `FixedRankState` for stacked parameters."""
        return self._map_state(self._gather, state)

    def unstack_step(self, updates: Any, state: Any) -> tuple[Any, Any]:
        """Updates and state after a step on stacks, taken apart together: what is still a stack made here is not."""
        trees = [updates]
        self._map_state(trees.append, state)
        updates, *rest = self._scatter(trees)
        each = iter(rest)
        return self._unflatten(updates), self._map_state(lambda _: next(each), state)

    def _unflatten(self, tree: Any) -> Any:
        def one(like: Any, x: Any) -> Any:
            return unflatten(x, like) if is_kernel(like) else x

        return jax.tree.map(one, self._params, tree, is_leaf=is_kernel)

    def _map_state(self, f: Any, state: Any) -> Any:
        inner_state = optax.tree.map_params(self._inner, f, state.inner_state, is_leaf=lambda _: True)
        return state._replace(inner_state=inner_state, kernels=f(state.kernels))

    def _gather(self, tree: Any) -> Any:
        groups = self._split.groups(tree)
        stacks = self._split.stack(groups)
        for group, stack in zip(groups, stacks, strict=True):
            for x, *parts in zip(*map(jax.tree.leaves, (stack, *group)), strict=True):
                self._parts[id(x)] = x, parts
        return self._split.first(stacks, self._split.ordinary(tree))

    def _scatter(self, trees: list[Any]) -> list[Any]:
        stacks = [jax.tree.flatten(stack) for tree in trees for stack, *_ in self._split.groups(tree)]
        changed = [{j: x for j, x in enumerate(leaves) if id(x) not in self._parts} for leaves, _ in stacks]
        sizes = self._split.sizes()
        groups = list(range(len(sizes))) * len(trees)
        rows = self._split.unstack(changed, sizes * len(trees), groups)
        each: list[Any] = []
        for (leaves, treedef), members in zip(stacks, rows, strict=True):
            for i, row in enumerate(members):
                parts = (row[j] if j in row else self._parts[id(x)][1][i] for j, x in enumerate(leaves))
                each.append(jax.tree.unflatten(treedef, parts))
        kernels = iter(each)
        return [
            self._split.merge_each(itertools.islice(kernels, sum(sizes)), self._split.ordinary(tree)) for tree in trees
        ]
