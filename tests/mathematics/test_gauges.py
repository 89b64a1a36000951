"""Bases and signs do not matter: turned bases and flipped inputs give the same run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import manifold as mf
from tests.mathematics.descent import Data, M, descend, kernel, loss, optimizer, relative, turn, weighted


@pytest.mark.parametrize("kind", [pytest.param("coefficient", marks=pytest.mark.slow), "tangent"])
def test_gauge_invariance_of_heavy_ball(kind: str) -> None:
    W = kernel(16, (5.0, 3.0, 2.0))
    data = weighted()
    _, Ws = descend(kind, 100, {"kernel": W}, data, 0.03)
    _, turned = descend(kind, 100, {"kernel": turn(W, 17)[0]}, data, 0.03)
    worst = max(relative(a, b) for a, b in zip(turned, Ws, strict=True))
    assert worst < 1e-8  # 100 roundings of 1e-15 on a contraction
    assert relative(Ws[-1], Ws[0]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coefficient", "tangent"])
def test_gauge_change_in_the_middle_of_a_run(kind: str) -> None:
    """Turning the bases and the momentum with them changes nothing: `canonicalize` carries moments too."""
    data, params = weighted(), {"kernel": kernel(16, (5.0, 3.0, 2.0))}
    tx = optimizer(kind, 0.03)
    state = tx.init(params)
    update = jax.jit(lambda params, state: one_step(tx, params, state, data))
    for _ in range(3):
        params, state = update(params, state)
    turned, (Q1, Q2) = turn(params["kernel"], 18)
    loop = state.inner_state
    first, *rest = loop.inner_state
    N = first.trace["kernel"]
    if kind == "coefficient":
        N = lro.geometry.Coefficients(Q1.T @ N.N @ Q2, N.shape)
    else:
        N = mf.Tangent(N.Up @ Q2, Q1.T @ N.M @ Q2, N.Vp @ Q1)
    loop = loop._replace(inner_state=(first._replace(trace={"kernel": N}), *rest))
    other = {"kernel": turned}, state._replace(inner_state=loop)
    for _ in range(3):
        params, state = update(params, state)
        other = update(*other)
        assert relative(other[0]["kernel"].to_dense(), params["kernel"].to_dense()) < 1e-13  # rounding


def one_step(tx: Any, params: Any, state: Any, data: Data) -> tuple[Any, Any]:
    updates, state = tx.update(jax.grad(loss)(params, data), state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coefficient", "tangent", "adam"])
def test_signs_of_inputs_do_not_matter(kind: str) -> None:
    """Flipping rows of the problem and of the start flips the trajectory, as for every dense optimizer.

    For Adam this needs frames whose signs are those of U: its second moments come back as (P_1^T sqrt(v) Q_1)^2.
    """
    flip = jnp.where(jnp.arange(M) % 2 == 0, 1.0, -1.0)[:, None]
    W, (H, T, c) = kernel(16, (5.0, 3.0, 2.0)), weighted()
    _, Ws = descend(kind, 30, {"kernel": W}, (H, T, c), 0.03)
    _, flipped = descend(kind, 30, {"kernel": lro.LowRank(flip * W.U, W.S, W.V)}, (H, flip * T, c), 0.03)
    worst = max(relative(flip * a, b) for a, b in zip(flipped, Ws, strict=True))
    assert worst < 1e-8  # 30 roundings of 1e-15, mildly amplified by Adam with eps = 1e-4
