r"""The geometry of balanced factors, on one kernel.

A kernel in the canonical gauge, W = U diag(sigma) V^T, is also

.. math:: W = A B^\top, \quad A = U \,\mathrm{diag}(\sigma)^{1/2}, \quad B = V \,\mathrm{diag}(\sigma)^{1/2},
   \quad A^\top A = B^\top B = \mathrm{diag}(\sigma).

A step moves A and B, and nothing is truncated: the product of moved factors has rank r again. Then the pair is
balanced anew, and moments on its columns turn with them. Compared with the tangent space of `manifold`, a direction of
singular value sigma moves sqrt(sigma) times as far: steps grow with the weights.

References:
  Mishra, Meyer, Bonnabel, Sepulchre, `Fixed-rank matrix factorizations and Riemannian low-rank optimization
  <https://arxiv.org/abs/1209.0430>`_, 2014, section 3.1, the balanced factorisation; the carry of moments is ours.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.geometry.base import Info, Settled, matrix_shape, polar_factor, register_coordinates
from lowrank_optax.geometry.factored import Factored
from lowrank_optax.lowrank import LowRank


class Pair(NamedTuple):
    """Coordinates of `Balanced`: A `(m, r)` and B `(n, r)` of W = A B^T, or gradients or moments of them.

    For the pair A X, B Y with Y = X^-T the gradients are G_A Y and G_B X.
    """

    A: jax.Array
    B: jax.Array


class PairFrame(NamedTuple):
    """The frame of `Balanced`.

    Attributes:
      grad: gradients with respect to A and B.
      weight: half of A and half of B: decay at a rate c multiplies W by (1 - c / 2)^2, which is 1 - c to first order.
      kernel: the kernel in the canonical gauge.
      turn: the change of basis to the canonical gauge.
      turned: whether the kernel came in another gauge.
      rank: columns in use; those with a singular value of zero are fresh.
      left: `(r,)` scales of U in A: square roots of the singular values, 1 in fresh columns, 0 in padding.
      right: `(r,)` scales of V in B: the same, but 0 in fresh columns.
      gradient_norm: |P(W)G|_F.
    """

    grad: Pair
    weight: Pair
    kernel: LowRank
    turn: mf.Turn
    turned: jax.Array
    rank: jax.Array
    left: jax.Array
    right: jax.Array
    gradient_norm: jax.Array


class Rebalanced(NamedTuple):
    """A moved pair, balanced anew: A X and B Y up to the lengths of columns, and X and Y with columns of norm 1."""

    kernel: LowRank
    turn: mf.Turn  # (X, Y)


@dataclasses.dataclass(frozen=True)
class Balanced(Factored):
    r"""Geometry of the factors of :math:`W = (U S^{1/2}) (V S^{1/2})^\top`, balanced anew after each step.

    The inner transformation works on the two factors. A direction of singular value sigma moves sqrt(sigma) times as
    far as in the other geometries: steps grow with the weights. This geometry is best with normalised steps (Adam,
    Muon) on networks, and its step is the cheapest of the three. It keeps the rank of every kernel. Plain gradient
    steps want a step size that falls like 1 / sigma: use `Tangent` for them.

    State of a moment: `r (m + n)` numbers.

    Args:
      rank: must be None. A rank policy needs a geometry whose steps can change the rank, `Tangent` or `Coefficient`.

    Raises:
      ValueError: for a rank policy.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> tx = lro.fixed_rank(optax.adam(1e-3), geometry=lro.Balanced())
    """

    rank: None = None
    truncates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank is not None:
            raise ValueError(
                "Balanced keeps the rank of every kernel: give the rank policy to a geometry that changes ranks, "
                "geometry=lro.Tangent(rank=...) or lro.Coefficient(rank=...); step sizes have another unit there"
            )

    def template(self, weight: LowRank) -> Pair:
        """Moments of A and B."""
        return Pair(jnp.zeros_like(weight.U), jnp.zeros_like(weight.V))

    def frame(self, weight: LowRank, grad: LowRank, aux: jax.Array) -> PairFrame:
        r"""The gradients with respect to A and B, from the gradients with respect to U, S and V.

        .. math::
          G_A = (I - U U^\top)\, G_U\, \mathrm{diag}(\sigma)^{-1/2} + U\, G_S\, \mathrm{diag}(\sigma)^{1/2}, \quad
          G_B = (I - V V^\top)\, G_V\, \mathrm{diag}(\sigma)^{-1/2} + V\, G_S^\top\, \mathrm{diag}(\sigma)^{1/2}

        For a function of W these are G B and G^T A, since :math:`G_U = G V S^\top` and :math:`G_S = U^\top G V`;
        column j of G_U carries the factor sigma_j and nothing else, so the division is exact to rounding. A function of
        U, S and V that is no function of W, a penalty on S say, moves W through its G_S. In a fresh column, where A = U
        and B = 0, the gradient G^T U is known within the span of V, where it is :math:`V G_S^\top`.
        """
        kernel, g, turn, turned = mf.canonicalize(weight, grad)
        sigma, active = linalg.diag_part(kernel.S), linalg.rank_mask(aux, kernel.width)
        known = active & (sigma > jnp.finfo(sigma.dtype).tiny)
        root = jnp.sqrt(jnp.where(known, sigma, 1.0))
        left, right, inverse = (
            jnp.where(mask, x, 0.0) for mask, x in ((active, root), (known, root), (known, 1 / root))
        )
        M = jnp.where(active[None] & active[:, None], g.S, 0.0)

        def gradient(basis: jax.Array, of_basis: jax.Array, inside: jax.Array) -> jax.Array:
            # The part of the gradient along padded columns counts as outside of the kernel.
            inside = jnp.where(active[:, None], inside - (basis.T @ of_basis) * inverse[None], 0.0)
            return of_basis * inverse[None] + basis @ inside

        pair = Pair(gradient(kernel.U, g.U, M * right[None]), gradient(kernel.V, g.V, M.T * left[None]))
        half = Pair(0.5 * kernel.U * left[None], 0.5 * kernel.V * right[None])
        norm = _riemannian_norm(pair, M, known, inverse)
        return PairFrame(pair, half, kernel, turn, turned, aux, left, right, norm)

    def propose(self, frame: PairFrame, step: Pair) -> Rebalanced:
        r"""Brings the moved pair to the canonical gauge, by two QR of the factors and an SVD of size r.

        .. math::
          A = Q_A R_A, \quad B = Q_B R_B, \quad R_A R_B^\top = P\,\mathrm{diag}(\sigma)\,Q^\top, \quad
          U = Q_A P, \quad V = Q_B Q

        Then :math:`A X = U \mathrm{diag}(\sigma)^{1/2}` with :math:`X = R_B^\top Q\,\mathrm{diag}(\sigma)^{-1/2}`, and
        :math:`B Y` likewise with :math:`Y = X^{-\top} = R_A^\top P\,\mathrm{diag}(\sigma)^{-1/2}`. The pair was
        balanced before the step, so X and Y are orthogonal to first order. Their columns are scaled to norm 1 and not
        divided by roots of sigma, which may be small or zero.
        """
        active = linalg.rank_mask(frame.rank, frame.kernel.width)
        A = frame.kernel.U * frame.left[None] + jnp.where(active[None], step.A, 0.0)
        B = frame.kernel.V * frame.right[None] + jnp.where(active[None], step.B, 0.0)
        (a, mix_a, r_a), (b, mix_b, r_b) = linalg.gram_qr(A), linalg.gram_qr(B)
        # New columns point along the old ones: a small step is a small change of U, V and of the moments.
        p, sigma, q = linalg.svd(r_a @ r_b.T, toward=r_a)
        S = linalg.diagonal(jnp.where(active, sigma, 0.0))
        X, Y = (_unit_columns(x, active) for x in (r_b.T @ q, r_a.T @ p))
        return Rebalanced(LowRank(a @ (mix_a @ p), S, b @ (mix_b @ q)), mf.Turn(X, Y))

    def settle(self, frame: PairFrame, proposal: Rebalanced, rank: None) -> Settled:
        """The proposal has the rank of the kernel."""
        info = Info(frame.rank, frame.gradient_norm, None)
        return Settled(proposal.kernel, frame.rank, info, proposal.turn)

    def carry(self, change: mf.Turn, moment: Pair, degree: int) -> Pair:
        """Moments of A X and B Y, `m_A Y` and `m_B X`.

        For second moments the entries of X and Y are squared: their columns have norm 1, so each new moment is a
        weighted mean of the old ones. The square-root congruence of the paper, `(sqrt(v) Q)^2`, may cancel: where
        singular values are close and bases turn fast it leaves second moments near zero beside large first moments, and
        steps explode.
        """
        X, Y = change if degree == 1 else map(jnp.square, change)
        return Pair(moment.A @ Y, moment.B @ X)


def _riemannian_norm(pair: Pair, M: jax.Array, known: jax.Array, inverse: jax.Array) -> jax.Array:
    r""":math:`|P(W)G|^2 = |M|^2 + |G V|^2 - |M|^2 + |G^\top U|^2 - |M|^2`, the last four over known columns."""
    parts = [linalg.norm(M)]
    for columns, m in ((pair.A, M), (pair.B, M.T)):
        whole, inside = linalg.norm((linalg.column_norms(columns) * inverse)[None]), linalg.norm(m * known[None])
        parts.append(jnp.sqrt(jnp.maximum(whole - inside, 0.0)) * jnp.sqrt(whole + inside))
    return linalg.root_of_squares(*parts)


def _unit_columns(x: jax.Array, active: jax.Array) -> jax.Array:
    """The active columns scaled to norm 1; zero columns and the rest are zero."""
    size = linalg.column_norms(x)
    return jnp.where((active & (size > 0))[None], x / jnp.where(size > 0, size, 1.0)[None], 0.0)


register_coordinates(Pair, Balanced(), {"A": "U", "B": "V"})


@polar_factor.register
def _(moment: Pair, steps: int) -> Pair:
    """The polar factors of A and of B."""
    return Pair(linalg.newton_schulz(moment.A, steps), linalg.newton_schulz(moment.B, steps))


@matrix_shape.register
def _(moment: Pair) -> tuple[int, int]:
    return moment.A.shape[-2], moment.B.shape[-2]
