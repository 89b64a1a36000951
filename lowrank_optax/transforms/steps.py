"""The steps of the paper on a whole parameter tree: project, update, retract, carry.

In the trees given and returned every kernel is flattened and in the working dtype; in the lists that steps work on,
kernels of equal shape are one stacked kernel. A step returns new kernels, and
at the ordinary leaves the updates of the inner transformation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import balanced, linalg
from lowrank_optax import manifold as mf
from lowrank_optax.linalg import transpose
from lowrank_optax.lowrank import LowRank
from lowrank_optax.rank import RankPolicy, Spectrum, relative_tail
from lowrank_optax.transforms.carry import (
    Change,
    carry,
    coefficient_change,
    gauge_change,
    map_mirrors,
    mirrors_finite,
    rest_finite,
    stayed_finite,
    transport_change,
    turn_change,
)
from lowrank_optax.transforms.split import Split
from lowrank_optax.xla import apply_if, together


class KernelState(NamedTuple):
    """What the optimizer keeps of one kernel, all of shape `(batch...)`.

    Attributes:
      rank: the rank kept by the last truncation, int32.
      gradient_norm: |P(W)G|_F when the bases last moved.
      truncation: relative Frobenius norm of what the last truncation discarded.
    """

    rank: jax.Array
    gradient_norm: jax.Array
    truncation: jax.Array


@dataclasses.dataclass(frozen=True)
class Method:
    """The options of `fixed_rank` that a step needs.

    Attributes:
      inner: the transformation of the whole tree.
      kernel_inner: the part of it for kernels, where ordinary leaves have a transformation of their own; else None.
      policy: chooses ranks.
      retraction: "svd" or "bug".
      momentum: "balanced", "tangent" or "coefficient": what moments are.
      in_place: whether bases are augmented within the width of the factors.
      second_moments: fields of the inner state that hold squares.
    """

    inner: optax.GradientTransformationExtraArgs
    kernel_inner: optax.GradientTransformation | None
    policy: RankPolicy
    retraction: str
    momentum: str
    in_place: bool
    second_moments: tuple[str, ...]

    def carry(
        self, state: Any, split: Split, changes: list[Change], when: jax.Array | None = None
    ) -> tuple[Any, list[Any]]:
        """The inner state in new bases, and what of it moved; the same state unless `when`."""
        tx, part = self.kernel_part(state)
        part, moved = carry(tx, part, split, changes, self.second_moments, when)
        return self._with_kernel_part(state, part), moved

    def finite(self, state: Any, split: Split) -> jax.Array:
        """Whether the mirrors of kernels in the inner state are finite."""
        return mirrors_finite(*self.kernel_part(state), split)

    def rest_finite(self, old: Any, new: Any, split: Split) -> jax.Array:
        """Whether the leaves of the inner state that mirror no kernel have stayed finite."""
        (tx, before), (_, after) = self.kernel_part(old), self.kernel_part(new)
        finite = rest_finite(tx, before, after, split)
        if self.kernel_inner is None:
            return finite
        return finite & stayed_finite(old.inner_states["ordinary"], new.inner_states["ordinary"])

    def map_mirrors(self, f: Callable[..., Any], split: Split, *states: Any) -> Any:
        """The first inner state with `f` of the values in all states at every place that mirrors a kernel."""
        (tx, _), *_ = parts = list(map(self.kernel_part, states))
        return self._with_kernel_part(states[0], map_mirrors(f, tx, split, *(part for _, part in parts)))

    def working_state(self, state: Any, split: Split) -> Any:
        """The inner state without what no step changes: the S of moments of balanced factors, which is zero."""
        if self.momentum != "balanced":
            return state
        return self.map_mirrors(balanced.without_zero, split, state)

    def whole_state(self, state: Any, old: Any, split: Split) -> Any:
        """The inverse of `working_state`, given the whole state before the step."""
        if self.momentum != "balanced":
            return state
        return self.map_mirrors(balanced.with_zero, split, state, old)

    def kernel_part(self, state: Any) -> tuple[optax.GradientTransformation, Any]:
        """The transformation of the kernels and its state."""
        if self.kernel_inner is None:
            return self.inner, state
        return self.kernel_inner, state.inner_states["kernel"]

    def _with_kernel_part(self, state: Any, part: Any) -> Any:
        if self.kernel_inner is None:
            return part
        return state._replace(inner_states={**state.inner_states, "kernel": part})

    def view(self, W: LowRank) -> Any:
        """What the inner transformation sees of a kernel: W as a coefficient matrix, tangent vector or pair."""
        if self.momentum == "balanced":
            return balanced.halves(
                balanced.balance(W, balanced.columns(W.S, jnp.ones((*W.batch_shape, 1, W.rank), bool)))
            )
        return LowRank(jnp.zeros_like(W.U), W.S, jnp.zeros_like(W.V)) if self.momentum == "tangent" else W.S


class Point(NamedTuple):
    """Where a step starts and ends.

    Attributes:
      params: parameters; after a step new kernels, and updates at the ordinary leaves.
      kernels: a tree with a `KernelState` at every kernel.
      inner_state: state of the inner transformation.
      finite: whether everything met and made at the kernels was finite.
    """

    params: Any
    kernels: Any
    inner_state: Any
    finite: jax.Array


Kernels = list[LowRank]  # one stacked kernel for each group of a Split


@linalg.precise
def canonicalize(method: Method, split: Split, point: Point, grads: Any) -> tuple[Point, Kernels, Kernels]:
    """Brings kernels, gradients and moments to the canonical gauge, where they usually are already.

    Returns:
      The point, whose kernels are not to be used any more; the kernels and their gradients, group by group.
    """
    Ws, gs = split.kernels(point.params), split.kernels(grads)
    ok = jnp.all(jnp.stack([jnp.all(x) for x in together(mf.is_canonical, [W.S for W in Ws])]))

    def turn(old: tuple[Kernels, Kernels, Any]) -> tuple[Kernels, Kernels, Any]:
        Ws, gs, _ = old
        gauges = together(mf.gauge, [W.S for W in Ws])
        turned = [
            LowRank(W.U @ p, linalg.diagonal(sigma), W.V @ q) for W, (p, sigma, q) in zip(Ws, gauges, strict=True)
        ]
        gs = [mf.rotate(g, p, q) for g, (p, _, q) in zip(gs, gauges, strict=True)]
        return turned, gs, [(p, q) for p, _, q in gauges]

    Ws, gs, turns = apply_if(~ok, turn, (Ws, gs, [(W.S, W.S) for W in Ws]))
    changes = [gauge_change(method.momentum, p, q) for p, q in turns]
    inner_state, _ = method.carry(point.inner_state, split, changes, ~ok)
    return point._replace(inner_state=inner_state), Ws, gs


def _states(split: Split, states: list[KernelState]) -> Any:
    return split.merge(states, [None] * split.ordinary_count)


def _project(W: LowRank, g: LowRank, k: KernelState) -> LowRank:
    return mf.project(W, g, linalg.leading(k.rank, W.rank))


def _sound(new: Kernels, norms: list[jax.Array], moments: list[Any]) -> jax.Array:
    """Whether a step is finite: NaN in a basis or a tangent vector is NaN in S or the norm."""
    return linalg.all_finite(([W.S for W in new], norms, moments))


def _trimmed(Ws: list[LowRank], ks: list[KernelState]) -> list[LowRank]:
    return [mf.trim(W, linalg.leading(k.rank, W.rank)) for W, k in zip(Ws, ks, strict=True)]


def _weights(Ws: list[LowRank], frames: list[mf.Frame]) -> list[jax.Array]:
    """The kernels as matrices in the frames."""
    return together(mf.congruence, [W.S for W in Ws], [f.left for f in frames], [f.right for f in frames])


def _coefficients(xis: list[LowRank], frames: list[mf.Frame]) -> list[jax.Array]:
    """Tangent vectors as matrices in the frames."""
    return together(mf.coefficients, [xi.S for xi in xis], *zip(*(f[2:] for f in frames), strict=True))


def _finish(
    method: Method,
    Ws: list[LowRank],
    frames: list[mf.Frame],
    ys: list[jax.Array],
    ks: list[KernelState],
    norms: list[jax.Array],
) -> tuple[list[LowRank], list[KernelState], list[Change]]:
    """Retracts the coefficients y, chooses all ranks together, truncates; with the changes from the frames."""

    def retract(y: jax.Array, left: jax.Array, right: jax.Array, active: jax.Array) -> mf.Retraction:
        if method.retraction == "bug":
            return mf.align(mf.retract_bug(y, left, right, active[..., 0, :]), left)
        return mf.align(mf.retract_svd(y, left.shape[-1]), left)

    masks = [linalg.leading(k.rank, W.rank)[..., None, :] for W, k in zip(Ws, ks, strict=True)]
    tries = together(retract, ys, [f.left for f in frames], [f.right for f in frames], masks)
    spectra = [
        Spectrum(t.spectrum, k.rank, W.rank, (W.U.shape[-2], W.V.shape[-2]))
        for W, t, k in zip(Ws, tries, ks, strict=True)
    ]
    new, states, changes = [], [], []
    chosen = method.policy.choose(spectra)
    for W, frame, t, k, rank, norm in zip(Ws, frames, tries, ks, chosen, norms, strict=True):
        # A galerkin loop begins with new directions, as many as the rank: growth leaves room for them.
        most = jnp.maximum(k.rank, W.rank // 2) if method.in_place else W.rank
        rank = jnp.minimum(rank, most).astype(jnp.int32)
        kept = linalg.leading(rank, W.rank)[..., None, :]
        new.append(mf.assemble(frame, t, rank))
        states.append(KernelState(rank, norm, relative_tail(t.spectrum, rank)))
        left, right = (transpose(jnp.where(kept, x, 0.0)) for x in (t.left, t.right))
        changes.append(coefficient_change(left, right))
    return new, states, changes


def coefficient_step(
    method: Method,
    split: Split,
    point: Point,
    grads: Any,
    extra: dict[str, Any],
    grad_fn: Callable[[Any], Any] | None = None,
    local_steps: int = 1,
) -> Point:
    """One whole step with moments in r x r coefficients: augment, carry, update, truncate, carry back.

    Args:
      method: options.
      split: places of the kernels.
      point: where the step starts, in any gauge.
      grads: gradients of the factors and of ordinary leaves.
      extra: extra arguments for the inner transformation.
      grad_fn: None for one update with the projected gradient. Otherwise gradients at flattened parameters, for
        `local_steps` updates with the galerkin gradient in the augmented bases.
      local_steps: see `grad_fn`.
    """
    point, Ws, gs = canonicalize(method, split, point, grads)
    ks = split.kernels(point.kernels)
    xis = [_project(W, g, k) for W, g, k in zip(Ws, gs, ks, strict=True)]
    frames = mf.augment(Ws, xis, [k.rank for k in ks], times=2)
    S = _weights(Ws, frames)
    changes = [coefficient_change(f.left, f.right) for f in frames]
    inner_state, _ = method.carry(point.inner_state, split, changes)
    ordinary = split.ordinary(point.params)

    if grad_fn is None:
        coefficients = _coefficients(xis, frames)
        steps, inner_state = method.inner.update(
            split.merge(coefficients, split.ordinary(grads)), inner_state, split.merge(S, ordinary), **extra
        )
        ys = [s + d for s, d in zip(S, split.kernels(steps), strict=True)]
        updates = split.ordinary(steps)
    else:
        augmented = (LowRank(f.U.array(), s, f.V.array()) for f, s in zip(frames, S, strict=True))
        now = Point(split.merge(augmented, ordinary), point.kernels, inner_state, point.finite)
        for _ in range(local_steps):
            moved = frozen_step(method, split, now, grad_fn(now.params), extra)
            rest = optax.apply_updates(split.ordinary(now.params), split.ordinary(moved.params))
            now = moved._replace(params=split.merge(split.kernels(moved.params), rest))
        ys, inner_state = [W.S for W in split.kernels(now.params)], now.inner_state
        end = split.ordinary(now.params)
        updates = [b - a for a, b in zip(ordinary, end, strict=True)]

    norms = [mf.norm(xi) for xi in xis]
    new, states, changes = _finish(method, Ws, frames, ys, ks, norms)
    inner_state, moments = method.carry(inner_state, split, changes)
    finite = point.finite & _sound(new, norms, moments)
    return Point(split.merge(new, updates), _states(split, states), inner_state, finite)


def tangent_step(method: Method, split: Split, point: Point, grads: Any, extra: dict[str, Any]) -> Point:
    """One whole step with moments that are tangent vectors: nothing that leaves the bases is lost."""
    point, Ws, gs = canonicalize(method, split, point, grads)
    ks = split.kernels(point.kernels)
    xis = [_project(W, g, k) for W, g, k in zip(Ws, gs, ks, strict=True)]
    steps, inner_state = method.inner.update(
        split.merge(xis, split.ordinary(grads)),
        point.inner_state,
        split.merge((method.view(W) for W in Ws), split.ordinary(point.params)),
        **extra,
    )
    directions = [
        mf.make_horizontal(W, d, linalg.leading(k.rank, W.rank))
        for W, d, k in zip(Ws, split.kernels(steps), ks, strict=True)
    ]
    frames = mf.augment(Ws, directions, [k.rank for k in ks], times=2)
    ys = [s + d for s, d in zip(_weights(Ws, frames), _coefficients(directions, frames), strict=True)]
    norms = [mf.norm(xi) for xi in xis]
    new, states, _ = _finish(method, Ws, frames, ys, ks, norms)
    changes = list(map(transport_change, _trimmed(Ws, ks), _trimmed(new, states)))
    inner_state, moments = method.carry(inner_state, split, changes)
    finite = point.finite & _sound(new, norms, moments)
    return Point(split.merge(new, split.ordinary(steps)), _states(split, states), inner_state, finite)


def balanced_step(method: Method, split: Split, point: Point, grads: Any, extra: dict[str, Any]) -> Point:
    """One whole step with moments on balanced factors: the pair moves and is balanced anew.

    The S of moments, which is zero, is None in the inner state given and returned, see `Method.working_state`.
    """
    point, Ws, gs = canonicalize(method, split, point, grads)
    ks = split.kernels(point.kernels)
    actives = [linalg.leading(k.rank, W.rank)[..., None, :] for W, k in zip(Ws, ks, strict=True)]
    columns = together(balanced.columns, [W.S for W in Ws], actives)
    gradients = balanced.gradients(Ws, gs, columns)
    pairs = list(map(balanced.balance, Ws, columns))
    steps, inner_state = method.inner.update(
        split.merge(gradients, split.ordinary(grads)),
        method.map_mirrors(balanced.with_zero, split, point.inner_state),
        split.merge(map(balanced.halves, pairs), split.ordinary(point.params)),
        **extra,
    )
    moved = balanced.rebalance(list(map(balanced.move, pairs, split.kernels(steps), columns)), actives)
    norms = balanced.norms(gradients, [g.S for g in gs], columns)
    states = [k._replace(gradient_norm=norm) for k, norm in zip(ks, norms, strict=True)]
    changes = [turn_change(balanced.turn, x.x, x.y) for x in moved]
    new = [x.kernel for x in moved]
    inner_state, moments = method.carry(method.working_state(inner_state, split), split, changes)
    finite = point.finite & _sound(new, norms, moments)
    return Point(split.merge(new, split.ordinary(steps)), _states(split, states), inner_state, finite)


def augment_step(
    method: Method,
    split: Split,
    point: Point,
    grads: Any,
    extra: dict[str, Any],
    move_ordinary: bool,
) -> Point:
    """The first batch of a galerkin loop: bases grow within the width of the factors, W stays."""
    point, Ws, gs = canonicalize(method, split, point, grads)
    inner_state, ks = point.inner_state, split.kernels(point.kernels)
    updates = [jnp.zeros_like(x) for x in split.ordinary(point.params)]
    if move_ordinary:
        steps, after = method.inner.update(
            split.merge((jnp.zeros_like(W.S) for W in Ws), split.ordinary(grads)),
            inner_state,
            split.merge((W.S for W in Ws), split.ordinary(point.params)),
            **extra,
        )
        inner_state = method.map_mirrors(lambda new, old: old, split, after, inner_state)
        updates = split.ordinary(steps)

    new, states, changes = [], [], []
    xis = [_project(W, g, k) for W, g, k in zip(Ws, gs, ks, strict=True)]
    frames = mf.augment(Ws, xis, [k.rank for k in ks], times=1)
    for S, xi, frame, k in zip(_weights(Ws, frames), xis, frames, ks, strict=True):
        new.append(LowRank(frame.U.array(), S, frame.V.array()))
        states.append(k._replace(gradient_norm=mf.norm(xi)))
        changes.append(coefficient_change(frame.left, frame.right))
    inner_state, moments = method.carry(inner_state, split, changes)
    finite = point.finite & _sound(new, [k.gradient_norm for k in states], moments)
    return Point(split.merge(new, updates), _states(split, states), inner_state, finite)


def frozen_step(method: Method, split: Split, point: Point, grads: Any, extra: dict[str, Any]) -> Point:
    """A later batch of a galerkin loop: the inner update on S, U and V frozen."""
    Ws = split.kernels(point.params)
    blocks = [mf.augmented_block(W.S, k.rank) for W, k in zip(Ws, split.kernels(point.kernels), strict=True)]
    gs = [jnp.where(b, g.S, 0.0) for b, g in zip(blocks, split.kernels(grads), strict=True)]
    steps, inner_state = method.inner.update(
        split.merge(gs, split.ordinary(grads)),
        point.inner_state,
        split.merge((W.S for W in Ws), split.ordinary(point.params)),
        **extra,
    )
    new = [
        LowRank(W.U, W.S + jnp.where(b, d, 0.0), W.V) for W, b, d in zip(Ws, blocks, split.kernels(steps), strict=True)
    ]
    finite = point.finite & linalg.all_finite([W.S for W in new]) & method.finite(inner_state, split)
    return Point(split.merge(new, split.ordinary(steps)), point.kernels, inner_state, finite)


def truncate_step(method: Method, split: Split, point: Point) -> Point:
    """The end of a galerkin loop: S and the moments are truncated to the new rank."""
    Ws, ks = split.kernels(point.params), split.kernels(point.kernels)
    frames = []
    for W in Ws:
        eye = jnp.broadcast_to(jnp.eye(W.rank, dtype=W.S.dtype), W.S.shape)
        frames.append(mf.Frame(mf.Basis((W.U,), eye), mf.Basis((W.V,), eye), eye, eye, eye, eye))
    norms = [k.gradient_norm for k in ks]
    new, states, changes = _finish(method, Ws, frames, [W.S for W in Ws], ks, norms)
    inner_state, moments = method.carry(point.inner_state, split, changes)
    finite = point.finite & linalg.all_finite((new, moments))
    return Point(split.merge(new, split.ordinary(point.params)), _states(split, states), inner_state, finite)
