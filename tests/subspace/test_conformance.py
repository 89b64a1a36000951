"""Every published method does what Optax asks of its own, and works inside the wrappers of Optax."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.optimizers.cases import in_variables, signature

# Each with short periods, so that six steps meet refreshes.
CASES = {
    "galore": lambda h, **o: lro.galore(h, 2, refresh=3, **o),
    "q_galore": lambda h, **o: lro.q_galore(h, 2, refresh=lro.refresh.doubling(2, window=1), **o),
    "golore": lambda h, **o: lro.golore(h, 2, refresh=3, random_from=2, **o),
    "adarankgrad": lambda h, **o: lro.adarankgrad(h, 3, lost=0.2, **o),
    "online_subspace": lambda h, **o: lro.online_subspace(h, 2, **o),
    "coap": lambda h, **o: lro.coap(h, 2, refresh=2, recalibrate=2, **o),
    "fira": lambda h, **o: lro.fira(h, 2, refresh=3, **o),
    "subtrack": lambda h, **o: lro.subtrack(h, 2, refresh=3, basis_learning_rate=1e-4, **o),
    "apollo": lambda h, **o: lro.apollo(h, 2, refresh=3, **o),
    "apollo_mini": lambda h, **o: lro.apollo_mini(h, scale=1.0, **o),
    "frugal": lambda h, **o: lro.frugal(h, 2, refresh=3, **o),
    "ldadam": lambda h, **o: lro.ldadam(h, 2, **o),
    "dct_adam": lambda h, **o: lro.dct_adam(h, 2, **o),
    "flora": lambda h, **o: lro.flora(h, 2, refresh=3, **o),
    "sumo": lambda h, **o: lro.sumo(h, 2, refresh=3, **o),
    "dion": lambda h, **o: lro.dion(h, 2, **o),
    "snsm": lambda h, **o: lro.snsm(h, 2, refresh=3, **o),
    "mofasgd": lambda h, **o: lro.mofasgd(h, 2, **o),
    "trion": lambda h, **o: lro.trion(h, 2, **o),
}
FAST = {"galore", "frugal"}
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES]
# The same operations in float64, fused in another order.
SAME = dict(rtol=1e-9, atol=1e-11)


def params(dtype=jnp.float64):
    """A stack of two tall kernels, a wide one, a bias; no gradient is zero."""
    keys = jax.random.split(jax.random.key(0), 3)
    tree = {
        "stack": {"kernel": jax.random.normal(keys[0], (2, 7, 5), jnp.float64)},
        "wide": {"kernel": jax.random.normal(keys[1], (5, 6), jnp.float64)},
        "bias": jax.random.normal(keys[2], (6,), jnp.float64),
    }
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def where(path, shape):
    return lro.Axes(1, 1) if len(shape) == 3 else path.endswith("kernel")


def loss(params):
    x = jnp.linspace(-1, 1, 14, dtype=params["bias"].dtype).reshape(2, 7)
    h = jnp.tanh(jnp.einsum("bi,kio->bko", x, params["stack"]["kernel"])) @ params["wide"]["kernel"]
    return jnp.sum(jnp.square(h + params["bias"][None, None] - 1))


def start(name, dtype=jnp.float64, h=0.01):
    tx, tree = CASES[name](h, where=where), params(dtype)
    return tx, tree, tx.init(tree)


# --- one step -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
def test_compiles_once_with_extra_arguments_and_stable_state(name, caplog):
    """Unknown extra arguments, `lax.cond` around the update, donated buffers: one trace and one compilation."""
    tx, tree, state = start(name)
    state = jax.tree.map(jnp.copy, state)
    traces = []

    def step(tree, state, flag):
        traces.append(1)
        grads = jax.grad(loss)(tree)
        updates, state = jax.lax.cond(
            flag,
            lambda: tx.update(grads, state, tree, unexpected_extra_argument=jnp.float16(1)),
            lambda: (jax.tree.map(jnp.zeros_like, tree), state),
        )
        return optax.apply_updates(tree, updates), state

    before, first = (signature(tree), signature(state)), loss(tree)
    step = jax.jit(step, donate_argnums=(0, 1))
    tree, state = step(tree, state, True)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for flag in (True, False, True, True, True):
            tree, state = step(tree, state, flag)
    assert len(traces) == 1
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()], caplog.text
    assert (signature(tree), signature(state)) == before
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert loss(tree) < first


@pytest.mark.parametrize("name", EACH)
def test_takes_variables_of_nnx(name):
    """`nnx.state(model)` holds variables around the arrays; updates come in variables too."""
    tx, tree = CASES[name](0.01, where=where), in_variables(params())
    state = jax.eval_shape(tx.init, tree)
    updates, new = jax.eval_shape(tx.update, tree, state, tree)
    assert signature(updates) == signature(tree)
    assert signature(new) == signature(state)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_preserves_structure_shapes_and_dtypes(name, dtype):
    """Of parameters in updates and of state in state, also inside `MultiSteps`."""
    tx, tree = CASES[name](0.01, where=where), params(dtype)
    grads = jax.eval_shape(jax.grad(loss), tree)
    for wrapped in (tx, optax.MultiSteps(tx, 4)):
        state = jax.eval_shape(wrapped.init, tree)
        updates, new = jax.eval_shape(wrapped.update, grads, state, tree)
        assert signature(updates) == signature(tree)
        assert signature(new) == signature(state)
        assert signature(jax.eval_shape(wrapped.init, jax.eval_shape(lambda: tree))) == signature(state)


@pytest.mark.parametrize("name", EACH)
def test_a_step_that_is_not_finite_leaves_no_trace(name):
    """In no piece of a method: moments, counts of bias corrections and schedules, weight decay, other leaves."""
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx, tree = CASES[name](schedule, where=where, weight_decay=0.1), params()
    grads, update = jax.grad(loss)(tree), jax.jit(tx.update)
    _, state = update(grads, tx.init(tree), tree)
    for bad in ("stack", "bias"):
        spoiled = {**grads, bad: jax.tree.map(lambda x: x.at[..., :1].set(jnp.nan), grads[bad])}
        updates, skipped = update(spoiled, state, tree)
        assert not any(map(np.any, jax.tree.leaves(updates)))
        assert int(skipped.notfinite_count) == 1
        for x, y in zip(jax.tree.leaves(skipped.inner_state), jax.tree.leaves(state.inner_state), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", [case for case in EACH if case.values != ("mofasgd",)])
def test_the_limit_of_skips_is_that_of_the_whole_method(name):
    tx, tree = CASES[name](0.1, where=where, max_consecutive_skips=1), params()
    grads, update = jax.grad(loss)(tree), jax.jit(tx.update)
    state = tx.init(tree)
    bad = {**grads, "bias": grads["bias"] * jnp.nan}
    seen = []
    for _ in range(2):
        updates, state = update(bad, state, tree)
        seen.append(bool(jnp.isnan(updates["bias"]).all()))
    assert seen == [False, True]


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(
    "tree", [{}, {"bias": jnp.ones(3)}, {"kernel": jnp.ones((6, 5))}], ids=lambda tree: str([*tree])
)
@pytest.mark.filterwarnings("ignore:.*projects nothing|.*nothing is projected:UserWarning")
def test_trees_without_kernels_or_without_others(name, tree):
    """By themselves, and as a part of `optax.partition` that gets no leaf."""
    tx = CASES[name](0.01)
    both = optax.partition({"a": tx, "b": optax.sgd(0.1)}, lambda tree: jax.tree.map(lambda x: "b", tree))
    for each in (tx, both):
        updates, _ = each.update(tree, each.init(tree), tree)
        assert signature(updates) == signature(tree)


@pytest.mark.parametrize("name", EACH)
def test_map_params_and_specs_of_shapes(name):
    """`optax.tree.map_params` calls `init` on a tree without leaves, and finds the moments of ordinary leaves."""
    tx, tree, state = start(name)
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert signature(same) == signature(state)
    zeros = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert signature(tx.init(zeros)) == signature(state)


# Those that pass their step size on in ways of their own; the other aliases share one line.
@pytest.mark.parametrize(
    "name",
    [
        "galore",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("online_subspace", "apollo_mini", "dion", "snsm", "mofasgd")
        ),
    ],
)
def test_numbers_schedules_and_injected_hyperparameters_agree(name):
    """A constant schedule and `inject_hyperparams` give the updates and states of the plain number."""
    number, tree, _ = start(name)
    build = lambda learning_rate: CASES[name](learning_rate, where=where)  # noqa: E731
    txs = number, build(optax.constant_schedule(0.01)), optax.inject_hyperparams(build)(learning_rate=0.01)
    grads = jax.grad(loss)(tree)

    @jax.jit
    def step(states):
        return [tx.update(grads, s, tree) for tx, s in zip(txs, states, strict=True)]

    (a, state_a), (b, _), (c, state_c) = step([tx.init(tree) for tx in txs])
    for other, reference in ((b, a), (c, a), (state_c.inner_state, state_a)):
        assert jax.tree.structure(other) == jax.tree.structure(reference)
        for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(x, y, **SAME)


def test_every_number_of_an_alias_can_be_injected():
    tx = optax.inject_hyperparams(lro.galore, static_args=("rank",))(learning_rate=0.1, rank=2, refresh=3, where=where)
    tree, plain = params(), lro.galore(0.1, 2, refresh=3, where=where)
    grads, state = jax.grad(loss)(tree), tx.init(tree)
    assert {"refresh", "scale", "b1", "b2", "eps", "weight_decay"} <= set(state.hyperparams)
    updates, _ = jax.jit(tx.update)(grads, state, tree)
    expected, _ = jax.jit(plain.update)(grads, plain.init(tree), tree)
    # The injected numbers are rounded to the dtype of the parameters, or to float32 where there is none.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, expected)


@pytest.mark.parametrize("alias", ["apollo_mini", "galore", "fira", "frugal", "mofasgd", "snsm"])
def test_a_rank_that_was_injected_is_refused_by_the_name_of_the_cure(alias):
    """The default rank of `apollo_mini` becomes an array too, though the user gave none."""
    tree = {"kernel": jnp.ones((8, 6))}
    given = {} if alias == "apollo_mini" else {"rank": 2}
    tx = optax.inject_hyperparams(getattr(lro, alias))(learning_rate=1e-2, **given)
    with pytest.raises(TypeError, match=r'static_args=\("rank",\)'):
        tx.init(tree)
    optax.inject_hyperparams(getattr(lro, alias), static_args=("rank",))(learning_rate=1e-2, **given).init(tree)


# --- wrappers -----------------------------------------------------------------------------


def steps(tx, tree, count=4):
    def step(carry, _):
        tree, state = carry
        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        return (optax.apply_updates(tree, updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=count)[0])((tree, tx.init(tree)))


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **SAME), a, b)


@pytest.mark.parametrize("name", ["galore", pytest.param("ldadam", marks=pytest.mark.slow)])
def test_multi_steps_is_one_step_with_the_mean_gradient(name):
    tx, tree, _ = start(name)
    wrapped = optax.MultiSteps(tx, 2, accumulator_dtype=jnp.float64)
    close(steps_with(wrapped, tree, [1.0, 3.0, -1.0, 2.0])[0], steps_with(tx, tree, [2.0, 0.5])[0])


def steps_with(tx, tree, factors):
    grads, state, update = jax.grad(loss)(tree), tx.init(tree), jax.jit(tx.update)
    for factor in factors:
        updates, state = update(jax.tree.map(lambda g: factor * g, grads), state, tree)  # noqa: B023
        tree = optax.apply_updates(tree, updates)
    return tree, state


@pytest.mark.parametrize("name", ["frugal", pytest.param("fira", marks=pytest.mark.slow)])
def test_masks_and_partitions_leave_other_leaves_alone(name):
    """A kernel alone moves as it does beside others, whatever hides them."""
    tx, tree, _ = start(name)
    parts = {"a": tx, "b": optax.set_to_zero()}
    labels = {"stack": "b", "wide": "a", "bias": "b"}
    partitioned, state = steps(optax.partition(parts, labels), tree)
    masked, _ = steps(optax.chain(optax.masked(tx, {"stack": False, "wide": True, "bias": False}), zeroed), tree)
    close(partitioned, masked)
    close((partitioned["stack"], partitioned["bias"]), (tree["stack"], tree["bias"]))
    assert not np.allclose(partitioned["wide"]["kernel"], tree["wide"]["kernel"])
    assert not [x for x in jax.tree.leaves(state) if x.shape[:1] == (2,) and x.ndim == 3]


zeroed = optax.masked(optax.set_to_zero(), {"stack": True, "wide": False, "bias": True})


def test_ordinary_leaves_get_the_inner_transformation():
    tree = params()
    tx = lro.subspace(optax.scale_by_adam(), lro.projectors.svd(), rank=2, refresh=3, where=where)
    grads = jax.grad(loss)(tree)
    updates, _ = jax.jit(tx.update)(grads, tx.init(tree))  # without params
    adam = optax.scale_by_adam()
    expected, _ = adam.update(grads["bias"], adam.init(tree["bias"]))
    np.testing.assert_allclose(updates["bias"], expected, **SAME)


def test_an_inner_transformation_that_looks_at_parameters_sees_them_in_coordinates():
    """Weight decay inside decays the part of a kernel in the subspace."""
    W = params()["wide"]
    inner = optax.chain(optax.identity(), optax.add_decayed_weights(0.5))
    tx = lro.subspace(inner, lro.projectors.rows(), rank=3, refresh=3)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, W), tx.init(W), W)
    rows = np.asarray(optax.tree.get(state, "basis")["kernel"])
    expected = np.zeros((5, 6))
    expected[rows] = 1 + 0.5 * np.asarray(W["kernel"])[rows]
    np.testing.assert_allclose(updates["kernel"], expected, **SAME)


def test_averages_and_schedule_free_steps():
    tx, tree, _ = start("galore")
    free = optax.contrib.schedule_free(tx, 0.01, b1=0.9)
    new, state = steps(free, tree, 10)
    assert loss(optax.contrib.schedule_free_eval_params(state, new)) < loss(tree)
    new, state = steps(optax.chain(tx, optax.ema(0.9)), tree)
    assert loss(new) < loss(tree)


def test_a_stack_is_its_kernels_one_by_one():
    tree = params()["stack"]["kernel"]
    for name in ("galore", "fira", "ldadam"):
        stacked, _ = steps_of_kernels(CASES[name](0.01, where=where), {"kernel": tree})
        for i in range(2):
            single, _ = steps_of_kernels(CASES[name](0.01), {"kernel": tree[i]}, i)
            np.testing.assert_allclose(stacked["kernel"][i], single["kernel"], **SAME)


def steps_of_kernels(tx, tree, member=None):
    state, update = tx.init(tree), jax.jit(tx.update)
    for t in range(4):
        g = jax.random.normal(jax.random.key(t), (2, 7, 5), jnp.float64)
        updates, state = update({"kernel": g if member is None else g[member]}, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree, state


@pytest.mark.parametrize(
    "name, shape, matrix",
    [
        ("conv", (3, 3, 4, 8), (36, 8)),
        ("query", (6, 2, 4), (6, 8)),
        ("out", (2, 4, 6), (8, 6)),
    ],
)
def test_convolutions_and_attention_are_matrices(name, shape, matrix):
    """A kernel with several input or output axes moves as the matrix that it is."""
    g = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    tx = lro.galore(0.1, 3)
    updates, _ = tx.update({name: {"kernel": g}}, tx.init({name: {"kernel": g}}), {name: {"kernel": g}})
    expected, _ = tx.update(g.reshape(matrix), tx.init(g.reshape(matrix)), g.reshape(matrix))
    np.testing.assert_allclose(updates[name]["kernel"].reshape(matrix), expected, **SAME)
