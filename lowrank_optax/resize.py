"""Changes of width between jitted segments, of parameters and optimizer state together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.axes import Rank, rank_number
from lowrank_optax.boxes import unboxed, unwrapped
from lowrank_optax.checks import check_orthonormal
from lowrank_optax.diagnostics import ranks
from lowrank_optax.door import FixedRankState, nodes
from lowrank_optax.galerkin import GalerkinState
from lowrank_optax.geometry import Info, geometry_of, is_coordinates
from lowrank_optax.layout import map_kernel, map_numbers
from lowrank_optax.lowrank import LowRank, is_lowrank
from lowrank_optax.paths import path_name
from lowrank_optax.rank import check_int, relative_tail


class _Move(NamedTuple):
    """How one kernel changes width."""

    old: LowRank
    new: LowRank
    lost: jax.Array


def resize(params: Any, opt_state: Any = None, rank: Rank | None = None, *, grow: bool = False) -> tuple[Any, Any]:
    """Changes the width of the factors and of the optimizer state together, so that memory and time follow the ranks.

    Growing, and shrinking to no less than the active rank, leave W unchanged. Shrinking below it truncates W to its
    best approximation; with a geometry that truncates, `diagnostics` shows the loss as `truncation`. Moments change
    basis as they do in a step.

    Call it outside `jit`, where shapes may change, and between steps; compiled steps compile again for new shapes. For
    nnx modules and optimizers there is `lowrank_optax.nnx.resize`.

    Args:
      params: a tree with `LowRank` nodes.
      opt_state: the matching state of any transformation with `fixed_rank` inside, or None.
      rank: new width, an int, a fraction of min(m, n), or a callable of the path and the dense shape, e.g.
        `buckets(params)`; cut to min(m, n). None takes the active rank of each kernel (the largest of a stack), the
        smallest width that holds W. A kernel in the canonical gauge whose width does not change stays the same to the
        bit.
      grow: whether steps may use all columns at once, so that every rank grows to its width (with `galerkin`, to half
        of it). By default only a rank policy takes new columns into use. They have singular values of zero, which
        leave W unchanged.

    Returns:
      Parameters and state.

    Raises:
      ValueError: for factors that are not orthonormal, a state of another optimizer or of other parameters, one that
        keeps factored copies of the parameters outside `fixed_rank`, or one of `galerkin` inside a loop; and for a
        width below twice the rank with `galerkin`; and for `grow` without a state, which holds the ranks.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2, max_rank=4)
      >>> params, state = lro.resize(params, lro.lowrank_adam(1e-3).init(params))
      >>> params["kernel"].U.shape, optax.tree.get(state, "mu")["kernel"].A.shape
      ((6, 2), (6, 2))
    """
    params, wrap_params = unwrapped(params)
    opt_state, wrap_state = unwrapped(opt_state)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_lowrank)
    kernels = {tuple(path): W for path, W in leaves if is_lowrank(W)}
    check_orthonormal([(path_name(path), W) for path, W in kernels.items()])
    if grow and opt_state is None:
        raise ValueError("grow=True raises the ranks that an optimizer state holds: pass the state with the parameters")
    if kernels and not nodes(opt_state, FixedRankState) and any(jnp.ndim(x) for x in jax.tree.leaves(opt_state)):
        raise ValueError(
            "resize found no state of fixed_rank in this optimizer state, so its moments would keep the old width: "
            "pass the state that tx.init(params) made"
        )
    loops = nodes(opt_state, GalerkinState)
    if any(bool(jnp.any(loop.phase != 0)) for loop in loops):
        raise ValueError(
            "resize inside a loop of galerkin would lose the directions that its bases have gained: call it when "
            'optax.tree.get(opt_state, "phase") is 0'
        )
    room = 2 if loops else 1
    plans = {path: _plan(path_name(path), W, rank, room) for path, W in kernels.items()}
    moves = {path: move for path, move in plans.items() if move is not None}
    grown = {path: (moves[path].new if path in moves else W).width // room for path, W in kernels.items() if grow}

    def kernel(path: Any, x: Any) -> Any:
        move = moves.get(tuple(path))
        return move.new if move else x

    def outer(path: Any, x: Any) -> Any:
        if isinstance(x, FixedRankState):
            return _resized_state(x, kernels, moves, grown)
        return _resized_gradient(path, x, _owner(path, kernels), moves) if is_lowrank(x) else x

    is_node = lambda x: is_lowrank(x) or isinstance(x, FixedRankState)  # noqa: E731
    new = jax.tree_util.tree_map_with_path(kernel, params, is_leaf=is_lowrank)
    return wrap_params(new), wrap_state(jax.tree_util.tree_map_with_path(outer, opt_state, is_leaf=is_node))


def _plan(name: str, W: LowRank, rank: Rank | None, room: int) -> _Move | None:
    """The move of one kernel to at least `room` times its rank, of need; None if it stays the same to the bit."""
    shapes = jax.eval_shape(lambda W: W.flatten(), W)
    limit = min(shapes.U.shape[-2], shapes.V.shape[-2])
    S = W.S.astype(linalg.working_dtype(W.U, W.S, W.V))
    needed = min(limit, room * max(1, int(jnp.max(map_numbers(mf.rank, S)))))
    width = needed if rank is None else min(limit, rank_number(rank, name, W.shape, limit))
    if room > 1 and width < needed:
        raise ValueError(
            f"galerkin needs a width of twice the rank, {needed} for {name!r}, to move its bases: "
            f"resize to {width} would leave less"
        )
    if width == W.width and bool(jnp.all(map_numbers(mf.is_canonical, S))):
        return None
    return _Move(W, *map_kernel(_fitted, W, width=width))


def _fitted(W: LowRank, width: int) -> tuple[LowRank, jax.Array]:
    """The kernel cut or padded to `width` columns, and the relative norm that was cut."""
    W = mf.canonicalize(W, W).kernel
    sigma, more = linalg.diag_part(W.S), max(0, width - W.width)

    def basis(x: jax.Array) -> jax.Array:
        completed, _ = linalg.orthonormalize(jnp.pad(x, ((0, 0), (0, more))))
        return jnp.concatenate([x, completed[:, x.shape[1] :]], axis=1)[:, :width]

    new = LowRank(basis(W.U), linalg.diagonal(jnp.pad(sigma, (0, more))[:width]), basis(W.V))
    return new, relative_tail(sigma, jnp.int32(width))


def _owner(path: Any, kernels: dict[Any, LowRank]) -> Any:
    """The path of the kernel that a node of the state mirrors: the longest that ends the path of the node."""
    ends = [end for end in kernels if tuple(path)[len(path) - len(end) :] == end]
    if not ends:
        raise ValueError(
            f"the optimizer state holds moments of {path_name(path)!r}, which is no kernel of these parameters"
        )
    return max(ends, key=len)


def _resized_state(
    state: FixedRankState, kernels: dict[Any, LowRank], moves: dict[Any, _Move], grown: dict[Any, int]
) -> FixedRankState:
    copies: dict[Any, int] = {}  # path of a copy of the parameters -> its position among the copies

    def moment(path: Any, x: Any) -> Any:
        if not is_coordinates(x) or not jax.tree.leaves(x) or not any(map(jnp.ndim, jax.tree.leaves(x))):
            return x
        owner = _owner(path, kernels)
        copy = copies.setdefault(tuple(path)[: len(path) - len(owner)], len(copies))
        if owner not in moves:
            return x
        old, new, _ = moves[owner]
        return map_kernel(_rebased, old, new, x, geometry=geometry_of(x), degree=int(state.degrees[copy]))

    def rank(path: Any, x: Any) -> Any:
        if tuple(path) in grown:
            return jnp.full_like(x, grown[tuple(path)])
        return jnp.minimum(x, moves[tuple(path)].new.width).astype(x.dtype) if tuple(path) in moves else x

    def info(path: Any, x: Any) -> Any:
        move = moves.get(tuple(path))
        if move is None or not isinstance(x, Info):
            return x
        lost = None if x.truncation is None else jnp.maximum(x.truncation, move.lost.astype(x.truncation.dtype))
        return Info(jnp.minimum(x.rank, move.new.width).astype(x.rank.dtype), x.gradient_norm, lost)

    each = jax.tree_util.tree_map_with_path
    return state._replace(
        inner_state=each(moment, state.inner_state, is_leaf=is_coordinates),
        aux=each(rank, state.aux),
        info=each(info, state.info, is_leaf=lambda x: isinstance(x, Info)),
    )


def _rebased(old: LowRank, new: LowRank, moment: Any, geometry: Any, degree: int) -> Any:
    change = geometry.rebase(old, mf.trim(new, mf.rank(new.S)))
    working = jax.tree.map(lambda x: x.astype(old.S.dtype), moment)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), geometry.carry(change, working, degree), moment)


def _resized_gradient(path: Any, x: LowRank, owner: Any, moves: dict[Any, _Move]) -> LowRank:
    """Gradients of the factors that a wrapper has accumulated: `G V S^T` changes basis with the columns of U."""
    if not any(getattr(key, "name", None) in ("acc_grads", "grad_acc") for key in path):
        raise ValueError(
            f"the optimizer state keeps factors at {path_name(path)!r} outside of fixed_rank, and resize cannot tell "
            "whether they are parameters, gradients or moments: take that transformation inside, or make its state anew"
        )
    return map_kernel(_turned_gradient, x, *moves[owner][:2]) if owner in moves else x


def _turned_gradient(grads: LowRank, old: LowRank, new: LowRank) -> LowRank:
    P, Q = mf.turn_between(old, mf.trim(new, mf.rank(new.S)))
    return LowRank(grads.U @ P, P.T @ grads.S @ Q, grads.V @ Q)


def buckets(
    params: Any, size: int = 8, *, max_rank: Rank | None = None, room: int = 1
) -> Callable[[str, tuple[int, ...]], int]:
    r"""Widths for `resize` that follow the active ranks in multiples of `size`, so that few shapes are compiled.

    A kernel of width w gets the first of these widths that applies, where k is `room` times its rank and
    :math:`\lceil k \rceil` the next multiple of `size`, cut to `max_rank`:

    .. math::

      \lceil k + 1 \rceil \ \text{if that is above } w, \quad
      \lceil k + 1 + \tfrac{1}{2}\,\text{size} \rceil \ \text{if that is below } w, \quad w

    One column stays free, because a rank policy could not ask for more otherwise. Ranks that wander by half a bucket
    change no shape. A kernel has at most `max_rank / size` widths, and a step compiles at most once for every `resize`
    that changed one.

    Args:
      params: a tree with `LowRank` nodes.
      size: distance of the widths, at least 1.
      max_rank: largest width, of the forms that `factorize` takes. Default: min(m, n).
      room: how many times its rank a kernel must be wide. Default 1; 2 for a state of `galerkin`, whose bases move
        within twice the rank.

    Returns:
      A callable for the argument `rank` of `resize`.

    Raises:
      TypeError, ValueError: for a `size` or `room` that is no int of at least 1.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(64)}, rank=5, max_rank=32)
      >>> params, _ = lro.resize(params, None, lro.buckets(params, 8))
      >>> params["kernel"].width
      16
    """
    for name, number in (("size", size), ("room", room)):
        check_int(name, number)
        if number < 1:
            raise ValueError(f"{name} is at least 1, got {number}")
    leaves = jax.tree_util.tree_leaves_with_path(unboxed(params)[0], is_leaf=is_lowrank)
    kernels = {path_name(path): W for path, W in leaves if is_lowrank(W)}
    active = {name: room * max(1, int(jnp.max(rank))) for name, rank in ranks(params).items()}

    def width(name: str, shape: tuple[int, ...]) -> int:
        F, k = jax.eval_shape(lambda W: W.flatten(), kernels[name]), active[name]
        limit = min(F.U.shape[-2], F.V.shape[-2])
        most = limit if max_rank is None else min(limit, rank_number(max_rank, name, shape, limit))
        least, roomy = (min(most, -(-x // size) * size) for x in (k + 1, k + 1 + size // 2))
        return least if least > F.width else min(roomy, F.width)

    return width
