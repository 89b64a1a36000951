r"""The geometry of balanced factors, on one flattened kernel.

A kernel in the canonical gauge, W = U diag(sigma) V^T, is also

.. math:: W = A B^\top, \quad A = U \,\mathrm{diag}(\sigma)^{1/2}, \quad B = V \,\mathrm{diag}(\sigma)^{1/2},
   \quad A^\top A = B^\top B = \mathrm{diag}(\sigma).

A step moves A and B, and nothing is truncated: the product of moved factors has rank r again. Then the pair is
balanced anew, and what rides on its columns is turned with them. Compared with the tangent space of `manifold`, a
direction of singular value sigma moves sqrt(sigma) times as far: steps grow with the weights.
A pair of moments is a `LowRank` triple too, `(m_A, 0, m_B)`: it has the shapes of (U, S, V), and like in the triple
of a tangent vector m_A rides on the columns of V and m_B on those of U: for the pair A X, B Y gradients are `G_A Y` and
`G_B X`, see `turn`.

References:
  Mishra, Meyer, Bonnabel, Sepulchre, `Fixed-rank matrix factorizations and Riemannian low-rank optimization
  <https://arxiv.org/abs/1209.0430>`_, 2014, section 3.1, the balanced factorisation; the way of moments is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.linalg import transpose
from lowrank_optax.lowrank import LowRank
from lowrank_optax.xla import apply_if, barrier, together


class Columns(NamedTuple):
    """What the columns of a kernel are multiplied by, each `(batch..., 1, r)`; zero in padding.

    Fresh columns belong to the kernel, but their singular value is zero.

    Attributes:
      left: those of U in A: square roots of the singular values, 1 in fresh columns.
      right: those of V in B: the same, 0 in fresh columns.
      inverse: 1 / right, 0 in fresh columns.
      active: 1.
    """

    left: jax.Array
    right: jax.Array
    inverse: jax.Array
    active: jax.Array

    @property
    def fresh(self) -> jax.Array:
        """1 in fresh columns, else 0."""
        return self.left - self.right


def columns(S: jax.Array, active: jax.Array) -> Columns:
    """The columns of a kernel in the canonical gauge.

    Args:
      S: of the kernel.
      active: `(batch..., 1, r)` mask of the columns that are not padding.
    """
    sigma = linalg.diag_part(S)[..., None, :]
    known = active & (sigma > jnp.finfo(sigma.dtype).tiny)
    known, root = barrier((known, jnp.sqrt(jnp.where(known, sigma, 1.0))))
    left, right, inverse = (jnp.where(mask, x, 0.0) for mask, x in ((active, root), (known, root), (known, 1 / root)))
    return barrier(Columns(left, right, inverse, active.astype(sigma.dtype)))


def balance(W: LowRank, c: Columns) -> LowRank:
    """The pair (A, 0, B) with `W = A B^T`. Where sigma is zero, A = U and B = 0, so that B can move."""
    return LowRank(W.U * c.left, jnp.zeros_like(W.S), W.V * c.right)


def halves(pair: LowRank) -> LowRank:
    """What weight decay works on: at a rate c it multiplies W by (1 - c / 2)^2, 1 - c to first order."""
    return LowRank(0.5 * pair.U, pair.S, 0.5 * pair.V)


def move(pair: LowRank, step: LowRank, c: Columns) -> LowRank:
    """The pair after a step, without what the step has in padding."""
    u, v = (x + jnp.where(c.active > 0, d, 0.0) for x, d in ((pair.U, step.U), (pair.V, step.V)))
    return LowRank(u, pair.S, v)


@linalg.precise
def gradients(Ws: Sequence[LowRank], grads: Sequence[LowRank], cs: Sequence[Columns]) -> list[LowRank]:
    r"""The gradients with respect to A and B of all kernels, from those of U, S and V.

    .. math:: G_A = G B = G_U \,\mathrm{diag}(\sigma)^{-1/2}, \quad G_B = G^\top A = G_V \,\mathrm{diag}(\sigma)^{-1/2}

    Column j of :math:`G_U = G V S^\top` carries the factor :math:`\sigma_j` and nothing else, so the division is
    exact to rounding. In a fresh column :math:`G_B = G^\top U` is known within the span of V, where it is
    :math:`V G_S^\top`.
    """

    def begin(bs: list[jax.Array]) -> list[jax.Array]:
        return [b + W.V @ (transpose(g.S) * c.fresh) for W, g, c, b in zip(Ws, grads, cs, bs, strict=True)]

    any_fresh = jnp.any(jnp.stack([jnp.any(c.fresh > 0) for c in cs]))
    bs = apply_if(any_fresh, begin, [g.V * c.inverse for g, c in zip(grads, cs, strict=True)])
    pairs = zip(grads, cs, bs, strict=True)
    return [barrier(LowRank(g.U * c.inverse, jnp.zeros_like(g.S), b)) for g, c, b in pairs]


@linalg.precise
def turn(xi: LowRank, x: jax.Array, y: jax.Array) -> LowRank:
    """A pair of moments of A and B for the pair A X, B Y."""
    return LowRank(xi.U @ y, xi.S, xi.V @ x)


def without_zero(xi: LowRank) -> LowRank:
    """A pair of moments as a triple without S, on which no step depends."""
    none: Any = None
    return LowRank(xi.U, none, xi.V)


def with_zero(xi: LowRank, like: LowRank | None = None) -> LowRank:
    """The inverse of `without_zero`: with zeros for S, or with the S of another triple."""
    r = xi.U.shape[-1]
    S = jnp.zeros((*xi.U.shape[:-2], r, r), xi.U.dtype) if like is None else like.S
    return LowRank(xi.U, S, xi.V)


def norms(pairs: Sequence[LowRank], Ms: Sequence[jax.Array], cs: Sequence[Columns]) -> list[jax.Array]:
    r"""The Riemannian norms, :math:`|P(W)G|^2 = |G V|^2 + |G^\top U|^2 - |U^\top G V|^2`, each `(batch...)`.

    Args:
      pairs: the gradients with respect to A and B.
      Ms: those with respect to S, :math:`U^\top G V`.
      cs: the columns.
    """
    of_u, of_v = ([linalg.column_norms(x) for x in xs] for xs in ([x.U for x in pairs], [x.V for x in pairs]))
    return together(_norm, Ms, cs, *barrier((of_u, of_v)))


def _norm(M: jax.Array, c: Columns, of_u: jax.Array, of_v: jax.Array) -> jax.Array:
    belong, known = c.active > 0, c.right > 0
    parts = [linalg.norm(M * belong * transpose(belong))]
    for columns, m in ((of_u, M), (of_v, transpose(M))):
        whole, inside = linalg.norm(columns * c.inverse), linalg.norm(m * known * transpose(belong))
        parts.append(jnp.sqrt(jnp.maximum(whole - inside, 0.0)) * jnp.sqrt(whole + inside))
    return linalg.norm(jnp.stack(parts, axis=-1)[..., None, :])


class Rebalancing(NamedTuple):
    """A moved pair, balanced anew: A' X and B' Y.

    Attributes:
      kernel: the kernel, in the canonical gauge.
      x: `(batch..., r, r)`, X with columns of norm 1.
      y: `(batch..., r, r)`, Y likewise.
    """

    kernel: LowRank
    x: jax.Array
    y: jax.Array


@linalg.precise
def rebalance(pairs: Sequence[LowRank], actives: Sequence[jax.Array]) -> list[Rebalancing]:
    r"""Brings pairs to the canonical gauge, by two QR of the factors and an SVD of size r.

    .. math::
      A = Q_A R_A, \quad B = Q_B R_B, \quad R_A R_B^\top = P\,\mathrm{diag}(\sigma)\,Q^\top, \quad
      U = Q_A P, \quad V = Q_B Q

    Then :math:`A X = U \mathrm{diag}(\sigma)^{1/2}` with :math:`X = R_B^\top Q\,\mathrm{diag}(\sigma)^{-1/2}`, and
    :math:`B Y` likewise with :math:`Y = X^{-\top} = R_A^\top P\,\mathrm{diag}(\sigma)^{-1/2}`. Of a pair that was
    balanced a step ago X and Y are orthogonal to first order. Their columns are scaled to norm 1 rather than divided
    by a sigma, which may be small or zero.

    Args:
      pairs: every (A, 0, B).
      actives: masks `(batch..., 1, r)` of the columns that are not padding; the others of A and B are zero.
    """
    factors = [x.U for x in pairs] + [x.V for x in pairs]
    extensions = linalg.extend([x[..., :0] for x in factors], factors)
    left, right = extensions[: len(pairs)], extensions[len(pairs) :]

    def turn(ra: jax.Array, rb: jax.Array, active: jax.Array) -> tuple[jax.Array, ...]:
        p, sigma, q = linalg.svd(ra @ transpose(rb))
        x, y = transpose(rb) @ q, transpose(ra) @ p
        # New columns point along the old ones: a small step is a small change of U, V and of the moments.
        sign = linalg.signs(linalg.diag_part(y))[..., None, :]
        s = linalg.diagonal(jnp.where(active[..., 0, :], sigma, 0.0))
        return p * sign, q * sign, s, _unit(x * sign, active), _unit(y * sign, active)

    turns = together(turn, [e.x for e in left], [e.x for e in right], actives)
    return [
        Rebalancing(LowRank(a.block @ (a.mix @ p), s, b.block @ (b.mix @ q)), x, y)
        for a, b, (p, q, s, x, y) in zip(left, right, turns, strict=True)
    ]


def _unit(x: jax.Array, active: jax.Array) -> jax.Array:
    """The active columns, a mask `(batch..., 1, r)`, scaled to norm 1; zero columns and the rest are zero."""
    size = linalg.column_norms(x)
    return jnp.where(active & (size > 0), x / jnp.where(size > 0, size, 1.0), 0.0)
