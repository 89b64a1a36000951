"""The geometry whose moments are tangent vectors, transported by projection."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.geometry.base import Settled, matrix_shape, polar_factor, register_coordinates
from lowrank_optax.geometry.truncated import Proposal, Truncated
from lowrank_optax.lowrank import LowRank


class TangentFrame(NamedTuple):
    """The frame of `Tangent`.

    Attributes:
      grad: the Riemannian gradient.
      weight: W, which is a tangent vector at W.
      kernel: the kernel in the canonical gauge.
      turn: the change of basis to the canonical gauge.
      turned: whether the kernel came in another gauge.
      rank: columns in use.
      gradient_norm: |P(W)G|_F.
    """

    grad: mf.Tangent
    weight: mf.Tangent
    kernel: LowRank
    turn: mf.Turn
    turned: jax.Array
    rank: jax.Array
    gradient_norm: jax.Array


class Transport(NamedTuple):
    """The change of basis of a step: two kernels with zeros in padded columns."""

    old: LowRank
    new: LowRank


@dataclasses.dataclass(frozen=True)
class Tangent(Truncated):
    r"""Geometry of the embedded manifold: the inner transformation works on tangent vectors at W.

    .. math:: \hat S = \hat U^\top (W + \xi) \hat V = P\, \mathrm{diag}(\sigma)\, Q^\top, \quad
      U' = \hat U P_1, \quad S' = \mathrm{diag}(\sigma_{1:r'}), \quad V' = \hat V Q_1

    with the bases :math:`\hat U = \mathrm{orth}[U, U_p]`, :math:`\hat V = \mathrm{orth}[V, V_p]` of the step xi.
    Moments are transported by projection onto the new tangent space, so they keep directions that leave the bases. An
    ill-conditioned W does not slow steps down, which makes this the default of `lowrank_heavy_ball`. With a policy the
    rank adapts.

    State of a moment: `r (m + n) + r^2` numbers.

    Args:
      rank: `tolerance(...)`, `budget(...)`, or None to keep the rank of every kernel.
      retraction: "svd" truncates at the best approximation. "bug", basis update and galerkin, keeps the rank and
        replaces the SVD of size 2r by two QR of 2r x r and an SVD of size r: about one per cent of a step faster.

    Raises:
      ValueError: for options that exclude each other.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lowrank_adam(3e-3, geometry=lro.Tangent(rank=lro.tolerance(0.02)))

    References:
      arXiv:2506.17475, tangent space and truncation; the transport of moments is ours.
    """

    def template(self, weight: LowRank) -> mf.Tangent:
        """Moments of the three matrices of a tangent vector."""
        return mf.Tangent(*map(jnp.zeros_like, (weight.U, weight.S, weight.V)))

    def frame(self, weight: LowRank, grad: LowRank, aux: jax.Array) -> TangentFrame:
        """The Riemannian gradient."""
        kernel, grad, turn, turned = mf.canonicalize(weight, grad)
        xi = mf.project(kernel, grad, aux)
        at = mf.Tangent(jnp.zeros_like(kernel.U), kernel.S, jnp.zeros_like(kernel.V))
        return TangentFrame(xi, at, kernel, turn, turned, aux, mf.norm(xi))

    def propose(self, frame: TangentFrame, step: mf.Tangent) -> Proposal:
        """The retraction of W + step, in the bases that the step augments."""
        kernel, rank = frame.kernel, frame.rank
        step = mf.make_horizontal(kernel, step, rank)
        bases = mf.augment(kernel, step, rank)
        y = mf.weight_coefficients(kernel, bases) + mf.tangent_coefficients(step, bases)
        return self.retract(bases, y, rank, kernel.width)

    def settle(self, frame: TangentFrame, proposal: Proposal, rank: jax.Array | None) -> Settled:
        """The truncated kernel."""
        kernel, rank, info = self.truncate(frame, proposal, rank)
        return Settled(kernel, rank, info, Transport(mf.trim(frame.kernel, frame.rank), mf.trim(kernel, rank)))

    def carry(self, change: Any, moment: mf.Tangent, degree: int) -> mf.Tangent:
        """Transport to another tangent space, or a change of basis in the same one."""
        if isinstance(change, Transport):
            return (mf.transport if degree == 1 else mf.transport_squared)(moment, *change)
        return mf.turn_tangent(moment, change if degree == 1 else mf.Turn(*map(jnp.square, change)))

    def rebase(self, old: LowRank, new: LowRank) -> Transport:
        """The two kernels, between which `carry` transports."""
        return Transport(old, new)


register_coordinates(mf.Tangent, Tangent(), {"Up": "U", "M": "S", "Vp": "V"})


@polar_factor.register
def _(xi: mf.Tangent, steps: int) -> mf.Tangent:
    """The tangent part of the polar factor of a horizontal vector, through its 2r x 2r coefficient matrix."""
    r = xi.M.shape[0]
    (u, k_u, r_u), (v, k_v, r_v) = linalg.gram_qr(xi.Up), linalg.gram_qr(xi.Vp)
    z = linalg.newton_schulz(jnp.block([[xi.M, r_v.T], [r_u, jnp.zeros_like(xi.M)]]), steps)
    return mf.Tangent(u @ (k_u @ z[r:, :r]), z[:r, :r], v @ (k_v @ z[:r, r:].T))


@matrix_shape.register
def _(xi: mf.Tangent) -> tuple[int, int]:
    return xi.Up.shape[-2], xi.Vp.shape[-2]
