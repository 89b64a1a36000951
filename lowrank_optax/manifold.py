r"""The geometry of fixed-rank matrices, on one flattened kernel.

Reads top to bottom as one step of the paper: gauge, tangent projection, augmentation, retraction,
transport. Kernels are flattened `LowRank` values, U `(batch..., m, r)`, S `(batch..., r, r)`,
V `(batch..., n, r)`, in the working dtype; batch axes are independent kernels. A tangent vector

.. math:: \xi = U M V^\top + U_p V^\top + U V_p^\top, \quad U^\top U_p = 0, \quad V^\top V_p = 0

is a `LowRank` value too, the triple (U_p, M, V_p): it has the shapes of (U, S, V), depends linearly on xi,
and :math:`|\xi|_F^2 = |U_p|^2 + |M|^2 + |V_p|^2`. No function forms an m x n array.

References:
  Schotthöfer, Klein, Kusch, `A geometric framework for momentum-based optimizers for low-rank training
  <https://arxiv.org/abs/2506.17475>`_, 2025. The single-gradient step is that of GeoLoRA,
  `arXiv:2410.18720 <https://arxiv.org/abs/2410.18720>`_.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.linalg import transpose
from lowrank_optax.lowrank import LowRank
from lowrank_optax.xla import barrier, together


def is_canonical(S: jax.Array) -> jax.Array:
    """True where S `(batch..., r, r)` is diagonal, non-negative and descending, `(batch...)`."""
    sigma = linalg.diag_part(S)
    ordered = jnp.all(sigma[..., :-1] >= sigma[..., 1:], axis=-1) & jnp.all(sigma >= 0, axis=-1)
    return ordered & jnp.all(linalg.diagonal(sigma) == S, axis=(-2, -1))


def gauge(S: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """P, sigma, Q with `S = P diag(sigma) Q^T`: `(U P, diag(sigma), V Q)` is W in the canonical gauge.

    Singular values at the rounding level of a full S are noise. They become exact zeros here, because
    `project` divides by what is not zero.
    """
    p, sigma, q = linalg.svd(S)
    floor = S.shape[-1] * jnp.finfo(sigma.dtype).eps * sigma[..., :1]
    return p, jnp.where(sigma <= floor, 0.0, sigma), q  # NaN stays


def singular_values(S: jax.Array) -> jax.Array:
    """The singular values `(batch..., r)` of W, exact where S is canonical."""
    sigma = linalg.diag_part(S)
    return jax.lax.cond(jnp.all(is_canonical(S)), lambda: sigma, lambda: gauge(S)[1])


def rank(S: jax.Array) -> jax.Array:
    """The number of singular values that are not zero, `(batch...)`, int32."""
    return jnp.sum(singular_values(S) > 0, axis=-1, dtype=jnp.int32)


@linalg.precise
def rotate(x: LowRank, p: jax.Array, q: jax.Array) -> LowRank:
    """The triple x (factor gradients or a tangent vector) in the bases U P and V Q.

    With `G_U = G V S^T` and `S = P diag(sigma) Q^T`, the gradient with respect to U P is
    `G (V Q) diag(sigma) = G_U P`. A tangent triple instead has `U_p` ride on V, see `rotate_tangent`.
    """
    return LowRank(x.U @ p, transpose(p) @ x.S @ q, x.V @ q)


@linalg.precise
def rotate_tangent(xi: LowRank, p: jax.Array, q: jax.Array) -> LowRank:
    """The same tangent vector for the bases U P and V Q: `U_p V^T = (U_p Q)(V Q)^T`."""
    return LowRank(xi.U @ q, transpose(p) @ xi.S @ q, xi.V @ p)


def trim(W: LowRank, active: jax.Array) -> LowRank:
    """The kernel with zeros in the padded columns of U and V; `active` is the mask `(batch..., r)` of the others."""
    U, V = (jnp.where(active[..., None, :], x, 0.0) for x in (W.U, W.V))
    return LowRank(U, W.S, V)


@linalg.precise
def project(W: LowRank, grads: LowRank, active: jax.Array) -> LowRank:
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
      active: `(batch..., r)` mask of the columns that belong to the kernel (the rest is padding).

    Returns:
      The triple (U_p, M, V_p), zero in the padded columns.
    """
    sigma = linalg.diag_part(W.S)
    known = active & (sigma > jnp.finfo(sigma.dtype).tiny)
    known, divisor = barrier((known, jnp.where(known, sigma, 1.0)[..., None, :]))
    bases = trim(W, active)

    def horizontal(basis: jax.Array, factor_grad: jax.Array) -> jax.Array:
        x = jnp.where(known[..., None, :], factor_grad / divisor, 0.0)
        return x - basis @ (transpose(basis) @ x)

    m = jnp.where(active[..., None, :] & active[..., :, None], grads.S, 0.0)
    return LowRank(horizontal(bases.U, grads.U), m, horizontal(bases.V, grads.V))


