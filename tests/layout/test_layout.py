"""Groups of kernels: the same steps as one by one, whatever the masks, dtypes, layouts and inner transformations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.layout import Layout, fusion
from tests import problems

slow = pytest.mark.slow
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
    total = jnp.zeros((), jnp.float64)
    if "bias" in params:
        total += (jnp.sum(jnp.cos(params["bias"])) + jnp.sum(params["scale"] ** 4)).astype(jnp.float64)
    for i, name in enumerate(SHAPES):
        if name in params:
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


def assert_close(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    """Sums are taken in another order: rounding, times the condition of five steps."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def one_by_one(inner: Any) -> optax.GradientTransformation:
    """The same transformation, of which nothing is known: it is given the tree of the user."""
    inner = optax.with_extra_args_support(inner)

    def first(params: Any) -> Any:
        return inner.init(params)

    def then(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return inner.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(first, then)


ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05, eps=1e-3, weight_decay=0.1))
MUON = optax.partition(
    {
        "kernel": optax.chain(optax.trace(0.9), lro.scale_by_polar_factor(), optax.scale(-0.05)),
        "ordinary": optax.adam(0.1),
    },
    lro.kernel_labels,
)
BALL = optax.sgd(0.05, 0.9, nesterov=True)


CASES = {
    "adam balanced": (lambda inner: lro.fixed_rank(inner), ADAM, RANK),
    "adam tolerance": (
        lambda inner: lro.fixed_rank(inner, geometry=lro.Tangent(rank=lro.tolerance(0.05))),
        ADAM,
        2 * RANK,
    ),
    "adam coefficient": (lambda inner: lro.fixed_rank(inner, geometry=lro.Coefficient()), ADAM, RANK),
    "adam galerkin": (lambda inner: lro.galerkin(inner, 2), ADAM, 2 * RANK),
    "muon balanced": (lambda inner: lro.fixed_rank(inner), MUON, RANK),
    "heavy ball": (lambda inner: lro.fixed_rank(inner, geometry=lro.Tangent()), BALL, RANK),
}


@slow
@pytest.mark.parametrize("name", CASES)
def test_a_known_inner_transformation_sees_groups_and_moves_as_an_unknown_one(name: str) -> None:
    make, inner, width = CASES[name]
    params = network(width)
    moved, state = steps(make(inner), params)
    assert_close((moved, state), steps(make(one_by_one(inner)), params))
    assert float(loss(moved)) < float(loss(params))


@slow
def test_a_galerkin_loop_on_one_batch() -> None:
    params = network(2 * RANK)
    ends = [steps(lro.galerkin(inner, 2), params, 2, grad_fn=jax.grad(loss))[0] for inner in (ADAM, one_by_one(ADAM))]
    assert_close(*ends)


GEOMETRIES = {"balanced": lro.Balanced(), "tangent": lro.Tangent(), "coefficient": lro.Coefficient()}


@slow
@pytest.mark.parametrize("geometry", ["balanced", "tangent"])
def test_kernels_move_as_each_does_alone(geometry: str) -> None:
    """The oracle of `test_oracle_trajectories` asks the same of coefficients."""
    params, tx = network(), lro.lowrank_adam(0.05, eps=1e-3, geometry=GEOMETRIES[geometry])
    together, _ = steps(tx, params)
    for name in ("b", "heads", "scan"):
        alone, _ = steps(tx, {name: params[name]})
        assert_close(lro.densify(alone[name]), lro.densify(together[name]))


# --- copies of the parameters that hold different kernels ------------------------------------------------------------


def masked(inner: Any, *names: str) -> optax.GradientTransformation:
    return optax.masked(inner, {name: name in names for name in ("a", "b", "heads")})


COPIES = {
    "masked trace, then a trace of all": optax.chain(masked(optax.trace(0.5), "b"), optax.trace(0.9)),
    "a trace of all, then a masked one": optax.chain(optax.trace(0.9), masked(optax.trace(0.5), "a", "heads")),
    "two masks": optax.chain(masked(optax.trace(0.5), "a"), masked(optax.trace(0.9), "b", "heads")),
    "adam of one, trace of the others": optax.partition(
        {"x": optax.scale_by_adam(eps=1e-3), "y": optax.trace(0.9)}, {"a": "y", "b": "x", "heads": "y"}
    ),
    "masked adam in a chain": optax.chain(masked(optax.scale_by_adam(eps=1e-3), "heads"), optax.trace(0.9)),
}


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        pytest.param(x, g, marks=() if x.startswith("masked trace") and g == "balanced" else slow)
        for x in COPIES
        for g in GEOMETRIES
    ],
)
def test_copies_that_hold_different_kernels(name: str, geometry: str) -> None:
    """Every kernel moves as it does when the mask of each copy is applied to a tree with that kernel alone."""
    inner = optax.chain(COPIES[name], optax.scale(-0.02))
    params = {k: network()[k] for k in ("a", "b", "heads")}
    tx = lro.fixed_rank(inner, geometry=GEOMETRIES[geometry])

    @jax.jit
    def step(weights: Any, params: Any, state: Any) -> Any:
        grads = {k: jax.tree.map(lambda g: weights[k] * g, g) for k, g in jax.grad(loss)(params).items()}  # noqa: B023
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(*trained: str) -> Any:
        """The masks above are trees of all three names: kernels that are not trained get gradients of zero."""
        moved, state, weights = params, jax.jit(tx.init)(params), {k: float(k in trained) for k in params}
        for _ in range(6):
            moved, state = step(weights, moved, state)
        return lro.densify(moved)

    together = run(*params)
    for k in params:
        assert_close(together[k], run(k)[k], 1e-12)


