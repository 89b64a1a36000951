"""Every single call of `update`, from the state of the independent dense NumPy oracle."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle, problems
from tests.mathematics.oracle_cases import (
    R_MAX,
    R_MIN,
    RANK,
    TARGETS,
    THETA,
    Case,
    Errors,
    case_params,
    compare,
    growth_limit,
    oracle_call,
    oracle_calls,
    phase_of,
    physical_width,
    scalars,
    start,
    to_library,
    update,
)
from tests.problems import LAYOUTS, Layout, Problem


def matrix() -> list[Any]:
    """Adam, the more exacting method, in every layout; the rest where layouts differ in kind."""
    cases = []
    for method in ("heavy ball", "adam"):
        every = LAYOUTS if method == "adam" else ("tall", "stack")
        cases += [(Case(method, s, n), name) for s, n in (("projected", 1), ("galerkin", 3)) for name in every]
        cases += [(Case(method, s, 1), "tall") for s in ("galerkin", "grad_fn")]
        cases += [(Case(method, "grad_fn", 3), name) for name in ("stack", "narrow")]
        cases += [
            (Case(method, s, n, adaptive=True), name)
            for s, n in (("projected", 1), ("galerkin", 3))
            for name in ("stack", "narrow")
        ]
        cases += [(Case(method, "grad_fn", 3, adaptive=True), "stack")]
    fast = {
        (Case("heavy ball", "projected"), "stack"),
        (Case("heavy ball", "galerkin", 1), "tall"),
        (Case("adam", "projected"), "narrow"),
        (Case("adam", "galerkin", 3), "tall"),
        (Case("adam", "grad_fn", 1), "tall"),
    }
    return [
        p if p.values in fast else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) for p in case_params(*cases)
    ]


def threshold(
    case: Case,
    problem: Problem,
    state: oracle.State,
    phase: int,
    rank: int,
    width: int,
    method: oracle.Method,
    target: int,
    above: bool,
) -> float:
    """A tolerance that a truncation of slice 0 must answer with rank `target`, one millionth from another answer."""
    after, _ = oracle_call(case, problem, state, 0, phase, rank, width, method, 0.0, dict(theta=0.0))
    sigma = np.diag(after.S)
    tails = [np.linalg.norm(sigma[r:]) / np.linalg.norm(sigma) for r in range(sigma.size + 1)]
    if above and tails[target] > 1e-6:
        return float(tails[target] * (1 + 1e-6))  # just large enough to discard the rest
    return float(tails[target - 1] * (1 - 1e-6))  # just too small to discard one more


# --- every single call, from the oracle's own state -----------------------------------


def single_calls(
    case: Case, layout: Layout, calls: int, h: float, eps: float, dtype: Any = jnp.float64
) -> tuple[Errors, set[int]]:
    """The worst errors of single calls along the oracle's trajectory, and the ranks it went through."""
    problem, method = problems.weighted(layout), case.oracle_method(h, eps)
    width = physical_width(case, layout)
    states, ranks = start(layout)
    errors, seen = Errors(), set(ranks)
    for call in range(calls):
        loop, phase = divmod(call, case.loop)
        theta = THETA
        if case.adaptive and phase == case.loop - 1:
            limit = growth_limit(ranks[0], width) if case.schedule != "projected" else R_MAX
            target = min(TARGETS[loop % len(TARGETS)], limit)
            theta = threshold(case, problem, states[0], phase, ranks[0], width, method, target, loop % 2 == 0)
        params, opt_state = to_library(case, layout, states, ranks, phase, width, dtype)
        params, opt_state = update(case, params, opt_state, problem.data, *scalars(h, eps, theta, dtype))
        states, ranks = oracle_calls(case, problem, states, ranks, phase, width, method, theta)
        assert phase_of(opt_state) == (phase + 1) % case.loop
        errors = errors.worst(compare(case, layout, params, opt_state, states, ranks))
        seen |= set(ranks)
    return errors, seen


@pytest.mark.parametrize(("case", "name"), matrix())
def test_every_call_from_the_oracles_state(case: Case, name: str) -> None:
    # Adam divides entries of the gradient that are zero up to rounding, about 1e-15, by sqrt(v) + eps: a step of
    # h = 0.1 is off by h 1e-15 / eps, which a truncation magnifies by the inverse of a gap of singular values and the
    # next of the steps inside one call (grad_fn) once more by 1 / eps. 1e-10 holds for eps = 1e-3. Heavy ball stays
    # below 1e-13.
    errors, ranks = single_calls(case, LAYOUTS[name], 3 * case.loop if case.loop > 1 else 6, 0.1, 1e-3)
    assert errors.W < 1e-10
    assert errors.N < 1e-10
    assert errors.v < 1e-10
    grows = case.schedule == "projected" or growth_limit(RANK, physical_width(case, LAYOUTS[name])) == R_MAX
    assert ranks == ({RANK} if not case.adaptive else {R_MIN, RANK, R_MAX} if grows else {R_MIN, RANK})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["heavy ball", "adam"])
@pytest.mark.parametrize(("schedule", "local_steps"), [("projected", 1), ("galerkin", 3)])
def test_every_call_in_float32(method: str, schedule: str, local_steps: int) -> None:
    # Rounding is 6e-8 of a gradient of norm 10; eps = 1e-2 keeps Adam's quotient of such entries at 1e-4 of h.
    case = Case(method, schedule, local_steps)
    errors, _ = single_calls(case, LAYOUTS["tall"], 2 * case.loop if case.loop > 1 else 6, 0.1, 1e-2, jnp.float32)
    assert errors.W < 1e-4
    assert errors.N < 1e-4
    assert errors.v < 1e-4
