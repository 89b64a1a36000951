"""Zero kernels learn, and neither signs of singular pairs nor padding matter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.robustness.cases import (
    BALANCED,
    BUG,
    COEFFICIENT,
    GALERKIN_1,
    TANGENT,
    TANGENT_BUG,
    dense,
    factor_gradients,
    flat,
    optimizer,
    random_kernel,
)

# --- special starts and symmetries -------------------------------------------------------------------------------

GEOMETRIES = {
    "balanced": BALANCED,
    "coefficient": COEFFICIENT,
    "tangent": TANGENT,
    "bug": BUG,
    "tangent-bug": TANGENT_BUG,
    "galerkin": GALERKIN_1,
}


@functools.lru_cache
def symmetric_optimizer(inner: str, geometry: str) -> optax.GradientTransformationExtraArgs:
    return optimizer(inner, GEOMETRIES[geometry], None)


@functools.lru_cache
def jitted(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    return jax.jit(tx.update)


def trajectory(tx: optax.GradientTransformationExtraArgs, params: Any, T: np.ndarray, calls: int) -> list[np.ndarray]:
    """Dense kernels after each call on the loss |W - T|^2 / 2."""
    step = jitted(tx)
    state, path = tx.init(params), [dense(params["kernel"])]
    for _ in range(calls):
        grads = {"kernel": factor_gradients(params["kernel"], path[-1] - T)}
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        path.append(dense(params["kernel"]))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "geometry",
    [g if g in ("coefficient", "galerkin") else pytest.param(g, marks=pytest.mark.slow) for g in GEOMETRIES],
)
def test_a_zero_kernel_is_not_dead(geometry: str) -> None:
    """Adapters start at S = 0, where the gradients of U and V vanish: S has to move first."""
    W = random_kernel(0, 9, 8, [], width=4)
    T = np.random.default_rng(1).standard_normal((9, 8))
    calls = 2 if geometry == "galerkin" else 1
    path = trajectory(optimizer("heavyball", GEOMETRIES[geometry], None), {"kernel": W}, T, calls)
    # The step is -0.05 P(W)G = 0.05 U U^T T V V^T, with columns of its own where galerkin completes the bases.
    U, _, V = flat(W)
    if geometry != "galerkin":
        np.testing.assert_allclose(path[-1], 0.05 * U @ (U.T @ T @ V) @ V.T, atol=1e-13)
    assert np.linalg.norm(path[-1]) > 0.05
    assert np.linalg.norm(path[-1] - T) < np.linalg.norm(T)


# Signs are exact in floating point; what is left is the rounding of sums in another order. Adam raises it: a
# coefficient that vanishes in exact arithmetic comes out as 1e-16, and Adam moves it by h 1e-16 / (1e-16 + 1e-8).
ROUNDING = {"heavyball": 1e-12, "muon": 1e-12, "adam": 1e-8}


SIGNED_ROOTS = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="second moments are carried as (P^T sqrt(v) Q)^2: P and Q have the signs of the bases, roots have none",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "inner"),
    [
        pytest.param("coefficient", "adam", marks=SIGNED_ROOTS),
        pytest.param("bug", "adam", marks=SIGNED_ROOTS),
        pytest.param("galerkin", "adam", marks=SIGNED_ROOTS),
        ("balanced", "adam"),
        ("tangent", "adam"),
        ("balanced", "muon"),
        ("tangent-bug", "heavyball"),
    ],
)
def test_signs_of_singular_pairs_do_not_matter(geometry: str, inner: str) -> None:
    W = random_kernel(2, 13, 12, [3.0, 2.0, 1.0], width=6)
    signs = jnp.array([[1.0, -1.0, -1.0, 1.0, -1.0, -1.0]])
    flipped = lro.LowRank(W.U * signs, W.S, W.V * signs)
    T = np.random.default_rng(3).standard_normal((13, 12))
    tx = symmetric_optimizer(inner, geometry)
    a, b = (trajectory(tx, {"kernel": K}, T, 4) for K in (W, flipped))
    np.testing.assert_allclose(b, a, rtol=0, atol=ROUNDING[inner])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "inner"),
    [
        ("balanced", "adam"),
        ("coefficient", "adam"),
        ("bug", "adam"),
        ("tangent", "adam"),
        ("galerkin", "adam"),
        ("coefficient", "muon"),
        ("tangent-bug", "heavyball"),
    ],
)
def test_padding_does_not_matter(geometry: str, inner: str) -> None:
    W = random_kernel(4, 13, 12, [3.0, 2.0], width=4)
    rng = np.random.default_rng(5)
    T = rng.standard_normal((13, 12))
    # The same kernel in factors of width 6, with the same leading columns.
    U, V = (np.linalg.qr(np.hstack([x, rng.standard_normal((len(x), 2))]))[0] for x in (W.U, W.V))
    U[:, :4], V[:, :4] = W.U, W.V
    padded = jax.tree.map(jnp.asarray, lro.LowRank(U, np.pad(W.S, ((0, 2), (0, 2))), V))
    tx = symmetric_optimizer(inner, geometry)
    a, b = (trajectory(tx, {"kernel": K}, T, 4) for K in (W, padded))
    np.testing.assert_allclose(b, a, rtol=0, atol=ROUNDING[inner])
