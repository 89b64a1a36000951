"""What Optax asks of every optimizer, asked of ours: with ordinary parameters and with factored kernels.

The behaviours are those of the suite for contributed optimizers in Optax (`optax.contrib`): convergence on small
targets, unknown extra arguments, no second compilation, `inject_hyperparams`, dtypes, schedules,
`optax.tree.map_params`, state that is stable under `lax.cond`. Compilation dominates the time of these tests, so
each case compiles once and checks several things with it.
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro


def _riemannian(learning_rate):
    return optax.chain(
        lro.project_to_tangent(),
        optax.clip_by_global_norm(20.0),
        optax.scale_by_learning_rate(learning_rate),
        lro.retract(),
    )


# Name of the case to the optimizer as a function of its learning rate.
CASES = {
    "adam": lambda learning_rate: lro.lowrank_adam(learning_rate),
    "adam-coefficient": lambda learning_rate: lro.lowrank_adam(learning_rate, momentum="coefficient"),
    "adam-tangent": lambda learning_rate: lro.lowrank_adam(learning_rate, momentum="tangent"),
    "adam-galerkin": lambda learning_rate: lro.lowrank_adam(learning_rate, gradient="galerkin", local_steps=2),
    "adam-bug": lambda learning_rate: lro.lowrank_adam(learning_rate, retraction="bug"),
    "adam-tolerance": lambda learning_rate: lro.lowrank_adam(learning_rate, rank=lro.tolerance(1e-3)),
    "adamw-tangent": lambda learning_rate: lro.lowrank_adamw(learning_rate, momentum="tangent"),
    "heavy-ball": lambda learning_rate: lro.lowrank_heavy_ball(learning_rate, momentum_space="coefficient"),
    "heavy-ball-tangent": lambda learning_rate: lro.lowrank_heavy_ball(learning_rate),
    "muon": lambda learning_rate: lro.lowrank_muon(learning_rate, adam_learning_rate=0.1),
    "muon-coefficient": lambda h: lro.lowrank_muon(h, adam_learning_rate=0.1, momentum="coefficient"),
    "muon-tangent": lambda learning_rate: lro.lowrank_muon(learning_rate, adam_learning_rate=0.1, momentum="tangent"),
    "lion": lambda learning_rate: lro.fixed_rank(optax.lion(learning_rate), momentum="coefficient"),
    "rmsprop": lambda learning_rate: lro.fixed_rank(optax.rmsprop(learning_rate), momentum="coefficient"),
    "adabelief": lambda learning_rate: lro.fixed_rank(optax.adabelief(learning_rate), momentum="coefficient"),
    "nesterov": lambda learning_rate: lro.fixed_rank(optax.sgd(learning_rate, momentum=0.9, nesterov=True)),
    "riemannian-sgd": _riemannian,
}

# The optimizer that ordinary leaves get.
INNER = {
    "adam": lambda h: optax.adamw(h, weight_decay=0.0),
    "adam-galerkin": lambda h: optax.adamw(h, weight_decay=0.0),
    "adamw-tangent": lambda h: optax.adamw(h),
    "heavy-ball-tangent": lambda h: optax.sgd(h, momentum=0.9),
    "muon": lambda h: optax.adamw(0.1, weight_decay=0.0),
    "lion": optax.lion,
    "rmsprop": optax.rmsprop,
    "adabelief": optax.adabelief,
    "nesterov": lambda h: optax.sgd(h, momentum=0.9, nesterov=True),
    "riemannian-sgd": lambda h: optax.chain(optax.clip_by_global_norm(20.0), optax.sgd(h)),
}


def names(*fast):
    """Every case, slow unless it is named."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in CASES]


def is_galerkin(name):
    return "galerkin" in name


