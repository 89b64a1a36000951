"""Stacked kernels: the same steps as one by one, for every optimizer, layout and wrapper, and a smaller program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.transforms.split import Split
from lowrank_optax.transforms.stack import Stacks
from tests import problems

RANK = 2
SHAPES = {  # name -> layout; the first three flatten to the same shape
    "a": problems.Layout((12,), (8,)),
    "b": problems.Layout((12,), (8,)),
    "heads": problems.Layout((12,), (2, 4)),
    "scan": problems.Layout((12,), (8,), batch=(3,)),
}


def network(width: int = RANK) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    params: dict[str, Any] = {name: jnp.asarray(rng.standard_normal(8)) for name in ("bias", "scale")}
    for name, layout in SHAPES.items():
        U, V = (
            np.stack([problems.orthonormal(rng, k, width) for _ in range(layout.slices)]) for k in (layout.m, layout.n)
        )
        sigma = np.where(np.arange(width) < RANK, rng.uniform(1, 2, (layout.slices, width)), 0)
        S = np.stack([np.diag(np.sort(s)[::-1]) for s in sigma])
        params[name] = {"kernel": layout.kernel(U, S, V)}
    return params


def loss(params: dict[str, Any]) -> jax.Array:
    total = (jnp.sum(jnp.cos(params["bias"])) + jnp.sum(params["scale"] ** 4)).astype(jnp.float64)
    for i, name in enumerate(SHAPES):
        W = params[name]["kernel"].to_dense()
        target = np.random.default_rng(i).standard_normal(W.shape)
        total += jnp.sum((W - target.astype(W.dtype)) ** 2).astype(jnp.float64) / 2
    return total


def steps(tx: Any, params: Any, n: int = 5, **extra: Any) -> Any:
    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(n):
        params, state = step(params, state)
    return params, state


def adam(**options: Any) -> Callable[[bool], Any]:
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05, eps=1e-3, weight_decay=0.1))
    return lambda stack: lro.fixed_rank(inner, **options, stack="all" if stack else None)


def muon(**options: Any) -> Callable[[bool], Any]:
    inner = optax.chain(optax.trace(0.9), lro.orthogonalize(), optax.scale(-0.05))
    return lambda stack: lro.fixed_rank(inner, ordinary=optax.adam(0.1), **options, stack="all" if stack else None)


def ball(**options: Any) -> Callable[[bool], Any]:
    return lambda stack: lro.fixed_rank(optax.sgd(0.05, 0.9, nesterov=True), **options, stack="all" if stack else None)


GALERKIN = {"gradient": "galerkin", "local_steps": 2}
CASES = {
    "adam balanced": (adam(momentum="balanced"), RANK),
    "adam tolerance": (adam(momentum="tangent", rank=lro.tolerance(0.05)), 2 * RANK),
    "adam galerkin": (adam(**GALERKIN), 2 * RANK),
    "muon balanced": (muon(momentum="balanced"), RANK),
    "heavy ball": (ball(), RANK),
}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_stacks_move_as_single_kernels_do(name: str) -> None:
    make, width = CASES[name]
    params = network(width=width)
    one, state_of_one = steps(make(False), params)
    stacked, state = steps(make(True), params)
    assert jax.tree.structure(state) == jax.tree.structure(state_of_one)
    # Sums over leaves are taken in another order: rounding, times the condition of five steps.
    for x, y in zip(jax.tree.leaves((one, state_of_one)), jax.tree.leaves((stacked, state)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)
    assert float(loss(stacked)) < float(loss(params))


@pytest.mark.slow
def test_a_galerkin_loop_on_one_batch() -> None:
    params = network(width=2 * RANK)
    ends = [steps(adam(**GALERKIN)(stack), params, 2, grad_fn=jax.grad(loss))[0] for stack in (False, True)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), *ends)


@pytest.mark.slow
def test_a_mask_tells_kernels_apart() -> None:
    """Weight decay on one kernel of a stack only: with a mask the optimizers do not stack."""
    params = network()

    def mask(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "b", tree)

    plain, decayed, some = (
        steps(lro.lowrank_adam(0.01, **options), params, 1)[0]
        for options in ({"weight_decay": 0.0}, {"weight_decay": 5.0}, {"weight_decay": 5.0, "mask": mask})
    )
    for name in SHAPES:
        expected = decayed if name == "b" else plain
        np.testing.assert_allclose(some[name]["kernel"].S, expected[name]["kernel"].S, rtol=1e-9, atol=1e-9)
    assert not np.allclose(plain["a"]["kernel"].S, decayed["a"]["kernel"].S, rtol=1e-3)


@pytest.mark.slow
def test_kernels_of_other_dtypes_are_other_stacks() -> None:
    params = network()
    params["b"] = {"kernel": params["b"]["kernel"].astype(jnp.bfloat16)}
    params["heads"] = {"kernel": params["heads"]["kernel"].astype(jnp.float32)}
    one, stacked = (steps(adam(momentum="balanced")(stack), params)[0] for stack in (False, True))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2 if x.dtype == jnp.bfloat16 else 1e-5), one, stacked
    )
    assert [stacked[name]["kernel"].U.dtype for name in "ab"] == [jnp.float64, jnp.bfloat16]


@pytest.mark.parametrize("params", [{}, {"bias": jnp.ones(3)}, {"bias": jnp.ones(3), "none": None}])
def test_trees_without_kernels(params: Any) -> None:
    tx = lro.lowrank_adam(0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.1, rtol=1e-6), updates)


def test_a_frozen_kernel_and_a_step_that_fails() -> None:
    params = network()
    labels = {name: "frozen" if name in ("a", "bias") else "moves" for name in params}
    tx = optax.partition({"moves": lro.lowrank_adam(0.05), "frozen": optax.set_to_zero()}, labels)
    moved, state = steps(tx, params, 2)
    jax.tree.map(np.testing.assert_array_equal, moved["a"], params["a"])
    assert float(loss(moved)) < float(loss(params))
    bad = jax.tree.map(jnp.zeros_like, params)
    bad["b"]["kernel"] = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), bad["b"]["kernel"])
    updates, after = jax.jit(tx.update)(bad, state, moved)
    assert all(not np.any(x) for x in jax.tree.leaves(updates))
    before = state.inner_states["moves"].inner_state
    after = after.inner_states["moves"].inner_state
    assert int(after.notfinite_count) == 1
    jax.tree.map(np.testing.assert_array_equal, before.inner_state, after.inner_state)


def test_there_and_back() -> None:
    params, tx = network(), lro.lowrank_adam(0.1)
    stacks = Stacks(optax.adam(0.1), Split(params, vectors=True), params)
    tree = stacks.stack(params)
    assert tree["bias"].shape == (2, 8) and tree["scale"] is None
    kernels = [x for x in jax.tree.leaves(tree, is_leaf=lro.is_lowrank) if lro.is_lowrank(x)]
    assert [W.shape for W in kernels] == [(3, 12, 8), (1, 3, 12, 8)]
    twice = lambda tree: jax.tree.map(lambda x: 2 * x, tree)  # noqa: E731
    back = stacks.unstack(twice(tree))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, twice(params))
    _, state = steps(tx, params, 1)
    again = Stacks(optax.adamw(0.1), Split(params, vectors=True), params)
    both = again.unstack_step(twice(again.stack(params)), twice(again.stack_state(state)))
    jax.tree.map(np.testing.assert_array_equal, both, (twice(params), twice(state)))


def test_what_a_step_leaves_alone_is_not_taken_from_a_stack() -> None:
    params, tx = network(), lro.lowrank_adam(0.1)
    state = tx.init(params)
    program = jax.make_jaxpr(tx.update)(params, state, params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    outputs = program.jaxpr.outvars[-len(names) :]
    passed = {name for name, x in zip(names, outputs, strict=True) if x in program.jaxpr.invars}
    expected = {name for name in names if name.endswith((".rank", ".truncation", ".S"))}
    assert passed == expected | {".phase"}


def test_the_program_hardly_grows_with_depth() -> None:
    def lines(kernels: int, stack: bool) -> int:
        keys = jax.random.split(jax.random.key(0), kernels)
        params = {str(i): lro.lowrank_init(4)(key, (40, 48), jnp.float32) for i, key in enumerate(keys)}
        tx = lro.fixed_rank(optax.adamw(1e-2), momentum="balanced", stack="kernels" if stack else None)
        return len(jax.jit(tx.update).lower(params, tx.init(params), params).as_text().splitlines())

    # A kernel is put on a stack, one slice of it taken off; else each of three factors has an Adam of its own.
    each, stacked = (lines(8, stack) - lines(4, stack) for stack in (False, True))
    assert stacked < each / 3
