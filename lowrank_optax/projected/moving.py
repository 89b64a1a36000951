"""Projectors whose basis moves from where it is: power iteration, Oja's rule, Grassmann geodesics, COAP, Dion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax.projected.base import Projector, Refreshing
from lowrank_optax.projected.spans import leading, toward


def _tracked(track: Callable[[jax.Array, Refreshing], jax.Array], momentum: bool = False) -> Projector:
    """The projector that starts at the singular vectors of the first gradient and goes on by `track`."""

    def refresh(stored: jax.Array, at: Refreshing) -> jax.Array:
        def start() -> jax.Array:
            # In a stack some matrices may have a basis already.
            exists = jnp.any(stored != 0)
            return jnp.where(exists, track(stored, at), leading(at.gradient, stored.shape[1]))

        return jax.lax.cond(at.first, start, lambda: track(stored, at))

    return Projector(refresh, momentum=momentum)


def power(rho: float | jax.Array = 0.908, b1: float | jax.Array = 0.908) -> Projector:
    r"""One warm-started power iteration on a mean of momentum and gradient.

    .. math:: B = \rho\, P \hat m + (1 - \rho)\, A, \quad P \leftarrow \mathrm{qf}(B\, B^\top P)

    Args:
      rho: weight of the momentum.
      b1: decay of the first moment of the inner transformation, for its bias correction.

    References:
      Robert et al., LDAdam, `arXiv:2410.16103 <https://arxiv.org/abs/2410.16103>`_, 2024, algorithm 1.
    """

    def track(stored: jax.Array, at: Refreshing) -> jax.Array:
        mean = at.momentum / (1 - jnp.power(jnp.asarray(b1, stored.dtype), jnp.maximum(at.count, 1)))
        b = rho * (stored @ mean) + (1 - rho) * at.gradient
        return linalg.orthonormalize(b @ (b.T @ stored))[0]

    return _tracked(track, momentum=True)


def grassmann(learning_rate: float | jax.Array = 10.0) -> Projector:
    r"""A step along the geodesic of the Grassmann manifold that best reduces the part of A outside the subspace.

    .. math::

      (I - P P^\top) A A^\top P \approx \sigma u v^\top, \quad
      P \leftarrow (P v \cos\theta + u \sin\theta)\, v^\top + P (I - v v^\top), \quad \theta = 2 \eta \sigma

    Args:
      learning_rate: eta, in units of one over the square of the gradient.

    References:
      Rajabi, Nonta, Rambhatla, SubTrack++, `arXiv:2502.01586 <https://arxiv.org/abs/2502.01586>`_, 2025, equation 5.
    """

    def track(stored: jax.Array, at: Refreshing) -> jax.Array:
        projected = stored.T @ at.gradient
        tangent = 2 * (at.gradient - stored @ projected) @ projected.T
        tangent = tangent - stored @ (stored.T @ tangent)
        left, sigma, right = linalg.svd(tangent)
        u, v, angle = left[:, :1], right[:, :1], learning_rate * sigma[0]
        moved = (stored @ v * jnp.cos(angle) + u * jnp.sin(angle)) @ v.T
        return moved + stored - (stored @ v) @ v.T

    return _tracked(track)


class Moving(NamedTuple):
    """A basis, the state of the optimizer that moves it, and whether this step has made it."""

    matrix: jax.Array
    optimizer: Any
    fresh: jax.Array


def oja(optimizer: optax.GradientTransformation) -> Projector:
    r"""A basis that an optimizer moves after every use, by the gradient of the loss of principal components.

    It begins with singular vectors, where the loss has no slope but rounding, and moves from the next step on.

    .. math:: L(P) = |P P^\top \bar A - \bar A|_F^2, \quad \bar A = A / |A|_F

    Its columns stay close to orthonormal by the loss alone.

    Args:
      optimizer: of the basis, with its learning rate, for instance `optax.adam(1 / 200)`.

    References:
      Liang et al., `arXiv:2408.12857 <https://arxiv.org/abs/2408.12857>`_, 2024, equation 4.
    """

    def init(key: jax.Array, shape: tuple[int, int], rank: int, dtype: Any) -> Moving:
        basis = jnp.zeros((shape[0], rank), dtype)
        return Moving(basis, optimizer.init(basis), jnp.zeros((), bool))

    def refresh(stored: Moving, at: Refreshing) -> Moving:
        matrix = toward(stored.matrix, leading(at.gradient, stored.matrix.shape[1]))
        return stored._replace(matrix=matrix, fresh=jnp.ones((), bool))

    def after(stored: Moving, basis: jax.Array, gradient: jax.Array, projected: jax.Array, count: jax.Array) -> Moving:
        size = linalg.norm(gradient)
        unit, inside = (x / jnp.where(size > 0, size, 1) for x in (gradient, projected))
        error = basis @ inside - unit
        slope = 2 * (error @ inside.T + unit @ (error.T @ basis))
        step, state = optimizer.update(slope, stored.optimizer, basis)
        moved = stored._replace(matrix=basis + step, optimizer=state)
        moves = (size > 0) & ~stored.fresh
        kept = jax.tree.map(lambda new, old: jnp.where(moves, new, old), moved, stored)
        return kept._replace(fresh=jnp.zeros((), bool))

    return Projector(refresh, init, lambda stored, gradient, rank: stored.matrix, after=after)


def coap(period: int = 32, recalibrate: int = 5, learning_rate: float | jax.Array = 0.1) -> Projector:
    r"""A gradient step on the basis that keeps the momentum correlated with the gradient, and now and then a new basis.

    .. math:: L(P) = \mathrm{mean}\,(P P^\top A - A)^{2} \; \big(1 - \mathrm{mean}_j \cos((P M)_j, A_j)\big)

    over the outputs j of the kernel, whichever side is projected. Every `recalibrate`-th refresh the basis becomes the
    left singular vectors of :math:`A Q`, with Q the orthonormal factor of :math:`A^\top P`.

    Args:
      period: steps between refreshes, the same as in `refresh`.
      recalibrate: refreshes between two recalibrations.
      learning_rate: step size of the basis, with gradients clipped to norm 1.

    References:
      Xiao et al., COAP, `arXiv:2412.00071 <https://arxiv.org/abs/2412.00071>`_, 2024, equations 5 to 8.
    """

    def loss(basis: jax.Array, a: jax.Array, momentum: jax.Array, inputs: int) -> jax.Array:
        lifted = basis @ momentum
        product = _safe_norms(lifted, inputs) * _safe_norms(a, inputs)
        cosine = jnp.sum(lifted * a, axis=inputs) / jnp.maximum(product, 1e-8)
        return jnp.mean(jnp.square(basis @ (basis.T @ a) - a)) * (1 - jnp.mean(cosine))

    def step(stored: jax.Array, at: Refreshing) -> jax.Array:
        slope = jax.grad(loss)(stored, at.gradient, at.momentum, at.inputs)
        return stored - learning_rate * slope * jnp.minimum(1, 1 / (linalg.norm(slope) + 1e-6))

    def calibrated(stored: jax.Array, at: Refreshing) -> jax.Array:
        start = jax.random.normal(at.key, stored.shape, stored.dtype)
        start = jnp.where(jnp.any(stored != 0), stored, start)
        q, _ = linalg.orthonormalize(at.gradient.T @ start)
        return toward(stored, leading(at.gradient @ q, stored.shape[1]))

    def refresh(stored: jax.Array, at: Refreshing) -> jax.Array:
        due = at.first | (at.count % (recalibrate * period) == 0)
        return jax.lax.cond(due, lambda: calibrated(stored, at), lambda: step(stored, at))

    return Projector(refresh, momentum=True)


def _safe_norms(x: jax.Array, axis: int) -> jax.Array:
    """Norms along an axis; their derivative at zero is zero."""
    squares = jnp.sum(jnp.square(x), axis=axis)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def dion() -> Projector:
    r"""One power iteration on A from the normalised coordinates of the last step; these are stored, and not the basis.

    .. math:: P = \mathrm{qf}(A Q), \quad R = P^\top A, \quad Q \leftarrow R^\top \text{ with columns of norm 1}

    References:
      Ahn, Xu, Abreu, Fan, Magakyan, Sharma, Zhan, Langford, Dion,
      `arXiv:2504.05295 <https://arxiv.org/abs/2504.05295>`_, 2025, algorithm 1.
    """

    def init(key: jax.Array, shape: tuple[int, int], rank: int, dtype: Any) -> jax.Array:
        return jax.random.normal(key, (shape[1], rank), dtype)

    def basis(stored: jax.Array, gradient: jax.Array, rank: int) -> jax.Array:
        p, _ = linalg.orthonormalize(gradient @ stored)
        return jnp.where(jnp.any(gradient != 0), p, 0)

    def after(
        stored: jax.Array, basis: jax.Array, gradient: jax.Array, projected: jax.Array, count: jax.Array
    ) -> jax.Array:
        return jnp.where(jnp.any(gradient != 0), normalized_rows(projected).T, stored)

    return Projector(lambda stored, at: stored, init, basis, after=after)


def normalized_rows(x: jax.Array) -> jax.Array:
    """Rows divided by their norm."""
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
