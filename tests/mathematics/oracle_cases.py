"""The library beside the dense NumPy oracle: cases, calls of both, and the states of one as the other has them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests import oracle, problems
from tests.problems import Layout, Problem


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
        policy = lro.tolerance(theta, min_rank=R_MIN, max_rank=R_MAX) if self.adaptive else None
        inner = optax.adam(h, B1, B2, eps) if self.method == "adam" else optax.sgd(h, BETA)
        if self.schedule == "projected":
            return lro.fixed_rank(inner, geometry=lro.Coefficient(rank=policy))
        return lro.galerkin(inner, self.local_steps, rank=policy)

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
    first, *rest = loop_of(state).inner_state
    N, v = ({"kernel": lro.geometry.Coefficients(x, (layout.m, layout.n))} for x in (N, v))
    if case.method == "adam":
        first = first._replace(count=jnp.asarray(states[0].t, jnp.int32), mu=N, nu=v)
    else:
        first = first._replace(trace=N)
    rank = jnp.asarray(np.array(ranks).reshape(layout.batch), jnp.int32)
    loop = loop_of(state)._replace(inner_state=(first, *rest), aux={"kernel": rank})
    if case.schedule == "projected":
        return params, state._replace(inner_state=loop)
    return params, state._replace(inner_state=lro.GalerkinState(loop, jnp.asarray(phase, jnp.int32)))


def loop_of(state: Any) -> lro.FixedRankState:
    inner = state.inner_state
    return inner.loop if isinstance(inner, lro.GalerkinState) else inner


def phase_of(state: Any) -> int:
    return int(state.inner_state.phase) if isinstance(state.inner_state, lro.GalerkinState) else 0


def moments(case: Case, layout: Layout, state: Any) -> tuple[np.ndarray, np.ndarray]:
    first = loop_of(state).inner_state[0]
    N, v = (first.mu, first.nu) if case.method == "adam" else (first.trace, jax.tree.map(jnp.zeros_like, first.trace))
    width = N["kernel"].N.shape[-1]
    return tuple(np.asarray(x["kernel"].N, np.float64).reshape(layout.slices, width, width) for x in (N, v))


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
    done = phase_of(state) == 0
    np.testing.assert_array_equal(np.asarray(loop_of(state).aux["kernel"]).reshape(-1), ranks)
    if case.method == "adam":
        assert int(loop_of(state).inner_state[0].count) == expected[0].t
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
    """The effect of one call of `update` on slice i; `rank` is the rank after the last truncation."""
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
