"""Every optimizer does what Optax asks of its own, with ordinary parameters and with factored kernels.

The behaviours are those of the suite for contributed optimizers in Optax (`optax.contrib`): unknown extra arguments, no
second compilation, `inject_hyperparams`, dtypes, schedules, `optax.tree.map_params`, state that is stable under
`lax.cond`. Compilation dominates the time of these tests, so each case compiles once and checks several things with it.
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.optimizers.cases import CASES, INNER, in_variables, names, signature, small, small_loss

# --- one step -------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("adam-galerkin", "riemannian-sgd"))
def test_compiles_once_with_extra_arguments_and_stable_state(name, caplog):
    """Unknown extra arguments, `lax.cond` around the update, donated buffers: one trace and one compilation."""
    tx, params = CASES[name](0.01), small()
    state = jax.tree.map(jnp.copy, tx.init(params))
    traces = []

    def step(params, state, flag):
        traces.append(1)
        grads = jax.grad(small_loss)(params)
        # lax.cond refuses branches whose structures, shapes or dtypes differ.
        updates, state = jax.lax.cond(
            flag,
            lambda: tx.update(grads, state, params, unexpected_extra_argument=jnp.float16(1)),
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
        )
        return optax.apply_updates(params, updates), state

    before, loss = (signature(params), signature(state)), small_loss(params)
    step = jax.jit(step, donate_argnums=(0, 1))
    params, state = step(params, state, True)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for flag in (True, True, False, True):
            params, state = step(params, state, flag)
    assert len(traces) == 1
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()], caplog.text
    assert (signature(params), signature(state)) == before
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    # Four steps of size 0.01 from a random start go downhill for every method.
    assert small_loss(params) < loss


@pytest.mark.parametrize("name", names("adam", "adam-galerkin", "muon", "riemannian-sgd"))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_preserves_structure_shapes_and_dtypes(name, dtype):
    """Of parameters in updates and of state in state, for every dtype and inside `MultiSteps`."""
    tx, params = CASES[name](0.01), small(dtype)
    grads = jax.eval_shape(jax.grad(small_loss), params)
    for wrapped in (tx, optax.MultiSteps(tx, 4)) if dtype in ("bfloat16", "float32") else (tx,):
        state = jax.eval_shape(wrapped.init, params)
        updates, new = jax.eval_shape(wrapped.update, grads, state, params)
        assert signature(updates) == signature(params)
        assert signature(new) == signature(state)


@pytest.mark.parametrize("name", names("adam", "adam-galerkin", "muon", "riemannian-sgd"))
def test_takes_variables_of_nnx(name):
    """`nnx.state(model)` holds variables around the arrays; updates come in variables too."""
    tx, params = CASES[name](0.01), in_variables(small())
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert signature(updates) == signature(params)
    assert signature(new) == signature(state)


def test_variables_of_nnx_change_no_number():
    tx, params = lro.lowrank_adam(0.01), small()
    grads = jax.grad(small_loss)(params)
    expected, _ = tx.update(grads, tx.init(params), params)
    variables = in_variables(params)
    updates, _ = tx.update(in_variables(grads), tx.init(variables), variables)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(updates), jax.tree.leaves(expected))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trains_in_half_precision(dtype):
    """The factors stay half-precision numbers, are decomposed in float32, and the loss falls."""
    tx, params = lro.lowrank_adam(0.1), small(dtype)
    state, loss = tx.init(params), small_loss(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p))
    assert {x.dtype for x in optax.tree.get(state, "mu")["kernel"]} == {jnp.dtype(jnp.float32)}
    for _ in range(20):
        updates, state = update(jax.grad(small_loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert all(x.dtype == jnp.dtype(dtype) for x in jax.tree.leaves(params))
    assert small_loss(params) < 0.5 * loss
    U = params["kernel"].U.astype(jnp.float64)
    # Entries are rounded once when U is cast, and again when new - old is added to old: two eps, whose inner
    # products over five rows stay below four.
    np.testing.assert_allclose(U.T @ U, np.eye(4), atol=4 * float(jnp.finfo(dtype).eps))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "riemannian-sgd",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("adam", "adam-galerkin", "adamw-tangent", "heavy-ball", "muon", "lion", "adabelief")
        ),
    ],
)
def test_numbers_schedules_and_injected_hyperparameters_agree(name):
    """A constant schedule and `inject_hyperparams` give the updates and states of the plain number."""
    number, params = CASES[name](0.01), small()
    schedule = CASES[name](optax.constant_schedule(0.01))
    injected = optax.inject_hyperparams(CASES[name])(learning_rate=0.01)
    grads = jax.grad(small_loss)(params)
    states = [tx.init(params) for tx in (number, schedule, injected)]

    @jax.jit
    def step(grads, states):
        return [tx.update(grads, s, params) for tx, s in zip((number, schedule, injected), states, strict=True)]

    (a, state_a), (b, _), (c, state_c) = step(grads, states)
    # The same float64 operations on the same numbers, up to the order in which XLA fuses them.
    for other, reference in ((b, a), (c, a), (state_c.inner_state, state_a)):
        assert jax.tree.structure(other) == jax.tree.structure(reference)
        for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)
    assert signature(state_c) == signature(states[2])


def _every_number(learning_rate, b1, b2, eps, weight_decay, theta, max_rank, nesterov):
    return lro.lowrank_adamw(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay=weight_decay,
        nesterov=nesterov,
        geometry=lro.Tangent(rank=lro.tolerance(theta, max_rank=max_rank)),
    )


@pytest.mark.slow
def test_every_number_can_be_injected_and_changed():
    """Also eps, decay and the tolerance of a rank policy; a change between steps takes effect without a compilation."""
    values = dict(learning_rate=0.1, b1=0.8, b2=0.99, eps=1e-6, weight_decay=0.1, theta=1e-4)
    static = dict(max_rank=3, nesterov=True)
    tx = optax.inject_hyperparams(_every_number, static_args=("max_rank", "nesterov"))(**values, **static)
    plain, params = _every_number(**values, **static), small()
    state, grads = tx.init(params), jax.grad(small_loss)(params)
    assert set(state.hyperparams) == set(values)
    traces = []

    @jax.jit
    def update(grads, state):
        traces.append(1)
        return tx.update(grads, state, params)

    updates, after = update(grads, state)
    expected, plain_after = jax.jit(plain.update)(grads, plain.init(params), params)
    for x, y in zip(
        jax.tree.leaves((updates, after.inner_state)), jax.tree.leaves((expected, plain_after)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)  # Rounding, as above.
    assert int(lro.diagnostics(after).kernels["kernel"].rank) == 3

    def changed(**numbers):
        hyperparams = state.hyperparams | {k: jnp.asarray(v, jnp.float64) for k, v in numbers.items()}
        return update(grads, state._replace(hyperparams=hyperparams))

    # A tolerance of one discards everything down to the smallest rank, 1.
    assert int(lro.diagnostics(changed(theta=1.0)[1]).kernels["kernel"].rank) == 1
    still, _ = changed(learning_rate=0.0, theta=0.0)
    W = params["kernel"]
    # Without a step W stays: three products of matrices of norm about 4, in float64.
    moved = jax.tree.map(jnp.add, W, still["kernel"])
    np.testing.assert_allclose(moved.to_dense(), W.to_dense(), atol=1e-13)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "factory, static",
    [
        (lro.lowrank_adam, ("mu_dtype", "nesterov")),
        (lro.lowrank_adamw, ("mu_dtype", "mask", "nesterov")),
        (lro.lowrank_heavy_ball, ("nesterov", "accumulator_dtype")),
        (lro.lowrank_muon, ("ns_steps", "nesterov")),
    ],
)
@pytest.mark.parametrize("geometry", [{}, {"geometry": lro.Tangent(retraction="bug")}], ids=["default", "bug"])
def test_the_ready_made_optimizers_can_be_injected(factory, static, geometry):
    tx = optax.inject_hyperparams(factory, static_args=static)(learning_rate=0.01, **geometry)
    params = small()
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert signature(updates) == signature(params)


def test_static_arguments_can_be_injected_around():
    """Step counts are listed static, numbers are injected."""

    def factory(learning_rate, beta, local_steps):
        return lro.galerkin(optax.sgd(learning_rate, beta), local_steps)

    tx = optax.inject_hyperparams(factory, static_args=("local_steps",))(0.1, 0.9, 2)
    params = small()
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert (signature(updates), signature(new)) == (signature(params), signature(state))
    with pytest.raises(ValueError, match=r"local_steps.*static_args"):
        optax.inject_hyperparams(factory)(0.1, 0.9, 2).init(params)


# --- state ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_map_params_finds_what_mirrors_the_parameters(name):
    """With a tree of anything parameter-shaped, here the path of each parameter, as for sharding specs."""
    tx, params = CASES[name](0.01), small()
    state = tx.init(params)
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True))

    specs = {"kernel": "spec of the kernel", "bias": "spec of the bias"}
    masked = lambda x: lro.geometry.is_coordinates(x) or isinstance(x, optax.MaskedNode)  # noqa: E731
    mapped = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None, is_leaf=masked
    )
    found = set(jax.tree.leaves(mapped))
    stateful = not name.startswith("riemannian")
    assert found == (set(specs.values()) if stateful else set())
    if "mu" in str(jax.tree.structure(mapped)):
        assert optax.tree.get_all_with_path(mapped, "mu")[-1][1]["bias"] == specs["bias"]


def test_map_params_takes_specs_per_factor_with_tangent_momentum():
    """Moments that are tangent vectors have the shapes of the factors, so their shardings are those of the factors."""
    tx, params = lro.lowrank_adam(0.01, geometry=lro.Tangent()), small()
    state = tx.init(params)
    specs = {"kernel": lro.LowRank("u", "s", "v"), "bias": "b"}
    leaf = lro.geometry.is_coordinates
    one = lambda x, spec: type(x)(spec.U, spec.S, spec.V) if leaf(x) else spec  # noqa: E731
    mapped = optax.tree.map_params(tx, one, state, specs, transform_non_params=lambda _: "-", is_leaf=leaf)
    assert optax.tree.get(mapped, "mu") == {"kernel": lro.geometry.TangentVector("u", "s", "v"), "bias": "b"}
    assert optax.tree.get(mapped, "notfinite_count") == "-"


@pytest.mark.parametrize("name", CASES)
def test_abstract_init(name):
    """`jax.eval_shape(init)` gives the structure, shapes and dtypes of the real state."""
    tx, params = CASES[name](0.01), small()
    abstract = jax.eval_shape(tx.init, params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert signature(jax.eval_shape(tx.init, shapes)) == signature(abstract)
    assert signature(tx.init(params)) == signature(abstract)


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_state_can_be_donated(name):
    """No two leaves of parameters and state are the same buffer."""
    params = small()
    leaves = jax.tree.leaves((params, CASES[name](0.01).init(params)))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


def test_init_inside_jit_on_parameters_from_outside():
    """The idiom `jax.jit(lambda: tx.init(params), out_shardings=...)()`."""
    tx, params = CASES["adam"](0.01), small()
    assert signature(jax.eval_shape(lambda: tx.init(params))) == signature(tx.init(params))


@pytest.mark.parametrize("name", ["adam", "muon", "heavy-ball-tangent"])
def test_init_on_shapes(name):
    """`init` on `ShapeDtypeStruct` leaves, as Optax's own optimizers allow."""
    tx, params = CASES[name](0.01), small()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert signature(tx.init(shapes)) == signature(tx.init(params))


