"""The two rank policies, tolerance and budget, against brute force."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    assert [int(r) for r in chooser(60)([nothing, something])] == [2, 1]  # 17 + 17, and 19 of the 60


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
    assert [int(r) for r in chooser(74)(spectra)] == [3, 1]


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