@linalg.precise
def make_horizontal(W: LowRank, xi: LowRank, active: jax.Array) -> LowRank:
    """Restores `U^T U_p = 0` and `V^T V_p = 0`, which an elementwise optimizer breaks."""
    W = trim(W, active)
    return LowRank(xi.U - W.U @ (transpose(W.U) @ xi.U), xi.S, xi.V - W.V @ (transpose(W.V) @ xi.V))


def norm(xi: LowRank) -> jax.Array:
    """The norm of a tangent triple, which is that of the matrix, `(batch...)`."""
    parts = jnp.stack([linalg.norm(x) for x in (xi.U, xi.S, xi.V)], axis=-1)
    return linalg.norm(parts[..., None, :])


class Basis(NamedTuple):
    """Orthonormal columns, kept as the product `[blocks...] @ mix`, so that a combination of them is one product.

    Attributes:
      blocks: arrays `(batch..., m, c)`.
      mix: `(batch..., sum of c, p)`.
    """

    blocks: tuple[jax.Array, ...]
    mix: jax.Array

    @linalg.precise
    def __matmul__(self, x: jax.Array) -> jax.Array:
        """Combinations of the columns, `(batch..., m, p) @ (batch..., p, q)`."""
        return self._replace(mix=self.mix @ x).array()

    @linalg.precise
    def array(self) -> jax.Array:
        """The columns, `(batch..., m, p)`."""
        start, total = 0, jnp.zeros((), self.mix.dtype)
        for block in self.blocks:
            stop = start + block.shape[-1]
            total = total + block @ self.mix[..., start:stop, :]
            start = stop
        return total


class Frame(NamedTuple):
    """Bases that hold the old bases and the directions added to them.

    Attributes:
      U: basis of p = min(m, 2r) columns or the width asked for.
      V: basis of q columns.
      left: `U_frame^T U_old`, `(batch..., p, r)`.
      right: `V_frame^T V_old`, `(batch..., q, r)`.
      left_new: `U_frame^T U_p`, `(batch..., p, r)`.
      right_new: `V_frame^T V_p`, `(batch..., q, r)`.
    """

    U: Basis
    V: Basis
    left: jax.Array
    right: jax.Array
    left_new: jax.Array
    right_new: jax.Array


@linalg.precise
def augment(Ws: Sequence[LowRank], xis: Sequence[LowRank], ranks: Sequence[jax.Array], times: int) -> list[Frame]:
    """Orthonormal bases of the spans of [U, U_p] and [V, V_p], those of their QR.

    Columns come in order: the k of the basis, as many new directions as fit, arbitrary orthonormal ones in the
    place of padding. The order matters to elementwise optimizers, which must not see padding mixed into U_p.

    Args:
      Ws: kernels in the canonical gauge.
      xis: their triples (U_p, M, V_p); M is not used.
      ranks: `(batch...)` numbers k of columns of the kernels that are not padding.
      times: columns of the frames in units of r, 1 or 2; with fewer than 2k some new directions are left out.

    Returns:
      The frames, with at most m (or n) columns.
    """
    bases, news = [W.U for W in Ws] + [W.V for W in Ws], [xi.U for xi in xis] + [xi.V for xi in xis]
    counts = [k[..., None, None] for k in [*ranks, *ranks]]
    # With fewer rows than 2 r the columns of [U, U_p] are dependent: a QR of them as they are.
    high = [basis.shape[-2] >= 2 * basis.shape[-1] for basis in bases]
    extensions = linalg.extend(*([x for x, h in zip(xs, high, strict=True) if h] for xs in (bases, news)))
    small = [(e.mix, e.basis, e.x) for e in extensions]
    order = functools.partial(_in_order, times=times)
    ordered = together(order, small, [k for k, h in zip(counts, high, strict=True) if h])
    tall = iter(zip(extensions, ordered, strict=True))
    sides = []
    for basis, new, k, h in zip(bases, news, counts, high, strict=True):
        if h:
            e, (mix, old, added) = next(tall)
            sides.append((Basis((basis, e.block), mix), old, added))
        else:
            q, old, added = _ordered_qr(basis, new, k, times)
            eye = jnp.eye(q.shape[-1], dtype=q.dtype)
            sides.append((Basis((q,), jnp.broadcast_to(eye, (*q.shape[:-2], *eye.shape))), old, added))
    pairs = zip(sides[: len(Ws)], sides[len(Ws) :], strict=True)
    return [Frame(u, v, left, right, left_new, right_new) for (u, left, left_new), (v, right, right_new) in pairs]


