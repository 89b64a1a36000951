"""Changes of the width of bases between jitted segments, so that memory follows the ranks in use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.boxes import unwrapped
from lowrank_optax.door import nodes
from lowrank_optax.paths import path_name
from lowrank_optax.projected.transformation import SubspaceState


def resize(opt_state: Any, rank: int | None = None) -> Any:
    """Cuts bases and moments to the columns in use, or gives them another width.

    With `adapt_rank` the columns of a basis that are not in use are zero, and so are their moments: without them a run
    goes on as before, in less memory. The optimizer takes the width of a basis from its state, and ranks cannot rise
    above it; a larger `rank` makes room again.

    Call it outside `jit`, between steps; a compiled step compiles again for new shapes.

    Args:
      opt_state: the state of an optimizer with `subspace` inside.
      rank: the new width of all bases, cut to the number of their rows. None takes the rank in use of each kernel, the
        largest of a stack.

    Returns:
      The state.

    Raises:
      ValueError: for a state without `subspace`, or whose bases are no stored matrices.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx, gradient = lro.adarankgrad(1e-3, rank=4), {"kernel": jnp.ones((6, 8))}  # of rank 1
      >>> _, state = tx.update(gradient, tx.init(gradient), gradient)
      >>> state = lro.projected.resize(state)
      >>> optax.tree.get(state, "basis")["kernel"].shape, optax.tree.get(state, "mu")["kernel"].shape
      ((6, 1), (1, 8))
    """
    opt_state, wrap = unwrapped(opt_state)
    if not nodes(opt_state, SubspaceState):
        raise ValueError("resize found no state of subspace in this optimizer state: pass what tx.init(params) made")
    is_state = lambda x: isinstance(x, SubspaceState)  # noqa: E731
    new = jax.tree.map(lambda x: _resized(x, rank) if is_state(x) else x, opt_state, is_leaf=is_state)
    return wrap(new)


def _resized(state: SubspaceState, rank: int | None) -> SubspaceState:
    ranks = {tuple(path): x for path, x in jax.tree_util.tree_leaves_with_path(state.rank)}
    bases = {tuple(path): x for path, x in jax.tree_util.tree_leaves_with_path(state.basis)}
    widths: dict[Any, tuple[int, int]] = {}
    for path, active in ranks.items():
        basis = bases.get(path)
        if basis is None or basis.ndim != active.ndim + 2 or not jnp.issubdtype(basis.dtype, jnp.floating):
            raise ValueError(f"the basis of {path_name(path)!r} is no stored matrix, and only such bases have a width")
        old = basis.shape[-1]
        widths[path] = old, min(basis.shape[-2], rank or max(1, int(jnp.max(active))))

    def moment(path: Any, x: Any) -> Any:
        owner = next((tuple(path)[i:] for i in range(len(path) + 1) if tuple(path)[i:] in widths), None)
        if owner is None or jnp.ndim(x) != ranks[owner].ndim + 2:
            return x
        old, new = widths[owner]
        if x.shape[-2] != old:
            raise ValueError(
                f"the optimizer state holds an array of shape {x.shape} for {path_name(owner)!r}, whose coordinates "
                f"have {old} rows: resize knows moments that mirror them"
            )
        return _fitted(x, -2, new)

    def other(path: Any, x: Any, axis: int | None) -> Any:
        new = widths[tuple(path)][1]
        return jnp.minimum(x, new) if axis is None else _fitted(x, axis, new)

    each = jax.tree_util.tree_map_with_path
    return state._replace(
        basis=each(lambda path, x: other(path, x, -1), state.basis),
        inner=each(moment, state.inner),
        rank=each(lambda path, x: other(path, x, None), state.rank),
    )


def _fitted(x: jax.Array, axis: int, size: int) -> jax.Array:
    """The array cut or padded with zeros along an axis."""
    x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis % x.ndim)
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads) if size > x.shape[axis] else x
