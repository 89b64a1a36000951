"""Thousands of steps do not drift, and float32 stays float32."""

from __future__ import annotations

import re
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
    COEFFICIENT,
    TANGENT,
    abstract,
    allowed_orthonormality,
    dense,
    flat,
    orthonormality,
    random_kernel,
)

# --- long runs ---------------------------------------------------------------------------------------------------


def long_run(tx: optax.GradientTransformationExtraArgs, dtype: Any, steps: int) -> tuple[Any, Any, np.ndarray]:
    """Linear regression from batches of 4 rows with label noise; returns the excess loss |W - T|_F^2 of every step."""
    T = 0.5 * jax.random.normal(jax.random.key(0), (12, 3)) @ jax.random.normal(jax.random.key(1), (3, 8))
    T = T.astype(jnp.float32)
    params = {"kernel": lro.lowrank_init(3)(jax.random.key(2), (12, 8), dtype)}

    def loss(params: Any, key: jax.Array) -> jax.Array:
        x_key, noise_key = jax.random.split(key)
        x = jax.random.normal(x_key, (4, 12), dtype)
        y = x.astype(jnp.float32) @ T + 0.1 * jax.random.normal(noise_key, (4, 8), jnp.float32)
        return jnp.mean((x @ params["kernel"] - y.astype(dtype)).astype(jnp.float32) ** 2)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, key), state, params)
        params = optax.apply_updates(params, updates)
        dense = params["kernel"].to_dense().astype(jnp.float32)
        return (params, state), jnp.sum((dense - T) ** 2)

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    (params, state), excess = run((params, tx.init(params)), jax.random.split(jax.random.key(3), steps))
    return params, state, np.asarray(excess)


LONG = {
    "adam": lro.lowrank_adam(3e-3, geometry=lro.Coefficient()),
    # At 0.999 the second moment forgets the first gradients over thousands of steps, and the floor rises meanwhile.
    "adam-balanced": lro.lowrank_adam(3e-3, b2=0.99),
    "heavyball": lro.lowrank_heavy_ball(0.02, 0.9, geometry=lro.Coefficient()),
}


@pytest.mark.parametrize(
    "geometry", [TANGENT, *(pytest.param(g, marks=pytest.mark.slow) for g in (BALANCED, COEFFICIENT))]
)
def test_an_infinite_step_size_changes_nothing(geometry: Any) -> None:
    """Gradients are finite and there are no moments: only the new kernel tells."""
    W = lro.lowrank_init(3)(jax.random.key(0), (9, 8))
    tx = lro.fixed_rank(optax.scale(-np.inf), geometry=geometry())
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, W), tx.init(W), W)
    assert int(state.notfinite_count) == 1 and not any(np.any(x) for x in jax.tree.leaves(updates))


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_ten_thousand_steps_do_not_drift(name: str) -> None:
    params, state, excess = long_run(LONG[name], jnp.float32, 10_000)
    U, S, V = flat(params["kernel"])
    # Nothing accumulates: the bound of a single step.
    assert max(orthonormality(U), orthonormality(V)) < 1e-5
    assert np.all(np.diag(np.diag(S)) == S) and int(state.notfinite_count) == 0
    # The step size is constant, so the excess fluctuates about a floor set by the label noise: the last thousand
    # steps have the floor of the third thousand, up to the fluctuation of a mean of a thousand.
    floor = np.mean(excess[2000:3000])
    assert floor < 1e-2 * excess[0]
    assert np.mean(excess[-1000:]) < 1.5 * floor


@pytest.mark.slow
def test_a_thousand_steps_in_bfloat16_do_not_drift() -> None:
    params, state, excess = long_run(LONG["heavyball"], jnp.bfloat16, 1_000)
    U, S, V = flat(params["kernel"])
    assert max(orthonormality(U), orthonormality(V)) <= allowed_orthonormality(jnp.bfloat16)
    assert np.all(np.diag(np.diag(S)) == S) and int(state.notfinite_count) == 0
    # Steps below u |W| are lost in bfloat16, so the loss stalls above the floor of float32; it must not rise again.
    assert np.mean(excess[-100:]) < 1e-2 * excess[0]
    assert np.mean(excess[-100:]) < 1.2 * np.mean(excess[-200:-100])


# --- dtypes ------------------------------------------------------------------------------------------------------


def small_case(x: np.ndarray, T: np.ndarray) -> tuple[Any, Any, Callable[..., Any]]:
    params = {"kernel": jax.tree.map(jnp.asarray, LOW_PRECISION_KERNEL), "bias": jnp.zeros(6, jnp.float32)}
    # At the usual eps of 1e-8 Adam would take rounding for signal: coefficients that vanish in exact arithmetic.
    rate = optax.linear_schedule(0.1, 0.05, 10)
    tx = lro.lowrank_adamw(rate, eps=1e-2, weight_decay=0.1, geometry=lro.Tangent(rank=lro.tolerance(0.01)))

    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda p: jnp.mean((x @ p["kernel"] + p["bias"][None] - T) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return params, tx.init(params), step


DATA_32 = [np.random.default_rng(7).standard_normal((5, n)).astype(np.float32) for n in (8, 6)]


LOW_PRECISION_KERNEL = jax.tree.map(lambda x: np.asarray(x, np.float32), random_kernel(6, 8, 6, [2.0, 1.0], width=4))


@pytest.mark.slow
def test_no_float64_sneaks_into_float32_under_x64() -> None:
    params, state, step = small_case(*DATA_32)
    # Scalars aside: with x64 on, the literals of Python are traced as weak f64[].
    assert not re.search(r"f64\[\d", str(jax.make_jaxpr(step)(params, state)))


@pytest.mark.slow
def test_float32_does_not_need_x64() -> None:
    def three_steps() -> Any:
        params, state, step = small_case(*DATA_32)
        step = jax.jit(step)
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    expected = three_steps()
    with jax.enable_x64(False):  # A request for a 64-bit type would warn, so fail.
        found = three_steps()
        assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32", "int32"}
    assert abstract(found) == abstract(expected)
    # The rounding of sums that XLA may order differently, 1e-7, over three steps.
    np.testing.assert_allclose(dense(found[0]["kernel"]), dense(expected[0]["kernel"]), atol=1e-5)
