"""Compiled steps (layout x dtype x variant), and the kernels and gradients that they are given."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

# --- cases -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of a kernel, its rank and the width of its factors."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rank: int
    width: int
    batch: tuple[int, ...] = ()

    @property
    def matrix(self) -> tuple[int, int]:
        return math.prod(self.inputs), math.prod(self.outputs)


PLAIN = Layout((9,), (7,), 2, 2)


PADDED = Layout((8,), (6,), 2, 5)


NARROW = Layout((5,), (4,), 3, 3)  # m < 2r


FULL = Layout((4,), (6,), 4, 4)  # r = min(m, n)


ROW = Layout((1,), (6,), 1, 1)


COLUMN = Layout((6,), (1,), 1, 1)


SCALAR = Layout((1,), (1,), 1, 1)


BATCH = Layout((6,), (5,), 2, 4, batch=(2,))


HEADS = Layout((2, 4), (3, 2), 2, 3)


BATCHED_HEADS = Layout((4,), (2, 3), 2, 4, batch=(2, 1))


# From a rank policy to a geometry.
BALANCED: Any = lro.Balanced


COEFFICIENT = lro.Coefficient


TANGENT = lro.Tangent


BUG = functools.partial(lro.Coefficient, retraction="bug")


TANGENT_BUG = functools.partial(lro.Tangent, retraction="bug")


# The local steps of the other loop.
GALERKIN, GALERKIN_1 = 2, 1


BUDGET = 100  # Above the smallest possible cost and below the largest one of every case that uses it.


def optimizer(inner: str, geometry: Any, policy: Any) -> optax.GradientTransformationExtraArgs:
    if isinstance(geometry, int):
        return lro.galerkin(inside(inner), geometry, rank=policy)
    if inner == "adam":
        return lro.lowrank_adam(0.1, geometry=geometry(rank=policy))
    if inner == "muon":
        return lro.lowrank_muon(0.1, adam_learning_rate=0.01, geometry=geometry(rank=policy))
    return lro.lowrank_heavy_ball(0.05, 0.9, geometry=geometry(rank=policy))


def inside(inner: str) -> optax.GradientTransformation:
    """The same transformations without a loop around them."""
    if inner == "adam":
        return optax.adam(0.1)
    if inner == "heavyball":
        return optax.sgd(0.05, 0.9)
    muon = optax.chain(optax.trace(0.95, nesterov=True), lro.scale_by_polar_factor(), optax.scale(-0.1))
    parts = {"kernel": muon, "ordinary": optax.adamw(0.01, weight_decay=0.0)}
    return optax.partition(parts, lro.kernel_labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One compiled step."""

    name: str
    layouts: tuple[Layout, ...]
    dtype: Any
    inner: str
    geometry: Any
    policy: Any = None


CASES = [
    Case("padded-f32-adam-tolerance", (PADDED,), jnp.float32, "adam", COEFFICIENT, lro.tolerance(0.05)),
    Case("narrow-bf16-heavyball-tangent", (NARROW,), jnp.bfloat16, "heavyball", TANGENT),
    Case("batch-f32-muon", (BATCH,), jnp.float32, "muon", COEFFICIENT),
    Case("padded-f32-adam-balanced", (PADDED,), jnp.float32, "adam", BALANCED),
    Case("row-f64-heavyball-bug", (ROW,), jnp.float64, "heavyball", BUG),
    Case("padded-f32-adam-galerkin", (PADDED,), jnp.float32, "adam", GALERKIN),
    Case("two-f32-adam-tangent-budget", (PADDED, PLAIN), jnp.float32, "adam", TANGENT, lro.budget(BUDGET)),
    Case("heads-f16-adam-bug", (HEADS,), jnp.float16, "adam", BUG),
]


