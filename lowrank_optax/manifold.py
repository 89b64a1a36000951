r"""The geometry of fixed-rank matrices, on one kernel.

The file reads top to bottom as one step of the paper: gauge, tangent projection, augmentation, retraction, transport.
A kernel is a `LowRank` value of three matrices, U `(m, r)`, S `(r, r)`, V `(n, r)`, in the working dtype. The first
`rank` of its r columns belong to it; the others are padding beside zero singular values. No function forms an m x n
array.

References:
  Schotthöfer, Klein, Kusch, `A geometric framework for momentum-based optimizers for low-rank training
  <https://arxiv.org/abs/2506.17475>`_, 2025. The step with a single gradient comes from GeoLoRA,
  `arXiv:2410.18720 <https://arxiv.org/abs/2410.18720>`_.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.linalg import highest_precision
from lowrank_optax.lowrank import LowRank

# --- gauge ----------------------------------------------------------------------------


def is_canonical(S: jax.Array) -> jax.Array:
    """Whether S is diagonal, non-negative and descending."""
    sigma = linalg.diag_part(S)
    return jnp.all(sigma[:-1] >= sigma[1:]) & jnp.all(sigma >= 0) & jnp.all(linalg.diagonal(sigma) == S)


def gauge(S: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The SVD `S = P diag(sigma) Q^T` whose singular vectors point along the old columns.

    Singular values below `r eps sigma_1` are rounding, and their singular vectors are noise. They become exact zeros
    here, because `project` divides by every singular value that is not zero.
    """
    p, sigma, q = linalg.svd(S, toward=jnp.eye(S.shape[0], dtype=S.dtype))
    floor = S.shape[-1] * jnp.finfo(sigma.dtype).eps * sigma[:1]
    return p, jnp.where(sigma <= floor, 0.0, sigma), q  # NaN stays


class Turn(NamedTuple):
    """A change of basis: new columns of U and V in the old bases, U' = U P and V' = V Q."""

    P: jax.Array
    Q: jax.Array


@highest_precision
def turn_between(old: LowRank, new: LowRank) -> Turn:
    """The overlaps of the bases of two kernels; the bases of one contain the bases of the other."""
    return Turn(old.U.T @ new.U, old.V.T @ new.V)


class Canonical(NamedTuple):
    """A kernel and its factor gradients in the canonical gauge, the change of basis to it, and whether one was made."""

    kernel: LowRank
    grads: LowRank
    turn: Turn
    turned: jax.Array


@highest_precision
def canonicalize(W: LowRank, grads: LowRank) -> Canonical:
    """Restores the canonical gauge, in which a kernel usually is.

    With `G_U = G V S^T` and `S = P diag(sigma) Q^T`, the gradient with respect to U P is
    `G (V Q) diag(sigma) = G_U P`.
    """

    def turn(old: tuple[LowRank, LowRank, Turn]) -> tuple[LowRank, LowRank, Turn]:
        W, g, _ = old
        p, sigma, q = gauge(W.S)
        grads = LowRank(g.U @ p, p.T @ g.S @ q, g.V @ q)
        return LowRank(W.U @ p, linalg.diagonal(sigma), W.V @ q), grads, Turn(p, q)

    turned = ~is_canonical(W.S)
    eye = jnp.eye(W.width, dtype=W.S.dtype)
    kernel, grads, change = linalg.cond_without_copy(turned, turn, (W, grads, Turn(eye, eye)))
    return Canonical(kernel, grads, change, turned)


def singular_values(S: jax.Array) -> jax.Array:
    """The singular values `(r,)` of W, exact where S is canonical."""
    diagonal = linalg.diagonal
    canonical = linalg.cond_without_copy(~is_canonical(S), lambda S: diagonal(gauge(S)[1]), S)
    return linalg.diag_part(canonical)


def rank(S: jax.Array) -> jax.Array:
    """The number of singular values that are not zero, int32."""
    return jnp.sum(singular_values(S) > 0, dtype=jnp.int32)


def trim(W: LowRank, rank: jax.Array) -> LowRank:
    """The kernel with zeros in the padded columns of U and V."""
    return LowRank(linalg.first_columns(W.U, rank), W.S, linalg.first_columns(W.V, rank))


# --- tangent vectors ------------------------------------------------------------------