def small(dtype=jnp.float64, rank=2, max_rank=4):
    """One kernel of rank 2 in factors of width 4, and a bias."""
    W = jax.random.normal(jax.random.key(0), (5, 4), jnp.float64)
    params = lro.factorize({"kernel": W, "bias": jnp.ones(4)}, rank, max_rank=max_rank)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def small_loss(params):
    x = jnp.eye(5, dtype=params["bias"].dtype)
    target = 3 * jnp.sin(jnp.arange(20.0)).reshape(5, 4).astype(x.dtype)  # Neither W nor of low rank.
    return jnp.sum(jnp.square(x @ params["kernel"] + params["bias"][None] - target))


def signature(tree):
    """What must never change: structure, shapes, dtypes, weak types."""
    return jax.tree.map(lambda x: (tuple(x.shape), jnp.dtype(x.dtype), bool(x.weak_type)), tree)


# --- convergence ----------------------------------------------------------------------

MATRIX = jnp.array([[3.0, -2.0], [1.0, 4.0]])
VECTOR = jnp.array([1.0, -1.0, 1.0])
BIAS = jnp.arange(4.0)
RANK_TWO = jnp.array([[1.0, 0], [0, 1], [1, 1], [1, -1], [0, 2]]) @ jnp.array([[2.0, 1, 0, -1], [0, 1, 1, 1]])


def square(final):
    return lambda x: jnp.sum(jnp.square(lro.densify(x) - final))


def rosenbrock(x):
    # The valley is ten times as narrow as it is curved (a hundred in the suite of Optax, which takes 30 000 steps);
    # 0.2 brings its steep direction near the curvature of the other targets, so that one step size serves all.
    return 0.2 * ((1 - x[0]) ** 2 + 10 * (x[1] - x[0] ** 2) ** 2)


def mixed(kernel):
    return lambda p: square(BIAS)(p["bias"]) + square(kernel)(p["kernel"])


# Name to the initial value, the final value, and the objective; objectives are added up and run as one tree.
PLAIN = {
    "parabola": (jnp.array([-1.0, 10.0, 1.0]), VECTOR, square(VECTOR)),
    "rosenbrock": (jnp.zeros(2), jnp.ones(2), rosenbrock),
    "matrix": (jnp.zeros((2, 2)), MATRIX, square(MATRIX)),
    "mixed": (
        {"bias": jnp.zeros(4), "kernel": jnp.zeros((5, 4))},
        {"bias": BIAS, "kernel": RANK_TWO},
        mixed(RANK_TWO),
    ),
}


def kernels():
    start = jax.random.normal(jax.random.key(1), (5, 4))
    mixed_start = {"bias": jnp.zeros(4), "kernel": lro.factorize(start, 2, max_rank=4)}
    return {
        # From beside zero, which is no matrix of rank 1.
        "rosenbrock kernel": (
            lro.factorize(jnp.array([[0.5], [0.0]]), 1),
            jnp.ones((2, 1)),
            lambda W: rosenbrock(W.to_dense()[:, 0]),
        ),
        "mixed kernel": (mixed_start, {"bias": BIAS, "kernel": RANK_TWO}, mixed(RANK_TWO)),
    }


def more_kernels():
    return {
        "parabola kernel": (lro.factorize(jnp.array([[-1.0, 10.0, 1.0]]), 1), VECTOR[None], square(VECTOR[None])),
        # Full rank, from the zero kernel, which may use its whole width.
        "matrix kernel": (lro.factorize(jnp.zeros((2, 2)), 2), MATRIX, square(MATRIX)),
    }


# With coefficient momentum Adam knows no second moment for the directions that are new in a step, and moves there
# by (1 - b1) / sqrt(1 - b2) = 3 step sizes whatever the gradient. A narrow valley wants that to be small.
LEARNING_RATES = {"adam": 0.01, "rmsprop": 0.01, "adabelief": 0.01, "lion": 0.01, "muon": 0.02}


