"""Ranks: the two policies against brute force, and what they do in training with static shapes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lowrank_optax as lro


def spectrum(sigma: Any, shape: tuple[int, int] = (9, 7), width: int | None = None, rank: int = 1) -> lro.Spectrum:
    sigma = jnp.asarray(sigma)
    return lro.Spectrum(sigma, jnp.full(sigma.shape[:-1], rank, jnp.int32), width or sigma.shape[-1], shape)


# --- tolerance ---------------------------------------------------------------------------------------------------


def smallest_rank(sigma: np.ndarray, theta: float) -> int:
    """The smallest r with |sigma_{r+1:}| <= theta |sigma|, by trying all of them; numbers of any size."""
    sigma = sigma / max(np.max(sigma), 1e-300)
    return next(r for r in range(sigma.size + 1) if np.linalg.norm(sigma[r:]) <= theta * np.linalg.norm(sigma))


values = st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.sampled_from([1.0, 0.5, 0.1]))


@settings(max_examples=60)
@given(
    rows=st.lists(st.lists(values, min_size=6, max_size=6), min_size=4, max_size=4),
    theta=st.one_of(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0, 2.0]), st.floats(0.0, 1.5)),
    exponent=st.integers(-30, 30),
    bounds=st.sampled_from([(1, None), (2, None), (1, 3), (3, 3), (2, 9), (8, 9)]),
    width=st.sampled_from([3, 6]),
)
@example(
    rows=[[1.0] * 6, [0.0] * 6, [1.0] + [0.0] * 5, [1.0] * 3 + [0.0] * 3],
    theta=0.0,
    exponent=0,
    bounds=(1, None),
    width=6,
)
def test_tolerance_is_the_brute_force_rule(
    rows: list[list[float]], theta: float, exponent: int, bounds: tuple[int, int | None], width: int
) -> None:
    sigma = np.sort(np.array(rows) * 10.0**exponent, axis=-1)[:, ::-1].reshape(2, 2, 6)
    low, high = bounds
    policy = lro.tolerance(theta, min_rank=low, max_rank=high)
    most = width if high is None else min(high, width)
    for dtype in (np.float64, np.float32):
        (found,) = policy.choose([spectrum(sigma.astype(dtype), width=width)])
        assert found.shape == (2, 2) and found.dtype == jnp.int32
        # Tails within the rounding of six sums and a root of theta may fall on either side.
        slack = 10 * float(jnp.finfo(dtype).eps)
        for index in np.ndindex(2, 2):
            a, b = (smallest_rank(sigma[index], theta * factor) for factor in (1 + slack, 1 - slack))
            allowed = {int(np.clip(r, min(low, most), most)) for r in range(a, b + 1)}
            assert int(found[index]) in allowed


@pytest.mark.parametrize(
    ("sigma", "theta", "rank"),
    [
        ([1.0, 0.1], 0.05, 2),  # The tail includes the last singular value: 0.1 > 0.05.
        ([1.0, 0.1], 0.1, 1),  # 0.1 <= 0.1 * 1.005
        ([1.0, 0.06, 0.06, 0.06], 0.1, 2),  # Each is below theta, three together are not.
        ([1.0, 1.0, 1.0, 1.0], 0.1, 4),  # A flat spectrum fills the width.
        ([1.0, 1.0, 1.0, 1.0], 0.6, 3),  # 1 <= 0.6 * 2
        ([1.0, 1.0, 1.0, 1.0], 0.9, 1),  # sqrt(3) <= 1.8
        ([3.0, 2.0, 1.0, 0.0], 0.0, 3),  # theta = 0 drops nothing but zeros.
        ([3.0, 2.0, 1.0, 0.0], 1.0, 1),  # theta = 1 drops all; the minimum stays.
        ([0.0, 0.0, 0.0, 0.0], 0.1, 2),  # A spectrum of zeros says nothing: the rank stays.
    ],
)
def test_tolerance_by_hand(sigma: list[float], theta: float, rank: int) -> None:
    for number in (theta, jnp.asarray(theta)):  # inject_hyperparams makes arrays
        assert int(lro.tolerance(number).choose([spectrum(sigma, rank=2)])[0]) == rank


def test_tolerance_treats_kernels_separately() -> None:
    flat, steep = spectrum([1.0, 1.0, 1.0]), spectrum([1.0, 1e-9, 1e-9])
    assert [int(r) for r in lro.tolerance(0.01).choose([flat, steep, flat])] == [3, 1, 3]
    assert lro.tolerance(0.01).choose([]) == []


@pytest.mark.parametrize("make", [lambda: lro.tolerance(-0.1), lambda: lro.tolerance(0.1, min_rank=0)])
def test_tolerance_refuses(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"must not be negative|1 <= min_rank"):
        make()


def test_tolerance_refuses_crossed_bounds() -> None:
    with pytest.raises(ValueError, match="min_rank <= max_rank"):
        lro.tolerance(0.1, min_rank=3, max_rank=2)


# --- budget ------------------------------------------------------------------------------------------------------


def cost(rank: Any, shape: tuple[int, int]) -> int:
    """Values in the factors of kernels of these ranks."""
    return int(np.sum(np.asarray(rank, np.int64) * (sum(shape) + np.asarray(rank, np.int64))))


def discarded(spectra: list[lro.Spectrum], ranks: list[Any]) -> float:
    total = 0.0
    for s, rank in zip(spectra, ranks, strict=True):
        sigma = np.asarray(s.sigma, np.float64).reshape(-1, s.sigma.shape[-1])
        total += sum(np.sum(row[int(k) :] ** 2) for row, k in zip(sigma, np.asarray(rank).reshape(-1), strict=True))
    return total


def best_discarded(spectra: list[lro.Spectrum], parameters: int, min_rank: int) -> float:
    """The least discarded energy over all rank vectors that fit."""
    kernels = [
        (np.asarray(row), s.shape, min(s.width, len(row)))
        for s in spectra
        for row in np.asarray(s.sigma, np.float64).reshape(-1, s.sigma.shape[-1])
    ]
    best = np.inf
    for ranks in itertools.product(*(range(min(min_rank, most), most + 1) for _, _, most in kernels)):
        if sum(cost(k, shape) for k, (_, shape, _) in zip(ranks, kernels, strict=True)) <= parameters:
            best = min(best, sum(np.sum(row[k:] ** 2) for k, (row, _, _) in zip(ranks, kernels, strict=True)))
    return best


@functools.lru_cache
def chooser(parameters: int, min_rank: int = 1) -> Callable[..., Any]:
    policy = lro.budget(parameters, min_rank=min_rank)

    @functools.partial(jax.jit, static_argnums=1)
    def choose(arrays: Any, static: Any) -> Any:
        return policy.choose([lro.Spectrum(*a, *b) for a, b in zip(arrays, static, strict=True)])

    return lambda spectra: choose([(s.sigma, s.rank) for s in spectra], tuple((s.width, s.shape) for s in spectra))


SHAPES = [(9, 7), (30, 2), (4, 4)]


def draw_spectra(rows: list[list[float]]) -> list[lro.Spectrum]:
    """A batch of two kernels, one that is wider than its factors, one small."""
    a, b, c, d = (np.sort(np.array(row))[::-1] for row in rows)
    return [
        spectrum(np.stack([a, b]), SHAPES[0]),
        spectrum(c, SHAPES[1], width=2),
        spectrum(d, SHAPES[2]),
    ]


@pytest.mark.slow
@settings(max_examples=40)
@given(
    rows=st.lists(st.lists(values, min_size=4, max_size=4), min_size=4, max_size=4),
    two_budgets=st.tuples(*[st.sampled_from([60, 137, 222, 283, 419])] * 2),  # Each is compiled once.
    min_rank=st.sampled_from([1, 2]),
)
def test_budget_against_brute_force(rows: list[list[float]], two_budgets: tuple[int, int], min_rank: int) -> None:
    spectra, (parameters, more) = draw_spectra(rows), sorted(two_budgets)
    ranks = chooser(parameters, min_rank)(spectra)
    least = sum(cost(np.full(s.sigma.shape[:-1], min_rank), s.shape) for s in spectra)
    for s, rank in zip(spectra, ranks, strict=True):
        assert rank.shape == s.sigma.shape[:-1] and rank.dtype == jnp.int32
        assert np.all(rank >= min_rank) and np.all(rank <= s.width)
        # No rank is spent on zeros.
        assert np.all(rank <= np.maximum(min_rank, np.sum(np.asarray(s.sigma) > 0, -1)))
    used = sum(cost(rank, s.shape) for s, rank in zip(spectra, ranks, strict=True))
    assert used <= max(parameters, least)
    # Greedy by density stops at the first singular value that does not fit: the fractional optimum, which bounds the
    # best, keeps at most that one more.
    found = discarded(spectra, ranks)
    best = best_discarded(spectra, parameters, min_rank) if parameters >= least else found
    left = [
        float(row[int(k)])
        for s, rank in zip(spectra, ranks, strict=True)
        for row, k in zip(np.asarray(s.sigma).reshape(-1, 4), np.asarray(rank).reshape(-1), strict=True)
        if k < s.width
    ]
    assert best <= found + 1e-12 and found <= best + max(left, default=0.0) ** 2 + 1e-12  # Rounding of float64.
    # More parameters, no smaller rank.
    larger = chooser(more, min_rank)(spectra)
    assert all(np.all(b >= a) for a, b in zip(ranks, larger, strict=True))


@pytest.mark.slow
def test_budget_by_hand() -> None:
    # Costs 17, 19, 21 of (9, 7) and 33, 35 of (30, 2) for one singular value more; energies over costs decide.
    spectra = [spectrum([2.0, 2.0, 1.0], SHAPES[0]), spectrum([3.0, 1.0], SHAPES[1])]
    # 9/33 = .27, 4/17 = .24, 4/19 = .21, 1/21 = .048, 1/35 = .029, but each keeps one at least.
    for parameters, expected in [(68, [1, 1]), (69, [2, 1]), (89, [2, 1]), (90, [3, 1]), (125, [3, 2])]:
        assert [int(r) for r in chooser(parameters)(spectra)] == expected
    assert [int(r) for r in lro.budget(1, min_rank=2).choose(spectra)] == [2, 2]
    assert lro.budget(10).choose([]) == []
    nothing, something = spectrum([0.0, 0.0, 0.0], rank=2), spectrum([1.0, 0.0, 0.0], rank=3)
    assert [int(r) for r in chooser(60)([nothing, nothing])] == [2, 1]  # 17 + 17 + 19 of the 60
    assert [int(r) for r in chooser(60)([nothing, something])] == [1, 1]


def test_budget_refuses() -> None:
    for arguments in ({"parameters": 0}, {"parameters": 5, "min_rank": 0}):
        with pytest.raises(ValueError, match="parameters >= 1 and min_rank >= 1"):
            lro.budget(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-15, 1e15, 1e20, 1e30])
def test_budget_does_not_depend_on_the_scale(scale: float) -> None:
    spectra = [
        spectrum(np.float32([3, 2, 1]) * np.float32(scale)),
        spectrum(np.float32([3, 0.5, 0]) * np.float32(scale)),
    ]
    # 17 + 19 + 21 and 17: all three of the first, one of the second.
    assert [int(r) for r in lro.budget(74).choose(spectra)] == [3, 1]


@pytest.mark.slow
def test_budget_is_exact_for_large_models() -> None:
    shape, sigma = (100_001, 100_000), np.ones((40, 32), np.float32)
    # Equal energies: cheap values first. Budgets one short of a prefix that float32 sums to less than it is.
    costs = np.repeat(sum(shape) + 2 * np.arange(32) + 1, len(sigma))
    exact, rounded = np.cumsum(costs), np.asarray(jnp.cumsum(jnp.asarray(costs, jnp.float32)))
    for i in np.argsort(rounded - exact)[:2]:
        parameters = int(exact[i]) - 1
        (ranks,) = chooser(parameters)([spectrum(sigma, shape)])
        assert parameters - 2 * sum(shape) < cost(ranks, shape) <= parameters


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
    [
        pytest.param({}, id="coefficient"),
        pytest.param({"momentum_space": "tangent"}, id="tangent", marks=pytest.mark.slow),
    ],
)
def test_rank_follows_the_target_up_and_down_without_recompilation(geometry: dict[str, Any]) -> None:
    start = matrix(0, 14, 12, [1.0])
    large, small = matrix(1, 14, 12, [4.0, 3.0, 2.0, 1.0]), matrix(2, 14, 12, [3.0, 2.0])
    params = {"kernel": from_dense(start, 1, 8)}
    tx = lro.lowrank_heavy_ball(0.3, 0.2, rank=lro.tolerance(1e-3), **geometry)
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
    tx = lro.lowrank_adam(0.05, rank=lro.tolerance(1e-3), momentum="coefficient")
    step, traces = descent(tx)
    state = tx.init(params)
    for _ in range(150):
        params, state, _ = step(params, state, {"kernel": small})
    rank = ranks_of(params, state)["kernel"]
    before = np.asarray(params["kernel"].to_dense())
    params, state = lro.resize(params, state)
    assert params["kernel"].U.shape == (14, rank) and params["kernel"].V.shape == (12, rank)
    assert state.inner_state[0].mu["kernel"].shape == (rank, rank)
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
    mu = state.inner_state[0].mu
    assert mu["Dense_0"]["kernel"].U.shape == (9, 2)
    assert mu["Encoder_0"]["Dense_0"]["kernel"].U.shape == (9, 3)


@pytest.mark.slow
def test_no_policy_keeps_the_rank_through_zero() -> None:
    U, V = (np.linalg.qr(np.random.default_rng(i).standard_normal((k, 2)))[0] for i, k in enumerate((9, 8)))
    params = {"kernel": jax.tree.map(jnp.asarray, lro.LowRank(U, np.diag([2.0, 1.0]), V))}
    target = {"kernel": (U * np.array([2.0, -1.0])) @ V.T}
    for geometry in ({"momentum_space": "tangent"}, {"retraction": "bug"}):
        # Half the gradient: the first step lands on sigma_2 = 0 up to rounding, the second must not stay there.
        tx = lro.lowrank_heavy_ball(0.5, None, **geometry)
        step, _ = descent(tx)
        point, state = params, tx.init(params)
        point, state, _ = step(point, state, target)
        assert float(point["kernel"].S[1, 1]) < 1e-14  # Rounding of numbers of size 1.
        for _ in range(60):
            point, state, value = step(point, state, target)
            assert int(state.kernels["kernel"].rank) == 2
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
    tx = lro.lowrank_adam(optax.warmup_cosine_decay_schedule(0, 0.05, 5, 150), momentum="tangent", rank=policy)
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
    tx = lro.lowrank_heavy_ball(0.2, 0.3, rank=lro.budget(parameters))
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
    tx = lro.lowrank_heavy_ball(0.3, None, rank=lro.tolerance(1e-4))
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
    tx = lro.lowrank_heavy_ball(0.3, None, gradient="galerkin", rank=policy)
    step, _ = descent(tx)
    state = tx.init(params)
    for _ in range(200):
        params, state, value = step(params, state, {"kernel": jnp.asarray(T)})
    rank = int(lro.diagnostics(state).kernels["kernel"].rank)
    assert rank <= 4
    # A fixed rank of 4 reaches the best approximation of that rank; a policy that allows 4 and more is no worse.
    best = np.sum(np.linalg.svd(T, compute_uv=False)[4:] ** 2) / 2
    assert float(value) < 1.05 * best


# --- buckets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "width", "expected"),
    [
        (5, 5, 8),  # room for one more
        (7, 8, 8),
        (8, 8, 16),  # full
        (8, 40, 16),
        (5, 16, 16),  # half a bucket is not enough to shrink
        (4, 16, 16),
        (3, 16, 8),
        (0, 8, 8),
        (40, 40, 40),  # min(m, n)
    ],
)
def test_buckets_by_hand(rank: int, width: int, expected: int) -> None:
    basis = jnp.eye(40, width)
    params = {"a": {"kernel": lro.LowRank(basis, jnp.diag(jnp.arange(width) < rank) * 1.0, basis)}}
    assert lro.buckets(params)("a/kernel", (40, 40)) == expected
    assert lro.buckets(params, max_rank=12)("a/kernel", (40, 40)) == min(expected, 12)
    wide, _ = lro.resize(params, None, lro.buckets(params))
    assert wide["a"]["kernel"].rank == expected
    assert lro.buckets(wide)("a/kernel", (40, 40)) == expected  # once is enough


def test_resize_to_the_same_width_changes_no_bit() -> None:
    params = {"kernel": from_dense(matrix(0, 14, 12, [3.0, 2.0]), 2, 4), "bias": jnp.ones(3)}
    state = lro.lowrank_adam(0.1, momentum="tangent").init(params)
    before, after = jax.tree.leaves((params, state)), jax.tree.leaves(lro.resize(params, state, 4))
    assert all(a is b for a, b in zip(before, after, strict=True))
