"""A loss may be written with W, or with U, S and V: the step is that of the function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.one_kernel import GEOMETRIES, TARGET, kernel, run

slow = pytest.mark.slow


def frozen(x: Any) -> Any:
    return jax.lax.stop_gradient(x)


# Pairs of functions that agree on kernels with orthonormal U and V: one of W, one of the factors.
WRITTEN_TWICE = {
    "squares": (lambda W: jnp.sum(W.to_dense() ** 2) / 2, lambda W: jnp.sum(W.S**2) / 2),
    "squares of all leaves": (
        lambda W: jnp.sum(W.to_dense() ** 2) / 2,
        lambda W: sum(jnp.sum(x**2) / 2 for x in (W.U, W.S, W.V)),
    ),
    "nuclear norm": (
        lambda W: jnp.sum(W.to_dense() * frozen(W.U @ W.V.T)),
        lambda W: jnp.trace(W.S),
    ),
    "weighted trace": (
        lambda W: jnp.sum(W.to_dense() * frozen((W.U * jnp.array([[3.0, 1.0, -2.0]])) @ W.V.T)),
        lambda W: jnp.sum(jnp.diagonal(W.S) * jnp.array([3.0, 1.0, -2.0])),
    ),
}


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        pytest.param(n, g, marks=() if (n, g) in (("squares", "balanced"), ("nuclear norm", "tangent")) else slow)
        for n in WRITTEN_TWICE
        for g in GEOMETRIES
    ],
)
def test_a_loss_gives_the_same_step_written_with_w_or_with_factors(name: str, geometry: str) -> None:
    of_w, of_factors = WRITTEN_TWICE[name]
    W, tx = kernel(), lro.fixed_rank(optax.sgd(0.01), geometry=GEOMETRIES[geometry])
    a, b = (run(tx, W, tx.init(W), 1, f)[0].to_dense() for f in (of_w, of_factors))
    np.testing.assert_allclose(b, a, atol=1e-13)
    assert np.linalg.norm(a - W.to_dense()) > 1e-3


@pytest.mark.parametrize("geometry", [g if g == "balanced" else pytest.param(g, marks=slow) for g in GEOMETRIES])
def test_frozen_bases_still_move_within_their_span(geometry: str) -> None:
    """With stop_gradient on U and V the gradient is U G_S V^T, and so is the first-order step."""
    W = kernel()
    loss = lambda W: jnp.sum((lro.LowRank(frozen(W.U), W.S, frozen(W.V)).to_dense() - TARGET) ** 2) / 2  # noqa: E731
    G = W.U @ (W.U.T @ (W.to_dense() - TARGET) @ W.V) @ W.V.T
    h = 1e-6
    tx = lro.fixed_rank(optax.sgd(h), geometry=GEOMETRIES[geometry])
    moved = (run(tx, W, tx.init(W), 1, loss)[0].to_dense() - W.to_dense()) / h
    expected = -G
    if geometry == "balanced":  # A moves by -h G B and B by -h G^T A: W by -h (G B B^T + A A^T G)
        root = np.diagonal(W.S)[None]
        expected = -(G @ (W.V * root) @ W.V.T + (W.U * root) @ W.U.T @ G)
    np.testing.assert_allclose(moved, expected, atol=1e-4)
    assert np.linalg.norm(expected) > 0.1


@slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_penalty_on_s_shrinks_what_the_loss_does_not_need(geometry: str) -> None:
    """Nuclear-norm proximal target: soft thresholding of the singular values of the target."""
    target = kernel((2.0, 1.0, 0.5), seed=3)
    loss = lambda W: jnp.sum((W.to_dense() - target.to_dense()) ** 2) / 2 + 0.3 * jnp.trace(W.S)  # noqa: E731
    W = kernel((2.0, 1.5, 1.0), seed=4)
    tx = lro.fixed_rank(optax.sgd(0.1), geometry=GEOMETRIES[geometry])
    W, _ = run(tx, W, tx.init(W), 600, loss)
    np.testing.assert_allclose(jnp.diagonal(W.S), [1.7, 0.7, 0.2], atol=1e-3)
