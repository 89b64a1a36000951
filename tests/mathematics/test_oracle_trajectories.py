"""Whole trajectories of the library and of the independent dense NumPy oracle."""

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
from tests import oracle, problems
from tests.mathematics.oracle_cases import (
    BETA,
    RANK,
    THETA,
    Case,
    Errors,
    case_params,
    compare,
    oracle_calls,
    physical_width,
    relative,
    scalars,
    start,
    to_library,
    update,
)
from tests.problems import LAYOUTS, Layout

# --- whole trajectories ---------------------------------------------------------------


def trajectory(
    case: Case, layout: Layout, calls: int, h: float, eps: float, width: int | None = None
) -> tuple[Errors, set[int], list[list[oracle.State]]]:
    """Both sides run on their own from the same start; the worst errors of all calls.

    Errors of moments are relative to the largest moment so far, because moments vanish at a minimiser.
    """
    problem, method = problems.weighted(layout), case.oracle_method(h, eps)
    width = physical_width(case, layout) if width is None else width
    states, ranks = start(layout)
    params, _ = to_library(case, layout, states, ranks, width=width)
    opt_state = jax.tree.map(jnp.asarray, case.transform(h, eps, THETA).init(params))
    errors, scale, seen, history = Errors(), None, set(ranks), [states]
    for call in range(calls):
        phase = call % case.loop
        params, opt_state = update(case, params, opt_state, problem.data, *scalars(h, eps, THETA))
        states, ranks = oracle_calls(case, problem, states, ranks, phase, width, method, THETA)
        sizes = np.array([(np.linalg.norm(s.N), np.max(s.v)) for s in states])
        scale = sizes if scale is None else np.maximum(sizes, scale)
        errors = errors.worst(compare(case, layout, params, opt_state, states, ranks, scale))
        seen |= set(ranks)
        history.append(states)
    return errors, seen, history


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name"),
    case_params(
        (Case("heavy ball", "projected"), "tall"),
        (Case("heavy ball", "projected", adaptive=True), "stack"),
        (Case("heavy ball", "galerkin", 1), "tall"),
        (Case("heavy ball", "galerkin", 3), "tall"),
        (Case("heavy ball", "galerkin", 3), "narrow"),
        (Case("heavy ball", "galerkin", 3, adaptive=True), "stack"),
        (Case("heavy ball", "grad_fn", 3), "tall"),
        (Case("heavy ball", "grad_fn", 3, adaptive=True), "square"),
    ),
)
def test_heavy_ball_trajectory(case: Case, name: str) -> None:
    # With h = 0.03 the map contracts towards a minimiser: 200 roundings of 1e-15, hardly amplified. (With h = 0.1 and
    # three local steps the truncated momentum keeps the iterates in motion, and 1e-15 grows to 1e-7.)
    # `init` insists on room for the augmented bases, also where grad_fn does not need it.
    width = max(2 * RANK, physical_width(case, LAYOUTS[name])) if case.schedule == "grad_fn" else None
    errors, ranks, history = trajectory(case, LAYOUTS[name], 200, 0.03, 1.0, width)
    assert errors.W < 1e-8
    assert errors.N < 1e-8
    assert len(ranks) > 1 or not case.adaptive
    assert all(relative(b.W, a.W) > 0.1 for a, b in zip(history[0], history[-1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name"),
    case_params(
        (Case("adam", "projected"), "tall"),
        (Case("adam", "projected"), "stack"),
        (Case("adam", "projected", adaptive=True), "tall"),
        (Case("adam", "galerkin", 3), "tall"),
        (Case("adam", "galerkin", 3), "narrow"),
        (Case("adam", "galerkin", 3, adaptive=True), "stack"),
    ),
)
def test_adam_trajectory(case: Case, name: str) -> None:
    # Elementwise moments in rotating bases feed rounding back into directions through 1 / (sqrt(v) + eps):
    # eps = 1e-4 and h = 0.01 keep that loop near 1, see the test below for what it does otherwise.
    errors, _, _ = trajectory(case, LAYOUTS[name], 30, 0.01, 1e-4)
    assert errors.W < 1e-8
    assert errors.N < 1e-8
    assert errors.v < 1e-8


def test_adam_amplifies_rounding() -> None:
    # With eps = 1e-6 and h = 0.05 library and oracle drift apart. The oracle does so from itself, when its start
    # is moved by 1e-15: the difference is the method's conditioning and not another method.
    case, layout = Case("adam", "projected"), LAYOUTS["tall"]
    problem, method = problems.weighted(layout), case.oracle_method(0.05, 1e-6)
    errors, _, history = trajectory(case, layout, 30, 0.05, 1e-6)
    spread = 0.0
    for seed in range(8):
        noise = np.random.default_rng(seed).standard_normal((layout.m, layout.n))
        W = problems.starts(layout)[0]
        moved = oracle.start(W + 1e-15 * np.linalg.norm(W) * noise / np.linalg.norm(noise), RANK)
        for (exact,) in history[1:]:
            moved = oracle.projected_step(moved, problem.gradient(moved.W), method)
            spread = max(spread, relative(moved.W, exact.W))
    assert spread > 1e3 * 1e-15
    # Eight draws of a quantity of heavy tails: the library may be a hundred times as unlucky as the worst of them.
    assert errors.W / spread < 100


# --- what the oracle does not know: tangent momentum and the BUG retraction -----------


def orth(x: np.ndarray) -> np.ndarray:
    return np.linalg.qr(x)[0]


def dense_heavy_ball(
    gradient: Callable[[np.ndarray], np.ndarray], W: np.ndarray, steps: int, momentum: str, retraction: str
) -> list[np.ndarray]:
    """Heavy ball in dense matrices, free of bases: sections 5 and 6 of the algorithm notes.

    Z is the momentum, Y = W - h Z the point off the manifold.
    """
    h, r = 0.1, RANK
    state = oracle.start(W, r)
    U, V, W = state.U, state.V, state.W
    Z, out = np.zeros_like(W), [W]
    for _ in range(steps):
        Z = BETA * Z + oracle.projection(U, V, gradient(W))
        Y = W - h * Z
        if retraction == "svd":
            P, sigma, Qt = np.linalg.svd(Y)
            U, V = P[:, :r], Qt[:r].T
            W = U * sigma[:r] @ V.T
        else:
            # K = U (S + dM) + dU_p = Y V and L = V (S + dM)^T + dV_p = Y^T U, S' = U'^T Y V'
            U, V = orth(Y @ V), orth(Y.T @ U)
            W = U @ (U.T @ Y @ V) @ V.T
        # Coefficient momentum keeps U'^T Z V', tangent momentum the projection onto the new tangent space.
        Z = U @ (U.T @ Z @ V) @ V.T if momentum == "coefficient" else oracle.projection(U, V, Z)
        out.append(W)
    return out


def heavy_ball(momentum: str, retraction: Any) -> optax.GradientTransformationExtraArgs:
    geometry = lro.Coefficient if momentum == "coefficient" else lro.Tangent
    return lro.lowrank_heavy_ball(0.1, BETA, geometry=geometry(retraction=retraction))


@functools.partial(jax.jit, static_argnums=(0, 1))
def geometry_update(momentum: str, retraction: str, params: Any, state: Any, data: Any) -> tuple[Any, Any]:
    tx = heavy_ball(momentum, retraction)
    updates, state = tx.update(jax.grad(lambda p: problems.loss(p, data))(params), state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("momentum", "retraction", "name"),
    [
        ("coefficient", "bug", "narrow"),
        ("tangent", "svd", "tall"),
        ("tangent", "svd", "stack"),
        ("tangent", "bug", "narrow"),
    ],
)
def test_dense_counterparts(momentum: str, retraction: str, name: str) -> None:
    layout = LAYOUTS[name]
    problem = problems.weighted(layout)
    states, ranks = start(layout)
    params, _ = to_library(Case(), layout, states, ranks)
    state = heavy_ball(momentum, retraction).init(params)
    expected = [
        dense_heavy_ball(functools.partial(problem.gradient, i=i), s.W, 100, momentum, retraction)
        for i, s in enumerate(states)
    ]
    worst = 0.0
    for step in range(1, 101):
        params, state = geometry_update(momentum, retraction, params, state, problem.data)
        U, S, V = layout.flat(params["kernel"])
        worst = max(worst, *(relative(U[i] @ S[i] @ V[i].T, W[step]) for i, W in enumerate(expected)))
    assert worst < 1e-8  # a contraction: 100 roundings of 1e-15
    moved = [relative(W[-1], W[0]) for W in expected]
    assert min(moved) > 0.1  # and the trajectories do go somewhere


@pytest.mark.slow
def test_kernels_in_one_tree_do_not_mix() -> None:
    """Kernels of equal shape may be stepped together: each must still be the oracle's."""
    names = {"c": "tall", "a": "wide", "b": "tall", "d": "stack"}
    tasks = {key: problems.weighted(LAYOUTS[name], seed=i) for i, (key, name) in enumerate(names.items())}
    states = {key: start(LAYOUTS[name])[0] for key, name in names.items()}
    case = Case("adam")
    method, tx = case.oracle_method(0.05, 1e-2), case.transform(0.05, 1e-2, THETA)
    params = {
        k: to_library(case, LAYOUTS[name], states[k], [RANK] * len(states[k]))[0]["kernel"] for k, name in names.items()
    }

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        total = lambda p: sum(problems.loss({"kernel": p[k]}, task.data) for k, task in tasks.items())  # noqa: E731
        updates, state = tx.update(jax.grad(total)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
        for k, name in names.items():
            states[k] = [oracle.projected_step(s, tasks[k].gradient(s.W, i), method) for i, s in enumerate(states[k])]
            U, S, V = LAYOUTS[name].flat(params[k])
            # 1e-13 / eps for entries that vanish up to rounding, over five steps.
            assert all(relative(U[i] @ S[i] @ V[i].T, s.W) < 1e-10 for i, s in enumerate(states[k])), k
