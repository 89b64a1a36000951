"""The library against the independent dense NumPy oracle: every step, then whole trajectories."""

from __future__ import annotations

import dataclasses
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
from tests.problems import LAYOUTS, Layout, Problem


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to run the method; static for `jit`."""

    method: str = "heavy ball"
    schedule: str = "projected"  # or "galerkin", or "grad_fn": a galerkin loop in one call
    local_steps: int = 1
    adaptive: bool = False

    def __str__(self) -> str:
        ranks = "adaptive" if self.adaptive else "fixed"
        steps = "" if self.schedule == "projected" else f"-{self.local_steps}"
        return f"{self.method.replace(' ', '_')}-{self.schedule}{steps}-{ranks}"

    @property
    def loop(self) -> int:
        """Calls of `update` from one truncation to the next."""
        return self.local_steps + 1 if self.schedule == "galerkin" else 1

    def transform(self, h: Any, eps: Any, theta: Any) -> optax.GradientTransformationExtraArgs:
        gradient = "projected" if self.schedule == "projected" else "galerkin"
        geometry = dict(gradient=gradient, local_steps=self.local_steps)
        geometry["rank"] = lro.tolerance(theta, min_rank=R_MIN, max_rank=R_MAX) if self.adaptive else None
        if self.method == "adam":
            return lro.lowrank_adam(h, B1, B2, eps, momentum="coefficient", **geometry)
        return lro.lowrank_heavy_ball(h, BETA, momentum_space="coefficient", **geometry)

    def oracle_method(self, h: float, eps: float) -> oracle.Method:
        return oracle.Adam(h, B1, B2, eps) if self.method == "adam" else oracle.HeavyBall(h, BETA)

    def truncation(self, rank: int, theta: float) -> dict[str, Any]:
        return dict(theta=theta, r_min=R_MIN, r_max=R_MAX) if self.adaptive else dict(rank=rank)


BETA, B1, B2 = 0.8, 0.9, 0.99
RANK, R_MIN, R_MAX = 3, 2, 4
THETA = 0.12
TARGETS = (R_MAX, R_MIN, RANK)  # the ranks that thresholds are chosen for, one truncation after the other


@functools.partial(jax.jit, static_argnums=0)
def update(case: Case, params: Any, state: Any, data: Any, h: Any, eps: Any, theta: Any) -> tuple[Any, Any]:
    """One call of `update`; hyperparameters are arguments, so that one compilation serves many tests."""
    tx = case.transform(h, eps, theta)
    grad = jax.grad(lambda p: problems.loss(p, data))
    extra = dict(grad_fn=grad) if case.schedule == "grad_fn" else {}
    updates, state = tx.update(grad(params), state, params, **extra)
    return optax.apply_updates(params, updates), state


def physical_width(case: Case, layout: Layout) -> int:
    """The width of the factors: none to spare at fixed rank, padded where ranks move."""
    width = 2 * R_MAX if case.adaptive else RANK
    if case.schedule == "galerkin":
        width = max(width, 2 * RANK)
    return min(width, layout.m, layout.n)


# --- the oracle's calls ----------------------------------------------------------------


def augment_fully(state: oracle.State, G: np.ndarray) -> oracle.State:
    """Steps 1-2 with every direction there is: `oracle.augment` keeps to one width, here m and n cap U and V alone."""
    U, V = oracle._augmented(state, G)
    A, B = U.T @ state.U, V.T @ state.V
    N, v = oracle._carry(state.N, state.v, A, B)
    return oracle.State(U, A @ state.S @ B.T, V, N, v, state.t)


# --- between the oracle's states and the library's ------------------------------------


def embed(x: np.ndarray, width: int) -> np.ndarray:
    out = np.zeros((width, width))
    out[: x.shape[0], : x.shape[1]] = x
    return out


def complete(Q: np.ndarray, width: int, rng: np.random.Generator) -> np.ndarray:
    """Q and arbitrary orthonormal columns beside it: padding."""
    extra = rng.standard_normal((Q.shape[0], width - Q.shape[1]))
    for _ in range(2):
        extra = np.linalg.qr(extra - Q @ (Q.T @ extra))[0]
    return np.hstack([Q, extra])


def to_library(
    case: Case,
    layout: Layout,
    states: list[oracle.State],
    ranks: list[int],
    phase: int = 0,
    width: int | None = None,
    dtype: Any = jnp.float64,
) -> tuple[Any, Any]:
    """Parameters and optimizer state that hold the oracle's states, one to a slice."""
    width = physical_width(case, layout) if width is None else width
    rng = np.random.default_rng(7)
    factors = [
        np.stack(xs)
        for xs in zip(
            *((complete(s.U, width, rng), embed(s.S, width), complete(s.V, width, rng)) for s in states), strict=True
        )
    ]
    params = {"kernel": layout.kernel(*factors, dtype=dtype)}
    N, v = (
        jnp.asarray(np.stack([embed(x, width) for x in xs]).reshape(*layout.batch, width, width), dtype)
        for xs in ([s.N for s in states], [s.v for s in states])
    )
    # Shapes and dtypes only: a compilation of `init` for every layout would take longer than the steps.
    shapes = jax.eval_shape(case.transform(0.1, 1e-6, THETA).init, params)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    first, *rest = state.inner_state
    if case.method == "adam":
        count = jnp.asarray(states[0].t, jnp.int32)
        first = first._replace(count=count, mu={"kernel": N}, nu={"kernel": v})
    else:
        first = first._replace(trace={"kernel": N})
    rank = jnp.asarray(np.array(ranks).reshape(layout.batch), jnp.int32)
    kernels = {"kernel": state.kernels["kernel"]._replace(rank=rank)}
    inner_state = (first, *rest)
    return params, state._replace(inner_state=inner_state, kernels=kernels, phase=jnp.asarray(phase, jnp.int32))


