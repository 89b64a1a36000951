"""Steps that are not finite: they are skipped and counted, and let through after a limit."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.one_kernel import distance, kernel

slow = pytest.mark.slow


@pytest.mark.slow
def test_a_leaf_that_is_not_finite_does_not_stop_the_model_for_ever() -> None:
    """Adam's 1e-8 is zero in float16, and 0 / 0 in one leaf was skipped for ever."""
    params = {"kernel": kernel().astype(jnp.float16), "bias": jnp.ones(3, jnp.float16)}
    tx = lro.lowrank_adam(0.01, max_consecutive_skips=4)
    state, update = tx.init(params), jax.jit(tx.update)
    start = params
    loss = lambda p: distance(p["kernel"].astype(jnp.float64))  # noqa: E731
    for step in range(1, 8):
        updates, state = update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        seen = lro.diagnostics(state)
        assert int(seen.notfinite_count) == int(seen.consecutive_notfinite) == step
        if step <= 4:
            chex.assert_trees_all_equal(params, start)
    assert not np.array_equal(params["kernel"].S, start["kernel"].S)  # the rest moves
    assert np.all(np.isfinite(params["kernel"].S)) and not np.any(np.isfinite(params["bias"]))  # and the fault is seen


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_steps_in_a_row_are_let_through_after_the_limit(limit: int) -> None:
    tx = lro.skip_not_finite(optax.sgd(1.0, 0.9), limit)
    params = jnp.zeros(2)
    state, bad, good = tx.init(params), jnp.array([jnp.nan, 1.0]), jnp.ones(2)
    for i in range(limit):
        updates, state = tx.update(bad, state, params)
        assert not np.any(updates) and int(state.consecutive_notfinite) == i + 1
    # A finite step starts the count anew.
    updates, after = tx.update(good, state, params)
    assert int(after.consecutive_notfinite) == 0 and int(after.notfinite_count) == limit
    np.testing.assert_array_equal(updates, -good)
    updates, state = tx.update(bad, state, params)
    assert np.isnan(updates[0]) and int(state.notfinite_count) == limit + 1


@slow
@pytest.mark.parametrize("make", [lro.lowrank_adam, lro.lowrank_muon, lro.lowrank_heavy_ball, lro.lowrank_adamw])
def test_every_optimizer_has_the_limit(make: Any) -> None:
    params = {"kernel": kernel(), "bias": jnp.ones(3)}
    tx = make(0.01, max_consecutive_skips=2)
    state, update = tx.init(params), jax.jit(tx.update)
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), params)
    moved = []
    for _ in range(4):
        updates, state = update(bad, state, params)
        moved.append(any(np.any(u) for u in jax.tree.leaves(updates)))
    assert moved == [False, False, True, True]