class Tangent(NamedTuple):
    r"""A tangent vector at :math:`W = U S V^\top`, three matrices of the shapes of U, S and V.

    .. math:: \xi = U M V^\top + U_p V^\top + U V_p^\top, \quad U^\top U_p = 0, \quad V^\top V_p = 0

    It is linear in the vector, and :math:`|\xi|_F^2 = |U_p|^2 + |M|^2 + |V_p|^2`.
    """

    Up: jax.Array
    M: jax.Array
    Vp: jax.Array


@highest_precision
def project(W: LowRank, grads: LowRank, rank: jax.Array) -> Tangent:
    r"""Projects the gradient onto the tangent space, given the gradients of the factors.

    .. math::
      P(W) G = U M V^\top + U_p V^\top + U V_p^\top, \quad M = U^\top G V, \quad
      U_p = (I - U U^\top) G V, \quad V_p = (I - V V^\top) G^\top U

    Autodiff supplies :math:`G_U = G V S^\top`, :math:`G_S = U^\top G V`, :math:`G_V = G^\top U S`. In the
    canonical gauge column j of G_U carries the factor :math:`\sigma_j` and nothing else, so one division a
    column recovers G V to rounding whatever cond(S) is. A column with :math:`\sigma_j = 0` carries no
    information and becomes zero.

    Args:
      W: kernel in the canonical gauge.
      grads: gradients of its factors.
      rank: number of columns that are not padding.

    Returns:
      The tangent vector, zero in the padded columns.
    """
    sigma, active = linalg.diag_part(W.S), linalg.rank_mask(rank, W.width)
    known = active & (sigma > jnp.finfo(sigma.dtype).tiny)
    divisor = jnp.where(known, sigma, 1.0)

    def divided(factor_grad: jax.Array) -> jax.Array:
        return jnp.where(known[None], factor_grad / divisor[None], 0.0)

    m = jnp.where(active[None] & active[:, None], grads.S, 0.0)
    return make_horizontal(W, Tangent(divided(grads.U), m, divided(grads.V)), rank)


@highest_precision
def make_horizontal(W: LowRank, xi: Tangent, rank: jax.Array) -> Tangent:
    """Restores `U^T U_p = 0` and `V^T V_p = 0`, which an elementwise optimizer breaks."""
    W = trim(W, rank)
    return Tangent(xi.Up - W.U @ (W.U.T @ xi.Up), xi.M, xi.Vp - W.V @ (W.V.T @ xi.Vp))


@highest_precision
def turn_tangent(xi: Tangent, turn: Turn) -> Tangent:
    """The same tangent vector for the bases U P and V Q: `U_p V^T = (U_p Q)(V Q)^T`."""
    return Tangent(xi.Up @ turn.Q, turn.P.T @ xi.M @ turn.Q, xi.Vp @ turn.P)


def norm(xi: Tangent) -> jax.Array:
    """The Riemannian norm of a tangent vector, which is the Frobenius norm of the matrix."""
    return linalg.root_of_squares(*map(linalg.norm, xi))


# --- augmentation ---------------------------------------------------------------------


class Basis(NamedTuple):
    """Orthonormal columns `[blocks...] @ mix`, kept in factors: a combination of them multiplies `mix` first."""

    blocks: tuple[jax.Array, ...]
    mix: jax.Array

    @highest_precision
    def __matmul__(self, x: jax.Array) -> jax.Array:
        """Combinations of the columns, `(m, p) @ (p, q)`."""
        mix, start, total = self.mix @ x, 0, jnp.zeros((), self.mix.dtype)
        for block in self.blocks:
            stop = start + block.shape[1]
            total = total + block @ mix[start:stop]
            start = stop
        return total

    def columns(self) -> jax.Array:
        """The columns as an array."""
        return self @ jnp.eye(self.mix.shape[1], dtype=self.mix.dtype)


class Side(NamedTuple):
    """A basis that holds an old basis and the directions added to it, with their coordinates.

    Attributes:
      basis: p columns.
      old: `(p, r)`, coordinates of the old basis.
      new: `(p, r)`, coordinates of the new directions.
    """

    basis: Basis
    old: jax.Array
    new: jax.Array


class Augmented(NamedTuple):
    """The augmented bases of a kernel: `left` holds [U, U_p] and `right` holds [V, V_p]."""

    left: Side
    right: Side


