r"""The geometry of balanced factors, on one flattened kernel.

A kernel in the canonical gauge, W = U diag(sigma) V^T, is also

.. math:: W = A B^\top, \quad A = U \,\mathrm{diag}(\sigma)^{1/2}, \quad B = V \,\mathrm{diag}(\sigma)^{1/2},
   \quad A^\top A = B^\top B = \mathrm{diag}(\sigma).

A step moves A and B, and nothing is truncated: the product of moved factors has rank r again. Then the pair is
balanced anew, and what rides on its columns is turned with them. Compared with the tangent space of `manifold`, a
direction of singular value sigma moves sqrt(sigma) times as far: steps grow with the weights.
A pair of moments is a `LowRank` triple too, `(m_A, 0, m_B)`: it has the shapes of (U, S, V), and like in the triple
of a tangent vector m_A rides on the columns of V and m_B on those of U: for the pair A X, B Y gradients are `G_A Y` and
`G_B X`, so `manifold.rotate_tangent` turns first moments and `rotate_tangent_squared` second ones.

References:
  Mishra, Meyer, Bonnabel, Sepulchre, `Fixed-rank matrix factorizations and Riemannian low-rank optimization
  <https://arxiv.org/abs/1209.0430>`_, 2014, section 3.1, the balanced factorisation; the way of moments is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.linalg import transpose
from lowrank_optax.lowrank import LowRank


class Columns(NamedTuple):
    """What the columns of a kernel are, each `(batch..., 1, r)`.

    Attributes:
      root: the square roots of the singular values; 1 where `fresh`, 0 in padding.
      fresh: columns whose singular value is zero but which belong to the kernel.
      known: the other columns of the kernel.
    """

    root: jax.Array
    fresh: jax.Array
    known: jax.Array


def columns(W: LowRank, active: jax.Array) -> Columns:
    """The columns of a kernel in the canonical gauge.

    Args:
      W: the kernel.
      active: `(batch..., r)` mask of the columns that are not padding.
    """
    sigma = jnp.diagonal(W.S, axis1=-2, axis2=-1)
    known = active & (sigma > jnp.finfo(sigma.dtype).tiny)
    fresh = active & ~known
    root = jnp.where(known, jnp.sqrt(jnp.where(known, sigma, 1.0)), fresh.astype(sigma.dtype))
    return Columns(root[..., None, :], fresh[..., None, :], known[..., None, :])


def balance(W: LowRank, c: Columns) -> tuple[jax.Array, jax.Array]:
    """A and B with `W = A B^T`. Where sigma is zero, A = U and B = 0, so that B can move."""
    return W.U * c.root, W.V * jnp.where(c.known, c.root, 0.0)


@linalg.precise
def gradient(W: LowRank, grads: LowRank, c: Columns) -> LowRank:
    r"""The gradients with respect to A and B, from those of U, S and V.

    .. math:: G_A = G B = G_U \,\mathrm{diag}(\sigma)^{-1/2}, \quad G_B = G^\top A = G_V \,\mathrm{diag}(\sigma)^{-1/2}

    Column j of :math:`G_U = G V S^\top` carries the factor :math:`\sigma_j` and nothing else, so the division is
    exact to rounding. In a fresh column :math:`G_B = G^\top U` is known within the span of V, where it is
    :math:`V G_S^\top`.
    """
    root = jnp.where(c.known, c.root, 1.0)
    a = jnp.where(c.known, grads.U / root, 0.0)
    b = jnp.where(c.known, grads.V / root, jnp.where(c.fresh, W.V @ transpose(grads.S), 0.0))
    return LowRank(a, jnp.zeros_like(grads.S), b)


def norm(W: LowRank, grads: LowRank, c: Columns) -> jax.Array:
    r"""The Riemannian norm, :math:`|P(W)G|^2 = |G V|^2 + |G^\top U|^2 - |U^\top G V|^2`, `(batch...)`."""
    root, belong = jnp.where(c.known, c.root, 1.0), c.known | c.fresh
    parts = []
    for x, m in ((grads.U, grads.S), (grads.V, transpose(grads.S))):
        inside = linalg.norm(jnp.where(c.known & transpose(belong), m, 0.0))
        whole = linalg.norm(jnp.where(c.known, x / root / root, 0.0))
        parts.append(jnp.sqrt(jnp.maximum(whole - inside, 0.0)) * jnp.sqrt(whole + inside))
    parts.append(linalg.norm(jnp.where(belong & transpose(belong), grads.S, 0.0)))
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
def rebalance(a: jax.Array, b: jax.Array, active: jax.Array) -> Rebalancing:
    r"""Brings the pair to the canonical gauge, by two QR of its factors and an SVD of size r.

    .. math::
      A = Q_A R_A, \quad B = Q_B R_B, \quad R_A R_B^\top = P\,\mathrm{diag}(\sigma)\,Q^\top, \quad
      U = Q_A P, \quad V = Q_B Q

    Then :math:`A X = U \mathrm{diag}(\sigma)^{1/2}` with :math:`X = R_B^\top Q\,\mathrm{diag}(\sigma)^{-1/2}`, and
    :math:`B Y` likewise with :math:`Y = X^{-\top} = R_A^\top P\,\mathrm{diag}(\sigma)^{-1/2}`. Of a pair that was
    balanced a step ago X and Y are orthogonal to first order. Their columns are scaled to norm 1 rather than divided
    by a sigma, which may be small or zero.

    Args:
      a: A, `(batch..., m, r)`.
      b: B, `(batch..., n, r)`.
      active: `(batch..., r)` mask of the columns that are not padding; the others of A and B are zero.
    """
    left, right = (linalg.extend(x[..., :0], x) for x in (a, b))
    ra, rb = left.x, right.x
    p, sigma, q = linalg.svd(ra @ transpose(rb))
    sigma = jnp.where(active, sigma, 0.0)
    x, y = transpose(rb) @ q, transpose(ra) @ p
    # New columns point along the old ones: a small step is a small change of U, V and of the moments.
    sign = linalg.signs(jnp.diagonal(y, axis1=-2, axis2=-1))[..., None, :]
    u, v = left.block @ (left.mix @ (p * sign)), right.block @ (right.mix @ (q * sign))
    return Rebalancing(LowRank(u, linalg.diagonal(sigma), v), _unit(x * sign, active), _unit(y * sign, active))


def _unit(x: jax.Array, active: jax.Array) -> jax.Array:
    """The active columns scaled to norm 1; zero columns and the rest are zero."""
    top = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    x = jnp.where(active[..., None, :] & (top > 0), x / jnp.where(top > 0, top, 1.0), 0.0)
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=-2, keepdims=True)), 1.0)