def moments(case: Case, layout: Layout, state: Any) -> tuple[np.ndarray, np.ndarray]:
    first = state.inner_state[0]
    N, v = (first.mu, first.nu) if case.method == "adam" else (first.trace, jax.tree.map(jnp.zeros_like, first.trace))
    width = N["kernel"].shape[-1]
    return tuple(np.asarray(x["kernel"], np.float64).reshape(layout.slices, width, width) for x in (N, v))


TINY = np.finfo(np.float64).tiny


def relative(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), TINY))


@dataclasses.dataclass
class Errors:
    """Relative errors of W, of the first moment as a dense matrix, and of second moments entrywise."""

    W: float = 0.0
    N: float = 0.0
    v: float = 0.0

    def worst(self, other: Errors) -> Errors:
        return Errors(*(max(a, b) for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def compare(
    case: Case,
    layout: Layout,
    params: Any,
    state: Any,
    expected: list[oracle.State],
    ranks: list[int],
    scale: np.ndarray | None = None,
) -> Errors:
    """The largest errors over slices. Ranks and the counter must be equal, padding must be empty.

    Moments are compared relative to `scale`, a row (first, second) for each slice, by default to themselves.
    """
    U, S, V = layout.flat(params["kernel"])
    N, v = moments(case, layout, state)
    errors = Errors()
    done = int(state.phase) == 0
    np.testing.assert_array_equal(np.asarray(state.kernels["kernel"].rank).reshape(-1), ranks)
    if case.method == "adam":
        assert int(state.inner_state[0].count) == expected[0].t
    for i, s in enumerate(expected):
        outside = S[i] - embed(S[i][: len(s.S), : s.S.shape[1]], S.shape[-1])
        # Zero up to the rounding of the QR that made the frame; exactly zero once truncated.
        assert np.max(np.abs(outside)) <= (0 if done else 1e-14 * np.max(np.abs(S))), "weight in the padding"
        first, second = s.U @ s.N @ s.V.T, embed(s.v, v.shape[-1])
        N_scale, v_scale = (np.linalg.norm(first), np.max(second)) if scale is None else scale[i]
        errors = errors.worst(
            Errors(
                relative(U[i] @ S[i] @ V[i].T, s.W),
                float(np.linalg.norm(U[i] @ N[i] @ V[i].T - first) / max(N_scale, TINY)),
                float(np.max(np.abs(v[i] - second)) / max(v_scale, TINY)),
            )
        )
    return errors


def oracle_call(
    case: Case,
    problem: Problem,
    state: oracle.State,
    i: int,
    phase: int,
    rank: int,
    width: int,
    method: oracle.Method,
    theta: float,
    cut: dict[str, Any] | None = None,
) -> tuple[oracle.State, int]:
    """What one call of `update` does to slice i; `rank` is that of the last truncation."""
    G = problem.gradient(state.W, i)
    cut = case.truncation(rank, theta) if cut is None else cut
    if "r_max" in cut and case.schedule != "projected":
        # Ranks grow as far as the next augmentation has room for as many directions again.
        cut["r_max"] = growth_limit(rank, width)
    if case.schedule == "projected":
        cut.pop("rank", None)
        after = oracle.projected_step(state, G, method, **cut)
        return after, after.rank
    if case.schedule == "grad_fn":
        after = augment_fully(state, G)
        for _ in range(case.local_steps):
            after = oracle.coefficient_step(after, problem.gradient(after.W, i), method)
        after = oracle.truncate(after, **cut)
        return after, after.rank
    if phase == 0:
        return oracle.augment(state, G, width), rank
    after = oracle.coefficient_step(state, G, method)
    if phase < case.local_steps:
        return after, rank
    after = oracle.truncate(after, **cut)
    return after, after.rank


def growth_limit(rank: int, width: int) -> int:
    return min(R_MAX, max(rank, width // 2))


def oracle_calls(
    case: Case,
    problem: Problem,
    states: list[oracle.State],
    ranks: list[int],
    phase: int,
    width: int,
    method: oracle.Method,
    theta: float,
) -> tuple[list[oracle.State], list[int]]:
    after = [
        oracle_call(case, problem, s, i, phase, k, width, method, theta)
        for i, (s, k) in enumerate(zip(states, ranks, strict=True))
    ]
    return [s for s, _ in after], [k for _, k in after]


def start(layout: Layout) -> tuple[list[oracle.State], list[int]]:
    states = [oracle.start(W, RANK) for W in problems.starts(layout)]
    return states, [RANK] * len(states)


def scalars(h: float, eps: float, theta: float, dtype: Any = jnp.float64) -> list[jax.Array]:
    return [jnp.asarray(x, dtype) for x in (h, eps, theta)]


def case_params(*cases: tuple[Case, str]) -> list[Any]:
    return [pytest.param(case, name, id=f"{case}-{name}") for case, name in cases]


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
    fast = {(Case("heavy ball", "projected"), "stack"), (Case("adam", "projected"), "narrow")}
    return [
        p if p.values[1] == "tall" or p.values in fast else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow)
        for p in case_params(*cases)
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
        assert int(opt_state.phase) == (phase + 1) % case.loop
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


@functools.partial(jax.jit, static_argnums=(0, 1))
def geometry_update(momentum: str, retraction: str, params: Any, state: Any, data: Any) -> tuple[Any, Any]:
    tx = lro.lowrank_heavy_ball(0.1, BETA, momentum_space=momentum, retraction=retraction)
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
    state = lro.lowrank_heavy_ball(0.1, BETA, momentum_space=momentum, retraction=retraction).init(params)
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
