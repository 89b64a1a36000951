"""Changes, rules, starts and settings that cannot work are refused by name, before anything is computed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from tests.adapters.every_kind import NAMES, start
from tests.models.linen_models import draw

ad = lro.adapters
INPUTS_ALONE = {"hra", "oft", "oft_neumann"}  # rotations of the inputs, which know nothing of the outputs


def change(kind, shape=(8, 6), rank=2, seed=1):
    kernel = jax.random.normal(jax.random.key(0), shape)
    return ad.init(jax.random.key(seed), {"kernel": kernel}, rank, kind=kind)[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_change_for_another_shape_is_refused(name):
    _, delta = start(name, {"kernel": draw((9, 18), 3)})
    for shape in ((3, 4), (18, 9), (12, 18), (9, 6), (9, 36), (2, 9, 18), (9, 18, 2), (162,)):
        if name in INPUTS_ALONE and shape[0] == 9:
            continue
        with pytest.raises(ValueError, match="'kernel' is for a kernel of another shape"):
            ad.merge({"kernel": jnp.ones(shape)}, delta)


@pytest.mark.parametrize("kind", ["fourier", "shira", "nola", "vera", "randlora", "miss"])
def test_a_change_made_by_hand_has_no_sides_to_compare(kind):
    delta = change(kind)
    fields = {**vars(delta["kernel"]), "sides": None}
    delta["kernel"] = type(delta["kernel"])(**fields)
    assert ad.merge({"kernel": jnp.ones((8, 6))}, delta)["kernel"].shape == (8, 6)


@pytest.mark.parametrize("inner", [optax.adamw(1e-2), optax.sgd(0.1), optax.chain(optax.clip(1.0), optax.adam(0.1))])
@pytest.mark.parametrize("make", [lambda: change("lowrank"), lambda: change(ad.magnitude("lowrank"))])
def test_a_rule_that_would_leave_the_manifold_is_refused(make, inner):
    with pytest.raises(ValueError, match=r"'kernel.*' is of kind 'lowrank'.*off the manifold.*rule='manifold'"):
        ad.optimizer(inner, "plain").init(make())


@pytest.mark.parametrize(
    "tx",
    [
        ad.optimizer(optax.adamw(1e-2), "manifold"),
        ad.optimizer(optax.adamw(1e-2)),
        ad.optimizer(optax.sgd(0.1), geometry=lro.Balanced()),
        ad.optimizer(lro.lowrank_adam(1e-2)),
        ad.optimizer(optax.chain(optax.identity(), lro.fixed_rank(optax.sgd(0.1)))),
    ],
    ids=["manifold", "adamw", "balanced", "lowrank_adam", "chain"],
)
def test_a_rule_on_the_manifold_keeps_bases_orthonormal(tx):
    delta = change("lowrank")
    state = tx.init(delta)
    for seed in range(3):
        target = jax.random.normal(jax.random.key(seed), (8, 6))
        grads = jax.grad(lambda d: jnp.sum((ad.merge({"kernel": jnp.eye(8, 6)}, d)["kernel"] - target) ** 2))(delta)  # noqa: B023
        updates, state = tx.update(grads, state, delta)
        delta = optax.apply_updates(delta, updates)
    U = np.asarray(delta["kernel"].U, float)
    np.testing.assert_allclose(U.T @ U, np.eye(2), atol=1e-5)


def test_the_defaults_of_nnx_keep_to_the_manifold():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    lro.nnx.adapt(model, rank=2)
    optimizer = nnx.Optimizer(model, ad.optimizer(optax.adamw(1e-2)), wrt=lro.nnx.AdapterParam)
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (5, 8))
        wanted = nnx.DiffState(0, lro.nnx.AdapterParam)
        grads = nnx.grad(lambda model, x=x: jnp.mean((model(x) - 1) ** 2), argnums=wanted)(model)
        optimizer.update(model, grads)
    U = np.asarray(lro.nnx.adapters(model)["kernel"].U, float)
    np.testing.assert_allclose(U.T @ U, np.eye(2), atol=1e-5)


def test_the_default_rule_and_an_inner_on_the_manifold_take_the_same_steps():
    delta, ends = change("lowrank"), []
    for tx in (ad.optimizer(optax.adam(1e-2)), ad.optimizer(lro.lowrank_adam(1e-2, geometry=lro.Tangent()))):
        moved, state = delta, tx.init(delta)
        for seed in range(4):
            grads = jax.tree.map(lambda x, seed=seed: draw(x.shape, seed), moved)
            updates, state = tx.update(grads, state, moved)
            moved = optax.apply_updates(moved, updates)
        ends.append(ad.merge({"kernel": jnp.zeros((8, 6))}, moved)["kernel"])
    np.testing.assert_allclose(*ends, atol=1e-6)


@pytest.mark.parametrize("rule", ["plus", "precondition", "pro", "muon", "rite", "frozen_a"])
def test_a_rule_that_reads_the_changes_says_so(rule):
    delta = change("lora")
    tx = ad.optimizer(optax.sgd(0.1), rule, damping=1e-3 if rule == "frozen_a" else None)
    with pytest.raises(ValueError, match=r"needs the changes: update\(grads, state, params\)"):
        tx.update(delta, tx.init(delta))


@pytest.mark.parametrize("value", [-1.0, float("nan"), "16"])
@pytest.mark.parametrize("name", ["ratio", "damping", "b1", "b2"])
def test_a_number_of_a_rule_outside_its_range_is_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} is "):
        ad.optimizer(optax.sgd(0.1), "plus", **{name: value})


@pytest.mark.parametrize("value", [-1.0, 1.0, 2.0, float("nan"), "16"])
@pytest.mark.parametrize("name", ["b1", "b2"])
def test_a_decay_of_a_budget_outside_its_range_is_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} is "):
        ad.budget(2, begin=1, end=3, **{name: value})


@pytest.mark.parametrize("inner", [optax.adam, 1e-3, None])
def test_an_inner_that_is_no_transformation_is_refused(inner):
    with pytest.raises(TypeError, match="inner is a transformation of Optax"):
        ad.optimizer(inner)


@pytest.mark.parametrize("rule", [["plus"], {}, 1, "pluss"])
def test_a_rule_that_is_no_name_is_refused(rule):
    with pytest.raises(ValueError, match="rule is one of"):
        ad.optimizer(optax.sgd(0.1), rule)


@pytest.mark.parametrize("kind", ["lora", "lowrank"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_start_from_what_is_not_finite_is_refused(kind, bad):
    params = {"kernel": jnp.eye(6)}
    for given in (
        ad.gradient({"kernel": jnp.eye(6).at[1, 2].set(bad)}),
        ad.activation({"kernel": jnp.ones((9, 6)).at[1, 2].set(bad)}),
    ):
        with pytest.raises(ValueError, match="of 'kernel' is not finite"):
            ad.init(jax.random.key(0), params, 2, kind=kind, start=given)


@pytest.mark.parametrize("gamma", [-1.0, 0, "16"])
def test_a_gamma_that_is_not_positive_is_refused(gamma):
    with pytest.raises((TypeError, ValueError), match="gamma is "):
        ad.gradient({"kernel": jnp.eye(6)}, gamma=gamma)


@pytest.mark.parametrize("given", [{"kernel": jnp.eye(6)}, 3, None])
def test_gradients_in_the_place_of_a_start_are_refused(given):
    with pytest.raises(TypeError, match=r"lro.adapters.gradient\(grads\)"):
        ad.init(jax.random.key(0), {"kernel": jnp.eye(6)}, 2, kind="lora", start=given)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gralora", {"k": 0}),
        ("gralora", {"k": -2}),
        ("vblora", {"length": 0}),
        ("vblora", {"vectors": 4, "length": 2, "top": 1.5}),
        ("nola", {"bases": -1}),
        ("nola", {"bases": 0}),
        ("boft", {"factors": 0}),
        ("rosa", {"density": -0.1}),
        ("allora", {"eta": 0.0}),
    ],
)
def test_a_setting_that_is_not_positive_is_refused(kind, settings):
    with pytest.raises((TypeError, ValueError), match=f"{list(settings)[-1]} "):
        ad.variant(kind, **settings)


def test_forget_asks_for_the_rule_of_changes_on_the_manifold():
    delta = change("lowrank")
    tx = ad.optimizer(optax.adam(0.1), "manifold")
    assert ad.forget(tx, tx.init(delta))
    tx = ad.optimizer(optax.adam(0.1))
    with pytest.raises(ValueError, match="for changes of kind 'lowrank' name the rule"):
        ad.forget(tx, tx.init(delta))


@pytest.mark.parametrize("share", [2.0, -0.1, float("nan"), "half"])
def test_a_share_that_is_no_probability_is_refused(share):
    with pytest.raises((TypeError, ValueError), match="share is "):
        ad.switch(jax.random.key(1), {"kernel": jnp.eye(8, 6)}, change("lora"), share=share)


@pytest.mark.parametrize("share", [0, 1])
def test_a_share_of_none_and_of_all_may_be_whole_numbers(share):
    delta = change("lora")
    _, new, kept = ad.switch(jax.random.key(1), {"kernel": jnp.eye(8, 6)}, delta, share=share)
    assert np.array_equal(new["kernel"].A, delta["kernel"].A) == (share == 0)
    np.testing.assert_array_equal(kept["kernel"].A, 1 - share)


def test_a_sum_of_changes_for_different_kernels_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'kernel' are for kernels of different shapes, \[\(4, 6\), \(8, 6\)\]"):
        ad.add(change("lora"), change("lora", (4, 6)))
    with pytest.raises(TypeError, match="weights is a sequence"):
        ad.add(change("lora"), weights=2.0)


@pytest.mark.parametrize("make", [tuple, list, np.array, jnp.array], ids=lambda x: x.__name__)
def test_weights_of_a_sum_may_be_any_sequence(make):
    delta = change("lora")
    got = ad.add(delta, delta, weights=make([0.5, 0.25]))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, ad.add(delta, delta, weights=(0.5, 0.25))))


class Two(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("kind", ["vera", "randlora", "nola", ad.variant("vblora", vectors=8, length=4)])
def test_a_second_bank_of_a_kind_is_refused_and_leaves_the_model_as_it_was(kind):
    model, x = Two(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (3, 8))
    lro.nnx.adapt(model, rank=2, kind=kind, where=lambda path, shape: path.startswith("a"))
    with pytest.raises(ValueError, match=r"_bank' already.*in one call"):
        lro.nnx.adapt(model, rank=2, kind=kind, where=lambda path, shape: path.startswith("b"))
    nnx.update(model, jax.tree.map(lambda x: x + 0.1, nnx.state(model, lro.nnx.AdapterParam)))
    merged = ad.merge({"a": {"kernel": model.a.kernel[...]}}, lro.nnx.adapters(model))
    np.testing.assert_allclose(model(x), x @ merged["a"]["kernel"] @ model.b.kernel[...], atol=1e-5)


@pytest.mark.parametrize("wrong", [(5, 4), (8, 6, 2)])
def test_changes_that_are_refused_leave_an_nnx_model_as_it_was(wrong):
    model = Two(nnx.Rngs(0))
    kernels = {"a": {"kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones(wrong)}}
    split = lro.Axes(inputs=1)
    _, delta = ad.init(jax.random.key(1), kernels, 2, kind="lora", where=lambda path, shape: split)
    with pytest.raises(ValueError, match="'b/kernel' is for a kernel of another shape"):
        lro.nnx.adapt(model, delta=delta)
    assert lro.nnx.adapters(model) == {}


@pytest.mark.parametrize(("delta", "error"), [({}, ValueError), ([1], TypeError), (3, TypeError)])
def test_a_delta_without_changes_is_refused(delta, error):
    with pytest.raises(error, match="delta "):
        lro.nnx.adapt(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), delta=delta)


def test_rngs_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"rngs is nnx.Rngs"):
        lro.nnx.adapt(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), rank=2, rngs=0)


def test_a_base_of_another_shape_is_refused_in_a_layer():
    model, x = nn.Dense(3), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match="another shape"):
        lro.linen.apply(model)({"params": params, "adapters": change("fourier")}, x)
