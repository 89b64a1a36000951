"""Balanced momentum against dense NumPy oracles, and what its coordinates must satisfy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import linalg, manifold
from lowrank_optax.geometry import Balanced, Pair
from tests import problems

H, BETA, B2, EPS = 0.05, 0.9, 0.99, 1e-3
SIGMA = np.array([3.0, 2.0, 0.7])


def kernel(seed: int = 0, m: int = 9, n: int = 7, sigma: np.ndarray = SIGMA) -> lro.LowRank:
    rng = np.random.default_rng(seed)
    U, V = (problems.orthonormal(rng, k, len(sigma)) for k in (m, n))
    return jax.tree.map(jnp.asarray, lro.LowRank(U, np.diag(sigma), V))


def factor_gradients(W: lro.LowRank, G: np.ndarray) -> lro.LowRank:
    return lro.LowRank(G @ W.V @ W.S.T, W.U.T @ G @ W.V, G.T @ W.U @ W.S)


class Oracle:
    """Factors that are optimised as dense matrices and balanced after each step through an SVD of W = A B^T.

    The change of the columns is found by least squares and not from the formulas of the library.
    """

    def __init__(self, W: np.ndarray, rank: int, inner: str) -> None:
        self.rank, self.inner, self.t = rank, inner, 0
        self.A, self.B = self._balance(W)
        self.m = [np.zeros_like(self.A), np.zeros_like(self.B)]
        self.v = [np.zeros_like(self.A), np.zeros_like(self.B)]

    def _balance(self, W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        P, sigma, Qt = np.linalg.svd(W)
        root = np.sqrt(sigma[: self.rank])
        return P[:, : self.rank] * root, Qt[: self.rank].T * root

    @property
    def W(self) -> np.ndarray:
        return self.A @ self.B.T

    def direction(self, i: int, g: np.ndarray) -> np.ndarray:
        if self.inner == "heavy ball":
            self.m[i] = BETA * self.m[i] + g
            return self.m[i]
        self.m[i] = BETA * self.m[i] + (1 - BETA) * g
        self.v[i] = B2 * self.v[i] + (1 - B2) * g**2
        return self.m[i] / (1 - BETA**self.t) / (np.sqrt(self.v[i] / (1 - B2**self.t)) + EPS)

    def step(self, G: np.ndarray) -> None:
        self.t += 1
        gradients = G @ self.B, G.T @ self.A
        A, B = (x - H * self.direction(i, g) for i, (x, g) in enumerate(zip((self.A, self.B), gradients, strict=True)))
        self.A, self.B = self._balance(A @ B.T)
        X, Y = np.linalg.lstsq(A, self.A)[0], np.linalg.lstsq(B, self.B)[0]
        np.testing.assert_allclose(X.T @ Y, np.eye(self.rank), atol=1e-10)
        X, Y = X / np.linalg.norm(X, axis=0), Y / np.linalg.norm(Y, axis=0)
        self.m = [self.m[0] @ Y, self.m[1] @ X]
        self.v = [self.v[0] @ Y**2, self.v[1] @ X**2]


OPTIMIZERS = {
    "heavy ball": lro.lowrank_heavy_ball(H, BETA, geometry=lro.Balanced()),
    "adam": lro.lowrank_adam(H, BETA, B2, EPS),
}


@pytest.mark.parametrize("inner", OPTIMIZERS)
def test_trajectory_is_the_oracles(inner: str) -> None:
    W, tx = kernel(), OPTIMIZERS[inner]
    T = np.random.default_rng(1).standard_normal((9, 7))
    oracle = Oracle(np.asarray(W.to_dense()), 3, inner)
    params, state, update = W, tx.init(W), jax.jit(tx.update)
    for _ in range(30):
        G = np.asarray(params.to_dense()) - T
        oracle.step(oracle.W - T)
        updates, state = update(factor_gradients(params, G), state, params)
        params = optax.apply_updates(params, updates)
        # 30 roundings of 1e-16, raised by 1 / eps where a moment vanishes.
        np.testing.assert_allclose(params.to_dense(), oracle.W, atol=1e-10)
    assert np.linalg.norm(params.to_dense() - W.to_dense()) > 0.5


def test_muon_is_newton_schulz_on_each_factor() -> None:
    W = kernel(m=6, n=24)
    G = np.random.default_rng(2).standard_normal((6, 24))
    tx = lro.lowrank_muon(H)
    updates, _ = jax.jit(tx.update)(factor_gradients(W, G), tx.init(W), W)
    root = np.sqrt(SIGMA)[None]
    A, B = W.U * root, W.V * root
    # The first momentum is a multiple of the gradient; sqrt(24 / 6) = 2.
    A, B = (x - 2 * H * linalg.newton_schulz(jnp.asarray(g), 5) for x, g in ((A, G @ B), (B, G.T @ A)))
    np.testing.assert_allclose(optax.apply_updates(W, updates).to_dense(), A @ B.T, atol=1e-12)


FULL = jnp.int32(3)


def pair(W: lro.LowRank) -> Pair:
    """A and B of a kernel without zeros."""
    root = jnp.sqrt(linalg.diag_part(W.S))[None]
    return Pair(W.U * root, W.V * root)


def test_gradients_are_those_of_autodiff() -> None:
    W = kernel()
    A, B = pair(W)
    T = jnp.asarray(np.random.default_rng(3).standard_normal((9, 7)))
    np.testing.assert_allclose(A @ B.T, W.to_dense(), atol=1e-14)
    g = Balanced().frame(W, factor_gradients(W, W.to_dense() - T), FULL).grad
    gA, gB = jax.grad(lambda A, B: jnp.sum((A @ B.T - T) ** 2) / 2, argnums=(0, 1))(A, B)
    np.testing.assert_allclose(g.A, gA, atol=1e-13)
    np.testing.assert_allclose(g.B, gB, atol=1e-13)


@pytest.mark.parametrize("sigma", [SIGMA, np.array([1.0, 1e-5, 1e-9]), np.array([2.0, 1.0, 0.0]), np.zeros(3)])
@pytest.mark.parametrize("rank", [2, 3])
def test_norm_is_that_of_the_tangent_gradient(sigma: np.ndarray, rank: int) -> None:
    W, rank = kernel(sigma=sigma), jnp.int32(rank)
    grads = factor_gradients(W, np.random.default_rng(4).standard_normal((9, 7)))
    expected = manifold.norm(manifold.project(W, grads, rank))
    np.testing.assert_allclose(Balanced().frame(W, grads, rank).gradient_norm, expected, rtol=1e-10)


@jax.jit
def moved(A: Any, B: Any) -> Any:
    """The proposal of a step that ends at the pair (A, B)."""
    frame = Balanced().frame(W := kernel(m=len(A), n=len(B), sigma=np.ones(A.shape[1])), W, FULL)
    start = Pair(W.U * frame.left[None], W.V * frame.right[None])
    return Balanced().propose(frame, jax.tree.map(jnp.subtract, Pair(A, B), start))


@pytest.mark.parametrize(
    ("a", "b"),
    [("normal", "normal"), ("zero column", "normal"), ("normal", "tiny column"), ("zero", "zero"), ("equal", "normal")],
)
def test_rebalancing_keeps_the_product_whatever_the_factors(a: str, b: str) -> None:
    rng = np.random.default_rng(5)

    def factor(kind: str, m: int) -> Any:
        x = rng.standard_normal((m, 4))
        scales = {"zero": [0] * 4, "zero column": [1, 0, 1, 0], "tiny column": [1, 1e-160, 1, 0]}
        x = x * np.array(scales.get(kind, [1, 1, 1, 0]), float)
        return jnp.asarray(x[:, [0, 0, 2, 3]] if kind == "equal" else x)

    A, B = factor(a, 9), factor(b, 7)
    new = moved(A, B)
    W = new.kernel
    np.testing.assert_allclose(W.to_dense(), A @ B.T, atol=1e-13)
    assert bool(manifold.is_canonical(W.S)) and float(W.S[3, 3]) == 0
    for Q in (W.U, W.V):
        np.testing.assert_allclose(Q.T @ Q, np.eye(4), atol=1e-13)
    X, Y = new.turn
    for Z in (X, Y):
        lengths = np.linalg.norm(Z, axis=0)
        assert np.all((np.abs(lengths - 1) < 1e-12) | (lengths == 0)) and not np.any(Z[:, 3])
    if a == b == "normal":  # A X and B Y are the balanced factors up to the lengths of their columns.
        for left, right in ((A @ X, W.U), (B @ Y, W.V)):
            cosines = np.sum(left[:, :3] * right[:, :3], axis=0) / np.linalg.norm(left[:, :3], axis=0)
            np.testing.assert_allclose(cosines, 1, atol=1e-12)


@pytest.mark.slow
def test_a_small_step_turns_moments_little() -> None:
    W = kernel()
    frame = Balanced().frame(W, W, FULL)
    d = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(len(x)).standard_normal(x.shape)), pair(W))
    sizes = []
    for h in (1e-3, 1e-4):
        new = Balanced().propose(frame, jax.tree.map(lambda x: h * x, d))  # noqa: B023
        sizes.append(max(float(jnp.abs(x - jnp.eye(3)).max()) for x in new.turn))
    assert sizes[0] < 1e-2 and 8 < sizes[0] / sizes[1] < 12  # of first order in h


def test_second_moments_stay_means_where_the_congruence_cancels() -> None:
    """Equal second moments of all columns must not change when the columns turn."""
    v = Pair(jnp.full((9, 2), 4.0), jnp.full((7, 2), 9.0))
    turn = jnp.array([[1.0, 1.0], [-1.0, 1.0]]) / jnp.sqrt(2)
    moved = Balanced().carry(manifold.Turn(turn, turn), v, 2)
    np.testing.assert_allclose(moved.A, v.A)
    np.testing.assert_allclose(moved.B, v.B)
    assert float(jnp.min(jnp.sqrt(v.A) @ turn)) == 0  # as in (sqrt(v) Q)^2


@pytest.mark.parametrize("inner", ["adam", "muon"])
def test_an_adapter_that_starts_at_zero_learns(inner: str) -> None:
    W = kernel(sigma=np.zeros(3))
    T = problems.orthonormal(np.random.default_rng(6), 9, 3) @ problems.orthonormal(np.random.default_rng(7), 7, 3).T
    tx = lro.lowrank_adam(0.05) if inner == "adam" else lro.lowrank_muon(0.1)

    @jax.jit
    def step(W: Any, state: Any) -> Any:
        updates, state = tx.update(factor_gradients(W, W.to_dense() - T), state, W)
        return optax.apply_updates(W, updates), state

    state, losses = tx.init(W), [1.5]
    for _ in range(60):
        W, state = step(W, state)
        losses.append(float(jnp.sum((W.to_dense() - T) ** 2) / 2))
    assert losses[1] < 1.5 and min(losses) < 0.3
    assert int(lro.diagnostics(state).kernels[""].rank) == 3
