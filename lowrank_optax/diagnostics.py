"""A run seen from outside: `ranks` and `diagnostics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import manifold as mf
from lowrank_optax.boxes import unboxed, unwrapped
from lowrank_optax.door import FixedRankState, nodes
from lowrank_optax.geometry import Info
from lowrank_optax.guard import SkipNotFiniteState
from lowrank_optax.layout import map_numbers
from lowrank_optax.linalg import working_dtype
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import path_name


def ranks(params: Any) -> dict[str, jax.Array]:
    """The rank of every kernel: its number of non-zero singular values.

    Args:
      params: a tree with `LowRank` nodes, an nnx module, or its state. Of an `nnx.Optimizer` without a model, the ranks
        after its last step.

    Returns:
      Path of the kernel to an int32 array of the shape of its batch axes. Works under `jit`.

    Raises:
      ValueError: for an `nnx.Optimizer` whose state does not come from `fixed_rank`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"dense": {"kernel": jnp.eye(6)}}, rank=2, max_rank=4)
      >>> {path: int(rank) for path, rank in lro.ranks(params).items()}
      {'dense/kernel': 2}
    """
    if hasattr(params, "opt_state") and not any(hasattr(params, name) for name in ("model", "params")):
        return {name: info.rank for name, info in diagnostics(params).kernels.items()}
    leaves = jax.tree_util.tree_leaves_with_path(unboxed(params)[0], is_leaf=is_lowrank)
    return {
        path_name(path): map_numbers(mf.rank, W.S.astype(working_dtype(W.S))) for path, W in leaves if is_lowrank(W)
    }


class Diagnostics(NamedTuple):
    """The result of `diagnostics`.

    Attributes:
      kernels: path of the kernel to its `Info`: rank, `|P(W)G|_F`, and the relative norm that the last step
        discarded, None with a geometry that never truncates.
      notfinite_count: number of steps that met or made a number that is not finite.
      consecutive_notfinite: number of such steps since the last finite one.
    """

    kernels: dict[str, Info]
    notfinite_count: jax.Array
    consecutive_notfinite: jax.Array


def diagnostics(opt_state: optax.OptState) -> Diagnostics:
    """Reads ranks, gradient norms, truncation errors and skipped steps off an optimizer state.

    Args:
      opt_state: the state of any transformation with `fixed_rank` or `galerkin` somewhere inside, an `nnx.Optimizer`, a
        Flax `TrainState`, or `nnx.state(optimizer)`.

    Returns:
      The diagnostics of all kernels. Works under `jit`.

    Raises:
      ValueError: if there is no such state inside.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2)
      >>> state = optax.chain(optax.identity(), lro.lowrank_adam(1e-3)).init(params)
      >>> int(lro.diagnostics(state).kernels["kernel"].rank)
      2
    """
    opt_state = _named(opt_state)
    states, skips = (unwrapped(nodes(opt_state, kind))[0] for kind in (FixedRankState, SkipNotFiniteState))
    if not states:
        raise ValueError("this optimizer state holds no FixedRankState: it does not come from fixed_rank")
    is_info = lambda x: isinstance(x, Info)  # noqa: E731
    leaves = [leaf for s in states for leaf in jax.tree_util.tree_leaves_with_path(s.info, is_leaf=is_info)]
    kernels = {path_name(path): info for path, info in leaves if is_info(info)}
    zero = jnp.zeros((), jnp.int32)
    return Diagnostics(
        kernels,
        sum((s.notfinite_count for s in skips), zero),
        sum((s.consecutive_notfinite for s in skips), zero),
    )


def _named(tree: Any) -> Any:
    """The tree with our states in the place of mappings of their fields, to which `nnx.state` turns named tuples."""
    if not isinstance(tree, Mapping):
        if type(tree) in (list, tuple):
            return type(tree)(map(_named, tree))
        return tree
    for kind in (FixedRankState, SkipNotFiniteState, Info):
        # A field without arrays, such as the truncation of a geometry that never truncates, is left out.
        if _FIELDS[kind] <= set(tree) <= set(kind._fields):
            return kind(**{field: _named(tree.get(field)) for field in kind._fields})
    return {key: _named(x) for key, x in tree.items()}


_FIELDS: dict[Any, set[str]] = {
    FixedRankState: {"inner_state", "aux", "info", "degrees"},
    SkipNotFiniteState: {"inner_state", "notfinite_count", "consecutive_notfinite"},
    Info: {"rank", "gradient_norm"},
}
