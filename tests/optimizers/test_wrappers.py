"""Every wrapper of Optax around our optimizers: accumulation, masks, partitions, chains, decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.trees import EXACT, TARGET, apply, close, loss, orthonormal, same, tree

slow = pytest.mark.slow


# Adam divides coefficients that are zero up to rounding, 1e-15, by its eps of 1e-8: steps agree to 1e-7 step sizes.
ADAM = dict(rtol=1e-6, atol=1e-7)


@slow
@pytest.mark.parametrize(
    "tx, tolerance",
    [
        pytest.param(lro.lowrank_heavy_ball(0.1), EXACT, id="heavy-ball"),
        pytest.param(lro.lowrank_adam(0.1, geometry=lro.Tangent()), ADAM, id="adam-tangent", marks=slow),
        pytest.param(
            optax.chain(lro.project_to_tangent(), optax.scale(-0.1), lro.retract()), EXACT, id="riemannian", marks=slow
        ),
    ],
)
def test_multi_steps_equals_one_step_with_the_mean_gradient(tx, tolerance):
    params = tree()
    wrapped = optax.MultiSteps(tx, 3, accumulator_dtype=jnp.float64)  # The default is float32.
    batches = jnp.stack([TARGET, -TARGET, TARGET + 1])
    grads = [jax.grad(loss)(params, target) for target in batches]
    mean = jax.tree.map(lambda *g: sum(g) / 3, *grads)

    state, seen, update = wrapped.init(params), [], jax.jit(wrapped.update)
    for g in grads:
        updates, state = update(g, state, params)
        seen.append(updates)
    for updates in seen[:2]:
        assert all(not np.any(u) for u in jax.tree.leaves(updates))
    expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    new, reference = (optax.apply_updates(params, u) for u in (seen[2], expected))
    close(lro.densify(new), lro.densify(reference), **tolerance)
    assert int(state.gradient_step) == 1


@slow
def test_apply_if_finite_skips_a_bad_step():
    tx = optax.apply_if_finite(lro.lowrank_heavy_ball(0.1), max_consecutive_errors=5)
    params = tree()
    state = tx.init(params)
    update = jax.jit(tx.update)
    good = jax.grad(loss)(params)
    bad = {**good, "bias": good["bias"].at[0].set(jnp.nan)}
    updates, after = update(bad, state, params)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    same(after.inner_state.inner_state, state.inner_state.inner_state)
    assert int(after.notfinite_count) == 1 and not after.last_finite
    # The wrapper looks at gradients first, so our own guard inside had nothing to count.
    assert int(lro.diagnostics(after).notfinite_count) == 0
    recovered, _ = update(good, after, params)
    expected, _ = update(good, state, params)
    same(recovered, expected)


def _kernels_only(tree):
    return jax.tree.map(lro.is_lowrank, tree, is_leaf=lro.is_lowrank)


def _others_only(tree):
    return jax.tree.map(lambda x: not lro.is_lowrank(x), tree, is_leaf=lro.is_lowrank)


@slow
@pytest.mark.parametrize("form", [pytest.param("callable", marks=slow), "prefix tree"])
def test_masked_trains_only_the_kernels(form):
    params = tree()
    mask, rest = _kernels_only, _others_only
    if form == "prefix tree":
        mask, rest = mask(params), rest(params)
    tx = optax.chain(optax.masked(lro.lowrank_heavy_ball(0.1), mask), optax.masked(optax.set_to_zero(), rest))
    new, _ = apply(tx, params, tx.init(params))
    same(new["bias"], params["bias"])
    alone = {"kernel": params["kernel"]}
    expected, _ = apply(
        lro.lowrank_heavy_ball(0.1),
        alone,
        lro.lowrank_heavy_ball(0.1).init(alone),
        objective=lambda p: loss({**params, **p}),
    )
    close(new["kernel"], expected["kernel"])


def test_masked_freezes_the_kernels():
    params = tree()
    tx = optax.chain(
        optax.masked(lro.lowrank_heavy_ball(0.1), _others_only), optax.masked(optax.set_to_zero(), _kernels_only)
    )
    state = tx.init(params)
    new, _ = apply(tx, params, state)
    same(new["kernel"], params["kernel"])
    assert not np.array_equal(new["bias"], params["bias"])
    # A frozen kernel costs no state.
    assert not [x for x in jax.tree.leaves(state) if x.shape == params["kernel"].S.shape]


def _labels_per_leaf(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "a" if path[0].key == "one" else "b", params)


PREFIX = {"one": "a", "two": {"kernel": "b", "bias": "b"}}


@slow
@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(PREFIX, id="prefix ending at the kernels", marks=slow),
        pytest.param(lambda params: PREFIX, id="callable", marks=slow),
        pytest.param(_labels_per_leaf, id="a label at every factor"),
    ],
)
def test_partition_gives_each_layer_its_optimizer(labels):
    params = {"one": tree(seed=1), "two": tree(seed=2)}
    parts = {"a": lro.fixed_rank(optax.sgd(0.01), geometry=lro.Tangent()), "b": lro.lowrank_heavy_ball(0.01)}
    tx = optax.partition(parts, labels)
    state = tx.init(params)
    objective = lambda p: loss(p["one"]) + loss(p["two"])  # noqa: E731
    new, _ = apply(tx, params, state, objective=objective)
    for layer, label in (("one", "a"), ("two", "b")):
        expected, _ = apply(parts[label], params[layer], parts[label].init(params[layer]))
        close(new[layer], expected)


@slow
def test_partition_freezes_a_layer():
    params = {"one": tree(seed=1), "two": tree(seed=2)}
    tx = optax.partition(
        {"train": lro.lowrank_heavy_ball(0.01), "freeze": optax.set_to_zero()}, {"one": "train", "two": "freeze"}
    )
    new, state = apply(tx, params, tx.init(params), objective=lambda p: loss(p["one"]) + loss(p["two"]))
    same(new["two"], params["two"])
    assert loss(new["one"]) < loss(params["one"])
    assert set(lro.diagnostics(state).kernels) == {"one/kernel"}


def test_masks_per_leaf():
    """`jax.tree.map(lambda x: x.ndim > 1, params)` is True for the factors of a kernel and False for a bias."""
    params = tree()
    tx = optax.masked(lro.lowrank_heavy_ball(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    updates = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)[0]
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_masks_per_leaf_that_leave_kernels_out():
    params = tree()
    tx = optax.masked(lro.lowrank_heavy_ball(0.1), lambda p: jax.tree.map(lambda x: x.ndim == 1, p))
    updates = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)[0]
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@slow
def test_chain_and_snapshot_and_states_by_name():
    """The parts of a chain around `fixed_rank`, and the numbers that its state shows afterwards."""
    params = tree()
    inner = optax.chain(optax.snapshot("norm", optax.tree.norm), optax.clip_by_global_norm(1e-3), optax.sgd(1.0, 0.9))
    tx = optax.chain(optax.identity(), lro.fixed_rank(inner, geometry=lro.Coefficient()), optax.identity())
    state = tx.init(params)
    _, state = apply(tx, params, state)
    # Inside, a kernel is one matrix whose norm is the Riemannian norm.
    grads = jax.grad(loss)(params)
    np.testing.assert_allclose(optax.tree.get(state, "norm"), lro.tangent_norm(params, grads), **EXACT)
    trace = optax.tree.get(state, "trace")
    assert trace["kernel"].N.shape == (4, 4) and trace["bias"].shape == (5,)
    assert set(lro.diagnostics(state).kernels) == {"kernel"}
    mu = optax.tree.get(lro.lowrank_adam(0.1).init(params), "mu")
    assert mu["kernel"].A.shape == params["kernel"].U.shape and mu["bias"].shape == (5,)


@slow
def test_clipping_inside_acts_on_the_riemannian_norm():
    """|dW|_F of a clipped gradient step is the bound times the step size, to first order in the step size."""
    params, h, bound = tree(), 1e-6, 0.5
    no_bias = lambda p: loss({**params, **p})  # noqa: E731
    alone = {"kernel": params["kernel"]}
    transforms = (
        lro.fixed_rank(optax.chain(optax.clip_by_global_norm(bound), optax.sgd(h)), geometry=lro.Tangent()),
        optax.chain(lro.project_to_tangent(), optax.clip_by_global_norm(bound), optax.scale(-h), lro.retract()),
    )
    for tx in transforms:
        new, _ = apply(tx, alone, tx.init(alone), objective=no_bias)
        moved = jnp.linalg.norm(new["kernel"].to_dense() - params["kernel"].to_dense())
        # The retraction bends at h^2 bound^2 / sigma_min = 1e-13, and subtraction leaves 1e-15 / 5e-7.
        np.testing.assert_allclose(moved, h * bound, rtol=1e-6)


@pytest.mark.parametrize(
    ("tx", "kept"),
    [
        pytest.param(lro.lowrank_adamw(1.0, weight_decay=0.1), 0.95**2, id="balanced"),  # half of it on each factor
        pytest.param(lro.lowrank_adamw(1.0, weight_decay=0.1, geometry=lro.Tangent()), 0.9, id="tangent", marks=slow),
        pytest.param(lro.lowrank_adamw(1.0, weight_decay=0.1, geometry=lro.Coefficient()), 0.9, id="coefficient"),
        pytest.param(lro.lowrank_heavy_ball(1.0, weight_decay=0.1), 0.9, id="heavy-ball", marks=slow),
    ],
)
def test_weight_decay_decays_the_kernel_and_never_its_bases(tx, kept):
    """Zero gradients and a decay of 0.1 a step."""
    params = tree()
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zero, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["kernel"].to_dense(), kept * params["kernel"].to_dense(), **EXACT)
    np.testing.assert_allclose(new["bias"], 0.9 * params["bias"], **EXACT)
    orthonormal(new["kernel"])


@slow
def test_weight_decay_masks_see_kernels_as_matrices():
    params = tree()
    tx = lro.lowrank_heavy_ball(1.0, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zero, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["kernel"].to_dense(), 0.9 * params["kernel"].to_dense(), **EXACT)
    same(new["bias"], params["bias"])


@slow
def test_ordinary_leaves_get_an_optimizer_of_their_own():
    params = tree()
    parts = {"kernel": optax.sgd(0.1), "ordinary": optax.set_to_zero()}
    tx = lro.fixed_rank(optax.partition(parts, lro.kernel_labels), geometry=lro.Tangent())
    new, _ = apply(tx, params, tx.init(params))
    same(new["bias"], params["bias"])
    plain = lro.fixed_rank(optax.sgd(0.1), geometry=lro.Tangent())
    expected, _ = apply(plain, params, plain.init(params))
    close(new["kernel"], expected["kernel"])
