"""Takes parameter trees apart into kernels and ordinary leaves, and puts them together again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from lowrank_optax.lowrank import is_lowrank


class Split:
    """The places of the kernels in a parameter tree.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> split = Split({"kernel": lro.factorize(jnp.eye(4), 2), "bias": jnp.zeros(4)})
      >>> split.merge(["K"], ["b"])
      {'bias': 'b', 'kernel': 'K'}
    """

    def __init__(self, params: Any):
        treedef: Any
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_lowrank)
        self._treedef = treedef
        self._is_kernel = [is_lowrank(leaf) for leaf in leaves]

    def __bool__(self) -> bool:
        return any(self._is_kernel)

    def kernels(self, tree: Any) -> list[Any]:
        """What `tree`, of the structure of the parameters, holds at the kernels."""
        leaves = self._treedef.flatten_up_to(tree)
        return [x for x, kernel in zip(leaves, self._is_kernel, strict=True) if kernel]

    def ordinary(self, tree: Any) -> list[Any]:
        """What `tree`, of the structure of the parameters, holds at the other leaves."""
        leaves = self._treedef.flatten_up_to(tree)
        return [x for x, kernel in zip(leaves, self._is_kernel, strict=True) if not kernel]

    def merge(self, kernels: Iterable[Any], ordinary: Iterable[Any]) -> Any:
        """The tree with `kernels` in the places of the kernels and `ordinary` at the other leaves."""
        k, o = iter(kernels), iter(ordinary)
        return self._treedef.unflatten([next(k) if x else next(o) for x in self._is_kernel])
