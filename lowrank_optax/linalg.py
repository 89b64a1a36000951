"""Orthonormalisation and small SVDs of one matrix, safe in every dtype and at every rank.

Every function takes matrices without batch axes and computes in the dtype it is given. `layout` maps them over
batches and brings factors to `working_dtype` first, because LAPACK and its GPU counterparts have no half precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# A decorator. By default accelerators multiply float32 as bfloat16 or TF32, and every step would lose 1e-3 of W.
highest_precision = jax.default_matmul_precision("highest")


def working_dtype(*arrays: Any) -> jnp.dtype:
    """The dtype in which factors are decomposed: their common dtype, at least float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def is_floating(x: Any) -> bool:
    """Whether an array, or a dtype, is of floats that JAX promotes to a working dtype: not of 8 bits or fewer."""
    dtype = jnp.result_type(x)
    return bool(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16)


def check_floating(name: str, x: Any, done: str) -> None:
    """Raises ValueError for a kernel of other numbers; `done` says what would be done with it."""
    if not is_floating(x):
        raise ValueError(
            f"{name!r} has dtype {jnp.result_type(x)}: only floating kernels of 16 bits or more are {done}"
        )


def all_finite(tree: Any) -> jax.Array:
    """Whether every value of a tree is finite; a tree without floating leaves is."""
    # By the largest absolute value, which is NaN if any value is: XLA makes many kernels of a reduction of booleans.
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    finite = [jnp.max(jnp.abs(x)) < jnp.inf for x in leaves if x.size]
    return functools.reduce(jnp.logical_and, finite, jnp.ones((), bool))


def cond_without_copy(when: jax.Array, f: Callable[[Any], Any], x: Any) -> Any:
    """`f(x)` if `when`, else x, as a loop of one pass or none.

    A branch of `lax.cond` that returns x copies it; the loop does not. In a batch `lax.cond` always computes `f`; the
    loop runs only if a member needs it.
    """

    def body(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return jnp.zeros_like(carry[0]), f(carry[1])

    with jax.named_scope("cond_without_copy"):  # tells this from other loops in compiled programs
        return jax.lax.while_loop(lambda carry: carry[0], body, (when, x))[1]


def norm(x: jax.Array) -> jax.Array:
    """The Frobenius norm, also where squares overflow or vanish."""
    return _norms(x, (-2, -1))[0, 0]


def column_norms(x: jax.Array) -> jax.Array:
    """Norms `(k,)` of the columns, also where squares overflow or vanish."""
    return _norms(x, (-2,))[0]


def root_of_squares(*xs: jax.Array) -> jax.Array:
    """The root of the sum of the squares of numbers."""
    return norm(jnp.stack(xs)[None])


def _norms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    top = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scaled = x / jnp.where(top > 0, top, jnp.ones_like(top))
    return top * jnp.sqrt(jnp.sum(scaled * scaled, axis=axes, keepdims=True))


def diag_part(x: jax.Array) -> jax.Array:
    """The diagonal `(k,)`, as a sum: XLA on CPU fuses the gather of `jnp.diagonal` worse."""
    return jnp.sum(jnp.where(jnp.eye(x.shape[-1], dtype=bool), x, jnp.zeros_like(x)), axis=-1)


def diagonal(sigma: jax.Array) -> jax.Array:
    """The diagonal matrix of a vector."""
    return sigma[:, None] * jnp.eye(sigma.shape[-1], dtype=sigma.dtype)


def rank_mask(rank: Any, width: int) -> jax.Array:
    """Boolean mask `(width,)` that is true at the first `rank` positions."""
    return jax.lax.broadcasted_iota(jnp.int32, (width,), 0) < rank


def first_columns(x: jax.Array, rank: Any) -> jax.Array:
    """x with zeros in all columns but the first `rank`."""
    return jnp.where(rank_mask(rank, x.shape[1])[None], x, jnp.zeros_like(x))


# --- decompositions -------------------------------------------------------------------


Decomposition = Callable[[jax.Array], tuple[jax.Array, ...]]


def decomposition(
    f: Decomposition, on_gpu: Decomposition | None = None, of_number: Decomposition | None = None
) -> Decomposition:
    """`f` of one matrix; `of_number` is its closed form for 1 x 1 matrices, such as kernels of rank 1 have.

    More than one matrix: in a batch one batched call, on CPU one call after the other. Its derivative is refused.

    A batched LAPACK call of jaxlib hands its matrices to the thread pool it runs on and waits for them. If as many
    such calls run at once as the pool has threads (two, on two cores), all wait and the program hangs, as seen with
    jaxlib 0.10.2.
    """
    sequential = jax.custom_batching.sequential_vmap(f)

    @jax.custom_jvp
    def decompose(x: jax.Array) -> tuple[jax.Array, ...]:
        if of_number is not None and x.shape == (1, 1):
            return of_number(x)
        gpu = on_gpu or f
        return jax.lax.platform_dependent(x, cpu=sequential, cuda=gpu, rocm=gpu, default=f)

    @decompose.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "lowrank_optax does not differentiate through decompositions, hence not through update, retract, "
            "factorize, orthonormalize or resize: the derivative of a singular vector is unbounded where singular "
            "values meet, as the zeros of padded columns do. Take jax.lax.stop_gradient of the arguments, or "
            "differentiate the loss with respect to the factors U, S, V"
        )

    return decompose


