"""The tangent geometry cut in two, with room for a chain between the halves, and clipping by the Riemannian norm."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.boxes import unwrapped
from lowrank_optax.checks import check_gradients
from lowrank_optax.geometry import Tangent
from lowrank_optax.layout import map_kernel
from lowrank_optax.lowrank import LowRank

_TANGENT = Tangent()


def _rank(W: LowRank) -> jax.Array:
    """The rank; all columns of a zero kernel may be used."""
    return _TANGENT.init(W)[0]


def _gradient(W: LowRank, grads: LowRank) -> tuple[mf.Tangent, mf.Turn]:
    """P(W)G at the canonical gauge, and the change of basis to it."""
    frame = _TANGENT.frame(W, grads, _rank(W))
    return frame.grad, frame.turn


def _triple(W: LowRank, grads: LowRank) -> LowRank:
    """P(W)G in the bases of W, as a node of three factors."""
    xi, turn = _gradient(W, grads)
    return LowRank(*mf.turn_tangent(xi, mf.Turn(turn.P.T, turn.Q.T)))


def _norm(W: LowRank, grads: LowRank) -> jax.Array:
    return mf.norm(_gradient(W, grads)[0])


def _moved(W: LowRank, triple: LowRank, geometry: Tangent) -> LowRank:
    """The retraction of W + xi."""
    frame = geometry.frame(W, jax.tree.map(jnp.zeros_like, W), _rank(W))
    xi = mf.turn_tangent(mf.Tangent(triple.U, triple.S, triple.V), frame.turn)
    return geometry.truncate(frame, geometry.propose(frame, xi), None)[0]


def project_to_tangent() -> optax.GradientTransformationExtraArgs:
    r"""Turns factor gradients into the Riemannian gradient, in coordinates that any linear transform may act on.

    .. math:: (G_U, G_S, G_V) \mapsto (U_p, M, V_p), \quad P(W) G = U M V^\top + U_p V^\top + U V_p^\top

    The triple is linear in the tangent vector and its Euclidean norm is :math:`|P(W)G|_F`. Clipping by global norm,
    scaling, noise and accumulation between `project_to_tangent` and `retract` therefore work as for a dense kernel.
    Momentum does not: it has to be transported between steps, see `fixed_rank`. Ordinary leaves pass unchanged.

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
        (params, rebox), (grads, _) = map(unwrapped, (params, grads))
        check_gradients(grads, params)
        return rebox(_map_kernels(lambda W, g: map_kernel(_triple, W, g), params, grads)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def retract(retraction: Literal["svd", "bug"] = "svd") -> optax.GradientTransformationExtraArgs:
    r"""Moves every kernel along a tangent vector and back onto the manifold.

    .. math:: (U_p, M, V_p) \mapsto R_W(\xi) - W, \quad R_W(\xi) = W + \xi + O(|\xi|^2)

    The last link of a chain that begins with `project_to_tangent`. Kernels keep their number of non-zero singular
    values (a zero kernel may use its whole width). The part of U_p in the span of U is removed first.

    Args:
      retraction: "svd", the best approximation of W + xi, or "bug", see `Tangent`.

    Returns:
      A stateless transformation; its `update` needs `params` and returns `new - old` for every factor.

    Raises:
      ValueError: for an unknown retraction; from `update` for missing params or updates of another structure.
      NotImplementedError: for derivatives through `update`.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> tx = optax.chain(lro.project_to_tangent(), optax.scale(-0.1), lro.retract("bug"))
    """
    geometry = Tangent(retraction=retraction)

    def move(W: LowRank, xi: LowRank) -> LowRank:
        return jax.tree.map(jnp.subtract, map_kernel(_moved, W, xi, geometry=geometry), W)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        (params, rebox), (updates, _) = map(unwrapped, (params, updates))
        check_gradients(updates, params)
        return rebox(_map_kernels(move, params, updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def clip_by_tangent_norm(max_norm: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Scales gradients down so that the norm of the Riemannian gradient is at most `max_norm`.

    .. math:: G \leftarrow G \min\Big(1, \frac{c}{|P(W)\,G|}\Big)

    over all kernels and ordinary leaves, see `tangent_norm`. It stands in front of any low-rank optimizer and clips as
    `optax.clip_by_global_norm` does for dense kernels. In its place `clip_by_global_norm` would clip the gradients of
    the factors, whose norm depends on the gauge and grows with the condition of W.

    Args:
      max_norm: c.

    Returns:
      A stateless transformation; its `update` needs `params`.

    Raises:
      ValueError: from `update` for missing params or gradients of another structure.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> tx = optax.chain(lro.clip_by_tangent_norm(1.0), lro.lowrank_adam(1e-3))
    """

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        norm = tangent_norm(params, grads)
        # NaN passes on, so that the optimizer sees and counts it.
        scale = jnp.where(norm <= max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def tangent_norm(params: Any, grads: Any) -> jax.Array:
    r"""The norm of the Riemannian gradient, :math:`|P(W)G|_F` over all kernels, with the ordinary leaves.

    .. math:: \Big(\sum_{\text{kernels}} |P(W)G|_F^2 + \sum_{\text{others}} |G|^2\Big)^{1/2}

    It is zero exactly at the stationary points of low-rank training, and it does not depend on the gauge, while the
    norm of the factor gradients does and grows with the condition number of S.

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
    params, grads = (unwrapped(tree)[0] for tree in (params, grads))
    check_gradients(grads, params)

    def norm(W: Any, g: Any) -> jax.Array:
        return linalg.norm(map_kernel(_norm, W, g).reshape(1, -1))

    def other(g: Any) -> jax.Array:
        return linalg.norm(g.astype(linalg.working_dtype(g)).reshape(1, -1))

    norms = jax.tree.leaves(_map_kernels(norm, params, grads, other))
    return linalg.norm(jnp.stack(norms)[None]) if norms else jnp.zeros(())


def _map_kernels(f: Any, params: Any, tree: Any, other: Any = lambda x: x) -> Any:
    """`f(W, x)` at every kernel and `other(x)` at the other leaves."""
    one = lambda W, x: f(W, x) if _TANGENT.owns(W) else other(x)  # noqa: E731
    return jax.tree.map(one, params, tree, is_leaf=_TANGENT.owns)
