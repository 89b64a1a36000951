"""The geometry of the paper, whose moments are r x r coefficients in the bases, and its variant with frozen bases."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.geometry.base import Settled, matrix_shape, polar_factor, register_coordinates
from lowrank_optax.geometry.factored import Factored
from lowrank_optax.geometry.truncated import Proposal, Truncated
from lowrank_optax.lowrank import LowRank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Coefficients:
    """Coordinates of `Coefficient`: one matrix N, which stands for U N V^T.

    Attributes:
      N: `(r, r)` as moments are kept; `(p, q)` with at most 2r rows and columns during a step.
      shape: (m, n) of the kernel, static.
    """

    N: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})


class CoefficientFrame(NamedTuple):
    """The frame of `Coefficient`.

    Attributes:
      grad: the Riemannian gradient in the augmented bases.
      weight: W in the augmented bases.
      kernel: the kernel in the canonical gauge.
      turn: the change of basis to the canonical gauge.
      turned: whether the kernel came in another gauge.
      rank: columns in use.
      gradient_norm: |P(W)G|_F.
      bases: the augmented bases.
    """

    grad: Coefficients
    weight: Coefficients
    kernel: LowRank
    turn: mf.Turn
    turned: jax.Array
    rank: jax.Array
    gradient_norm: jax.Array
    bases: mf.Augmented


def _shape(W: LowRank) -> tuple[int, int]:
    return W.U.shape[0], W.V.shape[0]


def _carry(change: mf.Turn, moment: Coefficients, degree: int) -> Coefficients:
    move = mf.congruence if degree == 1 else mf.congruence_squared
    return Coefficients(move(moment.N, change), moment.shape)


@dataclasses.dataclass(frozen=True)
class Coefficient(Truncated):
    r"""Geometry of the paper: the inner transformation works on the coefficients of W in augmented bases.

    .. math::

      \hat U &= \mathrm{orth}[U, U_p], \quad \hat V = \mathrm{orth}[V, V_p], \\
      \hat S &= \hat U^\top U S V^\top \hat V, \quad
      \hat G = \hat U^\top (P(W) G) \hat V, \quad
      \hat N = \hat U^\top U N V^\top \hat V, \\
      \hat S &\leftarrow \hat S + \mathrm{inner}(\hat G, \hat N, \hat S)
        = P\, \mathrm{diag}(\sigma)\, Q^\top, \\
      U &\leftarrow \hat U P_1, \quad S \leftarrow \mathrm{diag}(\sigma_{1:r'}), \quad
      V \leftarrow \hat V Q_1, \quad N \leftarrow P_1^\top \hat N Q_1

    Second moments are carried by :math:`v \leftarrow (P_1^\top \sqrt{v}\, Q_1)^{\circ 2}`. Moments take next to no
    memory, but their parts outside of the kept bases are dropped: such directions never average more than one gradient,
    which raises the loss of long runs.

    State of a moment: `r^2` numbers.

    Args:
      rank: a policy or None, see `Tangent`.
      retraction: "svd" or "bug", see `Tangent`.

    Raises:
      ValueError: for options that exclude each other.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lowrank_adam(1e-2, geometry=lro.Coefficient())

    References:
      arXiv:2506.17475, low-rank heavy ball and low-rank Adam.
    """

    def template(self, weight: LowRank) -> Coefficients:
        """Moments of S."""
        return Coefficients(jnp.zeros_like(weight.S), _shape(weight))

    def frame(self, weight: LowRank, grad: LowRank, aux: jax.Array) -> CoefficientFrame:
        """The bases that the gradient augments, and W and P(W)G in them."""
        kernel, grad, turn, turned = mf.canonicalize(weight, grad)
        xi = mf.project(kernel, grad, aux)
        bases = mf.augment(kernel, xi, aux)
        g, s = mf.tangent_coefficients(xi, bases), mf.weight_coefficients(kernel, bases)
        g, s = (Coefficients(x, _shape(kernel)) for x in (g, s))
        return CoefficientFrame(g, s, kernel, turn, turned, aux, mf.norm(xi), bases)

    def lift(self, frame: CoefficientFrame, moment: Coefficients, degree: int) -> Coefficients:
        """Moments in the augmented bases."""
        moment = super().lift(frame, moment, degree)
        return _carry(mf.Turn(frame.bases.left.old.T, frame.bases.right.old.T), moment, degree)

    def propose(self, frame: CoefficientFrame, step: Coefficients) -> Proposal:
        """The retraction of W + step."""
        return self.retract(frame.bases, frame.weight.N + step.N, frame.rank, frame.kernel.width)

    def settle(self, frame: CoefficientFrame, proposal: Proposal, rank: jax.Array | None) -> Settled:
        """The truncated kernel; moments change basis by the congruence from the augmented bases."""
        kernel, rank, info = self.truncate(frame, proposal, rank)
        kept = (linalg.first_columns(x, rank) for x in (proposal.point.left, proposal.point.right))
        return Settled(kernel, rank, info, mf.Turn(*kept))

    def carry(self, change: mf.Turn, moment: Coefficients, degree: int) -> Coefficients:
        """The congruence."""
        return _carry(change, moment, degree)


@dataclasses.dataclass(frozen=True)
class Frozen(Factored):
    """Bases stay and S moves: the inner steps of `galerkin`. 2k columns are in use, k being the rank."""

    def columns_of_zero(self, width: int) -> int:
        """Half of the width: new directions need as many columns again."""
        return max(1, width // 2)

    def template(self, weight: LowRank) -> Coefficients:
        """Moments of S."""
        return Coefficients(jnp.zeros_like(weight.S), _shape(weight))

    def frame(self, weight: LowRank, grad: LowRank, aux: jax.Array) -> FrozenFrame:
        """The gradient of S, and S."""
        block = _in_use(weight.S, aux)
        g = Coefficients(jnp.where(block, grad.S, 0.0), _shape(weight))
        return FrozenFrame(g, Coefficients(weight.S, _shape(weight)), weight, aux)

    def lift(self, frame: Any, moment: Coefficients, degree: int) -> Coefficients:
        """Moments are kept in the same bases."""
        return moment

    def propose(self, frame: Any, step: Coefficients) -> LowRank:
        """S + step, without entries in padding."""
        W = frame.kernel
        return LowRank(W.U, W.S + jnp.where(_in_use(W.S, frame.rank), step.N, 0.0), W.V)

    def settle(self, frame: Any, proposal: LowRank, rank: None) -> Settled:
        """Nothing is truncated, and moments stay."""
        return Settled(proposal, frame.rank, None, ())

    def carry(self, change: Any, moment: Coefficients, degree: int) -> Coefficients:
        """The congruence where bases change."""
        return _carry(change, moment, degree) if change else moment


class FrozenFrame(NamedTuple):
    """The frame of `Frozen`: gradient of S, S, the kernel, and its rank."""

    grad: Coefficients
    weight: Coefficients
    kernel: LowRank
    rank: jax.Array


def _in_use(S: jax.Array, rank: jax.Array) -> jax.Array:
    """Mask of the coefficients of k basis columns and k new directions; the rest is padding."""
    rows, columns = (linalg.rank_mask(2 * rank, size) for size in S.shape)
    return rows[:, None] & columns[None]


register_coordinates(Coefficients, Coefficient(), {"N": "S"})


@polar_factor.register
def _(moment: Coefficients, steps: int) -> Coefficients:
    """The polar factor of N. In augmented bases N has the singular values of the tangent vector itself."""
    return Coefficients(linalg.newton_schulz(moment.N, steps), moment.shape)


@matrix_shape.register
def _(moment: Coefficients) -> tuple[int, int]:
    return moment.shape