@highest_precision
def svd_by_eigh(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""SVD of a square matrix from the eigenvectors :math:`[p; q] / \sqrt 2` of :math:`[[0, X], [X^\top, 0]]`.

    Relative to the largest singular value it is as accurate as LAPACK's SVD, unlike the eigenvectors of
    :math:`X^\top X`. GPUs have fast eigenvalue solvers for batches of small matrices: on an H100 one call for 24
    matrices of size 64 takes 1 ms, and the SVD of XLA takes 26 ms.
    """
    k, top = x.shape[0], jnp.max(jnp.abs(x))
    x = x / jnp.where(top > 0, top, 1.0)
    zero = jnp.zeros_like(x)
    values, vectors = jnp.linalg.eigh(jnp.block([[zero, x], [x.T, zero]]), symmetrize_input=False)
    vectors = vectors[:, : k - 1 : -1]
    # For a small sigma the eigenvectors of sigma and -sigma mix, and the halves are no longer orthonormal.
    p, q = (y @ mix for y, mix, _ in (gram_qr(vectors[:k]), gram_qr(vectors[k:])))
    return p, top * jnp.maximum(values[: k - 1 : -1], 0.0), q.T


def _thin_svd(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.linalg.svd(x, full_matrices=False))


_svd = decomposition(
    _thin_svd,
    on_gpu=lambda x: svd_by_eigh(x) if x.shape[0] == x.shape[1] <= 512 else _thin_svd(x),
    of_number=lambda x: (_signs(x), jnp.abs(x)[0], jnp.ones_like(x)),
)
_qr = decomposition(lambda x: tuple(jnp.linalg.qr(x, mode="reduced")))


_eigh = decomposition(lambda x: tuple(jnp.linalg.eigh(x, symmetrize_input=False)))


def leading_eigenvectors(x: jax.Array, k: int) -> jax.Array:
    """The eigenvectors `(n, k)` of the k largest eigenvalues of a symmetric matrix, in falling order."""
    return _eigh(x)[1][:, ::-1][:, :k]


def _cholesky_of_matrix(x: jax.Array) -> tuple[jax.Array, ...]:
    lower = jnp.linalg.cholesky(x, symmetrize_input=False)
    inverse = jax.lax.linalg.triangular_solve(lower, jnp.eye(x.shape[-1], dtype=x.dtype), left_side=True, lower=True)
    return lower.T, inverse.T


_cholesky = decomposition(_cholesky_of_matrix, of_number=lambda x: (jnp.sqrt(x), 1 / jnp.sqrt(x)))


def svd(x: jax.Array, toward: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin SVD, `x = P diag(sigma) Q^T`, with Q and not its transpose, and with signs that follow one rule.

    A pair of singular vectors is determined up to its sign. Column j of P points along column j of `toward`. If the
    latter is orthogonal, zero or missing, the largest entry of the column of P is positive; of several entries that are
    as large up to one per cent, the first.

    Args:
      x: a matrix `(k, l)`.
      toward: a matrix of k rows, by default of no columns.

    Returns:
      P `(k, min(k, l))`, sigma `(min(k, l),)` descending, Q `(l, min(k, l))`. Where x is not finite, sigma is NaN.
    """
    # LAPACK's bidiagonal iteration may not end on infinities: a program was seen to hang in sbdsqr.
    finite = jnp.all(jnp.isfinite(x))
    p, sigma, qt = _svd(jnp.where(finite, x, 0.0))
    top = jnp.abs(p) >= 0.99 * jnp.max(jnp.abs(p), axis=0, keepdims=True)
    first = top & (jnp.cumsum(top.astype(jnp.int32), axis=0) == 1)
    largest = jnp.sum(jnp.where(first, p, 0.0), axis=0)
    if toward is not None and toward.shape[1]:
        along = jnp.sum(p[:, : toward.shape[1]] * toward[:, : p.shape[1]], axis=0)
        along = jnp.pad(along, (0, p.shape[1] - along.shape[0]))
        largest = jnp.where(along == 0, largest, along)
    sign = _signs(largest)[None]
    return p * sign, jnp.where(finite, sigma, jnp.nan), qt.T * sign


def _signs(x: jax.Array) -> jax.Array:
    """-1 where x is negative, else 1."""
    return jnp.where(x < 0, -jnp.ones_like(x), jnp.ones_like(x))


def orthonormalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Thin QR, `x = Q R`, by Householder reflections. R has a non-negative diagonal, so Q keeps the signs of x.

    Q has orthonormal columns whatever the rank of `x`: a zero or dependent column (a zero gradient, a gradient inside
    the old basis, a padded column) only makes the matching column of Q arbitrary. Cholesky QR returns NaN in these
    cases, and in float32 it loses orthonormality from a condition number of about 1e5 on.

    Args:
      x: a matrix `(m, k)`.

    Returns:
      Q `(m, min(m, k))` and R `(min(m, k), k)`.
    """
    q, r = _qr(x)
    sign = _signs(diag_part(r[:, : q.shape[1]]))
    return q * sign[None], r * sign[:, None]


class ExtendedBasis(NamedTuple):
    """An orthonormal basis `[basis, block] @ mix` of the columns of `basis` and of x.

    Attributes:
      block: `(m, k)`, independent of the basis; only its product with `mix` is orthonormal.
      mix: `(r + k, r + k)`, upper triangular.
      of_basis: `(r + k, r)`, coordinates of the columns of the basis, zero below row r.
      of_x: `(r + k, k)`, coordinates of the columns of x, upper triangular below row r.
    """

    block: jax.Array
    mix: jax.Array
    of_basis: jax.Array
    of_x: jax.Array


class _Pass(NamedTuple):
    """Where `extend_basis` is: x = basis @ in_basis + y @ in_y, but for the scale of its columns."""

    y: jax.Array
    overlap: jax.Array  # basis^T y
    gram: jax.Array  # y^T y
    in_basis: jax.Array
    in_y: jax.Array
    shift: jax.Array
    passes: jax.Array

    def outside(self) -> tuple[jax.Array, jax.Array]:
        """The norms of the columns of y, and the Gram matrix of their parts outside the basis, relative to them."""
        size = jnp.sqrt(diag_part(self.gram))
        return size, (self.gram - self.overlap.T @ self.overlap) / (size[:, None] * size[None, :])


@highest_precision
def extend_basis(basis: jax.Array, x: jax.Array) -> ExtendedBasis:
    r"""Completes an orthonormal basis U to one of the span of [U, X]: the QR of [U, X] by Gram matrices only.

    .. math:: [U, X] = [U, Y]\,K\,[R_U, R_X], \quad (\,[U, Y]\,K\,)^\top [U, Y]\,K = I

    Shifted Cholesky QR: with :math:`C = U^\top Y` and :math:`R^\top R = Y^\top Y - C^\top C + s I`, a pass replaces Y
    by :math:`(Y - U C) R^{-1}`, whose condition is smaller by about the root of the shift s, 400 in single precision.
    Passes go on until Y is orthonormal up to a half, which takes one in most steps. A last Cholesky factorisation, of
    the Gram matrix of [U, Y], gives K. Only matrix products touch m rows: they are fast on accelerators, and over
    sharded rows they communicate nothing but k x k sums.

    The result equals `orthonormalize` of [U, X] up to rounding in the size of each column, whatever the rank of X. For
    this a fixed pseudo-random matrix of rounding size is added first, which makes the columns independent and takes the
    place of columns of zeros. U need not be orthonormal to more than a tenth; its drift is corrected.

    Args:
      basis: U, `(m, r)`; r may be 0.
      x: X, `(m, k)`, with r + k <= m.

    Returns:
      The extended basis. `mix` and the coordinates are NaN if X is not finite, or if eight passes do not suffice.

    References:
      Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, `Shifted Cholesky QR for computing the QR factorization of
      ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020; with the block Gram-Schmidt of Carson, Lund,
      Rozložník, Thomas, `arXiv:2010.12058 <https://arxiv.org/abs/2010.12058>`_, 2022, section 2.
    """
    (m, k), r, eps = x.shape, basis.shape[1], float(jnp.finfo(x.dtype).eps)
    eye = jnp.eye(k, dtype=x.dtype)
    top = jnp.max(jnp.abs(x), axis=0, keepdims=True)
    noise = _noise(m, k, x.dtype)
    # The factor keeps equal columns apart where the sum is rounded away; the sum keeps columns of zeros apart.
    scaled = x / jnp.where(top > 0, top, 1.0) * (1 + 2 * eps * jnp.sign(noise))
    scaled = scaled + noise * jnp.where(top > 0, jnp.full_like(top, eps), jnp.ones_like(top))

    def measured(y: jax.Array, in_basis: jax.Array, in_y: jax.Array, shift: jax.Array, passes: jax.Array) -> _Pass:
        return _Pass(y, basis.T @ y, y.T @ y, in_basis, in_y, shift, passes)

    def far_from_orthonormal(p: _Pass) -> jax.Array:
        return ~(jnp.sum(jnp.square(p.outside()[1] - eye)) < 0.25)  # NaN is far

    def improved(p: _Pass) -> _Pass:
        size, outside = p.outside()
        upper, inverse = _cholesky(outside + p.shift * eye)
        # Rounding may leave a negative eigenvalue below -shift; then the next pass has a larger shift.
        ok = jnp.isfinite(jnp.sum(inverse))
        upper = jnp.where(ok, upper * size[None], eye)
        inverse = jnp.where(ok, inverse / size[:, None], eye)
        y = p.y @ inverse - basis @ (p.overlap @ inverse)
        shift = jnp.where(ok, p.shift, 100 * p.shift)
        return measured(y, p.in_basis + p.overlap @ p.in_y, upper @ p.in_y, shift, p.passes + 1)

    zero = jnp.zeros((r, k), x.dtype)
    p = measured(scaled, zero, eye, jnp.asarray(k * eps, x.dtype), jnp.zeros((), jnp.int32))
    # Five passes is the most that was seen.
    p = jax.lax.while_loop(lambda p: (p.passes < 8) & far_from_orthonormal(p), improved, p)
    gram = jnp.block([[basis.T @ basis, p.overlap], [p.overlap.T, p.gram]])
    upper, mix = _cholesky(jnp.where(far_from_orthonormal(p), jnp.nan, gram))  # NaN rather than a wrong basis
    of_x = upper @ jnp.concatenate([p.in_basis, p.in_y]) * top
    return ExtendedBasis(p.y, mix, upper[:, :r], of_x)


def gram_qr(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`orthonormalize` by Gram matrices, see `extend_basis`: Y, K and R with `x = (Y K) R`, for k <= m."""
    e = extend_basis(x[:, :0], x)
    return e.block, e.mix, e.of_x


def _noise(m: int, k: int, dtype: Any) -> jax.Array:
    """A fixed pseudo-random m x k matrix, uniform with columns of norm 1 on average.

    Random signs would repeat whole columns for small m. The integer hash is `lowbias32` of Wellons.
    """
    i, j = (jax.lax.broadcasted_iota(jnp.uint32, (m, k), axis) for axis in (0, 1))
    x = i * jnp.uint32(k) + j
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    # The upper 24 bits are a number that single precision represents exactly.
    return ((x >> 8).astype(dtype) * 2.0**-23 - 1) * (3 / m) ** 0.5


@highest_precision
def held(s: jax.Array, size: int) -> jax.Array:
    """Which singular values of a matrix, in descending order, are more than rounding; `size` is its longer side."""
    return s > size * jnp.finfo(s.dtype).eps * s[0]


def newton_schulz(x: jax.Array, steps: int) -> jax.Array:
    """Approximates the orthogonal polar factor of a matrix by a quintic Newton-Schulz iteration.

    The iteration `X <- a X + b (X X^T) X + c (X X^T)^2 X` with the coefficients of Muon is tuned for
    speed, not for convergence: after five steps singular values are between about 0.7 and 1.2, except that values
    below about 1e-3 of the norm stay small. Zero stays zero.

    Args:
      x: a matrix `(k, l)`.
      steps: number of iterations; five is usual.

    Returns:
      A matrix of the shape of `x`.

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    # The guards only matter for a zero matrix, where they avoid 0 / 0. Entries are scaled to the order of 1 first, so
    # that no square vanishes.
    x = x / jnp.maximum(jnp.max(jnp.abs(x)), jnp.finfo(x.dtype).tiny)
    x = x / jnp.maximum(norm(x), 1.0)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
