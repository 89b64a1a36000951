"""Ranks in training with static shapes: they follow the target, the budget and the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

# --- budget ------------------------------------------------------------------------------------------------------


def cost(rank: Any, shape: tuple[int, int]) -> int:
    """Values in the factors of kernels of these ranks."""
    return int(np.sum(np.asarray(rank, np.int64) * (sum(shape) + np.asarray(rank, np.int64))))


# --- training ----------------------------------------------------------------------------------------------------


def matrix(seed: int, m: int, n: int, sigma: list[float]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((k, len(sigma))))[0] for k in (m, n))
    return (U * np.array(sigma)) @ V.T


def from_dense(W: np.ndarray, rank: int, width: int) -> lro.LowRank:
    return lro.factorize(jnp.asarray(W), rank, max_rank=width, where=lambda path, shape: True)


def descent(tx: optax.GradientTransformationExtraArgs) -> tuple[Callable[..., Any], list[int]]:
    """A jitted step on sum |W - T|^2 / 2 and the list that grows with every trace of it."""
    traces: list[int] = []

    @jax.jit
    def step(params: Any, state: Any, targets: Any) -> Any:
        traces.append(1)

        def loss(params: Any) -> jax.Array:
            return sum(
                jnp.sum((W.to_dense() - T) ** 2) / 2
                for W, T in zip(jax.tree.leaves(params, is_leaf=lro.is_lowrank), jax.tree.leaves(targets), strict=True)
            )

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, traces


@jax.jit
def observe(params: Any, state: Any) -> tuple[Any, Any]:
    return lro.ranks(params), lro.diagnostics(state)


def ranks_of(params: Any, state: Any) -> dict[str, Any]:
    """The ranks, which parameters and diagnostics must agree on."""
    ranks, diagnostics = observe(params, state)
    ranks = {name: np.asarray(rank).tolist() for name, rank in ranks.items()}
    assert ranks == {name: np.asarray(k.rank).tolist() for name, k in diagnostics.kernels.items()}
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    "geometry",
    [lro.Coefficient(rank=lro.tolerance(1e-3)), lro.Tangent(rank=lro.tolerance(1e-3))],
    ids=["coefficient", "tangent"],
)
def test_rank_follows_the_target_up_and_down_without_recompilation(geometry: lro.geometry.Geometry) -> None:
    start = matrix(0, 14, 12, [1.0])
    large, small = matrix(1, 14, 12, [4.0, 3.0, 2.0, 1.0]), matrix(2, 14, 12, [3.0, 2.0])
    params = {"kernel": from_dense(start, 1, 8)}
    tx = lro.lowrank_heavy_ball(0.3, 0.2, geometry=geometry)
    step, traces = descent(tx)
    state = tx.init(params)
    assert ranks_of(params, state) == {"kernel": 1}

    seen = [1]
    for _ in range(60):
        params, state, value = step(params, state, {"kernel": large})
        seen.append(ranks_of(params, state)["kernel"])
    # A step adds at most as many directions as there are.
    assert all(b <= 2 * a for a, b in itertools.pairwise(seen))
    assert seen[-1] == 4
    # Every step may cut theta |W| off; at a fixed point the error is at most theta |W| / h.
    assert float(value) < (1e-3 * 5.5 / 0.3) ** 2

    for _ in range(80):
        params, state, value = step(params, state, {"kernel": small})
    assert ranks_of(params, state) == {"kernel": 2} and float(value) < (1e-3 * 3.7 / 0.3) ** 2
    for _ in range(60):
        params, state, value = step(params, state, {"kernel": large})
    assert ranks_of(params, state) == {"kernel": 4}
    assert len(traces) == 1
    assert params["kernel"].U.shape == (14, 8)


@pytest.mark.slow
def test_resize_follows_the_ranks() -> None:
    large, small = matrix(1, 14, 12, [4.0, 3.0, 2.0, 1.0]), matrix(2, 14, 12, [3.0, 2.0])
    params = {"kernel": from_dense(large, 6, 8)}
    # A new direction has to grow past theta |W| in a step: theta is below 0.05 / 5.5.
    tx = lro.lowrank_adam(0.05, geometry=lro.Coefficient(rank=lro.tolerance(1e-3)))
    step, traces = descent(tx)
    state = tx.init(params)
    for _ in range(150):
        params, state, _ = step(params, state, {"kernel": small})
    rank = ranks_of(params, state)["kernel"]
    before = np.asarray(params["kernel"].to_dense())
    params, state = lro.resize(params, state)
    assert params["kernel"].U.shape == (14, rank) and params["kernel"].V.shape == (12, rank)
    assert optax.tree.get(state, "mu")["kernel"].N.shape == (rank, rank)
    assert ranks_of(params, state) == {"kernel": rank}
    # Columns beside exact zeros went: W stays to rounding.
    np.testing.assert_allclose(params["kernel"].to_dense(), before, atol=1e-14)

    params, state = lro.resize(params, state, rank=8)
    assert params["kernel"].U.shape == (14, 8) and ranks_of(params, state) == {"kernel": rank}
    np.testing.assert_allclose(params["kernel"].to_dense(), before, atol=1e-14)
    for _ in range(300):
        params, state, _ = step(params, state, {"kernel": large})
    assert ranks_of(params, state)["kernel"] >= 4
    assert len(traces) == 1  # The width is that of the first trace again.


@pytest.mark.slow
def test_resize_tells_nested_kernels_of_one_name_apart() -> None:
    params = {
        "Dense_0": {"kernel": from_dense(matrix(0, 9, 8, [1.0, 0.5]), 2, 4)},
        "Encoder_0": {"Dense_0": {"kernel": from_dense(matrix(1, 9, 8, [1.0, 0.5, 0.2]), 3, 4)}},
    }
    tx = lro.lowrank_adam(0.1)
    params, state = lro.resize(params, tx.init(params))
    assert ranks_of(params, state) == {"Dense_0/kernel": 2, "Encoder_0/Dense_0/kernel": 3}
    mu = optax.tree.get(state, "mu")
    assert mu["Dense_0"]["kernel"].A.shape == (9, 2)
    assert mu["Encoder_0"]["Dense_0"]["kernel"].A.shape == (9, 3)


@pytest.mark.slow
def test_no_policy_keeps_the_rank_through_zero() -> None:
    U, V = (np.linalg.qr(np.random.default_rng(i).standard_normal((k, 2)))[0] for i, k in enumerate((9, 8)))
    params = {"kernel": jax.tree.map(jnp.asarray, lro.LowRank(U, np.diag([2.0, 1.0]), V))}
    target = {"kernel": (U * np.array([2.0, -1.0])) @ V.T}
    for geometry in (lro.Tangent(), lro.Tangent(retraction="bug")):
        # Half the gradient: the first step lands on sigma_2 = 0 up to rounding, the second must not stay there.
        tx = lro.lowrank_heavy_ball(0.5, None, geometry=geometry)
        step, _ = descent(tx)
        point, state = params, tx.init(params)
        point, state, _ = step(point, state, target)
        assert float(point["kernel"].S[1, 1]) < 1e-14  # Rounding of numbers of size 1.
        for _ in range(60):
            point, state, value = step(point, state, target)
            assert int(lro.diagnostics(state).kernels["kernel"].rank) == 2
        # The error halves with every step: 2 * 2^-60 is below the rounding of W, 1e-16 |W| each of a few operations.
        assert float(value) < 1e-28
        assert ranks_of(point, state) == {"kernel": 2}


@pytest.mark.slow
def test_no_policy_keeps_exact_zeros_alive() -> None:
    """sigma_2 = 0 to the bit at the start of a step: M still moves it."""
    U, V = (np.linalg.qr(np.random.default_rng(i).standard_normal((k, 2)))[0] for i, k in enumerate((9, 8)))
    target = {"kernel": (U * np.array([2.0, -1.0])) @ V.T}
    params = {"kernel": jax.tree.map(jnp.asarray, lro.LowRank(U, np.diag([2.0, 1.0]), V))}
    tx = lro.lowrank_heavy_ball(0.5, None)
    step, _ = descent(tx)
    state = tx.init(params)
    params = {"kernel": jax.tree.map(jnp.asarray, lro.LowRank(U, np.diag([2.0, 0.0]), V))}
    for _ in range(60):
        params, state, value = step(params, state, target)
    assert float(value) < 1e-28 and ranks_of(params, state) == {"kernel": 2}  # As above.


@pytest.mark.slow
@pytest.mark.parametrize("policy", [lro.tolerance(0.1), lro.budget(150)], ids=["tolerance", "budget"])
def test_an_adapter_warms_up_under_a_rank_policy(policy: lro.RankPolicy) -> None:
    """A zero kernel, a first step of size zero: ranks stay until there is something to choose by."""
    W = from_dense(matrix(0, 12, 10, [1.0]), 4, 8)
    params = {"kernel": lro.LowRank(W.U, jnp.zeros_like(W.S), W.V)}
    target = {"kernel": matrix(1, 12, 10, [3.0, 2.0, 1.0])}
    rate = optax.warmup_cosine_decay_schedule(0, 0.05, 5, 150)
    tx = lro.lowrank_adam(rate, geometry=lro.Tangent(rank=policy))
    step, _ = descent(tx)
    state = tx.init(params)
    losses = []
    for _ in range(150):
        params, state, value = step(params, state, target)
        losses.append(float(value))
    assert np.all(np.diff(losses[1:30]) < 0) and losses[-1] < 1e-2 * losses[0]
    assert 3 <= ranks_of(params, state)["kernel"] < 8


@pytest.mark.slow
def test_budget_moves_rank_between_kernels() -> None:
    shapes = {"a": (14, 12), "b": (10, 16)}
    names = list(shapes)
    start = {name: matrix(i, *shapes[name], [1.0, 0.9, 0.8]) for i, name in enumerate(names)}
    params = {name: from_dense(start[name], 3, 6) for name in names}
    # Room for the targets, rank 5 and rank 1, and not for one more anywhere.
    parameters = cost(5, shapes["a"]) + cost(1, shapes["b"])
    targets = {"a": matrix(3, 14, 12, [5.0, 4.5, 4.0, 3.5, 3.0]), "b": matrix(4, 10, 16, [4.0])}
    tx = lro.lowrank_heavy_ball(0.2, 0.3, geometry=lro.Tangent(rank=lro.budget(parameters)))
    step, traces = descent(tx)
    state = tx.init(params)
    assert ranks_of(params, state) == {"a": 3, "b": 3}
    for _ in range(120):
        params, state, value = step(params, state, targets)
        ranks = ranks_of(params, state)
        assert sum(cost(ranks[name], shapes[name]) for name in names) <= parameters
    assert ranks == {"a": 5, "b": 1} and float(value) < 1e-20  # Linear convergence to targets that fit.
    # And back again with the roles exchanged, which costs as much: both have m + n = 26.
    targets = {"a": matrix(5, 14, 12, [4.0]), "b": matrix(6, 10, 16, [5.0, 4.5, 4.0, 3.5, 3.0])}
    for _ in range(150):
        params, state, value = step(params, state, targets)
    assert ranks_of(params, state) == {"a": 1, "b": 5} and float(value) < 1e-20
    assert len(traces) == 1


@pytest.mark.slow
def test_a_batch_has_its_own_ranks() -> None:
    stack = np.stack([matrix(0, 9, 8, [3.0]), matrix(1, 9, 8, [3.0, 2.0, 1.0])])
    start = np.stack([matrix(2, 9, 8, [1.0, 0.5]), matrix(3, 9, 8, [1.0, 0.5])])
    params = {"kernel": lro.factorize(jnp.asarray(start), 2, max_rank=6, where=lambda path, shape: lro.Axes(1, 1))}
    tx = lro.lowrank_heavy_ball(0.3, None, geometry=lro.Tangent(rank=lro.tolerance(1e-4)))
    step, _ = descent(tx)
    state = tx.init(params)
    for _ in range(80):
        params, state, _ = step(params, state, {"kernel": stack})
    assert ranks_of(params, state) == {"kernel": [1, 3]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", [lro.tolerance(0.01), lro.budget(cost(4, (12, 10)) + 60)], ids=["tolerance", "budget"]
)
def test_galerkin_keeps_room_for_new_directions(policy: Any) -> None:
    T = np.random.default_rng(0).standard_normal((12, 10))
    params = {"kernel": lro.lowrank_init(4, max_rank=8)(jax.random.key(0), (12, 10), jnp.float64)}
    tx = lro.galerkin(optax.sgd(0.3), rank=policy)
    step, _ = descent(tx)
    state = tx.init(params)
    for _ in range(200):
        params, state, value = step(params, state, {"kernel": jnp.asarray(T)})
    rank = int(lro.diagnostics(state).kernels["kernel"].rank)
    assert rank <= 4
    # A fixed rank of 4 reaches the best approximation of that rank; a policy that allows 4 and more is no worse.
    best = np.sum(np.linalg.svd(T, compute_uv=False)[4:] ** 2) / 2
    assert float(value) < 1.05 * best
