"""A momentum that is itself of low rank, in factors that a tangent projection updates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax.axes import Rank, Where
from lowrank_optax.guard import skip_not_finite
from lowrank_optax.projected.apart import kernels_and_others, numbers, over_kernels, start_kernels
from lowrank_optax.projected.common import Mask, Number, Schedule, is_zero, optimizer
from lowrank_optax.projected.kernel import over
from lowrank_optax.projected.leaves import Leaf


class Factors(NamedTuple):
    """A momentum `U diag(s) V^T`, with U on the shorter side."""

    U: jax.Array
    s: jax.Array
    V: jax.Array


class FactoredMomentumState(NamedTuple):
    """State of `scale_by_factored_momentum`.

    Attributes:
      momentum: `Factors` of every kernel.
    """

    momentum: Any


def scale_by_factored_momentum(
    rank: Rank,
    decay: Number = 0.95,
    outside: Number = 0.0,
    reciprocal: float | None = None,
    *,
    old_bases: bool = False,
    nesterov: bool = False,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The polar factor of a momentum of rank r, which follows the gradient on the tangent space of its rank.

    .. math::

      M = U S V^\top \leftarrow \mathcal{T}_r\big(\beta M + U U^\top G + G V V^\top - U U^\top G V V^\top\big), \quad
      U V^\top + \text{outside} \cdot (I - U U^\top)\, G\, (I - V V^\top)

    The truncation to rank r needs QR factorisations of m x 2r and n x 2r matrices and an SVD of size 2r. The first
    momentum is the truncated SVD of the first gradient that is not zero.

    Args:
      rank: r.
      decay: beta.
      outside: factor of the gradient outside the tangent space; 0 leaves it out.
      reciprocal: None for the polar factor :math:`U V^\top`; a number c for :math:`U \min(1 / S, c)\, V^\top`, the
        default direction of the authors' code.
      old_bases: whether U and V of the part outside are those before the step, as in the authors' code, which is then
        what the step itself leaves out; in the first step there are none.
      nesterov: whether the direction comes from a momentum that has followed the gradient once more.
      where: see `subspace`; all leaves of the tree must be kernels.

    Returns:
      An Optax transformation of trees of kernels. State: r (m + n + 1) numbers for each.

    References:
      Mahdavinia, Mahdavi, MoFaSGD, `arXiv:2507.08091 <https://arxiv.org/abs/2507.08091>`_, 2025, algorithm 1.
    """

    def init(params: Any) -> FactoredMomentumState:
        def start(leaf: Leaf, x: Any) -> Factors:
            (p, q), r, dtype = leaf.matrix_shape, leaf.rank, linalg.working_dtype(x)
            return Factors(*(numbers(leaf, shape, dtype) for shape in ((p, r), (r,), (q, r))))

        return FactoredMomentumState(start_kernels(start, params, rank, where))

    def begin(g: jax.Array, r: int) -> Factors:
        U, s, V = linalg.svd(g)
        return Factors(U[:, :r], s[:r], V[:, :r])

    def follow(m: Factors, g: jax.Array) -> Factors:
        r, GV, GtU = m.s.shape[0], g @ m.V, g.T @ m.U
        eye = jnp.eye(r, dtype=g.dtype)
        middle = jnp.block([[linalg.diagonal(decay * m.s) - m.U.T @ GV, eye], [eye, jnp.zeros_like(eye)]])
        left, right = (jnp.concatenate(pair, axis=1) for pair in ((m.U, GV), (m.V, GtU)))
        (Q, of_left), (W, of_right) = linalg.orthonormalize(left), linalg.orthonormalize(right)
        P, s, Z = linalg.svd(of_left @ middle @ of_right.T)
        return Factors(Q @ P[:, :r], s[:r], W @ Z[:, :r])

    @linalg.highest_precision
    def one(leaf: Leaf, g: jax.Array, momentum: Factors) -> tuple[jax.Array, Factors]:
        def step(g: jax.Array, m: Factors, missing: jax.Array) -> tuple[jax.Array, Factors]:
            fresh = jnp.all(m.U == 0)
            new = jax.lax.cond(
                missing,
                lambda: jax.tree.map(lambda x, y: jnp.where(fresh, x, y), begin(g, leaf.rank), follow(m, g)),
                lambda: follow(m, g),
            )
            # A gradient of zeros leaves a missing momentum missing.
            new = jax.tree.map(lambda x, y: jnp.where(fresh & jnp.all(g == 0), y, x), new, m)
            ahead = follow(new, g) if nesterov else new
            # Directions without a singular value are arbitrary.
            held = linalg.held(ahead.s, max(g.shape))
            size = jnp.ones_like(ahead.s) if reciprocal is None else 1 / jnp.maximum(ahead.s, 1 / reciprocal)
            direction = (ahead.U * jnp.where(held, size, 0)[None]) @ ahead.V.T
            if not is_zero(outside):
                at = jax.tree.map(lambda x, y: jnp.where(fresh, x, y), new, m) if old_bases else new
                rest = g - at.U @ (at.U.T @ g)
                direction = direction + outside * (rest - (rest @ at.V) @ at.V.T)
            return direction, new

        missing = jnp.any(jnp.all(momentum.U == 0, axis=(-2, -1)) & jnp.any(g != 0, axis=(-2, -1)))
        f = over(leaf, lambda g, m: step(g, m, missing))
        direction, momentum = f(g, momentum)
        return direction, momentum

    def update(grads: Any, state: FactoredMomentumState, params: Any = None, **extra_args: Any) -> Any:
        del params, extra_args
        updates, momentum = over_kernels(one, grads, state.momentum, rank, where)
        return updates, FactoredMomentumState(momentum)

    return skip_not_finite(optax.GradientTransformationExtraArgs(init, update))


def mofasgd(
    learning_rate: Schedule,
    rank: Rank = 32,
    *,
    momentum: Number = 0.95,
    outside: Number = 0.0,
    reciprocal: float | None = None,
    old_bases: bool = False,
    nesterov: bool = False,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    where: Where | None = None,
    ordinary: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MoFaSGD: steps along the polar factor of a momentum that is kept as :math:`U S V^\top`.

    It follows the paper. In the authors' code the first momentum comes from the weight, and the default direction has
    the reciprocals of the singular values.

    Args:
      learning_rate: a number or a schedule; the spectral norm of a step.
      rank: r.
      momentum: decay of the momentum.
      outside: see `lowrank_optax.projected.scale_by_factored_momentum`.
      reciprocal: likewise.
      old_bases: likewise.
      nesterov: likewise.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      where: see `lowrank_optax.subspace`.
      ordinary: transformation of other leaves; default `optax.scale_by_adam()`.

    Returns:
      An Optax transformation. State of an m x n kernel: r (m + n + 1) numbers.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.mofasgd(1e-2, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Mahdavinia, Mahdavi, `arXiv:2507.08091 <https://arxiv.org/abs/2507.08091>`_, 2025, algorithm 1.
    """
    others = optax.scale_by_adam() if ordinary is None else ordinary
    kernels = scale_by_factored_momentum(
        rank, momentum, outside, reciprocal, old_bases=old_bases, nesterov=nesterov, where=where
    )
    return optimizer(learning_rate, weight_decay, mask, kernels_and_others(kernels, others, rank, where))
