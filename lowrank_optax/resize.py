"""Changes of width between jitted segments, and averages of factored parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.explicit import Placement
from lowrank_optax.factorize import Rank, path_name, rank_number
from lowrank_optax.linalg import transpose
from lowrank_optax.lowrank import LowRank, cast_like, flatten, is_lowrank, unflatten
from lowrank_optax.monitor import ranks
from lowrank_optax.rank import relative_tail
from lowrank_optax.transforms import FixedRankState, KernelState
from lowrank_optax.transforms.carry import SECOND_MOMENTS


@dataclasses.dataclass(frozen=True)
class _Move:
    """How one kernel changes width: to the canonical gauge (p, q), then cut or padded to `width` columns."""

    W: LowRank
    sigma: jax.Array
    p: jax.Array
    q: jax.Array
    width: int

    def kernel(self) -> LowRank:
        F = flatten(self.W.astype(self.p.dtype))
        u, v = self._basis(F.U @ self.p), self._basis(F.V @ self.q)
        new = LowRank(u, linalg.diagonal(_fit(self.sigma, self.width, -1)), v)
        return cast_like(unflatten(new, self.W), self.W)

    def _basis(self, x: jax.Array) -> jax.Array:
        """Cut, or completed by orthonormal columns."""
        fitted = _fit(x, self.width, -1)
        if self.width <= x.shape[-1]:
            return fitted
        completed, _ = linalg.orthonormalize(fitted)
        return jnp.concatenate([x, completed[..., x.shape[-1] :]], axis=-1)

    def coefficients(self, x: jax.Array, squared: bool) -> jax.Array:
        carry = mf.congruence_squared if squared else mf.congruence
        y = carry(x.astype(self.p.dtype), transpose(self.p), transpose(self.q))
        return _fit(_fit(y, self.width, -1), self.width, -2).astype(x.dtype)

    def triple(self, x: LowRank, tangent: bool, squared: bool) -> LowRank:
        y = flatten(x.astype(self.p.dtype))
        root = LowRank(*(jnp.sqrt(jnp.maximum(a, 0)) if squared else a for a in (y.U, y.S, y.V)))
        turned = (mf.rotate_tangent if tangent else mf.rotate)(root, self.p, self.q)
        s = _fit(_fit(turned.S, self.width, -1), self.width, -2)
        out = LowRank(_fit(turned.U, self.width, -1), s, _fit(turned.V, self.width, -1))
        if squared:
            out = LowRank(jnp.square(out.U), jnp.square(out.S), jnp.square(out.V))
        return cast_like(unflatten(out, x), x)

    def state(self, k: KernelState) -> KernelState:
        rank = jnp.minimum(k.rank, self.width).astype(k.rank.dtype)
        lost = relative_tail(self.sigma, jnp.full_like(k.rank, self.width)).astype(k.truncation.dtype)
        return KernelState(rank, k.gradient_norm, jnp.maximum(k.truncation, lost))


def _fit(x: jax.Array, width: int, axis: int) -> jax.Array:
    """x cut or padded with zeros to `width` along one of its last axes."""
    have = x.shape[axis]
    if width <= have:
        return jax.lax.slice_in_dim(x, 0, width, axis=axis)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, width - have)
    return jnp.pad(x, pad)


def resize(params: Any, opt_state: Any = None, rank: Rank | None = None) -> tuple[Any, Any]:
    """Changes the width of the factors and of the optimizer state together, so that memory and time follow the ranks.

    Growing, and shrinking to no less than the active rank, leave W unchanged. Shrinking below truncates W to its
    best approximation; the loss is reported as `truncation` in `diagnostics`. Moments move along.

    Call it outside `jit`, where shapes may change, and between steps; compiled steps compile again for new shapes.

    Args:
      params: a tree with `LowRank` nodes.
      opt_state: the matching state of any transformation with `fixed_rank` inside, or None.
      rank: new width, an int, a fraction of min(m, n), or a callable of the path and the dense shape, e.g.
        `buckets(params)`; cut to min(m, n). None for the active rank of each kernel (the largest of a stack), as small
        as W allows. A kernel in the canonical gauge whose width does not change stays the same to the bit.

    Returns:
      Parameters and state.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2, max_rank=4)
      >>> params, state = lro.resize(params, lro.lowrank_adam(1e-3).init(params))
      >>> params["kernel"].U.shape, state.inner_state[0].mu["kernel"].U.shape
      ((6, 2), (6, 2))
    """
    moves: dict[Any, _Move | None] = {}
    for path, W in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_lowrank):
        if is_lowrank(W):
            moves[tuple(path)] = _plan(path_name(path), W, rank)

    def kernel(path: Any, x: Any) -> Any:
        move = moves.get(tuple(path))
        return move.kernel() if move else x

    new_params = jax.tree_util.tree_map_with_path(kernel, params, is_leaf=is_lowrank)
    node = lambda x: is_lowrank(x) or isinstance(x, FixedRankState)  # noqa: E731

    def outer(path: Any, x: Any) -> Any:
        if isinstance(x, FixedRankState):
            return _resize_state(x, moves)
        move = _owner(path, moves) if is_lowrank(x) else None
        # A factored node outside of fixed_rank holds gradients (accumulated by MultiSteps, say).
        return move.triple(x, tangent=False, squared=False) if move else x

    return new_params, jax.tree_util.tree_map_with_path(outer, opt_state, is_leaf=node)


def buckets(params: Any, size: int = 8, *, max_rank: Rank | None = None) -> Callable[[str, tuple[int, ...]], int]:
    r"""Widths for `resize` that follow the active ranks in multiples of `size`, so that few shapes are compiled.

    A kernel of rank k and width w gets the first of these widths that applies, where
    :math:`\lceil k \rceil` is the next multiple of `size`, cut to `max_rank`:

    .. math::

      \lceil k + 1 \rceil \ \text{if that is above } w, \quad
      \lceil k + 1 + \tfrac{1}{2}\,\text{size} \rceil \ \text{if that is below } w, \quad w

    One column stays free, or a rank policy could not show that it wants more. Ranks that wander by half a bucket
    change no shape. There are at most `max_rank / size` widths of a kernel, and a step compiles at most once for
    every `resize` that changed one.

    Args:
      params: a tree with `LowRank` nodes.
      size: distance of the widths.
      max_rank: largest width, of the forms that `factorize` takes. Default: min(m, n).

    Returns:
      For the argument `rank` of `resize`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(64)}, rank=5, max_rank=32)
      >>> params, _ = lro.resize(params, None, lro.buckets(params, 8))
      >>> params["kernel"].rank
      16
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_lowrank)
    kernels = {path_name(path): W for path, W in leaves if is_lowrank(W)}
    active = {name: max(1, int(jnp.max(rank))) for name, rank in ranks(params).items()}

    def width(name: str, shape: tuple[int, ...]) -> int:
        F, k = flatten(kernels[name]), active[name]
        limit = min(F.U.shape[-2], F.V.shape[-2])
        most = limit if max_rank is None else min(limit, rank_number(max_rank, name, shape, limit))
        least, roomy = (min(most, -(-x // size) * size) for x in (k + 1, k + 1 + size // 2))
        return least if least > F.rank else min(roomy, F.rank)

    return width


def _plan(name: str, W: LowRank, rank: Rank | None) -> _Move | None:
    """None for a kernel that stays as it is, to the bit."""
    F = flatten(W.astype(linalg.working_dtype(W.U, W.S, W.V)))
    limit = min(F.U.shape[-2], F.V.shape[-2])
    p = q = jnp.broadcast_to(jnp.eye(F.rank, dtype=F.S.dtype), F.S.shape)
    sigma = linalg.diag_part(F.S)
    canonical = bool(jnp.all(mf.is_canonical(F.S)))
    if not canonical:
        p, sigma, q = mf.gauge(F.S)
    width = max(1, int(jnp.max(mf.rank(F.S)))) if rank is None else min(limit, rank_number(rank, name, W.shape, limit))
    return None if canonical and width == F.rank else _Move(W, sigma, p, q, width)


def _owner(path: Any, moves: dict[Any, _Move | None]) -> _Move | None:
    """The move of the kernel whose path ends the path of a leaf of the state."""
    ends = [end for end in moves if tuple(path)[len(path) - len(end) :] == end]
    return moves[max(ends, key=len)] if ends else None


def _resize_state(state: FixedRankState, moves: dict[Any, _Move | None]) -> FixedRankState:
    def mirror(path: Any, x: Any) -> Any:
        move = _owner(path, moves)
        if move is None:
            return x
        names = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
        squared = any(name in SECOND_MOMENTS for name in names)
        if is_lowrank(x):
            return x if jnp.ndim(x.S) == 0 else move.triple(x, tangent=True, squared=squared)
        return move.coefficients(x, squared) if jnp.shape(x) == move.W.S.shape else x

    def kernel(path: Any, k: Any) -> Any:
        move = _owner(path, moves)
        return move.state(k) if isinstance(k, KernelState) and move else k

    is_state = lambda x: isinstance(x, KernelState)  # noqa: E731
    return state._replace(
        inner_state=jax.tree_util.tree_map_with_path(mirror, state.inner_state, is_leaf=is_lowrank),
        kernels=jax.tree_util.tree_map_with_path(kernel, state.kernels, is_leaf=is_state),
    )


def incremental_update(new: Any, old: Any, step_size: float | jax.Array) -> Any:
    r"""`optax.incremental_update` for factored parameters: a moving average that stays on the manifold.

    .. math:: W \leftarrow R\big(t\,W_{\mathrm{new}} + (1 - t)\,W_{\mathrm{old}}\big)

    with R the truncation to the rank of `new`. Averaging U, S and V leaf by leaf, as `optax.ema`, lookahead and
    schedule-free do, leaves the manifold, because equal kernels may have different bases.

    Args:
      new: parameters after a step.
      old: the average so far, of the same structure.
      step_size: weight t of `new`.

    Returns:
      The new average.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> a, b = (lro.factorize({"kernel": c * jnp.eye(4)}, 4) for c in (1.0, 3.0))
      >>> bool(jnp.allclose(lro.incremental_update(a, b, 0.5)["kernel"].to_dense(), 2 * jnp.eye(4), atol=1e-5))
      True
    """

    def one(a: Any, b: Any) -> Any:
        if not is_lowrank(a):
            return optax.incremental_update(a, b, step_size)
        return Placement(a).auto(mean, a, b, step_size)

    def mean(a: LowRank, b: LowRank, step_size: Any) -> LowRank:
        dtype = linalg.working_dtype(a.U, a.S, a.V)
        x, y = flatten(a.astype(dtype)), flatten(b.astype(dtype))
        u, ru = linalg.orthonormalize(jnp.concatenate([x.U, y.U], axis=-1))
        v, rv = linalg.orthonormalize(jnp.concatenate([x.V, y.V], axis=-1))
        r = x.rank
        s = step_size * mf.congruence(x.S, ru[..., :r], rv[..., :r])
        s = s + (1 - step_size) * mf.congruence(y.S, ru[..., r:], rv[..., r:])
        p, sigma, q = linalg.svd(s.astype(dtype))
        sigma = jnp.where(linalg.leading(mf.rank(x.S), r), sigma[..., :r], 0.0)
        middle = LowRank(u @ p[..., :r], linalg.diagonal(sigma), v @ q[..., :r])
        return cast_like(unflatten(middle, a), a)

    return jax.tree.map(one, new, old, is_leaf=is_lowrank)
