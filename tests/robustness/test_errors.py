"""Misuse: the error says what was given and what to do, and nothing has changed when it is raised."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro


def tree(rank=2, max_rank=4):
    W = jax.random.normal(jax.random.key(0), (6, 5), jnp.float64)
    return lro.factorize({"dense": {"kernel": W, "bias": jnp.ones(5)}}, rank, max_rank=max_rank)


PARAMS = tree()
DENSE = lro.densify(PARAMS)
KERNEL = PARAMS["dense"]["kernel"]


def with_kernel(W):
    return {"dense": {**PARAMS["dense"], "kernel": W}}


def leave_alone(f, *trees):
    """Calls f and checks that the trees it got are the same objects with the same values afterwards."""
    leaves = jax.tree.leaves(trees)
    values = [np.array(x) for x in leaves]
    try:
        return f()
    finally:
        after = jax.tree.leaves(trees)
        assert len(after) == len(leaves) and all(a is b for a, b in zip(after, leaves, strict=True))
        for x, value in zip(after, values, strict=True):
            np.testing.assert_array_equal(x, value)


# --- factorize ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, rank, options, message",
    [
        (
            (6, 5),
            6,
            dict(where=lambda p, s: True),
            r"rank 6 .* min\(m, n\) = 5 .*'w'.*\(6, 5\).*smaller rank.*fraction",
        ),
        (
            (6,),
            1,
            dict(where=lambda p, s: True),
            r"'w' has shape \(6,\).*at least one input and one output axis.*False",
        ),
        ((6, 5), 0, dict(where=lambda p, s: True), r"rank must be at least 1, got 0"),
        ((6, 5), -2, dict(where=lambda p, s: True), r"rank must be at least 1, got -2"),
        ((6, 5), 1.5, dict(where=lambda p, s: True), r"fractional rank lies in \(0, 1\], got 1.5.*int"),
        ((6, 5), 0.0, dict(where=lambda p, s: True), r"fractional rank lies in \(0, 1\], got 0.0"),
        ((6, 5), lambda p, s: 9, dict(where=lambda p, s: True), r"rank 9 is larger than min\(m, n\) = 5"),
        ((6, 5), 3, dict(max_rank=2, where=lambda p, s: True), r"max_rank 2 is below rank 3"),
        (
            (4, 3, 2),
            1,
            dict(where=lambda p, s: True),
            r"cannot tell batch, input and output axes.*Axes\(batch, inputs\)",
        ),
        ((4, 3, 2), 1, dict(where=lambda p, s: lro.Axes(2, 1)), r"no input or no output axis in 'w'"),
        ((4, 3, 2), 1, dict(where=lambda p, s: lro.Axes(0, 0)), r"no input or no output axis in 'w'"),
        ((4, 3, 2), 1, dict(where=lambda p, s: lro.Axes(-1, 1)), r"no input or no output axis in 'w'"),
        ((6, 5), 2, dict(), r"no kernel to factor at rank 2.*'kernel'.*'w'.*where="),
    ],
)
def test_factorize(shape, rank, options, message):
    params = {"w": jnp.ones(shape), "b": jnp.ones(3)}
    if "where" in options:
        chosen = options["where"]
        options = {**options, "where": lambda p, s: p == "w" and chosen(p, s)}
    with pytest.raises(ValueError, match=message):
        leave_alone(lambda: lro.factorize(params, rank, **options), params)


def test_factorize_says_which_kernel_is_ambiguous_and_takes_the_advice():
    params = {"block": {"kernel": jnp.ones((4, 3, 2))}}
    with pytest.raises(ValueError, match=r"'block/kernel' of shape \(4, 3, 2\).*linen.kernels.*leave it dense"):
        lro.factorize(params, 1)
    advised = lro.factorize(params, 1, where=lambda path, shape: lro.Axes(1, 1))
    assert advised["block"]["kernel"].batch_shape == (4,)


def test_factorize_a_rank_that_no_kernel_allows():
    with pytest.raises(ValueError, match=r"no kernel to factor at rank 64.*smaller rank"):
        lro.factorize({"kernel": jnp.ones((6, 5))}, 64)


TAKERS = {
    "factorize": lambda params: lro.factorize(params, 2),
    "budget": lambda params: lro.factorize(params, budget=0.9),
    "adapters": lambda params: lro.adapters.init(jax.random.key(0), params, 2),
    "subspace": lambda params: lro.galore(0.1, 2).init(params),
    "lowrank_init": lambda params: lro.lowrank_init(2)(jax.random.key(0), (60, 50), params["kernel"].dtype),
}


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_only_floating_kernels(name, dtype):
    with pytest.raises(ValueError, match=r"'kernel' has dtype \w+: only floating kernels"):
        TAKERS[name]({"kernel": jnp.ones((60, 50), dtype)})


@pytest.mark.parametrize("name", ["factorize", "budget", "adapters"])
def test_shapes_are_taken_inside_eval_shape_alone(name):
    shapes = {"kernel": jax.ShapeDtypeStruct((60, 50), jnp.float32)}
    with pytest.raises(TypeError, match=r"'kernel' is a shape and no array: jax\.eval_shape"):
        TAKERS[name](shapes)
    made = jax.tree.leaves(jax.eval_shape(TAKERS[name], shapes), is_leaf=lro.is_lowrank)
    assert any(lro.is_lowrank(x) for x in made)


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (lro.lowrank_muon, lro.factorize({"kernel": jnp.eye(6)}, 2)["kernel"]),
        (functools.partial(lro.trion, rank=2), jnp.eye(6)),
    ],
)
def test_iterations_that_inject_hyperparams_would_trace(make, kernel):
    """`ns_steps` unrolls a loop, so an array is refused when the optimizer is made, and works where it is named."""

    def build(learning_rate, ns_steps=5):
        return make(learning_rate=learning_rate, ns_steps=ns_steps)

    params = {"kernel": kernel}
    with pytest.raises(TypeError, match=r'ns_steps is an int, .*static_args=\("ns_steps",\)'):
        optax.inject_hyperparams(build)(learning_rate=0.1).init(params)
    tx = optax.inject_hyperparams(build, static_args=("ns_steps",))(learning_rate=0.1)
    assert set(tx.init(params).hyperparams) == {"learning_rate"}


def test_lowrank_init():
    with pytest.raises(ValueError, match=r"rank 9 .*min\(m, n\) = 5"):
        lro.lowrank_init(9)(jax.random.key(0), (6, 5))
    with pytest.raises(ValueError, match=r"rank 3 \(width 2\)"):
        lro.lowrank_init(3, max_rank=2)(jax.random.key(0), (6, 5))


# --- options --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: lro.Balanced(rank=lro.tolerance(0.1)), ValueError, r"keeps the rank.*lro\.Tangent\(rank=\.\.\.\)"),
        (
            lambda: lro.Tangent(rank=4),
            ValueError,
            r"rank takes a policy, lro.tolerance\(theta\).*factorize chose; got 4",
        ),
        (lambda: lro.Coefficient(rank=0.1), ValueError, r"rank takes a policy"),
        (lambda: lro.Tangent(retraction="qr"), ValueError, r"retraction must be 'svd' or 'bug', got 'qr'"),
        (lambda: lro.retract("qr"), ValueError, r"retraction must be 'svd' or 'bug', got 'qr'"),
        (
            lambda: lro.Tangent(retraction="bug", rank=lro.tolerance(0.1)),
            ValueError,
            r"retraction='bug' keeps the rank.*retraction='svd'",
        ),
        (
            lambda: lro.Coefficient(retraction="bug", rank=lro.budget(100)),
            ValueError,
            r"retraction='bug' keeps the rank",
        ),
        (lambda: lro.galerkin(optax.sgd(0.1), 0), ValueError, r"local_steps must be a Python int of at least 1.*got 0"),
        (
            lambda: lro.galerkin(optax.sgd(0.1), 2.0),
            ValueError,
            r"local_steps must be a Python int.*static_args.*got 2.0",
        ),
        (lambda: lro.galerkin(optax.sgd(0.1), rank=4), ValueError, r"rank takes a policy.*got 4"),
        (
            lambda: lro.lowrank_heavy_ball(0.1, "tangent"),
            TypeError,
            r"momentum is the decay beta.*geometry=.*'tangent'",
        ),
        (lambda: lro.lowrank_heavy_ball(0.1, lro.Tangent()), TypeError, r"momentum is the decay beta"),
    ],
)
def test_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "geometry, given",
    [
        ("tangent", "'tangent'"),
        (lro.Tangent, "Tangent without parentheses"),
        (None, "None"),
        (lro.tolerance(0.1), "Tol"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: lro.fixed_rank(optax.sgd(0.1), **kw),
        lambda **kw: lro.lowrank_adam(0.1, **kw),
        lambda **kw: lro.lowrank_adamw(0.1, **kw),
        lambda **kw: lro.lowrank_muon(0.1, **kw),
        lambda **kw: lro.lowrank_heavy_ball(0.1, **kw),
    ],
)
def test_what_is_no_geometry(make, geometry, given):
    with pytest.raises(TypeError, match=rf"geometry takes an object, lro.Balanced\(\).*got .*{given}"):
        make(geometry=geometry)


@pytest.mark.parametrize("make", [lro.lowrank_adam, lro.lowrank_adamw, lro.lowrank_muon, lro.lowrank_heavy_ball])
def test_a_rank_policy_belongs_to_a_geometry_that_changes_ranks(make):
    """No optimizer takes a policy by itself, which would have to change the geometry and the unit of the step size."""
    with pytest.raises(TypeError, match="rank"):
        make(0.1, rank=lro.tolerance(0.0))
    with pytest.raises(ValueError, match=r"geometry=lro\.Tangent\(rank=\.\.\.\)"):
        make(0.1, geometry=lro.Balanced(rank=lro.tolerance(0.0)))


def test_policies():
    with pytest.raises(ValueError, match=r"theta is a relative tail and must not be negative, got -0.1"):
        lro.tolerance(-0.1)
    with pytest.raises(ValueError, match=r"1 <= min_rank <= max_rank, got 3 and 2"):
        lro.tolerance(0.1, min_rank=3, max_rank=2)
    with pytest.raises(ValueError, match=r"parameters >= 1 and min_rank >= 1, got 0"):
        lro.budget(0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lro.tolerance("a"), r"theta is a number, got 'a'"),
        (lambda: lro.tolerance(0.1, min_rank=1.5), r"min_rank is an int, got 1.5"),
        (lambda: lro.tolerance(0.1, max_rank="8"), r"max_rank is an int, got '8'"),
        (lambda: lro.budget("1k"), r"parameters is an int, got '1k'"),
        (lambda: lro.budget(0.3), r"parameters is an int, got 0.3"),
        (lambda: lro.budget(100, min_rank=None), r"min_rank is an int, got None"),
        (lambda: lro.factorize(DENSE, 2, where="kernel"), r"where is a callable.*got 'kernel'"),
        (lambda: lro.factorize(DENSE, 2, scale="small"), r"scale is a number, got 'small'"),
    ],
)
def test_options_of_another_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


# --- init -----------------------------------------------------------------------------


def _bad_kernels():
    U, S, V = KERNEL.U, KERNEL.S, KERNEL.V
    not_orthonormal = r"columns of {} of 'dense/kernel' are not orthonormal \(.*\).*factorize.*orthonormalize\(params\)"
    return {
        "U scaled": (lro.LowRank(2 * U, S, V), not_orthonormal.format("U")),
        "V repeated": (lro.LowRank(U, S, V.at[:, 1].set(V[:, 0])), not_orthonormal.format("V")),
        "NaN": (lro.LowRank(U * jnp.nan, S, V), not_orthonormal.format("U")),
        "V transposed": (lro.LowRank(U, S, V.T), r"no factorisation U S V\^T: shapes .* should be"),
        "S not square": (lro.LowRank(U, S[:3], V), r"no factorisation U S V\^T"),
        "widths differ": (lro.LowRank(U[:, :3], S, V), r"no factorisation U S V\^T"),
        "batch axes differ": (lro.LowRank(U, S[None], V), r"no factorisation U S V\^T"),
        "too wide": (
            lro.LowRank(jnp.ones((6, 6)), jnp.ones((6, 6)), jnp.ones((5, 6))),
            r"width 6, more than min\(m, n\) = 5.*smaller rank in factorize",
        ),
        "integers": (
            jax.tree.map(lambda x: x.astype(jnp.int32), KERNEL),
            r"factors of 'dense/kernel' must be floating",
        ),
    }


@pytest.mark.parametrize("name", _bad_kernels())
def test_kernels_that_are_no_factorisation(name):
    W, message = _bad_kernels()[name]
    params, tx = with_kernel(W), lro.lowrank_heavy_ball(0.1)
    with pytest.raises(ValueError, match=message):
        leave_alone(lambda: tx.init(params), params)
    assert jax.tree.structure(tx.init(PARAMS)) is not None


def test_the_advice_for_factors_that_are_not_orthonormal_works():
    params = lro.orthonormalize(with_kernel(lro.LowRank(2 * KERNEL.U, KERNEL.S, KERNEL.V)))
    lro.lowrank_heavy_ball(0.1).init(params)
    dense = 2 * KERNEL.to_dense()
    np.testing.assert_allclose(params["dense"]["kernel"].to_dense(), dense, rtol=1e-12, atol=1e-13)  # Rounding.


@pytest.mark.parametrize("rank, width", [(1, 1), (2, 2), (4, 4), (3, 4)])
def test_galerkin_without_room(rank, width):
    tx = lro.galerkin(optax.sgd(0.1, 0.9))
    with pytest.raises(ValueError, match=rf"galerkin.*rank {rank}.*width {width}.*max_rank=2 \* rank.*fixed_rank"):
        tx.init(tree(rank, width))
    tx.init(tree(2, 4))


@pytest.mark.parametrize("inner", [optax.adafactor(0.1), optax.sm3(0.1)], ids=["adafactor", "sm3"])
def test_inner_transformations_whose_state_cannot_be_carried(inner):
    message = r"does not work inside fixed_rank.*does not mirror.*adafactor, sm3.*use adam, adamw, rmsprop, lion, sgd"
    with pytest.raises(ValueError, match=message):
        lro.fixed_rank(inner).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        lro.fixed_rank(inner, geometry=lro.Tangent()).init(PARAMS)


@pytest.mark.parametrize("inner", [optax.adafactor(0.1), optax.sm3(0.1)], ids=["adafactor", "sm3"])
def test_ordinary_leaves_may_have_them(inner):
    lro.lowrank_heavy_ball(0.1, ordinary=inner).init(PARAMS)


def test_muon_is_for_kernels():
    tx = lro.scale_by_polar_factor()
    for wrapped in (tx, lro.fixed_rank(tx)):
        with pytest.raises(ValueError, match=r"works on the coordinates of kernels, inside fixed_rank.*kernel_labels"):
            jax.eval_shape(wrapped.update, PARAMS, wrapped.init(PARAMS), PARAMS)


# --- update ---------------------------------------------------------------------------

TRANSFORMS = {
    "fixed_rank": lro.lowrank_heavy_ball(0.1),
    "tangent": lro.lowrank_adam(0.1, geometry=lro.Tangent()),
    "galerkin": lro.galerkin(optax.adam(0.1)),
    "riemannian": optax.chain(lro.project_to_tangent(), optax.scale(-0.1), lro.retract()),
}


def _bad_gradients():
    g = jax.tree.map(jnp.ones_like, PARAMS)
    wide = jax.tree.map(jnp.ones_like, tree(2, 5))
    structure = r"another structure than the parameters.*jax.grad\(loss\)\(params\)"
    return {
        "dense gradients": (DENSE, structure),
        "none": (None, structure),
        "a leaf missing": ({"dense": {"kernel": g["dense"]["kernel"]}}, structure),
        "another width": (wide, r"gradient at 'dense/kernel/U' has shape \(6, 5\), the parameter \(6, 4\)"),
        "a shape": (
            {"dense": {**g["dense"], "bias": jnp.ones(4)}},
            r"'dense/bias' has shape \(4,\), the parameter \(5,\)",
        ),
    }


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", _bad_gradients())
def test_gradients_of_another_structure(transform, name):
    tx, (grads, message) = TRANSFORMS[transform], _bad_gradients()[name]
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="(?s)" + message):
        leave_alone(lambda: tx.update(grads, state, PARAMS), PARAMS, state, grads)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_missing_params(transform):
    tx = TRANSFORMS[transform]
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"needs to know where they are: call tx.update\(grads, state, params\)"):
        leave_alone(lambda: tx.update(PARAMS, state), PARAMS, state)
    # The correct call afterwards.
    updates, new = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert jax.tree.structure((updates, new)) == jax.tree.structure((PARAMS, state))


def test_tangent_norm_checks_gradients():
    with pytest.raises(ValueError, match="another structure"):
        lro.tangent_norm(PARAMS, DENSE)


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(lambda: optax.adam(0.1).init(PARAMS), id="of optax"),
        pytest.param(lambda: lro.lowrank_heavy_ball(0.1).init(tree(2, 5)), id="of another width"),
    ],
)
def test_state_that_does_not_belong(state):
    """As after `resize` of the parameters alone: the error should name the state."""
    tx = lro.lowrank_heavy_ball(0.1)
    with pytest.raises((ValueError, TypeError), match=r"(?i)state.*(resize|init)"):
        jax.eval_shape(tx.update, PARAMS, state(), PARAMS)


# --- products, reports ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (6, 3), (), (5,), (2, 7)])
def test_products_of_the_wrong_shape(shape):
    with pytest.raises(TypeError, match=r"x @ W needs x of shape .*6.* input axes \(6,\) and output axes \(5,\), got "):
        jnp.ones(shape) @ KERNEL
    assert (jnp.ones((3, 6)) @ KERNEL).shape == (3, 5)


def test_products_over_other_axes_than_the_input():
    with pytest.raises(TypeError, match=r"contracted over its input axes \(0,\)"):
        lro.dot_general(jnp.ones((3, 5)), KERNEL, (((1,), (1,)), ((), ())))
    with pytest.raises(TypeError, match=r"without batch axes.*to_dense\(\)"):
        KERNEL[0]


@pytest.mark.parametrize("state", [optax.adam(0.1).init(DENSE), (), None, {"a": jnp.ones(3)}])
def test_diagnostics_of_a_foreign_state(state):
    with pytest.raises(ValueError, match=r"holds no FixedRankState.*fixed_rank"):
        lro.diagnostics(state)
    assert set(lro.diagnostics(lro.lowrank_adam(0.1).init(PARAMS)).kernels) == {"dense/kernel"}


@pytest.mark.slow
def test_resize_to_no_rank_changes_nothing():
    tx = lro.lowrank_heavy_ball(0.1)
    state = tx.init(PARAMS)
    for rank, message in ((0, "at least 1, got 0"), (1.5, r"fractional rank lies in \(0, 1\]")):
        with pytest.raises(ValueError, match=message):
            leave_alone(lambda: lro.resize(PARAMS, state, rank), PARAMS, state)  # noqa: B023
    # More than min(m, n) is cut to it, as for max_rank of factorize.
    assert lro.resize(PARAMS, state, 50)[0]["dense"]["kernel"].width == 5


def test_integer_parameters_fail_in_jax_and_not_later():
    """`jax.grad` refuses integer leaves itself; factors are refused by `init`, kernels by `factorize` (above)."""
    params = {**PARAMS, "step": jnp.arange(3)}
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.grad(lambda p: jnp.sum(p["dense"]["bias"]))(params)


@pytest.mark.parametrize("rank", ["2", True])
def test_ranks_of_another_type(rank):
    with pytest.raises(TypeError, match=r"must be an int or a fraction in \(0, 1\]"):
        lro.factorize({"kernel": jnp.eye(4)}, rank)


def test_fractions_of_numpy_are_fractions():
    assert lro.factorize({"kernel": jnp.eye(10)}, np.float32(0.5))["kernel"].width == 5


OPTIMIZERS = {
    "adam": lro.lowrank_adam(1e-3),
    "chain": optax.chain(optax.clip(1.0), lro.lowrank_muon(1e-3)),
    "galerkin": lro.galerkin(optax.adam(1e-3)),
    "multi steps": optax.MultiSteps(lro.lowrank_heavy_ball(1e-3), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_that_nobody_factored_are_warned_of(name):
    with pytest.warns(UserWarning, match=r"no LowRank kernel .* 1 leaves with two axes .*factorize\(params, rank\)"):
        OPTIMIZERS[name].init(DENSE)


def test_no_warning_where_dense_parameters_are_meant():
    """No matrix at all, or matrices that a mask hides."""
    for params in ({}, {"bias": jnp.ones(3)}, {"dense": PARAMS["dense"], "w": jnp.ones((4, 4))}):
        lro.lowrank_adam(1e-3).init(params)
    two = {"head": jnp.ones((4, 4)), **PARAMS}
    parts = {"a": lro.lowrank_adam(1e-3), "b": lro.lowrank_adam(1e-4)}
    optax.partition(parts, {"head": "b", "dense": "a"}).init(two)


def test_factors_of_zeros_are_not_orthonormal():
    zeros = {"kernel": lro.LowRank(jnp.zeros((4, 2)), jnp.zeros((2, 2)), jnp.zeros((3, 2)))}
    with pytest.raises(ValueError, match="not orthonormal"):
        lro.lowrank_adam(0.1).init(zeros)
