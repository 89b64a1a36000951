r"""LoRA-Pro: a transformation of Optax on the gradient of W that a step of both factors stands for.

With :math:`W = W_0 + s\,A B`, A of m x r and B of r x n, a step :math:`(dA, dB)` moves W by :math:`s\,(dA\,B + A\,dB)`.
LoRA-Pro chooses the step whose motion is closest to the gradient of W. It knows this gradient through
:math:`G_A = s\,G B^\top` and :math:`G_B = s\,A^\top G` alone:

.. math::
  dA = s^{-2} G_A K_B + A X, \quad
  dB = s^{-2} K_A G_B (I - B^\top K_B B) - X B,
  \quad K_A = (A^\top A + \lambda I)^{-1},\ K_B = (B B^\top + \lambda I)^{-1}

and the motion is the same for every X. The X of the least change of both factors solves
:math:`A^\top A\, X + X B B^\top = -s^{-2} A^\top G_A K_B`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.pairs import flatten_pair, is_pair, on_pairs, power_of_gram
from lowrank_optax.layout import map_matrices


def pro(inner: Any, damping: Any) -> optax.GradientTransformationExtraArgs:
    """`inner` on m x n gradients in the place of pairs, and on all other arrays as they are.

    Weight decay inside decays the product of a pair.
    """

    def init(delta: Any) -> Any:
        return inner.init(_with_products(delta))

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("rule 'pro' needs the changes: update(grads, state, params)")

        def equivalent(gradient: LoRA, pair: LoRA) -> jax.Array:
            flat, _ = flatten_pair(gradient, pair)
            return map_matrices(_equivalent, *flat, *_numbers(pair, damping, flat[0].dtype))

        def on_factors(pair: LoRA, motion: jax.Array) -> LoRA:
            flat, back = flatten_pair(pair, pair)
            update = back(*map_matrices(_on_factors, motion, *flat[2:], *_numbers(pair, damping, flat[0].dtype)))
            return dataclasses.replace(update, scale=jnp.zeros_like(pair.scale))

        motions, state = inner.update(on_pairs(equivalent, grads, params), state, _with_products(params), **extra_args)
        return jax.tree.map(lambda x, u: on_factors(x, u) if is_pair(x) else u, params, motions, is_leaf=is_pair), state

    return optax.GradientTransformationExtraArgs(init, update)


def _with_products(delta: Any) -> Any:
    """The tree with s A B in the place of pairs."""

    def product(pair: LoRA) -> jax.Array:
        flat, _ = flatten_pair(pair, pair)
        return map_matrices(lambda A, B, s: s * (A @ B), *flat[2:], pair.scale.astype(flat[0].dtype)[..., None, None])

    return jax.tree.map(lambda x: product(x) if is_pair(x) else x, delta, is_leaf=is_pair)


def _numbers(pair: LoRA, damping: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """s and lambda for every matrix of a stack."""
    scale = pair.scale.astype(dtype)
    return scale, jnp.broadcast_to(jnp.asarray(damping, dtype), scale.shape)


def _inverses(A: jax.Array, B: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    eye = jnp.eye(A.shape[1], dtype=A.dtype)
    return power_of_gram(A.T @ A + damping * eye, -1), power_of_gram(B @ B.T + damping * eye, -1)


def _adjusted(gA: jax.Array, gB: jax.Array, A: jax.Array, B: jax.Array, s: jax.Array, damping: jax.Array) -> Any:
    """dA and dB without X."""
    of_A, of_B = _inverses(A, B, damping)
    dA = gA @ of_B / s**2
    inside = of_A @ gB
    return dA, (inside - (inside @ B.T) @ of_B @ B) / s**2


def _equivalent(
    gA: jax.Array, gB: jax.Array, A: jax.Array, B: jax.Array, s: jax.Array, damping: jax.Array
) -> jax.Array:
    """The gradient of W that the factors' gradients stand for."""
    dA, dB = _adjusted(gA, gB, A, B, s, damping)
    return s * (dA @ B + A @ dB)


def _on_factors(motion: jax.Array, A: jax.Array, B: jax.Array, s: jax.Array, damping: jax.Array) -> Any:
    """The steps of both factors whose motion is closest to one of W."""
    gA, gB = s * (motion @ B.T), s * (A.T @ motion)
    dA, dB = _adjusted(gA, gB, A, B, s, damping)
    _, of_B = _inverses(A, B, damping)
    X = _sylvester(A.T @ A, B @ B.T, -(A.T @ gA @ of_B) / s**2)
    return dA + A @ X, dB - X @ B


def _sylvester(P: jax.Array, Q: jax.Array, R: jax.Array) -> jax.Array:
    """X with `P X + X Q = R` for symmetric positive semidefinite P and Q; no part where both vanish."""
    (p, u), (q, v) = jnp.linalg.eigh(P), jnp.linalg.eigh(Q)
    total = p[:, None] + q[None, :]
    floor = P.shape[0] * jnp.finfo(total.dtype).eps * jnp.maximum(jnp.abs(total).max(), jnp.finfo(total.dtype).tiny)
    return u @ jnp.where(total > floor, (u.T @ R @ v) / jnp.where(total > floor, total, 1.0), 0.0) @ v.T