def _in_order(
    parts: tuple[jax.Array, jax.Array, jax.Array], k: jax.Array, times: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The columns of an extension `(mix, basis, x)` in the order of `augment`, and the coordinates in them."""
    mix, basis, new = parts

    def padded() -> tuple[jax.Array, jax.Array, jax.Array]:
        q, left, left_new = _ordered_qr(basis, new, k, times)
        return mix @ q, left, left_new

    if times == 1:
        return padded()
    return jax.lax.cond(jnp.all(k == basis.shape[-1]), lambda: parts, padded)


def _ordered_qr(basis: jax.Array, new: jax.Array, k: jax.Array, times: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Orthonormal columns in the order of `augment`, and the coordinates of both in them; k is `(batch..., 1, 1)`."""
    r = basis.shape[-1]
    width = times * r
    shape = (*k.shape[:-1], width)
    j = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    # Column j of the frame is U_j below k, new direction j - k below 2k, and zero from there on.
    source = jnp.where(j < k, j, jnp.minimum(j - k + r, 2 * r - 1))
    # New direction i is column k + i of the frame.
    target = jnp.minimum(k + j[..., :r], width - 1)
    active = j[..., :r] < k
    fits = active & (k + j[..., :r] < width)
    columns = jnp.take_along_axis(jnp.concatenate([basis, new], axis=-1), source, axis=-1)
    q, x = linalg.orthonormalize(jnp.where(j < 2 * k, columns, 0.0))
    left_new = jnp.take_along_axis(x, target, axis=-1)
    return q, jnp.where(active, x[..., :r], 0.0), jnp.where(fits, left_new, 0.0)


def augmented_block(S: jax.Array, rank: jax.Array) -> jax.Array:
    """Mask, of the shape of S, of the coefficients between the k basis columns and k new directions.

    The rest is padding.
    """
    rows = linalg.leading(2 * rank, S.shape[-2])[..., :, None]
    return rows & linalg.leading(2 * rank, S.shape[-1])[..., None, :]


@linalg.precise
def coefficients(
    M: jax.Array, left: jax.Array, right: jax.Array, left_new: jax.Array, right_new: jax.Array
) -> jax.Array:
    r"""The matrix of a tangent vector in a frame, `(batch..., p, q)`.

    :math:`\hat U^\top \xi \hat V`, which is :math:`[[M, R_v^\top], [R_u, 0]]` when U and V are orthonormal.

    Args:
      M: of the triple (U_p, M, V_p).
      left, right, left_new, right_new: see `Frame`.
    """
    return left @ M @ transpose(right) + left_new @ transpose(right) + left @ transpose(right_new)


@linalg.precise
def congruence(x: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """`left x right^T`: carries weights, gradients and first moments between bases."""
    return left @ x @ transpose(right)


@linalg.precise
def congruence_squared(x: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """`(left sqrt(x) right^T)^2` elementwise: carries second moments, and keeps them non-negative."""
    return jnp.square(left @ jnp.sqrt(jnp.maximum(x, 0.0)) @ transpose(right))


class Retraction(NamedTuple):
    """A point near a coefficient matrix Y, before its rank is chosen.

    Attributes:
      left: `(batch..., p, r)`, the new U in the frame.
      right: `(batch..., q, r)`, the new V in the frame.
      spectrum: singular values of the retracted matrix before truncation, descending.
    """

    left: jax.Array
    right: jax.Array
    spectrum: jax.Array


def retract_svd(y: jax.Array, r: int) -> Retraction:
    """The best approximation of `U_frame y V_frame^T`: its SVD, of which r columns are kept."""
    p, sigma, q = linalg.svd(y)
    return Retraction(p[..., :r], q[..., :r], sigma)


@linalg.precise
def retract_bug(y: jax.Array, left: jax.Array, right: jax.Array, active: jax.Array) -> Retraction:
    r"""The basis-update and Galerkin step: no SVD of the frame's size, and a fixed rank.

    .. math:: U' = \mathrm{orth}(Y V), \quad V' = \mathrm{orth}(Y^\top U), \quad S' = U'^\top Y V'

    in the coordinates of the frame, then an r x r SVD that restores the canonical gauge.

    References:
      Ceruti, Lubich, `An unconventional robust integrator for dynamical low-rank approximation
      <https://arxiv.org/abs/2010.02022>`_, 2021, section 3.
    """
    (u, _), (v, _) = linalg.gram_qr([y @ right, transpose(y) @ left])
    # The columns of u and v beside padding are arbitrary: what Y has there is not part of the step.
    s = transpose(u) @ y @ v
    p, sigma, q = linalg.svd(jnp.where(active[..., None, :] & active[..., :, None], s, 0.0))
    return Retraction(u @ p, v @ q, sigma)


def align(retraction: Retraction, overlap: jax.Array) -> Retraction:
    """Flips pairs of singular vectors so that each new U column points along the old one.

    Signs of singular vectors are arbitrary; with this choice a small step is a small change of U and V.

    Args:
      retraction: the retraction.
      overlap: `U_frame^T U_old`, `(batch..., p, r)`.
    """
    sign = linalg.signs(jnp.sum(retraction.left * overlap, axis=-2, keepdims=True))
    return retraction._replace(left=retraction.left * sign, right=retraction.right * sign)


@linalg.precise
def assemble(frame: Frame, retraction: Retraction, rank: jax.Array) -> LowRank:
    """The kernel after truncation to `rank` (at most r) singular values."""
    r = retraction.left.shape[-1]
    sigma = jnp.where(linalg.leading(rank, r), retraction.spectrum[..., :r], 0.0)
    return LowRank(frame.U @ retraction.left, linalg.diagonal(sigma), frame.V @ retraction.right)


@linalg.precise
def transport(xi: LowRank, old: LowRank, new: LowRank) -> LowRank:
    r"""Carries a tangent vector at `old` to `new` by projection onto the tangent space there.

    With :math:`\xi V' = (U M + U_p)(V^\top V') + U (V_p^\top V')` and likewise :math:`\xi^\top U'`:
    :math:`M' = U'^\top \xi V'`, :math:`U_p' = \xi V' - U' M'`, :math:`V_p' = \xi^\top U' - V' M'^\top`.

    Args:
      xi: triple at `old`.
      old: kernel the triple belongs to.
      new: kernel to carry it to, with zeros in padded columns of its bases, see `trim`.

    Returns:
      The triple at `new`, zero in the padded columns.
    """
    right, left = transpose(old.V) @ new.V, transpose(old.U) @ new.U
    xi_v = (old.U @ xi.S + xi.U) @ right + old.U @ (transpose(xi.V) @ new.V)
    xi_u = (old.V @ transpose(xi.S) + xi.V) @ left + old.V @ (transpose(xi.U) @ new.U)
    m = transpose(new.U) @ xi_v
    return LowRank(xi_v - new.U @ m, m, xi_u - new.V @ transpose(m))


@linalg.precise
def transport_squared(x: LowRank, old: LowRank, new: LowRank) -> LowRank:
    r"""Carries second moments of the triple, as those of sums of independent numbers.

    With :math:`P = U^\top U'`, :math:`Q = V^\top V'`, and what of each basis is outside of the other,
    :math:`U_o = U' - U P` and :math:`U_d = U - U' P^\top`, `transport` is

    .. math::
      M' = P^\top (M Q + B) + A Q, \quad U_p' = U_p Q - U' A Q + U_d (M Q + B), \quad
      A = U_o^\top U_p, \quad B = V_p^\top V_o

    and likewise for V. Here all weights are squared. Where bases stay this is the identity, and a coordinate with a
    first moment has a second moment too, also after ranks have changed. Both kernels have zeros in padded columns.
    """
    p, q = transpose(old.U) @ new.U, transpose(old.V) @ new.V
    p2, q2 = jnp.square(p), jnp.square(q)
    a = transpose(jnp.square(new.U - old.U @ p)) @ x.U
    b = transpose(x.V) @ jnp.square(new.V - old.V @ q)
    right, left = x.S @ q2 + b, transpose(x.S) @ p2 + transpose(a)
    return LowRank(
        x.U @ q2 + jnp.square(new.U) @ (a @ q2) + jnp.square(old.U - new.U @ transpose(p)) @ right,
        transpose(p2) @ right + a @ q2,
        x.V @ p2 + jnp.square(new.V) @ (transpose(b) @ p2) + jnp.square(old.V - new.V @ transpose(q)) @ left,
    )
