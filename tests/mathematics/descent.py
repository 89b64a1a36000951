"""Descent on one small kernel, in one compiled loop for every problem of a shape."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from tests import problems

R = 3


M, N = 12, 8


BETA = 0.8


def relative(x: Any, y: Any) -> float:
    return float(np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(y)))


def kernel(seed: int, sigma: Any, m: int = M, n: int = N) -> lro.LowRank:
    """A random kernel with these singular values in the canonical gauge."""
    rng, sigma = np.random.default_rng(seed), np.asarray(sigma, np.float64)
    U, V = problems.orthonormal(rng, m, sigma.size), problems.orthonormal(rng, n, sigma.size)
    return lro.LowRank(jnp.asarray(U), jnp.asarray(np.diag(sigma)), jnp.asarray(V))


def factor_gradients(W: lro.LowRank, G: Any) -> lro.LowRank:
    """The gradients that autodiff gives for dL/dW = G."""
    return jax.grad(lambda W: jnp.sum(jnp.asarray(G, W.dtype) * W.to_dense()))(W)


# --- gauges and symmetries ------------------------------------------------------------


def turn(W: lro.LowRank, seed: int) -> tuple[lro.LowRank, tuple[jax.Array, jax.Array]]:
    """The same W in other bases, U Q1 and V Q2."""
    rng = np.random.default_rng(seed)
    Q1, Q2 = (jnp.asarray(problems.orthonormal(rng, W.width, W.width)) for _ in range(2))
    return lro.LowRank(W.U @ Q1, Q1.T @ W.S @ Q2, W.V @ Q2), (Q1, Q2)


def optimizer(kind: str, h: Any, theta: Any = None, beta: float = BETA) -> optax.GradientTransformation:
    rank = None if theta is None else lro.tolerance(theta)
    if kind == "adam":
        return lro.lowrank_adam(h, 0.9, 0.99, 1e-4, geometry=lro.Coefficient())
    if kind == "factors":
        return optax.sgd(h, beta)
    geometry = lro.Coefficient(rank=rank) if kind == "coefficient" else lro.Tangent(rank=rank)
    return lro.lowrank_heavy_ball(h, beta, geometry=geometry)


Data = tuple[Any, Any, float]


def dense_of(params: dict[str, Any]) -> jax.Array:
    if "kernel" in params:
        return params["kernel"].to_dense()
    if "A" in params:
        return params["A"] @ params["B"].T
    return params["U"] @ params["S"] @ params["V"].T


def loss(params: dict[str, Any], data: Data) -> jax.Array:
    H, T, c = data
    D = dense_of(params) - T
    return jnp.sum(H * D**2) / 2 + c * jnp.sum(D**4) / 4


@functools.partial(jax.jit, static_argnums=(0, 1))
def _descend(kind: str, steps: int, params: Any, data: Data, h: Any, theta: Any, beta: Any) -> tuple[Any, jax.Array]:
    tx = optimizer(kind, h, theta, beta)

    def body(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, data), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), dense_of(params)

    (params, _), Ws = jax.lax.scan(body, (params, tx.init(params)), None, length=steps)
    return params, Ws


def descend(
    kind: str, steps: int, params: Any, data: Data, h: float, theta: float | None = None, beta: float = BETA
) -> tuple[Any, np.ndarray]:
    """Final parameters and the dense kernel after every step. One compilation for all problems of a shape."""
    params, Ws = _descend(kind, steps, params, data, h, theta, beta)
    return params, np.asarray(Ws)


def weighted(seed: int = 15) -> Data:
    rng = np.random.default_rng(seed)
    T = problems.with_singular_values(rng, M, N, (6.0, 4.0, 2.5, 1.0))
    return jnp.asarray(rng.uniform(0.7, 1.3, T.shape)), jnp.asarray(T), 0.01
