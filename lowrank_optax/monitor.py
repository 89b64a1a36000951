"""What a run looks like from outside: `ranks` and `diagnostics`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.factorize import path_name
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.transforms import FixedRankState, KernelState


def ranks(params: Any) -> dict[str, jax.Array]:
    """The rank of every kernel: its number of non-zero singular values.

    Args:
      params: a tree with `LowRank` nodes.

    Returns:
      Path of the kernel to an int32 array of the shape of its batch axes. Works under `jit`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"dense": {"kernel": jnp.eye(6)}}, rank=2, max_rank=4)
      >>> {path: int(rank) for path, rank in lro.ranks(params).items()}
      {'dense/kernel': 2}
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_lowrank)
    return {path_name(path): _rank(W.S) for path, W in leaves if is_lowrank(W)}


@jax.jit
def _rank(S: jax.Array) -> jax.Array:
    """Compiled once for each shape, so that ranks can be printed from a loop."""
    S = S.astype(linalg.working_dtype(S))
    return mf.rank(S)


class Diagnostics(NamedTuple):
    """What `diagnostics` returns.

    Attributes:
      kernels: path of the kernel to its rank, |P(W)G|_F, and the relative norm its last truncation discarded.
      notfinite_count: number of steps that changed nothing because something was not finite.
    """

    kernels: dict[str, KernelState]
    notfinite_count: jax.Array


def diagnostics(opt_state: optax.OptState) -> Diagnostics:
    """Reads ranks, gradient norms, truncation errors and skipped steps off an optimizer state.

    Args:
      opt_state: the state of any transformation with `fixed_rank` somewhere inside.

    Returns:
      The diagnostics of all kernels. Works under `jit`.

    Raises:
      ValueError: if there is no `fixed_rank` inside.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2)
      >>> state = optax.chain(optax.identity(), lro.lowrank_adam(1e-3)).init(params)
      >>> int(lro.diagnostics(state).kernels["kernel"].rank)
      2
    """
    is_ours = lambda x: isinstance(x, FixedRankState)  # noqa: E731
    ours = [x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)]
    if not ours:
        raise ValueError("this optimizer state holds no FixedRankState: it does not come from fixed_rank")
    is_kernel = lambda x: isinstance(x, KernelState)  # noqa: E731
    kernels: dict[str, Any] = {}
    for state in ours:
        for path, k in jax.tree_util.tree_leaves_with_path(state.kernels, is_leaf=is_kernel):
            if is_kernel(k):
                kernels[path_name(path)] = k
    return Diagnostics(kernels, sum((s.notfinite_count for s in ours), jnp.zeros((), jnp.int32)))