def augment(W: LowRank, xi: Tangent, rank: jax.Array, width: int | None = None) -> Augmented:
    """Orthonormal bases of the spans of [U, U_p] and [V, V_p], the Q factors of their QR.

    Columns come in order: the k columns of the basis, as many new directions as fit, arbitrary orthonormal columns in
    the place of padding. Elementwise optimizers need this order, because they must not see padding mixed into U_p.

    Args:
      W: kernel in the canonical gauge.
      xi: tangent vector; M is not used.
      rank: number k of columns of the kernel that are not padding.
      width: columns of the bases, at most m and n; default 2r. If it is below 2k some new directions are left out.

    Returns:
      The augmented bases.
    """
    width = 2 * W.width if width is None else width
    return Augmented(_augment(W.U, xi.Up, rank, width), _augment(W.V, xi.Vp, rank, width))


@highest_precision
def _augment(basis: jax.Array, new: jax.Array, rank: jax.Array, width: int) -> Side:
    m, r = basis.shape
    if m < 2 * r:  # The columns of [U, U_p] are dependent: a QR of them as they are.
        q, old, added = _ordered_qr(basis, new, rank, width)
        return Side(Basis((q,), jnp.eye(q.shape[1], dtype=q.dtype)), old, added)
    e = linalg.extend_basis(basis, new)
    parts = e.mix, e.of_basis, e.of_x

    def ordered(parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mix, old, added = parts
        q, old, added = _ordered_qr(old, added, rank, width)
        return mix @ q, old, added

    if width == 2 * r:
        mix, old, added = linalg.cond_without_copy(rank != r, ordered, parts)
    else:
        mix, old, added = ordered(parts)
    return Side(Basis((basis, e.block), mix), old, added)


def _ordered_qr(basis: jax.Array, new: jax.Array, k: jax.Array, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Orthonormal columns in the order of `augment`, and the coordinates of both in them."""
    r = basis.shape[1]
    j = jnp.arange(width)
    # Column j is U_j below k, new direction j - k below 2k, and zero from there on.
    source = jnp.where(j < k, j, jnp.minimum(j - k + r, 2 * r - 1))
    columns = jnp.take(jnp.concatenate([basis, new], axis=1), source, axis=1)
    q, x = linalg.orthonormalize(jnp.where((j < 2 * k)[None], columns, 0.0))
    # New direction i is column k + i.
    active = j[:r] < k
    fits = active & (k + j[:r] < width)
    added = jnp.take(x, jnp.minimum(k + j[:r], width - 1), axis=1)
    return q, jnp.where(active[None], x[:, :r], 0.0), jnp.where(fits[None], added, 0.0)


@highest_precision
def weight_coefficients(W: LowRank, bases: Augmented) -> jax.Array:
    r"""The kernel as a matrix in the augmented bases, :math:`\hat U^\top U S V^\top \hat V`."""
    return bases.left.old @ W.S @ bases.right.old.T


@highest_precision
def tangent_coefficients(xi: Tangent, bases: Augmented) -> jax.Array:
    r"""A tangent vector as a matrix in the augmented bases.

    :math:`\hat U^\top \xi \hat V`, which is :math:`[[M, R_v^\top], [R_u, 0]]` when U and V are orthonormal.
    """
    left, right = bases
    return left.old @ xi.M @ right.old.T + left.new @ right.old.T + left.old @ right.new.T


@highest_precision
def congruence(x: jax.Array, turn: Turn) -> jax.Array:
    """`P^T x Q`: carries weights, gradients and first moments between bases."""
    return turn.P.T @ x @ turn.Q


@highest_precision
def congruence_squared(x: jax.Array, turn: Turn) -> jax.Array:
    """`(P^T sqrt(x) Q)^2` elementwise: carries second moments, and keeps them non-negative."""
    return jnp.square(turn.P.T @ jnp.sqrt(jnp.maximum(x, 0.0)) @ turn.Q)


# --- retraction -----------------------------------------------------------------------


class Retraction(NamedTuple):
    """A point near a coefficient matrix Y, before its rank is chosen.

    Attributes:
      left: `(p, r)`, the new U in the augmented basis.
      right: `(q, r)`, the new V in the augmented basis.
      sigma: singular values of the retracted matrix before truncation, descending.
    """

    left: jax.Array
    right: jax.Array
    sigma: jax.Array


def retract_svd(y: jax.Array, bases: Augmented, r: int) -> Retraction:
    """The best approximation of `U_hat y V_hat^T`: its SVD, of which r columns are kept.

    New columns point along the old ones, so that a small step is a small change of U and V.
    """
    p, sigma, q = linalg.svd(y, toward=bases.left.old)
    return Retraction(p[:, :r], q[:, :r], sigma)


@highest_precision
def retract_bug(y: jax.Array, bases: Augmented, rank: jax.Array) -> Retraction:
    r"""The basis-update and Galerkin step: no SVD of the size of the augmented bases, and a fixed rank.

    .. math:: U' = \mathrm{orth}(Y V), \quad V' = \mathrm{orth}(Y^\top U), \quad S' = U'^\top Y V'

    in the coordinates of the augmented bases, then an r x r SVD that restores the canonical gauge.

    References:
      Ceruti, Lubich, `An unconventional robust integrator for dynamical low-rank approximation
      <https://arxiv.org/abs/2010.02022>`_, 2021, section 3.
    """
    left, right = bases.left.old, bases.right.old
    (y_u, k_u, _), (y_v, k_v, _) = linalg.gram_qr(y @ right), linalg.gram_qr(y.T @ left)
    u, v = y_u @ k_u, y_v @ k_v
    # The columns of u and v beside padding are arbitrary: the entries of Y there are not part of the step.
    active = linalg.rank_mask(rank, u.shape[1])
    p, sigma, q = linalg.svd(jnp.where(active[None] & active[:, None], u.T @ y @ v, 0.0), toward=u.T @ left)
    return Retraction(u @ p, v @ q, sigma)


def assemble(bases: Augmented, point: Retraction, rank: jax.Array) -> LowRank:
    """The kernel after truncation to `rank` (at most r) singular values."""
    r = point.left.shape[1]
    sigma = jnp.where(linalg.rank_mask(rank, r), point.sigma[:r], 0.0)
    return LowRank(bases.left.basis @ point.left, linalg.diagonal(sigma), bases.right.basis @ point.right)


# --- transport ------------------------------------------------------------------------


@highest_precision
def transport(xi: Tangent, old: LowRank, new: LowRank) -> Tangent:
    r"""Carries a tangent vector at `old` to `new` by projection onto the tangent space there.

    With :math:`\xi V' = (U M + U_p)(V^\top V') + U (V_p^\top V')` and likewise :math:`\xi^\top U'`:
    :math:`M' = U'^\top \xi V'`, :math:`U_p' = \xi V' - U' M'`, :math:`V_p' = \xi^\top U' - V' M'^\top`.

    Args:
      xi: tangent vector at `old`.
      old: the kernel at which it is tangent.
      new: the kernel to carry it to, with zeros in padded columns of its bases, see `trim`.

    Returns:
      The tangent vector at `new`, zero in the padded columns.
    """
    right, left = old.V.T @ new.V, old.U.T @ new.U
    xi_v = (old.U @ xi.M + xi.Up) @ right + old.U @ (xi.Vp.T @ new.V)
    xi_u = (old.V @ xi.M.T + xi.Vp) @ left + old.V @ (xi.Up.T @ new.U)
    m = new.U.T @ xi_v
    return Tangent(xi_v - new.U @ m, m, xi_u - new.V @ m.T)


@highest_precision
def transport_squared(x: Tangent, old: LowRank, new: LowRank) -> Tangent:
    r"""Carries second moments of the three matrices, as if their entries were independent numbers.

    With :math:`P = U^\top U'`, :math:`Q = V^\top V'`, and the parts of each basis outside of the other,
    :math:`U_o = U' - U P` and :math:`U_d = U - U' P^\top`, `transport` is

    .. math::
      M' = P^\top (M Q + B) + A Q, \quad U_p' = U_p Q - U' A Q + U_d (M Q + B), \quad
      A = U_o^\top U_p, \quad B = V_p^\top V_o

    and likewise for V. Here all weights are squared. If bases stay this is the identity. A coordinate with a first
    moment has a second moment too, also after ranks have changed. Both kernels have zeros in padded columns.
    """
    p, q = old.U.T @ new.U, old.V.T @ new.V
    p2, q2 = jnp.square(p), jnp.square(q)
    a = jnp.square(new.U - old.U @ p).T @ x.Up
    b = x.Vp.T @ jnp.square(new.V - old.V @ q)
    right, left = x.M @ q2 + b, x.M.T @ p2 + a.T
    return Tangent(
        x.Up @ q2 + jnp.square(new.U) @ (a @ q2) + jnp.square(old.U - new.U @ p.T) @ right,
        p2.T @ right + a @ q2,
        x.Vp @ p2 + jnp.square(new.V) @ (b.T @ p2) + jnp.square(old.V - new.V @ q.T) @ left,
    )
