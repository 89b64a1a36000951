"""Lets a step see the kernels of equal shape as one kernel with a batch axis.

What is done leaf by leaf costs compile time for every leaf: an Adam step of 48 transformer blocks more than the network
itself. On stacks it is compiled once a shape; what grows with depth is one place in a stack and one slice a leaf.
"""

from __future__ import annotations

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

    def stack(self, tree: Any) -> Any:
        """A tree of parameters, or of their gradients, with its kernels in stacks."""
        return self._split.gather(jax.tree.map(lambda x: flatten(x) if is_kernel(x) else x, tree, is_leaf=is_kernel))

    def unstack(self, tree: Any) -> Any:
        """The inverse of `stack`."""

        def one(like: Any, x: Any) -> Any:
            return unflatten(x, like) if is_kernel(like) else x

        return jax.tree.map(one, self._params, self._split.scatter(tree), is_leaf=is_kernel)

    def stack_state(self, state: Any) -> Any:
        """A `FixedRankState` for stacked parameters."""
        return self._map_state(self._split.gather, state)

    def unstack_state(self, state: Any) -> Any:
        """The inverse of `stack_state`."""
        return self._map_state(self._split.scatter, state)

    def _map_state(self, f: Any, state: Any) -> Any:
        inner_state = optax.tree.map_params(self._inner, f, state.inner_state, is_leaf=lambda _: True)
        return state._replace(inner_state=inner_state, kernels=f(state.kernels))
