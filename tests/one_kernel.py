"""One small kernel with known singular values, its loss, and the geometries that it is trained in."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from tests import problems

GEOMETRIES = {
    "balanced": lro.Balanced(),
    "tangent": lro.Tangent(),
    "coefficient": lro.Coefficient(),
    "bug": lro.Tangent(retraction="bug"),
}


M, N, RANK = 9, 7, 3


def kernel(
    sigma: Any = (3.0, 2.0, 0.7), seed: int = 0, width: int | None = None, m: int = M, n: int = N
) -> lro.LowRank:
    rng, padded = np.random.default_rng(seed), np.zeros(width or len(sigma))
    padded[: len(sigma)] = sigma
    U, V = (problems.orthonormal(rng, k, padded.size) for k in (m, n))
    return jax.tree.map(jnp.asarray, lro.LowRank(U, np.diag(padded), V))


TARGET = np.random.default_rng(9).standard_normal((M, N))


def distance(params: Any) -> jax.Array:
    """The squared distance to the target, of every kernel and of every slice of a stack."""
    kernels = jax.tree.leaves(params, is_leaf=lro.is_lowrank)
    return sum(jnp.sum((W.to_dense() - np.broadcast_to(TARGET, W.shape)) ** 2) / 2 for W in kernels)


@functools.lru_cache
def step_of(tx: Any, loss: Any) -> Any:
    """A jitted step: one program for an optimizer, a loss and the shapes of parameters."""

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(tx: Any, params: Any, state: Any, steps: int, loss: Any = distance) -> tuple[Any, Any]:
    step = step_of(tx, loss)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state