SLOW_CASES = [
    Case("full-f32-adam-tangent", (FULL,), jnp.float32, "adam", TANGENT),
    Case("full-f16-adam-balanced", (FULL,), jnp.float16, "adam", BALANCED),
    Case("two-bf16-muon-balanced", (BATCHED_HEADS, NARROW), jnp.bfloat16, "muon", BALANCED),
    Case("column-f64-heavyball-balanced", (COLUMN,), jnp.float64, "heavyball", BALANCED),
    Case("full-f32-heavyball", (FULL,), jnp.float32, "heavyball", COEFFICIENT),
    Case("column-f32-muon-tangent", (COLUMN,), jnp.float32, "muon", TANGENT),
    Case("row-bf16-adam", (ROW,), jnp.bfloat16, "adam", COEFFICIENT),
    Case("scalar-f32-adam-tolerance", (SCALAR,), jnp.float32, "adam", COEFFICIENT, lro.tolerance(0.1)),
    Case("batch-bf16-adam-galerkin-tolerance", (BATCH,), jnp.bfloat16, "adam", GALERKIN, lro.tolerance(0.1)),
    Case("heads-f64-muon-tangent-bug", (HEADS,), jnp.float64, "muon", TANGENT_BUG),
    Case("narrow-f32-adam-bug", (NARROW,), jnp.float32, "adam", BUG),
    Case(
        "batched-heads-f64-heavyball-tangent-budget",
        (BATCHED_HEADS,),
        jnp.float64,
        "heavyball",
        TANGENT,
        lro.budget(BUDGET),
    ),
    Case(
        "padded-f16-muon-tangent-tolerance",
        (PADDED,),
        jnp.float16,
        "muon",
        TANGENT,
        lro.tolerance(0.02, min_rank=2, max_rank=3),
    ),
    Case(
        "two-bf16-heavyball-galerkin-budget",
        (PADDED, BATCH),
        jnp.bfloat16,
        "heavyball",
        GALERKIN_1,
        lro.budget(150),
    ),
    Case("padded-f64-muon-galerkin", (PADDED,), jnp.float64, "muon", GALERKIN_1),
    Case("two-f16-heavyball-tolerance", (FULL, COLUMN), jnp.float16, "heavyball", COEFFICIENT, lro.tolerance(0.0)),
]


@functools.lru_cache
def compiled(case: Case) -> tuple[Callable[..., Any], Callable[..., Any]]:
    tx = optimizer(case.inner, case.geometry, case.policy)

    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(tx.init), jax.jit(step)


# --- data --------------------------------------------------------------------------------------------------------

SPECTRA = ("distinct", "repeated", "graded", "zeros", "all zero", "huge", "tiny")


BENIGN = ("normal", "zero", "deficient", "span", "tiny")


KINDS = (*BENIGN, "huge", "nan", "inf", "nan in the bias")


