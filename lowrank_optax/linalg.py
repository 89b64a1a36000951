"""Orthonormalisation and small SVDs that are safe in every dtype and at every rank.

Arrays are matrices with any number of leading batch axes. Every function computes in the dtype it
is given; callers bring their factors to `working_dtype` first, because LAPACK and its GPU
counterparts have no half-precision kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.xla import barrier, in_groups, join, unjoin

# A decorator. Accelerators multiply float32 as bfloat16 or TF32 unless told otherwise, and 1e-3 of W would be lost in
# every step.
precise = jax.default_matmul_precision("highest")


def working_dtype(*arrays: Any) -> jnp.dtype:
    """The dtype in which factors are decomposed: their common dtype, at least float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def all_finite(tree: Any) -> jax.Array:
    """Whether every value of a tree is finite; a tree without floating leaves is."""
    # By the largest value, which is NaN where one is: for XLA a reduction as any other, unlike one of booleans.
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    finite = [jnp.max(jnp.abs(x)) < jnp.inf for x in leaves if x.size]
    return functools.reduce(jnp.logical_and, finite, jnp.ones((), bool))


def signs(x: jax.Array) -> jax.Array:
    """-1 where x is negative, else 1, in the dtype of x."""
    return jnp.where(x < 0, -jnp.ones_like(x), jnp.ones_like(x))


def norm(x: jax.Array) -> jax.Array:
    """Frobenius norm of every matrix of a batch, also where squares overflow or vanish."""
    return _norms(x, (-2, -1))[..., 0, 0]


def column_norms(x: jax.Array) -> jax.Array:
    """Norms `(..., 1, k)` of the columns, also where squares overflow or vanish."""
    return _norms(x, (-2,))


def _norms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    top = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scaled = x / jnp.where(top > 0, top, jnp.ones_like(top))
    return top * jnp.sqrt(jnp.sum(scaled * scaled, axis=axes, keepdims=True))


def transpose(x: jax.Array) -> jax.Array:
    """Swaps the two matrix axes."""
    return jnp.swapaxes(x, -1, -2)


def _each_matrix(f: Callable[[jax.Array], tuple[jax.Array, ...]], x: jax.Array) -> tuple[jax.Array, ...]:
    """A decomposition of every matrix of a batch: one batched call, on CPU one call after the other.

    A batched LAPACK call of jaxlib hands its matrices to the thread pool it runs on and waits for them. When as many
    such calls run at once as the pool has threads (two, on two cores), all wait and the program hangs: seen with
    jaxlib 0.10.2.
    """
    batch = x.shape[:-2]

    def sequential(x: jax.Array) -> tuple[jax.Array, ...]:
        one = jax.custom_batching.sequential_vmap(f)
        if not batch:
            return one(x)
        flat = jax.lax.map(one, x.reshape(-1, *x.shape[-2:]))
        return tuple(y.reshape(*batch, *y.shape[1:]) for y in flat)

    return jax.lax.platform_dependent(x, cpu=sequential, default=f)


def orthonormalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Thin QR, `x = Q R`, by Householder reflections; R has a non-negative diagonal, so signs are those of x.

    Q has orthonormal columns whatever the rank of `x`: a zero or dependent column (a zero gradient,
    a gradient inside the old basis, a padded column) only makes the matching column of Q arbitrary.
    Cholesky-QR returns NaN in those cases and loses orthonormality from a condition number of
    about 1e5 in float32 on, hence Householder.

    Args:
      x: array of shape `(..., m, k)`.

    Returns:
      Q of shape `(..., m, min(m, k))` and R of shape `(..., min(m, k), k)`.
    """
    q, r = _each_matrix(lambda y: tuple(jnp.linalg.qr(y, mode="reduced")), x)
    sign = signs(diag_part(r[..., : q.shape[-1]]))
    return q * sign[..., None, :], r * sign[..., :, None]


class Extension(NamedTuple):
    """An orthonormal basis `[basis, block] @ mix` of the columns of `basis` and of x, with their coordinates.

    Attributes:
      block: `(..., m, k)`, independent of the basis; only its product with `mix` is orthonormal.
      mix: `(..., r + k, r + k)`, upper triangular.
      basis: `(..., r + k, r)`, coordinates of the basis, zero below row r.
      x: `(..., r + k, k)`, coordinates of x, upper triangular below row r.
    """

    block: jax.Array
    mix: jax.Array
    basis: jax.Array
    x: jax.Array


class _Pass(NamedTuple):
    """Where `extend` is: X = U in_basis + y in_y, but for the scale of its columns. All but the ys are one batch."""

    ys: list[jax.Array]
    c: jax.Array  # U^T y
    gram: jax.Array  # y^T y
    size: jax.Array  # the norms of the columns of y
    beside: jax.Array  # the Gram matrix of their parts beside U, relative to those
    in_basis: jax.Array
    in_y: jax.Array
    shift: jax.Array
    passes: jax.Array


@precise
def extend(bases: Sequence[jax.Array], xs: Sequence[jax.Array]) -> list[Extension]:
    r"""Completes each orthonormal basis U to one of the span of [U, X]: the QR of [U, X] by Gram matrices only.

    .. math:: [U, X] = [U, Y]\,K\,[R_U, R_X], \quad (\,[U, Y]\,K\,)^\top [U, Y]\,K = I

    Shifted Cholesky QR: with :math:`C = U^\top Y` and :math:`R^\top R = Y^\top Y - C^\top C + s I`, a pass
    replaces Y by :math:`(Y - U C) R^{-1}`, whose condition is smaller by about the root of the shift s, 400 in single
    precision. Passes go on until every Y is orthonormal up to a half, one in most steps; a last Cholesky factorisation,
    of the Gram matrix of [U, Y], gives K. All that touches m rows is a matrix product: fast on accelerators, batched,
    and over sharded rows nothing but k x k sums is communicated. All matrices of equal r and k are factorised in one
    batch, whatever their m, see `xla.together`.

    The result is that of `orthonormalize` of [U, X], to rounding in the size of each column, whatever the rank of X:
    first a fixed pseudo-random matrix of rounding size is added, which makes the columns independent, and put in
    the place of columns of zeros. U need not be orthonormal to more than a tenth; its drift is corrected.

    Args:
      bases: every U, `(..., m, r)`; r may be 0.
      xs: every X, `(..., m, k)`, with r + k <= m.

    Returns:
      An `Extension` of each; `mix` and the coordinates are NaN where X is not finite, or if ever the passes should not
      end.

    References:
      Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, `Shifted Cholesky QR for computing the QR factorization of
      ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020; with the block Gram-Schmidt of Carson, Lund,
      Rozložník, Thomas, `arXiv:2010.12058 <https://arxiv.org/abs/2010.12058>`_, 2022, section 2.
    """
    pairs = list(zip(bases, xs, strict=True))
    small = [jax.eval_shape(lambda u, x: (transpose(u) @ x, transpose(x) @ x), *pair) for pair in pairs]
    return in_groups(lambda group: _extend(*map(list, zip(*group, strict=True))), pairs, small)


def _extend(bases: list[jax.Array], xs: list[jax.Array]) -> list[Extension]:
    """`extend` for matrices of equal r and k, and of equal batch axes but for the first."""
    k, eps = xs[0].shape[-1], float(jnp.finfo(xs[0].dtype).eps)

    def start(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        top = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
        size = jnp.where(top > 0, jnp.full_like(top, eps), jnp.ones_like(top))
        noise = jnp.broadcast_to(_noise(x.shape[-2], k, x.dtype), x.shape)
        # The factor keeps equal columns apart where the sum is rounded away, the sum where both are zero.
        return x / jnp.where(top > 0, top, 1.0) * (1 + 2 * eps * jnp.sign(noise)) + size * noise, top

    def products(ys: list[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        c = join([transpose(basis) @ y for basis, y in zip(bases, ys, strict=True)])
        gram = join([transpose(y) @ y for y in ys])
        size = barrier(jnp.sqrt(diag_part(gram)))
        return c, gram, size, (gram - transpose(c) @ c) / (size[..., :, None] * size[..., None, :])

    def oblique(p: _Pass) -> jax.Array:
        return ~jnp.all(jnp.sum(jnp.square(p.beside - eye), axis=(-2, -1)) < 0.25)

    def improve(p: _Pass) -> _Pass:
        upper, inverse = cholesky(p.beside + p.shift[..., None, None] * eye)
        # Rounding may leave a negative eigenvalue below -shift: the next pass has a larger shift.
        ok = jnp.isfinite(jnp.sum(inverse, axis=(-2, -1)))
        sound = ok[..., None, None]
        upper = jnp.where(sound, upper * p.size[..., None, :], eye)
        inverse = jnp.where(sound, inverse / p.size[..., :, None], eye)
        parts = zip(bases, p.ys, unjoin((inverse, p.c @ inverse), xs), strict=True)
        ys = [y @ inverse - basis @ c for basis, y, (inverse, c) in parts]
        shift = jnp.where(ok, p.shift, 100 * p.shift)
        return _Pass(ys, *products(ys), p.in_basis + p.c @ p.in_y, upper @ p.in_y, shift, p.passes + 1)

    ys, tops = map(list, zip(*map(start, xs), strict=True))
    c, gram, size, beside = products(ys)
    top = join(tops)
    eye = jnp.broadcast_to(jnp.eye(k, dtype=gram.dtype), gram.shape)
    shift = jnp.full(gram.shape[:-2], k * eps, gram.dtype)
    p = _Pass(ys, c, gram, size, beside, jnp.zeros_like(c), eye, shift, jnp.zeros((), jnp.int32))
    p = jax.lax.while_loop(lambda p: (p.passes < 8) & oblique(p), improve, p)  # Five is the most that was seen.
    above = jnp.concatenate([join([transpose(basis) @ basis for basis in bases]), p.c], axis=-1)
    below = jnp.concatenate([transpose(p.c), p.gram], axis=-1)
    # NaN rather than a basis that is none.
    upper, mix = cholesky(jnp.where(oblique(p), jnp.nan, jnp.concatenate([above, below], axis=-2)))
    coordinates = upper @ jnp.concatenate([p.in_basis, p.in_y], axis=-2) * top
    parts = unjoin((mix, upper[..., : c.shape[-2]], coordinates), xs)
    return [Extension(y, *part) for y, part in zip(p.ys, parts, strict=True)]


@precise
def gram_qr(xs: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """`orthonormalize` of each x by Gram matrices, see `extend`: Q `(..., m, k)` and R `(..., k, k)`, for k <= m."""
    return [(e.block @ e.mix, e.x) for e in extend([x[..., :0] for x in xs], xs)]


def cholesky(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upper triangular R with `x = R^T R`, and its inverse; NaN where `x` is not positive definite."""

    def one(x: jax.Array) -> tuple[jax.Array, ...]:
        lower = jnp.linalg.cholesky(x, symmetrize_input=False)
        eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
        inverse = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
        return transpose(lower), transpose(inverse)

    upper, inverse = _each_matrix(one, x)
    return upper, inverse