# --- ordinary leaves ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:there is no LowRank kernel")
@pytest.mark.parametrize("name", INNER)
def test_ordinary_parameters_get_the_inner_optimizer(name):
    """To the bit, where there is no kernel in the tree: three steps outside jit run the same operations."""
    ours, inner = CASES[name](0.01), INNER[name](0.01)
    params = {"bias": jnp.array([1.0, -2.0, 0.5]), "embedding": jnp.ones((3, 2))}
    loss = lambda p: jnp.sum(p["bias"] ** 4) + jnp.sum((p["embedding"] - 3) ** 2)  # noqa: E731
    a = b = params
    state_a, state_b = ours.init(a), inner.init(b)
    for _ in range(3):
        updates, state_a = ours.update(jax.grad(loss)(a), state_a, a)
        a = optax.apply_updates(a, updates)
        updates, state_b = inner.update(jax.grad(loss)(b), state_b, b)
        b = optax.apply_updates(b, updates)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", pytest.param("muon", marks=pytest.mark.slow)])
def test_ordinary_leaves_beside_kernels_get_the_inner_optimizer(name):
    ours, inner, params = CASES[name](0.01), INNER[name](0.01), small()
    grads = jax.grad(small_loss)(params)
    state_a, state_b = ours.init(params), inner.init(params["bias"])

    @jax.jit
    def steps(grads, state_a, state_b):
        a, b = params, params["bias"]
        for _ in range(2):
            updates, state_a = ours.update(grads, state_a, a)
            a = optax.apply_updates(a, updates)
            updates, state_b = inner.update(grads["bias"], state_b, b)
            b = optax.apply_updates(b, updates)
        return a["bias"], b

    a, b = steps(grads, state_a, state_b)
    np.testing.assert_allclose(a, b, rtol=1e-14)  # The same operations, fused differently.