def unit_roundoff(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def narrow(x: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def singular_values(pattern: str, layout: Layout, dtype: Any, rng: np.random.Generator) -> np.ndarray:
    j = np.arange(layout.rank)
    half_range = dtype == jnp.float16
    sigma = {
        "distinct": 2.0 / (1 + j),
        "repeated": np.ones(layout.rank),
        "graded": 10.0 ** (-(2.0 if half_range else 6.0) * j),
        "zeros": np.where(j < layout.rank // 2, 1.0, 0.0),
        "all zero": np.zeros(layout.rank),
        "huge": (1e3 if half_range else 1e15) * (1 + rng.random(layout.rank)),
        "tiny": (1e-3 if half_range else 1e-25) * (1 + rng.random(layout.rank)),
    }[pattern]
    padded = np.zeros((*layout.batch, layout.width))
    padded[..., : layout.rank] = np.sort(sigma)[::-1]
    return padded


def basis(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal(shape))[0]


def start(case: Case, pattern: str, rng: np.random.Generator) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for i, layout in enumerate(case.layouts):
        m, n = layout.matrix
        sigma = singular_values(pattern, layout, case.dtype, rng)
        W = lro.LowRank(
            basis(rng, *layout.batch, m, layout.width).reshape(*layout.batch, *layout.inputs, layout.width),
            sigma[..., None] * np.eye(layout.width),
            basis(rng, *layout.batch, n, layout.width).reshape(*layout.batch, *layout.outputs, layout.width),
        )
        params[f"layer{i}"] = {"kernel": jax.tree.map(lambda x: narrow(x, case.dtype), W)}
    # In float16 the 1e-8 of Adam is zero, and optax divides a zero gradient of an ordinary leaf by it: 0 / 0.
    params["bias"] = narrow(rng.standard_normal(3), jnp.float32 if case.dtype == jnp.float16 else case.dtype)
    return params


def flat(W: lro.LowRank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S, V in float64 with one input and one output axis."""
    batch, r = W.S.shape[:-2], W.S.shape[-1]
    return wide(W.U).reshape(*batch, -1, r), wide(W.S), wide(W.V).reshape(*batch, -1, r)


def dense(W: lro.LowRank) -> np.ndarray:
    U, S, V = flat(W)
    return U @ S @ np.swapaxes(V, -1, -2)


def dense_gradient(kind: str, W: lro.LowRank, rng: np.random.Generator) -> np.ndarray:
    U, S, V = flat(W)
    m, n, r, batch = U.shape[-2], V.shape[-2], U.shape[-1], S.shape[:-2]
    normal = rng.standard_normal((*batch, m, n))
    if kind == "zero":
        return np.zeros_like(normal)
    if kind == "deficient":
        return rng.standard_normal((*batch, m, 1)) @ rng.standard_normal((*batch, 1, n))
    if kind == "span":
        return U @ rng.standard_normal((*batch, r, n))
    if kind == "huge":
        return normal * 10.0 ** rng.uniform(18, 30)
    return normal * 1e-30 if kind == "tiny" else normal


def factor_gradients(W: lro.LowRank, G: np.ndarray) -> lro.LowRank:
    """The gradients that autodiff returns for dL/dW = G: `G_U = G V S^T`, `G_S = U^T G V`, `G_V = G^T U S`."""
    U, S, V = flat(W)
    T = functools.partial(np.swapaxes, axis1=-1, axis2=-2)
    grads = lro.LowRank((G @ V @ T(S)).reshape(W.U.shape), T(U) @ G @ V, (T(G) @ U @ S).reshape(W.V.shape))
    return jax.tree.map(lambda g, x: narrow(g, x.dtype), grads, W)


def gradients(kind: str, params: Any, rng: np.random.Generator) -> Any:
    grads: dict[str, Any] = {}
    for name, layer in params.items():
        if name == "bias":
            # Squares of 1e18 fit in float32; `test_ordinary_leaves_stay_finite` has those that do not.
            scale = {"zero": 0.0, "tiny": 1e-30, "huge": 1e18}.get(kind, 1.0)
            grads[name] = narrow(scale * rng.standard_normal(layer.shape), layer.dtype)
            continue
        W = layer["kernel"]
        grads[name] = {"kernel": factor_gradients(W, dense_gradient(kind, W, rng))}
    if kind in ("nan", "inf"):  # In one entry of one factor.
        g = grads["layer0"]["kernel"]
        factor = (g.U, g.S, g.V)[rng.integers(3)]
        factor.reshape(-1)[rng.integers(factor.size)] = np.nan if kind == "nan" else rng.choice([-np.inf, np.inf])
    if kind == "nan in the bias":
        grads["bias"][0] = np.nan
    return grads


# --- the invariants ----------------------------------------------------------------------------------------------


def same_bits(a: Any, b: Any) -> bool:
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def abstract(tree: Any) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def orthonormality(x: np.ndarray) -> float:
    return float(np.max(np.abs(np.swapaxes(x, -1, -2) @ x - np.eye(x.shape[-1]))))


def allowed_orthonormality(dtype: Any) -> float:
    # A factor is old + (new - old) with three roundings, of numbers whose columns have norms 1, 2 and 1: a column is
    # off by at most 4 u, an inner product of two columns by 8 u. In the dtype of the decomposition a QR and two
    # products add multiples of u that grow with the size, hence the plain 1e-5 and its counterpart in float64.
    rounding = 8 * unit_roundoff(dtype)
    return max(rounding, 1e-13 if dtype == jnp.float64 else 1e-5)


def random_kernel(seed: int, m: int, n: int, sigma: list[float], width: int | None = None) -> lro.LowRank:
    rng = np.random.default_rng(seed)
    padded = np.zeros(width or len(sigma))
    padded[: len(sigma)] = sigma
    U, V = basis(rng, m, padded.size), basis(rng, n, padded.size)
    return jax.tree.map(jnp.asarray, lro.LowRank(U, np.diag(padded), V))
