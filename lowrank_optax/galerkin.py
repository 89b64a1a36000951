"""The loop of the paper's authors: augment the bases, take steps with them frozen, truncate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.checks import check_gradients, is_known
from lowrank_optax.door import Door, FixedRankState
from lowrank_optax.geometry import Frozen, Info, Settled
from lowrank_optax.guard import MOST_SKIPS
from lowrank_optax.layout import Layout, map_numbers
from lowrank_optax.lowrank import LowRank
from lowrank_optax.moments import Moments
from lowrank_optax.optimize import choose_ranks, step
from lowrank_optax.rank import RankPolicy, Spectrum, relative_tail


class GalerkinState(NamedTuple):
    """State of `galerkin`.

    Attributes:
      loop: the state that `fixed_rank` keeps too, with moments in the current bases.
      phase: position in the loop, int32: 0 when the next call augments.
    """

    loop: FixedRankState
    phase: jax.Array


@dataclasses.dataclass(frozen=True)
class GalerkinBases(Frozen):
    """Bases that grow and are cut within the width of the factors, between steps with frozen bases."""

    def check(self, name: str, leaf: LowRank) -> None:
        """Raises ValueError where there is no room for new directions."""
        super().check(name, leaf)
        m, n = jax.eval_shape(lambda W: self.weight(W, W), leaf).shape[-2:]
        if not is_known(leaf) or leaf.width == min(m, n):
            return
        with jax.ensure_compile_time_eval():
            S = leaf.S.astype(linalg.working_dtype(leaf.S))
            rank = int(jnp.max(map_numbers(mf.rank, S)))
        if 2 * rank > leaf.width or leaf.width < 2:
            raise ValueError(
                f"galerkin augments the bases within the factors, and {name!r} of rank {rank} has factors of width "
                f"{leaf.width}: call factorize(params, rank, max_rank=2 * rank), or use fixed_rank"
            )

    def augment(self, weight: LowRank, grad: LowRank, rank: jax.Array, info: Info, *, twice: bool) -> Settled:
        """The same W in augmented bases, of the width of the factors or twice as wide."""
        kernel, grad, _, _ = mf.canonicalize(weight, grad)
        xi = mf.project(kernel, grad, rank)
        bases = mf.augment(kernel, xi, rank, 2 * kernel.width if twice else kernel.width)
        U, V = bases.left.basis.columns(), bases.right.basis.columns()
        new = LowRank(U, mf.weight_coefficients(kernel, bases), V)
        change = self.rebase(weight, mf.trim(new, 2 * rank))
        return Settled(new, rank, info._replace(gradient_norm=mf.norm(xi)), change)

    def decompose(self, weight: LowRank) -> mf.Retraction:
        """The SVD of S."""
        p, sigma, q = linalg.svd(weight.S, toward=jnp.eye(weight.S.shape[0], dtype=weight.S.dtype))
        return mf.Retraction(p, q, sigma)

    def spectrum(self, start: LowRank, point: mf.Retraction, rank: jax.Array) -> Spectrum:  # type: ignore[override]
        """Singular values before truncation to the width that the factors have at the start of a loop."""
        return Spectrum(point.sigma, rank, start.width, (start.U.shape[0], start.V.shape[0]))

    def cut(
        self, weight: LowRank, start: LowRank, point: mf.Retraction, rank: jax.Array, info: Info, chosen: Any
    ) -> Settled:
        """The kernel truncated to the chosen rank, which leaves room for as many new directions."""
        width = start.width
        most = jnp.maximum(rank, width // 2)
        rank = rank if chosen is None else jnp.minimum(chosen, most).astype(jnp.int32)
        S = linalg.diagonal(jnp.where(linalg.rank_mask(rank, width), point.sigma[:width], 0.0))
        new = LowRank(weight.U @ point.left[:, :width], S, weight.V @ point.right[:, :width])
        info = info._replace(rank=rank, truncation=relative_tail(point.sigma, rank))
        kept = (linalg.first_columns(x[:, :width], rank) for x in (point.left, point.right))
        return Settled(new, rank, info, mf.Turn(*kept))


def galerkin(
    inner: optax.GradientTransformation,
    local_steps: int = 1,
    *,
    rank: RankPolicy | None = None,
    move_ordinary: bool = False,
    first_moments: Sequence[str] = (),
    second_moments: Sequence[str] = (),
    max_consecutive_skips: int | jax.Array = MOST_SKIPS,
) -> optax.GradientTransformationExtraArgs:
    r"""The low-rank counterpart of an Optax transformation, in the loop of the paper's authors.

    A loop takes `local_steps + 1` calls of `update`. The first only augments the bases with the gradient,

    .. math:: \hat U = \mathrm{orth}[U, U_p], \quad \hat V = \mathrm{orth}[V, V_p], \quad
      \hat S = \hat U^\top U S V^\top \hat V,

    and W stays. In the later ones `inner` updates the full :math:`\hat S` with the gradients
    :math:`\hat U^\top G \hat V` of their batches, the bases frozen, and the last one truncates,

    .. math:: \hat S = P\, \mathrm{diag}(\sigma)\, Q^\top, \quad U = \hat U P_1, \quad S = \mathrm{diag}(\sigma_{1:r'}),
      \quad V = \hat V Q_1.

    Moments are coefficients, as in `Coefficient`. Factors need a width of twice the rank (`max_rank` of `factorize`).

    Args:
      inner: see `fixed_rank`.
      local_steps: steps with frozen bases, a Python int.
      rank: `tolerance(...)`, `budget(...)`, or None to keep the rank of every kernel.
      move_ordinary: whether ordinary leaves also move on the augmenting call. In the authors' loop they do not. If they
        do, step counters inside `inner` also advance on that call.
      first_moments: see `fixed_rank`.
      second_moments: see `fixed_rank`.
      max_consecutive_skips: see `fixed_rank`.

    Returns:
      An Optax transformation. Its `update` takes an optional extra argument `grad_fn`, a function from parameters to
      gradients: each call is then a whole loop on one batch.

    Raises:
      ValueError: for `local_steps` below 1 or a rank that is no policy; from `init` for factors without room. Else see
        `fixed_rank`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2, max_rank=4)
      >>> state = lro.galerkin(optax.adam(1e-3), local_steps=2).init(params)

    References:
      arXiv:2506.17475, low-rank heavy ball and low-rank Adam, in the loop of the authors' public code.
    """
    if not isinstance(local_steps, int) or local_steps < 1:
        raise ValueError(
            "local_steps must be a Python int of at least 1 (list it in static_args of inject_hyperparams), got "
            f"{local_steps!r}"
        )
    if rank is not None and not isinstance(rank, RankPolicy):
        raise ValueError(f"rank takes a policy, lro.tolerance(theta) or lro.budget(parameters), or None; got {rank!r}")
    inner = optax.with_extra_args_support(inner)
    moments = Moments(inner, first_moments, second_moments)

    def make(inner: Any, layout: Layout) -> Any:
        return _Driver(inner, moments, layout, rank, local_steps, move_ordinary).update

    def first(loop: FixedRankState) -> GalerkinState:
        return GalerkinState(loop, jnp.zeros((), jnp.int32))

    return Door(inner, moments, GalerkinBases(), GalerkinState).transformation(make, max_consecutive_skips, first)


Groups = list[Any]


def _cond(when: jax.Array, true: Callable[[], Any], false: Callable[[], Any]) -> Any:
    """`jax.lax.cond` under `jit`. An eager `lax.cond` would compile its branches at every call: here one just runs."""
    if isinstance(when, jax.core.Tracer):
        return jax.lax.cond(when, true, false)
    return true() if when else false()


@dataclasses.dataclass(frozen=True)
class _Driver:
    """The loop on groups of leaves: rebase, frozen steps, rebase."""

    inner: optax.GradientTransformationExtraArgs
    moments: Moments
    layout: Layout
    policy: RankPolicy | None
    local_steps: int
    move_ordinary: bool

    def update(self, grads: Groups, state: GalerkinState, weights: Groups, *, grad_fn: Any = None, **extra: Any) -> Any:
        """One call."""
        if not self.layout.has_kernels:
            new, loop = self._frozen(grads, state.loop, weights, extra)
            return self._differences(new, weights), GalerkinState(loop, state.phase)
        if grad_fn is not None:
            new, loop = self._whole_loop(grad_fn, grads, state.loop, weights, extra)
            return self._differences(new, weights), GalerkinState(loop, state.phase)

        def first() -> tuple[Groups, FixedRankState]:
            return self._augment(grads, state.loop, weights, extra)

        def later() -> tuple[Groups, FixedRankState]:
            new, loop = self._frozen(grads, state.loop, weights, extra)
            cut = functools.partial(self._truncate, new, weights, loop)
            return _cond(state.phase == self.local_steps, cut, lambda: (new, loop))

        new, loop = _cond(state.phase == 0, first, later)
        phase = jnp.where(state.phase == self.local_steps, 0, state.phase + 1).astype(jnp.int32)
        return self._differences(new, weights), GalerkinState(loop, phase)

    def _whole_loop(
        self,
        grad_fn: Callable[[Any], Any],
        grads: Groups,
        state: FixedRankState,
        weights: Groups,
        extra: dict[str, Any],
    ) -> tuple[Groups, FixedRankState]:
        new, state = self._rebased("augment", state, weights, grads, state.aux, state.info, twice=True)
        for _ in range(self.local_steps):
            at = self.layout.params(new)
            grads = self.layout.mesh.explicit(grad_fn)(at)
            check_gradients(grads, at)
            new, state = self._frozen(self.layout.weights(grads), state, new, extra)
        return self._truncate(new, weights, state)

    def _augment(
        self, grads: Groups, state: FixedRankState, weights: Groups, extra: dict[str, Any]
    ) -> tuple[Groups, FixedRankState]:
        inner_state, new = state.inner_state, list(weights)
        if self.move_ordinary:
            frames = self.layout.map("frame", weights, grads, state.aux)
            zeros = [f.grad if g.ordinary else jax.tree.map(jnp.zeros_like, f.grad) for g, f in self._rows(frames)]
            steps, after = self.inner.update(zeros, inner_state, [f.weight for f in frames], **extra)
            new = [optax.apply_updates(w, d) if g.ordinary else w for g, w, d in self._rows(weights, steps)]
            inner_state = self.moments.map(
                lambda a, b: [x if g.ordinary else y for g, x, y in self._rows(a.tree, b.tree)], after, inner_state
            )
        state = state._replace(inner_state=inner_state)
        return self._rebased("augment", state, new, grads, state.aux, state.info, twice=False)

    def _frozen(
        self, grads: Groups, state: FixedRankState, weights: Groups, extra: dict[str, Any]
    ) -> tuple[Groups, FixedRankState]:
        ends, after = step(self.inner, self.moments, self.layout, None, grads, state, weights, **extra)
        new = [optax.apply_updates(w, d) if g.ordinary else d for g, w, d in self._rows(weights, ends)]
        return new, after._replace(info=state.info)

    def _truncate(self, weights: Groups, start: Groups, state: FixedRankState) -> tuple[Groups, FixedRankState]:
        points = [g.call("decompose", w) if not g.ordinary else None for g, w in self._rows(weights)]
        chosen: list[Any] = [None] * len(points)
        if self.policy:
            rows = self._rows(start, points, state.aux)
            spectra = [None if g.ordinary else g.call("spectrum", *args) for g, *args in rows]
            chosen = choose_ranks(self.policy, spectra)
        return self._rebased("cut", state, weights, start, points, state.aux, state.info, chosen)

    def _rebased(self, method: str, state: FixedRankState, weights: Groups, *values: Groups, **static: Any) -> Any:
        """New weights by a method that changes bases, and the state in those bases."""
        rows = self._rows(weights, *values)
        ends = [Settled(args[0], (), (), None) if g.ordinary else g.call(method, *args, **static) for g, *args in rows]
        changes = [end.change for end in ends]
        inner_state = self.moments.map(
            lambda m: self.layout.map_moments("carry", changes, m.tree, m.degree), state.inner_state
        )
        aux, info = [end.aux for end in ends], [end.info for end in ends]
        return [end.weight for end in ends], state._replace(inner_state=inner_state, aux=aux, info=info)

    def _rows(self, *values: Groups) -> Any:
        return zip(self.layout.groups, *values, strict=True)

    def _differences(self, new: Groups, old: Groups) -> Groups:
        """The updates. Here ordinary weights have moved already, while `fixed_rank` keeps the step of each."""
        moved = [jax.tree.map(jnp.subtract, x, y) if g.ordinary else x for g, x, y in self._rows(new, old)]
        return self.layout.differences(moved, old)
