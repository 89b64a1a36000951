"""Projection, norms, transport and retractions, against dense matrices in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import manifold as mf
from tests import oracle
from tests.mathematics.descent import M, N, R, factor_gradients, kernel, relative, turn


def projected(W: lro.LowRank, G: Any) -> mf.Tangent:
    """P(W) G for W in the canonical gauge."""
    return mf.project(W, factor_gradients(W, G), jnp.int32(W.width))


def dense(W: lro.LowRank, xi: mf.Tangent) -> np.ndarray:
    """U M V^T + U_p V^T + U V_p^T."""
    U, V, u, M, v = (np.asarray(x) for x in (W.U, W.V, *xi))
    return U @ M @ V.T + u @ V.T + U @ v.T


def tangent(W: lro.LowRank) -> mf.Tangent:
    """The tangent vector in the node that chains pass on."""
    return mf.Tangent(W.U, W.S, W.V)


def nodes(xi: mf.Tangent) -> lro.LowRank:
    return lro.LowRank(*xi)


def random_dense(seed: int, m: int = M, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, n))


# --- the tangent space ----------------------------------------------------------------

SPECTRA = {"even": (2.0, 1.5, 1.0), "ill-conditioned": (1.0, 1e-3, 1e-6)}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_projection_is_an_orthogonal_projection(spectrum: str) -> None:
    # One division a column undoes one multiplication: rounding, whatever the condition number.
    W, G, K = kernel(0, SPECTRA[spectrum]), random_dense(1), random_dense(2)
    PG, PK = dense(W, projected(W, G)), dense(W, projected(W, K))
    assert relative(PG, oracle.projection(np.asarray(W.U), np.asarray(W.V), G)) < 1e-13
    assert relative(dense(W, projected(W, PG)), PG) < 1e-13
    assert abs(np.sum(PG * K) - np.sum(G * PK)) < 1e-13 * np.linalg.norm(G) * np.linalg.norm(K)
    assert 0.1 < np.linalg.norm(PG) / np.linalg.norm(G) < 0.99  # neither zero nor the identity


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_riemannian_norm(spectrum: str) -> None:
    """|P(W)G|^2 = |U_p|^2 + |M|^2 + |V_p|^2, inner products likewise; `tangent_norm` gives it in any gauge."""
    W, G, K = kernel(3, SPECTRA[spectrum]), random_dense(4), random_dense(5)
    xi, eta = projected(W, G), projected(W, K)
    PG, PK = dense(W, xi), dense(W, eta)
    # Sums of products of numbers of order one: rounding.
    product = sum(float(jnp.sum(a * b)) for a, b in zip(xi, eta, strict=True))
    assert abs(product - np.sum(PG * PK)) < 1e-13 * np.linalg.norm(PG) * np.linalg.norm(PK)
    assert float(mf.norm(xi)) == pytest.approx(np.linalg.norm(PG), rel=1e-13)
    assert np.max(np.abs(np.asarray(W.U.T @ xi.Up))) < 1e-14 * np.linalg.norm(G)
    assert np.max(np.abs(np.asarray(W.V.T @ xi.Vp))) < 1e-14 * np.linalg.norm(G)
    norm = float(lro.tangent_norm({"kernel": W}, {"kernel": factor_gradients(W, G)}))
    assert norm == pytest.approx(np.linalg.norm(PG), rel=1e-13)
    turned, _ = turn(W, 6)
    norm = float(lro.tangent_norm({"kernel": turned}, {"kernel": factor_gradients(turned, G)}))
    # A full S is first diagonalised: its smallest singular vectors are exact to 1e-16 cond(S), here up to 1e-10.
    assert norm == pytest.approx(np.linalg.norm(PG), rel=1e-9)


def test_tangent_gradient_in_float32() -> None:
    # cond(S) = 1e6: dividing by S^T as a matrix, or by products of S, would lose all of float32's seven digits.
    W = kernel(7, np.geomspace(1.0, 1e-6, 4), 40, 30).astype(jnp.float32)
    G = random_dense(8, 40, 30).astype(np.float32)
    tx = lro.project_to_tangent()
    xi, _ = tx.update({"kernel": factor_gradients(W, G)}, tx.init(W), {"kernel": W})
    U, V = (np.asarray(x, np.float64) for x in (W.U, W.V))
    exact = oracle.projection(U, V, G.astype(np.float64))
    W64, xi64 = W.astype(jnp.float64), tangent(xi["kernel"].astype(jnp.float64))
    # Every column by itself, because the error would hide in the one of sigma = 1e-6. Rounding is 1e-6 for sums
    # of 40 products; 1e-4 is what a step needs.
    assert relative(dense(W64, xi64), exact) < 1e-4
    assert all(relative((dense(W64, xi64) @ V)[:, j], (exact @ V)[:, j]) < 1e-4 for j in range(4))
    assert all(relative((dense(W64, xi64).T @ U)[:, j], (exact.T @ U)[:, j]) < 1e-4 for j in range(4))


def test_transport_is_the_projection_onto_the_new_tangent_space() -> None:
    old, new = kernel(9, (2.0, 1.5, 1.0)), kernel(10, (3.0, 1.0, 1e-6))
    xi = projected(old, random_dense(11))
    moved = mf.transport(xi, old, new)
    expected = oracle.projection(np.asarray(new.U), np.asarray(new.V), dense(old, xi))
    assert relative(dense(new, moved), expected) < 1e-13  # a handful of products of orthonormal matrices
    assert np.max(np.abs(np.asarray(new.U.T @ moved.Up))) < 1e-13
    # With padding: only the first two columns of `new` are its own.
    moved = mf.transport(xi, old, mf.trim(new, jnp.int32(2)))
    expected = oracle.projection(np.asarray(new.U)[:, :2], np.asarray(new.V)[:, :2], dense(old, xi))
    assert relative(dense(new, moved), expected) < 1e-13


def squares(xi: mf.Tangent) -> mf.Tangent:
    return jax.tree.map(jnp.square, xi)


@pytest.mark.parametrize(("before", "after"), [(R, R), (R, 1), (1, R)], ids=["same rank", "dropped", "grown"])
def test_what_has_a_first_moment_has_a_second(before: int, after: int) -> None:
    """m' is a sum of fewer than 4 m r^2 terms w m, and v' of their squares: |m'|^2 <= 4 m r^2 v', by Cauchy-Schwarz."""
    old, new = kernel(9, (2.0, 1.5, 1.0)), kernel(10, (3.0, 1.0, 1e-6))
    xi = mf.make_horizontal(old, projected(old, random_dense(11)), jnp.int32(before))
    old, new = mf.trim(old, jnp.int32(before)), mf.trim(new, jnp.int32(after))
    m, v = mf.transport(xi, old, new), mf.transport_squared(squares(xi), old, new)
    assert all(float(jnp.abs(x).max()) > 0.01 for x in jax.tree.leaves(m))
    rows = max(old.U.shape[0], old.V.shape[0])
    for first, second in zip(jax.tree.leaves(m), jax.tree.leaves(v), strict=True):
        assert np.all(np.square(first) <= 4 * rows * R**2 * second)
        assert np.all(second >= 0)


def test_second_moments_stay_where_bases_stay() -> None:
    """A turn by an angle t moves them by t^2."""
    old = kernel(9, (2.0, 1.5, 1.0))
    v = squares(projected(old, random_dense(11)))
    sizes = []
    for t in (0.0, 1e-3, 1e-2):
        turned = (np.linalg.qr(x + t * np.random.default_rng(12).standard_normal(x.shape)) for x in (old.U, old.V))
        u, w = (q * np.sign(np.diag(r)) for q, r in turned)
        moved = mf.transport_squared(v, old, lro.LowRank(jnp.asarray(u), old.S, jnp.asarray(w)))
        sizes.append(max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (moved, v)), strict=True)))
    assert sizes[0] < 1e-13 and 80 < sizes[2] / sizes[1] < 120


# --- retractions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "full", [pytest.param(False, id="canonical"), pytest.param(True, id="full S", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", ["svd", "bug"])
def test_retraction(method: str, full: bool) -> None:
    """R(0) = W, and |R(t xi) - (W + t xi)| = O(t^2)."""
    W = kernel(12, (2.0, 1.5, 1.0))
    xi = projected(W, random_dense(13) / 10)
    step = dense(W, xi)
    if full:
        W, (Q1, Q2) = turn(W, 14)
        xi = mf.Tangent(xi.Up @ Q2, Q1.T @ xi.M @ Q2, xi.Vp @ Q1)
    tx = lro.retract(method)

    @jax.jit
    def moved(t: Any) -> Any:
        updates, _ = tx.update({"kernel": jax.tree.map(lambda x: t * x, nodes(xi))}, tx.init(W), {"kernel": W})
        return optax.apply_updates({"kernel": W}, updates)["kernel"].to_dense()

    start = np.asarray(W.to_dense())
    assert relative(moved(jnp.zeros(())), start) < 1e-14  # two QR and an SVD of well-conditioned matrices
    # Third-order terms are below t |xi| / sigma_min = 0.1 of the second-order ones; rounding is 1e-15 against 1e-8.
    ts = np.geomspace(1e-3, 1e-1, 9)
    gaps = [np.linalg.norm(np.asarray(moved(jnp.asarray(t))) - start - t * step) for t in ts]
    slope = np.polyfit(np.log(ts), np.log(gaps), 1)[0]
    assert abs(slope - 2) < 0.1
    assert max(g / t**2 for g, t in zip(gaps, ts, strict=True)) < 4 * np.linalg.norm(step) ** 2  # |xi|^2 / sigma_min