def converge(name, problems):
    h = next((h for prefix, h in LEARNING_RATES.items() if name.startswith(prefix)), 0.05)
    steps = 10_000
    # The schedule ends at zero: methods whose steps do not shrink with the gradient need that to converge.
    tx = CASES[name](optax.cosine_decay_schedule(h, steps))
    params = {k: start for k, (start, _, _) in problems.items()}
    loss = lambda params: sum(f(params[k]) for k, (_, _, f) in problems.items())  # noqa: E731
    state = optax.tree.map_params(tx, lambda x: x, tx.init(params))

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=steps)[0]

    params, state = run(params, state)
    for k, (_, final, _) in problems.items():
        for got, want in zip(jax.tree.leaves(lro.densify(params[k])), jax.tree.leaves(final), strict=True):
            # The tolerance of the suite of Optax; the decay of 1e-4 in adamw moves the limits by less.
            np.testing.assert_allclose(got, want, rtol=3e-2, atol=3e-2, err_msg=k)
    for W in jax.tree.leaves(params, is_leaf=lro.is_lowrank):
        for basis in (W.U, W.V) if lro.is_lowrank(W) else ():
            # Every step orthonormalises anew, so rounding does not add up: a small multiple of eps = 2e-16.
            np.testing.assert_allclose(basis.T @ basis, np.eye(W.rank), atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", names("heavy-ball"))
def test_converges(name):
    problems = PLAIN | kernels()
    if is_galerkin(name):
        del problems["rosenbrock kernel"]  # Too small for factors of twice its rank.
    converge(name, problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "heavy-ball-tangent"])
def test_converges_at_full_rank(name):
    converge(name, more_kernels())


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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trains_in_half_precision(dtype):
    """The factors stay half-precision numbers, are decomposed in float32, and the loss falls."""
    tx, params = lro.lowrank_adam(0.1), small(dtype)
    state, loss = tx.init(params), small_loss(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p))
    assert optax.tree.get(state, "mu")["kernel"].dtype == jnp.float32
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
    return lro.lowrank_adam(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay=weight_decay,
        nesterov=nesterov,
        rank=lro.tolerance(theta, max_rank=max_rank),
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
        (lro.lowrank_adam, ("mu_dtype", "mask", "nesterov", "local_steps")),
        (lro.lowrank_adamw, ("mu_dtype", "mask", "nesterov", "local_steps")),
        (lro.lowrank_heavy_ball, ("nesterov", "accumulator_dtype", "local_steps")),
        (lro.lowrank_muon, ("ns_steps", "nesterov", "local_steps")),
    ],
)
@pytest.mark.parametrize("geometry", [{}, {"retraction": "bug"}], ids=["default", "bug"])
def test_the_ready_made_optimizers_can_be_injected(factory, static, geometry):
    tx = optax.inject_hyperparams(factory, static_args=static)(learning_rate=0.01, **geometry)
    params = small()
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert signature(updates) == signature(params)


def test_static_arguments_can_be_injected_around():
    """Strings and step counts are listed static, numbers are injected."""

    def factory(learning_rate, beta, gradient, local_steps):
        return lro.fixed_rank(optax.sgd(learning_rate, beta), gradient=gradient, local_steps=local_steps)

    tx = optax.inject_hyperparams(factory, static_args=("gradient", "local_steps"))(0.1, 0.9, "galerkin", 2)
    params = small()
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert (signature(updates), signature(new)) == (signature(params), signature(state))
    with pytest.raises(ValueError, match=r"local_steps.*static_args"):
        optax.inject_hyperparams(factory)(0.1, 0.9, "galerkin", 2).init(params)


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
    masked = lambda x: lro.is_lowrank(x) or isinstance(x, optax.MaskedNode)  # noqa: E731
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
    tx, params = lro.lowrank_adam(0.01, momentum="tangent"), small()
    state = tx.init(params)
    specs = {"kernel": lro.LowRank("u", "s", "v"), "bias": "b"}
    mapped = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: "-")
    assert optax.tree.get(mapped, "mu") == specs
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
