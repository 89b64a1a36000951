"""A step stays on the manifold, whatever the kernel, the optimizer and the gradients.

The compiled steps are a fixed list of cases; hypothesis varies the data.
"""

from __future__ import annotations

import dataclasses
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
from tests.robustness.cases import (
    CASES,
    KINDS,
    SLOW_CASES,
    SPECTRA,
    Case,
    abstract,
    allowed_orthonormality,
    compiled,
    dense,
    flat,
    gradients,
    orthonormality,
    same_bits,
    start,
    unit_roundoff,
    wide,
)


def check_kernel(W: lro.LowRank, before: lro.LowRank, rank: np.ndarray, whole: bool) -> None:
    U, S, V = flat(W)
    for x in (U, V):
        assert orthonormality(x) <= allowed_orthonormality(W.U.dtype)
    if not whole:
        return
    sigma = np.diagonal(S, axis1=-2, axis2=-1)
    np.testing.assert_array_equal(S, sigma[..., None] * np.eye(S.shape[-1]))
    assert np.all(sigma >= 0)
    # Also S is old + (new - old), so neighbours may swap within the rounding of the larger of the two.
    slack = 2 * unit_roundoff(W.S.dtype) * np.maximum(np.max(np.abs(flat(before)[1]), (-1, -2)), sigma[..., 0])
    assert np.all(sigma[..., :-1] - sigma[..., 1:] >= -slack[..., None])
    # Padding: exact zeros beyond the rank.
    assert np.all(np.sum(sigma > 0, axis=-1) <= rank)


def ranks_of(state: Any) -> Any:
    return jax.tree.map(np.asarray, optax.tree.get(state, "aux"))


def check_ranks(case: Case, params: Any, state: Any, first: Any) -> None:
    names = [f"layer{i}" for i in range(len(case.layouts))]
    ranks, before = ([aux[name]["kernel"] for name in names] for aux in (ranks_of(state), ranks_of(first)))
    policy = case.policy
    total = 0
    for name, layout, rank, old in zip(names, case.layouts, ranks, before, strict=True):
        np.testing.assert_array_equal(rank, lro.diagnostics(state).kernels[f"{name}/kernel"].rank)
        assert rank.shape == layout.batch and rank.dtype == np.int32
        assert np.all(rank >= 1) and np.all(rank <= layout.width)
        total += int(np.sum(rank * (sum(layout.matrix) + rank)))
        if policy is None:
            np.testing.assert_array_equal(rank, old)
        if hasattr(policy, "theta"):
            assert np.all(rank >= min(policy.min_rank, layout.width))
            assert np.all(rank <= (layout.width if policy.max_rank is None else policy.max_rank))
    if hasattr(policy, "parameters"):
        assert total <= policy.parameters


def abuse(case: Case, seed: int, pattern: str, kinds: list[str]) -> None:
    rng = np.random.default_rng(seed)
    init, step = compiled(case)
    params = start(case, pattern, rng)
    state = first = jax.device_get(init(params))
    shapes = abstract(params), abstract(state)
    huge, moved, truncates = False, False, getattr(case.policy, "theta", 0.0)
    for kind in kinds:
        grads = gradients(kind, params, rng)
        new, new_state = jax.device_get(step(grads, state, params))
        assert (abstract(new), abstract(new_state)) == shapes
        finite = all(np.all(np.isfinite(wide(x))) for x in jax.tree.leaves(grads))
        skipped = int(new_state.notfinite_count) - int(state.notfinite_count)
        assert skipped in (0, 1)
        assert int(new_state.consecutive_notfinite) == skipped * (int(state.consecutive_notfinite) + 1)
        assert skipped or finite
        # After a huge step an honest overflow may stop any other one.
        assert not skipped or not finite or huge or kind == "huge"
        huge = huge or (kind == "huge" and not skipped)
        if skipped:
            assert same_bits(new, params)
            assert same_bits(new_state.inner_state, state.inner_state)
        else:
            assert all(np.all(np.isfinite(wide(x))) for x in jax.tree.leaves((new, new_state)))
            whole = int(optax.tree.get(new_state, "phase", 0)) == 0
            for i in range(len(case.layouts)):
                W, before = new[f"layer{i}"]["kernel"], params[f"layer{i}"]["kernel"]
                check_kernel(W, before, ranks_of(new_state)[f"layer{i}"]["kernel"], whole)
                moved = moved or kind != "zero"
                if not moved:
                    # W = U S V^T moves with the rounding of its three factors, 4 u each (see above), and of the
                    # decompositions; a tolerance may cut that much more.
                    change = np.linalg.norm(dense(W) - dense(before), axis=(-2, -1))
                    size = np.linalg.norm(dense(before), axis=(-2, -1))
                    assert np.all(change <= (50 * unit_roundoff(case.dtype) + truncates) * size)
            if whole:
                check_ranks(case, new, new_state, first)
        params, state = new, new_state
    assert step._cache_size() == 1


DATA = dict(
    seed=st.integers(0, 2**32 - 1),
    pattern=st.sampled_from(SPECTRA),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
)


# Drawn every time: every spectrum, every gradient, the order that leaves moments behind a poisoned step.
EVERY_KIND = ["zero", "normal", "nan", "span", "tiny", "inf", "deficient", "nan in the bias", "zero", "huge", "normal"]


def drawn(test: Callable[..., None]) -> Callable[..., None]:
    for pattern in SPECTRA:
        test = example(seed=0, pattern=pattern, kinds=EVERY_KIND)(test)
    return given(**DATA)(test)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if i < 2 else pytest.mark.slow) for i, c in enumerate(CASES)]
)
@settings(max_examples=12)
@drawn
def test_every_step_stays_on_the_manifold(case: Case, seed: int, pattern: str, kinds: list[str]) -> None:
    abuse(case, seed, pattern, kinds)


@pytest.mark.slow
def test_an_infinite_gradient_does_not_hang() -> None:
    """Found by the test below: LAPACK's SVD went round and round on the S that this leads to."""
    case = next(case for case in SLOW_CASES if case.name == "two-bf16-heavyball-galerkin-budget")
    abuse(case, 766591513, "graded", ["span", "normal", "normal", "inf", "nan", "span"])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
@settings(max_examples=20)
@drawn
def test_every_step_stays_on_the_manifold_more(case: Case, seed: int, pattern: str, kinds: list[str]) -> None:
    abuse(case, seed, pattern, kinds)


@pytest.mark.parametrize(
    ("dtype", "gradient"),
    [
        (jnp.float32, 1e20),  # nu = inf in Adam: the leaf never moves again.
        (jnp.float16, 0.0),  # 0 / (0 + eps) with eps = 1e-8, which is 0 in float16: NaN in the parameter.
    ],
    ids=["overflow in the state", "nan in the update"],
)
def test_ordinary_leaves_stay_finite(dtype: Any, gradient: float) -> None:
    """A step that meets or makes something that is not finite changes nothing and is counted."""
    case = dataclasses.replace(CASES[0])  # A compiled step of its own: others count traces.
    init, step = compiled(case)
    params = start(case, "distinct", np.random.default_rng(0))
    params["bias"] = params["bias"].astype(dtype)
    grads = gradients("normal", params, np.random.default_rng(1))
    grads["bias"] = np.full(3, gradient, dtype)
    new, state = jax.device_get(step(grads, jax.device_get(init(params)), params))
    assert all(np.all(np.isfinite(wide(x))) for x in jax.tree.leaves((new, state)))
    assert int(state.notfinite_count) == 1 and same_bits(new, params)