@slow
def test_a_mask_tells_kernels_of_one_shape_apart() -> None:
    """Weight decay on one kernel of a group only."""
    params = network()

    def mask(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "b", tree)

    plain, decayed, some = (
        steps(lro.lowrank_adamw(0.01, **options), params, 1)[0]
        for options in ({"weight_decay": 0.0}, {"weight_decay": 5.0}, {"weight_decay": 5.0, "mask": mask})
    )
    for name in SHAPES:
        expected = decayed if name == "b" else plain
        np.testing.assert_allclose(some[name]["kernel"].S, expected[name]["kernel"].S, rtol=1e-9, atol=1e-9)
    assert not np.allclose(plain["a"]["kernel"].S, decayed["a"]["kernel"].S, rtol=1e-3)


@slow
@pytest.mark.parametrize("mask", [{"blocks": False, "b": True}, lambda tree: {"blocks": False, "b": True}])
def test_a_mask_that_ends_above_kernels(mask: Any) -> None:
    """A whole subtree is left out by one False."""
    params = {"blocks": {k: network()[k] for k in ("a", "heads")}, "b": network()["b"]}
    tx = lro.fixed_rank(optax.chain(optax.masked(optax.trace(0.9), mask), optax.scale(-0.02)))
    state, update = tx.init(params), jax.jit(tx.update)
    flat = lambda p: {**p["blocks"], "b": p["b"]}  # noqa: E731
    moved = params
    for _ in range(3):
        updates, state = update(jax.grad(lambda p: loss(flat(p)))(moved), state, moved)
        moved = optax.apply_updates(moved, updates)
    for names, inner in ((("a", "heads"), optax.sgd(0.02)), (("b",), optax.sgd(0.02, 0.9))):
        expected, _ = steps(lro.fixed_rank(inner), {k: network()[k] for k in names}, 3)
        for k in names:
            assert_close(lro.densify(flat(moved)[k]), lro.densify(expected[k]), 1e-12)


# --- other trees -----------------------------------------------------------------------------------------------------


@slow
def test_kernels_of_other_dtypes_are_other_groups() -> None:
    params = network()
    params["b"] = {"kernel": params["b"]["kernel"].astype(jnp.bfloat16)}
    params["heads"] = {"kernel": params["heads"]["kernel"].astype(jnp.float32)}
    one, grouped = (steps(lro.fixed_rank(inner), params)[0] for inner in (one_by_one(ADAM), ADAM))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2 if x.dtype == jnp.bfloat16 else 1e-5), one, grouped
    )
    assert [grouped[name]["kernel"].U.dtype for name in "ab"] == [jnp.float64, jnp.bfloat16]


@pytest.mark.parametrize("params", [{}, {"bias": jnp.ones(3)}, {"bias": jnp.ones(3), "none": None}])
def test_trees_without_kernels(params: Any) -> None:
    tx = lro.lowrank_adam(0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.1, rtol=1e-6), updates)


@pytest.mark.slow
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
    params = network()
    layout = Layout(params, lro.Balanced(), vectors=True)
    groups = layout.weights(params)
    shapes = sorted(jax.tree.leaves(g)[0].shape for g in groups)
    assert shapes == [(2, 8), (3, 12, 2), (3, 12, 2)]  # vectors, three kernels, three layers of one
    jax.tree.map(np.testing.assert_array_equal, layout.params(groups), params)
    ranks = {**dict.fromkeys(("bias", "scale"), jnp.ones(8)), **{name: {"kernel": jnp.int32(2)} for name in SHAPES}}
    jax.tree.map(np.testing.assert_array_equal, layout.scatter(layout.gather(ranks)), ranks)
    zero = layout.updates(layout.differences(groups, groups))
    # Ordinary leaves hold steps and not weights.
    kernels = {name: zero[name] for name in SHAPES}
    assert jax.tree.structure(zero) == jax.tree.structure(params)
    assert all(not np.any(x) for x in jax.tree.leaves(kernels))
    copy = lro.lowrank_adam(0.1).init(params).inner_state.inner_state[0].mu
    copy["a"]["kernel"] = jax.tree.map(jnp.ones_like, copy["a"]["kernel"])
    copy["heads"] = optax.MaskedNode()
    back = layout.scatter_copy(layout.gather_copy(copy), copy)
    assert jax.tree.structure(back) == jax.tree.structure(copy)
    jax.tree.map(np.testing.assert_array_equal, back, copy)


def test_stacks_and_slices() -> None:
    rng = np.random.default_rng(0)
    trees = [[{"x": rng.standard_normal((3, 2)), "y": rng.standard_normal(())} for _ in range(n)] for n in (4, 1, 2)]
    stacks = [(fusion.stack(group), len(group)) for group in trees]
    assert stacks[0][0]["x"].shape == (4, 3, 2)
    jax.tree.map(np.testing.assert_array_equal, fusion.unstack([*stacks, (optax.MaskedNode(), 2)])[:3], trees)
    assert fusion.unstack([((), 3)]) == [[(), (), ()]]


def test_behind_a_barrier_functions_may_be_mapped_and_differentiated() -> None:
    f = lambda x: jnp.exp(fusion.fusion_barrier({"x": jnp.sin(x)})["x"])  # noqa: E731
    xs = jnp.linspace(0, 1, 5)
    np.testing.assert_allclose(jax.vmap(f)(xs), np.exp(np.sin(xs)), rtol=1e-14)
    np.testing.assert_allclose(jax.grad(f)(0.3), np.exp(np.sin(0.3)) * np.cos(0.3), rtol=1e-14)
    assert fusion.fusion_barrier({"empty": None}) == {"empty": None}
