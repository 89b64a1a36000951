"""Orthonormalisation and small SVDs that are safe in every dtype and at every rank.

Arrays are matrices with any number of leading batch axes. Every function computes in the dtype it
is given; callers bring their factors to `working_dtype` first, because LAPACK and its GPU
counterparts have no half-precision kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def working_dtype(*arrays: Any) -> jnp.dtype:
    """The dtype in which factors are decomposed: their common dtype, at least float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def all_finite(tree: Any) -> jax.Array:
    """Whether every value of a tree is finite; a tree without floating leaves is."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in leaves], jnp.ones((), bool))


def signs(x: jax.Array) -> jax.Array:
    """-1 where x is negative, else 1, in the dtype of x."""
    return jnp.where(x < 0, -jnp.ones_like(x), jnp.ones_like(x))


def norm(x: jax.Array) -> jax.Array:
    """Frobenius norm of every matrix of a batch, also where squares overflow or vanish."""
    top = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    scaled = x / jnp.where(top > 0, top, jnp.ones_like(top))
    return top[..., 0, 0] * jnp.sqrt(jnp.sum(scaled * scaled, axis=(-2, -1)))


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
    sign = signs(jnp.diagonal(r, axis1=-2, axis2=-1))[..., : q.shape[-1]]
    return q * sign[..., None, :], r * sign[..., :, None]


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
