"""The operations of a step: precision and sizes of products, programs that do not grow, calls that do not compile."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.lax import Precision

import lowrank_optax as lro
from lowrank_optax import linalg
from tests import problems
from tests.jaxprs import DECOMPOSITIONS, named, traced

ROWS, COLUMNS, RANK = 40, 48, 4


def kernel(seed: int = 0, width: int = RANK) -> lro.LowRank:
    """A float32 kernel of rank 4, drawn in NumPy: JAX would compile for it."""
    rng, sigma = np.random.default_rng(seed), np.zeros(width)
    sigma[:RANK] = [1.0, 0.5, 0.3, 0.2]
    U, V = (problems.orthonormal(rng, k, width) for k in (ROWS, COLUMNS))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), lro.LowRank(U, np.diag(sigma), V))


def tree(kernels: int = 1, width: int = RANK) -> dict[str, Any]:
    params: dict[str, Any] = {f"layer_{i}": {"kernel": kernel(i, width)} for i in range(kernels)}
    return {**params, "bias": jnp.ones(3, jnp.float32)}


OPTIMIZERS = {
    "adam": lro.lowrank_adam(1e-2),
    "adamw": lro.lowrank_adamw(1e-2),
    "adam-tangent": lro.lowrank_adam(1e-2, geometry=lro.Tangent()),
    "adam-coefficient": lro.lowrank_adam(1e-2, geometry=lro.Coefficient()),
    "bug": lro.lowrank_adam(1e-2, geometry=lro.Tangent(retraction="bug")),
    "tolerance": lro.lowrank_adam(1e-2, geometry=lro.Coefficient(rank=lro.tolerance(0.1))),
    "budget": lro.lowrank_heavy_ball(1e-2, geometry=lro.Tangent(rank=lro.budget(500))),
    "heavy-ball": lro.lowrank_heavy_ball(1e-2),
    "muon": lro.lowrank_muon(1e-2),
    "muon-tangent": lro.lowrank_muon(1e-2, geometry=lro.Tangent()),
    "muon-coefficient": lro.lowrank_muon(1e-2, geometry=lro.Coefficient()),
    "galerkin": lro.galerkin(optax.adam(1e-2), 2),
    "riemannian": optax.chain(lro.clip_by_tangent_norm(1.0), lro.project_to_tangent(), lro.retract()),
    "riemannian-bug": optax.chain(lro.project_to_tangent(), lro.retract("bug")),
}


@functools.cache
def update_of(name: str, kernels: int = 1) -> list[Any]:
    """The equations of an update, traced once for all tests."""
    tx, params = OPTIMIZERS[name], tree(kernels, 2 * RANK if name == "galerkin" else RANK)
    return traced(tx.update, params, jax.eval_shape(tx.init, params), params)


# --- precision -------------------------------------------------------------------------------------------------------

W = kernel()
FUNCTIONS = {
    "to_dense": (lambda W: W.to_dense(), W),
    "densify": (lro.densify, {"kernel": W}),
    "factorize": (lambda x: lro.factorize({"kernel": x}, RANK), jnp.ones((ROWS, COLUMNS))),
    "orthonormalize": (lro.orthonormalize, W),
    "lowrank_init": (lambda key: lro.lowrank_init(RANK)(key, (ROWS, COLUMNS)), jax.random.key(0)),
    "tangent_norm": (lambda W: lro.tangent_norm(W, W), W),
    "incremental_update": (lambda W: lro.incremental_update(W, W, 0.1), W),
    "ranks": (lro.ranks, {"kernel": W}),
    "svd": (lambda x: linalg.svd(x), jnp.eye(RANK)),
    "init": (lro.lowrank_adam(1e-2).init, {"kernel": W}),
}


def assert_highest(found: list[Any]) -> None:
    products = named(found, "dot_general")
    assert all(e.params["precision"] == (Precision.HIGHEST, Precision.HIGHEST) for e in products)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_of_public_functions_are_in_full_precision(name: str) -> None:
    """By default accelerators round the factors of a product to 8 or 11 bits, and W with them."""
    f, x = FUNCTIONS[name]
    found = traced(f, x)
    assert_highest(found)
    assert named(found, "dot_general") or name in ("factorize", "ranks", "init")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_products_of_steps_are_in_full_precision(name: str) -> None:
    found = update_of(name)
    assert named(found, "dot_general")
    assert_highest(found)


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 6])
@pytest.mark.parametrize("geometry", [lro.Balanced(), lro.Tangent(), lro.Coefficient()], ids=lambda g: type(g).__name__)
def test_products_of_resize_are_in_full_precision(geometry: Any, width: int) -> None:
    """It runs outside of jit, so its parts are traced one after the other."""
    params = {"kernel": W}
    state = lro.lowrank_adam(1e-2, geometry=geometry).init(params)
    with jax.default_matmul_precision("bfloat16"):
        low = lro.resize(params, state, width)
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(lro.resize(params, state, width)), strict=True):
        np.testing.assert_array_equal(a, b)
    # On CPU every precision is the highest: look at the programs that ran.
    from lowrank_optax import resize as module
    from lowrank_optax.layout import map_kernel

    assert_highest(traced(lambda W: map_kernel(sys.modules[module.__module__]._fitted, W, width=width), W))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "adam-tangent", "adam-coefficient", "bug", "tolerance", "muon-tangent"])
def test_nothing_with_m_rows_is_decomposed(name: str) -> None:
    """Over sharded rows a decomposition would gather them, and on accelerators it is slow."""
    found = named(update_of(name), *DECOMPOSITIONS)
    assert {e.primitive.name for e in found} >= {"svd", "cholesky"}
    # On GPUs an SVD of size 2r comes from eigenvectors of size 4r.
    most = {"eigh": 4 * RANK}
    for e in found:
        largest = max(size for x in (*e.invars, *e.outvars) for size in x.aval.shape)
        assert largest <= most.get(e.primitive.name, 2 * RANK) < min(ROWS, COLUMNS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_array_has_the_size_of_the_dense_kernel(name: str) -> None:
    sizes = [x.aval.size for e in update_of(name) for x in e.outvars if hasattr(x.aval, "size")]
    assert max(sizes) <= max(ROWS, COLUMNS) * 4 * RANK < ROWS * COLUMNS


@pytest.mark.parametrize(
    "name", ["adam", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adam-tangent", "adam-coefficient", "muon"))]
)
def test_a_step_of_many_kernels_has_the_products_and_decompositions_of_one_group(name: str) -> None:
    def counts(kernels: int) -> dict[str, int]:
        found = update_of(name, kernels)
        return {kind: len(named(found, kind)) for kind in ("dot_general", "while", *DECOMPOSITIONS)}

    assert counts(2) == counts(5)


@pytest.mark.slow
def test_a_step_hardly_grows_with_depth() -> None:
    """A kernel is put on a stack, one slice of it taken off; else each of its arrays has an Adam of its own."""

    def growth(inner: Any) -> float:
        tx = lro.fixed_rank(inner)
        sizes = [len(traced(tx.update, p, jax.eval_shape(tx.init, p), p)) for p in (tree(4), tree(8))]
        return (sizes[1] - sizes[0]) / 4

    unknown = optax.GradientTransformation(lambda p: optax.adamw(1e-2).init(p), lambda *a: optax.adamw(1e-2).update(*a))
    assert growth(optax.adamw(1e-2)) < growth(unknown) / 2


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "riemannian",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("adam", "adam-tangent", "adam-coefficient", "bug", "tolerance", "budget", "muon", "galerkin")
        ),
    ],
)
def test_a_warm_eager_update_does_not_compile(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tx, params = OPTIMIZERS[name], tree(2, 2 * RANK if name == "galerkin" else RANK)
    state = tx.init(params)
    for _ in range(4):  # a galerkin loop has three calls
        _, state = tx.update(params, state, params)
    lro.ranks(params)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            _, state = tx.update(params, state, params)
        lro.ranks(params)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()], caplog.text


# --- derivatives -----------------------------------------------------------------------------------------------------


def _step_with(tx: Any) -> Any:
    params = tree()
    state = tx.init(params)

    def f(h: Any) -> Any:
        updates, _ = tx.update(jax.tree.map(lambda x: h * x, params), state, params)
        return sum(jnp.sum(x) for x in jax.tree.leaves(updates))

    return f


DERIVATIVES = {
    "update balanced": lambda: _step_with(OPTIMIZERS["adam"]),
    "update tangent": lambda: _step_with(OPTIMIZERS["heavy-ball"]),
    "update coefficient": lambda: _step_with(OPTIMIZERS["adam-coefficient"]),
    "retract": lambda: _step_with(lro.retract()),
    "factorize": lambda: lambda h: jnp.sum(lro.factorize({"kernel": h * jnp.ones((6, 5))}, 2)["kernel"].S),
    "orthonormalize": lambda: lambda h: jnp.sum(lro.orthonormalize(jax.tree.map(lambda x: h * x, W)).S),
    "incremental_update": lambda: lambda h: jnp.sum(lro.incremental_update(W, W, h).S),
}


@pytest.mark.parametrize("mode", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.startswith("update") else ()) for n in DERIVATIVES]
)
def test_derivatives_through_decompositions_are_refused_by_one_error(name: str, mode: Any) -> None:
    f = DERIVATIVES[name]()
    for g in (f, jax.jit(f)):
        with pytest.raises(NotImplementedError, match=r"does not differentiate through decompositions.*stop_gradient"):
            mode(g)(jnp.float32(0.5))


def test_derivatives_of_losses_and_of_projections_work() -> None:
    value, grads = jax.value_and_grad(lambda p: jnp.sum(p["layer_0"]["kernel"].to_dense() ** 2))(tree())
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    moved = jax.grad(lambda h: jnp.sum(h * optax.tree.norm(tree())))(jnp.float32(1.0))
    assert float(moved) > 0


# --- imports ---------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_neither_flax_nor_orbax() -> None:
    code = (
        "import jax, optax, sys, time; t = time.perf_counter(); import lowrank_optax as lro; "
        "print(time.perf_counter() - t, sorted({'flax', 'orbax', 'tensorstore'} & set(sys.modules))); "
        "lro.linen, lro.nnx, lro.checkpoint, lro.export_lora; assert 'linen' in dir(lro)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    seconds, loaded = run.stdout.split(" ", 1)
    assert loaded.strip() == "[]" and float(seconds) < 1.0  # 0.1 s on an idle core


def test_every_public_name_is_there_and_no_other() -> None:
    for name in lro.__all__:
        assert getattr(lro, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lro.nothing  # noqa: B018
