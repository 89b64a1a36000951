"""Projection and retraction as stateless transformations to put optimizers between."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.explicit import Placement
from lowrank_optax.linalg import transpose
from lowrank_optax.lowrank import LowRank, cast_like, flatten, is_lowrank, unflatten
from lowrank_optax.transforms.checks import check_gradients


def _canonical(W: LowRank) -> tuple[LowRank, jax.Array, jax.Array, jax.Array]:
    """W flattened, in the working dtype and the canonical gauge; the gauge P, Q; the active columns."""
    F = flatten(W.astype(linalg.working_dtype(W.U, W.S, W.V)))
    eye = jnp.broadcast_to(jnp.eye(F.rank, dtype=F.S.dtype), F.S.shape)
    sigma = linalg.diag_part(F.S)
    p, sigma, q = jax.lax.cond(jnp.all(mf.is_canonical(F.S)), lambda: (eye, sigma, eye), lambda: mf.gauge(F.S))
    # A zero kernel has no directions of its own yet, so all its columns may be used.
    active = (sigma > 0) | ~jnp.any(sigma > 0, axis=-1, keepdims=True)
    return LowRank(F.U @ p, linalg.diagonal(sigma), F.V @ q), p, q, active


def tangent_gradient(W: LowRank, grads: LowRank) -> LowRank:
    """The triple (U_p, M, V_p) of P(W)G in the bases of W, with the axes of W and in the working dtype."""
    C, p, q, active = _canonical(W)
    g = flatten(grads.astype(C.U.dtype))
    xi = mf.project(C, mf.rotate(g, p, q), active)
    return unflatten(mf.rotate_tangent(xi, transpose(p), transpose(q)), W)


def project_to_tangent() -> optax.GradientTransformationExtraArgs:
    r"""Turns factor gradients into the Riemannian gradient, in coordinates that any linear transform may act on.

    .. math:: (G_U, G_S, G_V) \mapsto (U_p, M, V_p), \quad P(W) G = U M V^\top + U_p V^\top + U V_p^\top

    The triple is linear in the tangent vector and its Euclidean norm is :math:`|P(W)G|_F`, so clipping by global
    norm, scaling, noise and accumulation do between `project_to_tangent` and `retract` what they do for a dense
    kernel. Momentum does not: it would have to be transported, see `fixed_rank`. Ordinary leaves pass.

    Returns:
      A stateless transformation; its `update` needs `params`. Updates have the dtypes of the parameters.

    Raises:
      ValueError: from `update` for missing params or gradients of another structure.

    Example:
      Riemannian gradient descent with clipping:

      >>> import lowrank_optax as lro, optax
      >>> tx = optax.chain(
      ...     lro.project_to_tangent(), optax.clip_by_global_norm(1.0), optax.scale(-0.1), lro.retract()
      ... )

    References:
      arXiv:2506.17475, tangent space projection.
    """

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        check_gradients(grads, params)

        def one(W: Any, g: Any) -> Any:
            if not is_lowrank(W):
                return g
            return Placement(W).auto(lambda W, g: cast_like(tangent_gradient(W, g), W), W, g)

        return jax.tree.map(one, params, grads, is_leaf=is_lowrank), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def retract(method: Literal["svd", "bug"] = "svd") -> optax.GradientTransformationExtraArgs:
    r"""Moves every kernel along a tangent vector and back onto the manifold.

    .. math:: (U_p, M, V_p) \mapsto R_W(\xi) - W, \quad R_W(\xi) = W + \xi + O(|\xi|^2)

    The last link of a chain that begins with `project_to_tangent`. Kernels keep their number of non-zero singular
    values (a zero kernel may use its whole width). The part of U_p in the span of U is removed first.

    Args:
      method: "svd", the best approximation of W + xi, or "bug", basis update and galerkin, which needs no SVD
        of size 2r.

    Returns:
      A stateless transformation; its `update` needs `params` and returns `new - old` for every factor.

    Raises:
      ValueError: for an unknown method; from `update` for missing params or updates of another structure.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> tx = optax.chain(lro.project_to_tangent(), optax.scale(-0.1), lro.retract("bug"))
    """
    if method not in ("svd", "bug"):
        raise ValueError(f"method must be 'svd' or 'bug', got {method!r}")

    def one(W: Any, xi: Any) -> Any:
        return Placement(W).auto(move, W, xi) if is_lowrank(W) else xi

    def move(W: LowRank, xi: LowRank) -> LowRank:
        C, p, q, active = _canonical(W)
        x = mf.rotate_tangent(flatten(xi.astype(C.U.dtype)), p, q)
        x = mf.make_horizontal(C, x, active)
        # The group of one that `augment` expects: its own batch axes may be sharded.
        C, x, active = jax.tree.map(lambda y: y[None], (C, x, active))
        rank = jnp.sum(active, axis=-1, dtype=jnp.int32)
        (frame,) = mf.augment([C], [x], [rank], times=2)
        left, right = frame.left, frame.right
        y = mf.congruence(C.S, left, right) + mf.coefficients(x.S, left, right, frame.left_new, frame.right_new)
        point = mf.retract_bug(y, left, right, active) if method == "bug" else mf.retract_svd(y, W.rank)
        new = jax.tree.map(lambda y: y[0], mf.assemble(frame, mf.align(point, left), rank))
        new = cast_like(unflatten(new, W), W)
        return LowRank(new.U - W.U, new.S - W.S, new.V - W.V)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        check_gradients(updates, params)
        return jax.tree.map(one, params, updates, is_leaf=is_lowrank), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def tangent_norm(params: Any, grads: Any) -> jax.Array:
    r"""The norm of the Riemannian gradient, :math:`|P(W)G|_F` over all kernels, with the ordinary leaves.

    .. math:: \Big(\sum_{\text{kernels}} |P(W)G|_F^2 + \sum_{\text{others}} |G|^2\Big)^{1/2}

    Zero exactly at the stationary points of low-rank training. The norm of the factor gradients is not: it depends
    on the gauge and grows with the condition number of S.

    Args:
      params: parameters with `LowRank` nodes.
      grads: gradients of the factors, of the same structure.

    Returns:
      A scalar in float32 or better.

    Raises:
      ValueError: for gradients of another structure.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": lro.factorize(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 2)}
      >>> loss = lambda p: jnp.sum(p["kernel"].to_dense() ** 2) / 2  # G = W, a tangent vector at W
      >>> round(float(lro.tangent_norm(params, jax.grad(loss)(params))), 4) == round(13**0.5, 4)
      True
    """
    check_gradients(grads, params)

    def norm(W: Any, g: Any) -> jax.Array:
        if is_lowrank(W):
            of_kernel = lambda W, g: linalg.norm(mf.norm(flatten(tangent_gradient(W, g))).reshape(1, -1))  # noqa: E731
            return Placement(W).auto(of_kernel, W, g)
        return linalg.norm(g.astype(linalg.working_dtype(g)).reshape(1, -1))

    norms = jax.tree.leaves(jax.tree.map(norm, params, grads, is_leaf=is_lowrank))
    return linalg.norm(jnp.stack(norms)[None]) if norms else jnp.zeros(())