def _noise(m: int, k: int, dtype: Any) -> jax.Array:
    """A fixed pseudo-random m x k matrix, uniform with columns of norm 1 on average; not of signs, which for small m
    repeat whole columns. From the integer hash `lowbias32` of Wellons.
    """
    i, j = (jax.lax.broadcasted_iota(jnp.uint32, (m, k), axis) for axis in (0, 1))
    x = i * jnp.uint32(k) + j
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    # The upper 24 bits are a number that single precision has.
    return ((x >> 8).astype(dtype) * 2.0**-23 - 1) * (3 / m) ** 0.5


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin SVD, `x = P diag(sigma) Q^T`, with Q and not its transpose.

    Args:
      x: array of shape `(..., k, l)`.

    Returns:
      P `(..., k, min(k, l))`, sigma `(..., min(k, l))` descending, Q `(..., l, min(k, l))`. Where a matrix is not
      finite, sigma is NaN.
    """
    # LAPACK's bidiagonal iteration need not end on infinities: seen in sbdsqr, a program that hangs.
    finite = jnp.all(jnp.isfinite(x), axis=(-2, -1))
    x = jnp.where(finite[..., None, None], x, 0.0)
    p, sigma, qt = _each_matrix(lambda y: tuple(jnp.linalg.svd(y, full_matrices=False)), x)
    return p, jnp.where(finite[..., None], sigma, jnp.nan), transpose(qt)


def diag_part(x: jax.Array) -> jax.Array:
    """The diagonals `(..., k)` of square matrices, as sums: XLA on CPU fuses the gather of `jnp.diagonal` worse."""
    eye = jnp.eye(x.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(jnp.broadcast_to(eye, x.shape), x, jnp.zeros_like(x)), axis=-1)


def diagonal(sigma: jax.Array) -> jax.Array:
    """The diagonal matrices `(..., k, k)` of vectors `(..., k)`."""
    eye = jnp.eye(sigma.shape[-1], dtype=sigma.dtype)
    return sigma[..., None] * jnp.broadcast_to(eye, sigma.shape + sigma.shape[-1:])


def leading(count: jax.Array, width: int) -> jax.Array:
    """Boolean mask `(..., width)` that is true at the first `count` positions."""
    shape = (*jnp.shape(count), width)
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < count[..., None]


def newton_schulz(x: jax.Array, steps: int) -> jax.Array:
    """Approximates the orthogonal polar factor of `x` by a quintic Newton-Schulz iteration.

    The iteration `X <- a X + b (X X^T) X + c (X X^T)^2 X` with the coefficients of Muon is tuned for
    speed, not for convergence: singular values end between about 0.7 and 1.2, and those below about
    1e-3 of the norm stay small after five steps. Zero stays zero.

    Args:
      x: array of shape `(..., k, l)`.
      steps: number of iterations; five is usual.

    Returns:
      Array of the shape of `x`.

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    # The guard only matters for a zero matrix, where it avoids 0 / 0. Entries are brought to the order of 1 first,
    # so that no square vanishes.
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True), jnp.finfo(x.dtype).tiny)
    x = x / jnp.maximum(norm(x)[..., None, None], 1.0)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else transpose(x)
    for _ in range(steps):
        gram = x @ transpose(x)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else transpose(x)
