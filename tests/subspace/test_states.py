"""State: its bytes, half precision, missing bases, turns of kernels, ranks that fall and what `resize` frees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

M, N, R = 64, 96, 8
S, L = min(M, N), max(M, N)  # the shorter and the longer side

# Numbers of four bytes that the table of the guide gives an m x n kernel.
NUMBERS = {
    "galore": (lambda: lro.galore(1e-2, R), R * (S + 2 * L)),
    "q_galore": (lambda: lro.q_galore(1e-2, R), R * (S / 8 + 2 * L) + 2 * R * S / 256),
    "golore": (lambda: lro.golore(1e-2, R, random_from=9), R * (S + 2 * L)),
    "adarankgrad": (lambda: lro.adarankgrad(1e-2, R), R * (S + 2 * L)),
    "online_subspace": (lambda: lro.online_subspace(1e-2, R), R * (3 * S + 2 * L)),
    "coap": (lambda: lro.coap(1e-2, R), R * (S + 2 * L)),
    "fira": (lambda: lro.fira(1e-2, R), R * (S + 2 * L) + 1),
    "subtrack": (lambda: lro.subtrack(1e-2, R), R * (S + 2 * L) + 1),
    "apollo": (lambda: lro.apollo(1e-2, R), 2 * R * L + 1),
    "apollo_mini": (lambda: lro.apollo_mini(1e-2), 2 * L + 1),
    "frugal": (lambda: lro.frugal(1e-2, R), R * (S + 2 * L)),
    "frugal rows": (lambda: lro.frugal(1e-2, R, projector=lro.projectors.rows()), 2 * R * L + R),
    "ldadam": (lambda: lro.ldadam(1e-2, R), R * (S + 2 * L) + S * L),
    "dct_adam": (lambda: lro.dct_adam(1e-2, R), 2 * R * L + S * L + R),
    "sumo": (lambda: lro.sumo(1e-2, R), R * (S + L)),
    "dion": (lambda: lro.dion(1e-2, R), S * L + R * S),
    "snsm": (lambda: lro.snsm(1e-2, R), R * (S + L) + L),
    "mofasgd": (lambda: lro.mofasgd(1e-2, R), R * (S + L + 1)),
    "trion": (lambda: lro.trion(1e-2, R), S * L + R),
    "galore bfloat16": (lambda: lro.galore(1e-2, R, basis_dtype=jnp.bfloat16), R * (S / 2 + 2 * L)),
}


@pytest.mark.parametrize("shape", [(M, N), (N, M)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", NUMBERS)
def test_state_has_the_bytes_of_the_formula(name, shape):
    make, numbers = NUMBERS[name]
    state = jax.eval_shape(make().init, {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)})
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    # Counters and the key are there whatever the size of kernels.
    assert 4 * numbers <= size <= 1.05 * 4 * numbers + 64


def problem(dtype=jnp.float64, shape=(10, 14)):
    keys = jax.random.split(jax.random.key(0), 2)
    target = jax.random.normal(keys[0], shape, jnp.float64)
    params = {"kernel": 0.1 * jax.random.normal(keys[1], shape, jnp.float64), "bias": jnp.zeros(shape[1])}
    params = jax.tree.map(lambda x: x.astype(dtype), params)

    def loss(p):
        return jnp.mean(jnp.square(p["kernel"] + p["bias"][None] - target.astype(dtype)))

    return params, loss


@pytest.mark.parametrize("alias", ["galore", pytest.param("ldadam", marks=pytest.mark.slow)])
def test_trains_in_half_precision(alias):
    params, loss = problem(jnp.bfloat16)
    tx = {"galore": lro.galore(0.3, 4, refresh=5), "ldadam": lro.ldadam(0.1, 4)}[alias]
    state, first, update = tx.init(params), loss(params), jax.jit(tx.update)
    for _ in range(40):
        updates, state = update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert optax.tree.get(state, "mu")["kernel"].dtype == optax.tree.get(state, "basis")["kernel"].dtype == jnp.float32
    assert loss(params) < 0.6 * first


def test_a_basis_waits_for_a_gradient():
    """A zero gradient, as of a layer in front of one that starts at zero, makes no basis and no step."""
    g = jax.random.normal(jax.random.key(0), (2, 5, 7), jnp.float64)
    zero = g.at[0].set(0)
    tx = lro.galore(1.0, 3, refresh=100, where=lambda path, shape: lro.Axes(1, 1))
    state, update = tx.init(g), jax.jit(tx.update)
    updates, state = update(zero, state, g)
    assert optax.tree.get(state, "rank").tolist() == [0, 3]
    assert np.all(updates[0] == 0) and np.any(updates[1] != 0)
    before = optax.tree.get(state, "basis")
    updates, state = update(g, state, g)
    assert optax.tree.get(state, "rank").tolist() == [3, 3] and np.any(updates[0] != 0)
    after = optax.tree.get(state, "basis")
    np.testing.assert_array_equal(after[1], before[1])  # the other one was not due
    # A gradient of zeros at a refresh keeps the basis.
    late = lro.galore(1.0, 3, refresh=1, where=lambda path, shape: lro.Axes(1, 1))
    _, state = late.update(zero, state, g)
    np.testing.assert_array_equal(optax.tree.get(state, "basis")[0], after[0])


def test_steps_that_are_not_finite_are_skipped():
    params, loss = problem()
    tx, grads = lro.fira(0.1, 3, refresh=2), jax.grad(loss)(params)
    state, update = tx.init(params), jax.jit(tx.update)
    _, state = update(grads, state, params)
    bad = {**grads, "kernel": grads["kernel"].at[0, 0].set(jnp.inf)}
    updates, after = update(bad, state, params)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    assert int(optax.tree.get(after, "notfinite_count")) == 1
    same = jax.tree.map(np.array_equal, optax.tree.get(after, "basis"), optax.tree.get(state, "basis"))
    assert all(jax.tree.leaves(same))


def test_kernels_take_turns():
    """With `stagger` every step but the first refreshes at most one of five kernels, each once in a period."""
    params = {f"{i}": {"kernel": jnp.ones((4, 6), jnp.float64)} for i in range(5)}
    seen = []

    def refresh(stored, at):
        jax.debug.callback(lambda count: seen.append(int(count)), at.count)
        return jnp.eye(*stored.shape, dtype=stored.dtype)

    projector = lro.projectors.Projector(refresh)
    tx = lro.subspace(optax.identity(), projector, rank=2, refresh=lro.refresh.every(10, stagger=True))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(21):
        _, state = update(params, state)
    jax.effects_barrier()
    assert sorted(seen) == [0] * 5 + [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]


# --- ranks that fall ----------------------------------------------------------------------


def falling(t, shape=(10, 14)):
    """Gradients whose spectrum falls faster and faster."""
    rng = np.random.default_rng(3)
    u, _ = np.linalg.qr(rng.standard_normal((shape[0], shape[0])))
    v, _ = np.linalg.qr(rng.standard_normal((shape[1], shape[0])))
    sigma = np.exp(-np.arange(shape[0]) * (0.1 + 0.15 * t))
    return jnp.asarray(u * sigma @ v.T)


def test_ranks_fall_and_resize_turns_that_into_bytes():
    """A run that is resized after six steps goes on as one that never is, in half of the memory."""
    params = {"kernel": jnp.zeros((10, 14)), "bias": jnp.zeros(14)}
    tx = lro.adarankgrad(1e-2, 8, lost=0.05, refresh=2, projector=lro.projectors.svd())
    update = jax.jit(tx.update)
    state, resized, ranks = tx.init(params), None, []
    for t in range(12):
        grads = {"kernel": falling(t), "bias": jnp.ones(14)}
        updates, state = update(grads, state, params)
        ranks.append(int(optax.tree.get(state, "rank")["kernel"]))
        if resized is not None:
            ours, resized = update(grads, resized, params)
            # The cut columns are zero: the same sums without them.
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), ours, updates)
        if t == 5:
            resized = lro.projected.resize(state)
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > ranks[5] > ranks[-1]
    bytes_of = lambda x: sum(leaf.nbytes for leaf in jax.tree.leaves(x))  # noqa: E731
    kernels = lambda s: (optax.tree.get(s, "basis"), optax.tree.get(s, "mu")["kernel"])  # noqa: E731
    assert bytes_of(kernels(resized)) * 8 == bytes_of(kernels(state)) * ranks[5]
    # Room to grow again.
    assert optax.tree.get(lro.projected.resize(resized, 7), "nu")["kernel"].shape == (7, 14)


def test_resize_refuses_what_it_cannot_cut():
    params = {"kernel": jnp.ones((6, 8))}
    with pytest.raises(ValueError, match="no state of subspace"):
        lro.projected.resize(optax.adam(1e-3).init(params))
    with pytest.raises(ValueError, match=r"'kernel' is no stored matrix"):
        lro.projected.resize(lro.apollo(1e-3, 2).init(params))


# --- ranks and bases ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 40)])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_a_fraction_of_a_side_is_the_rank(fraction, shape):
    """No least rank, which kernels of low rank have."""
    state = lro.frugal(1e-2, fraction).init({"kernel": jnp.ones(shape)})
    side = min(shape)
    assert optax.tree.get(state, "basis")["kernel"].shape == (side, max(1, round(fraction * side)))


@pytest.mark.parametrize("refresh", [lro.refresh.converged(1.0), lro.refresh.doubling(1, threshold=0.0, window=1)])
def test_a_gradient_of_zeros_tells_a_schedule_nothing(refresh):
    """It makes no basis, so it is no reference for the next one."""
    params = jax.random.normal(jax.random.key(0), (6, 8))
    tx = lro.subspace(optax.identity(), lro.projectors.svd(), rank=2, refresh=refresh)
    _, before = tx.update(params, tx.init(params))
    _, after = tx.update(jnp.zeros_like(params), before)
    old, new = (optax.tree.get(x, "clock") for x in (before, after))
    if hasattr(old, "reference"):
        assert new.reference == old.reference > 0 and new.steps == old.steps + 1
    else:
        np.testing.assert_equal(jax.tree.map(np.asarray, new), jax.tree.map(np.asarray, old))


def test_directions_without_a_gradient_do_not_move():
    """A polar factor of fewer directions than the rank has no others, which would be arbitrary and of full size."""
    g = jnp.zeros((6, 8)).at[:2].set(jax.random.normal(jax.random.key(0), (2, 8)))
    for tx in (lro.sumo(1.0, 3), lro.mofasgd(1.0, 3)):
        updates, _ = tx.update(g, tx.init(g), g)
        assert np.max(np.abs(updates[2:])) < 1e-6 < np.max(np.abs(updates[:2]))


def test_numbers_of_a_factored_momentum_can_be_injected():
    g = jax.random.normal(jax.random.key(0), (6, 8))
    plain = lro.mofasgd(0.1, 2, outside=0.5)
    tx = optax.inject_hyperparams(lro.mofasgd, static_args=("rank",))(learning_rate=0.1, rank=2, outside=0.5)
    updates, _ = jax.jit(tx.update)(g, tx.init(g), g)
    np.testing.assert_allclose(updates, plain.update(g, plain.init(g), g)[0], atol=1e-6)


# --- misuse -------------------------------------------------------------------------------


def test_misuse_is_refused_by_name():
    adam, svd, kernel = optax.scale_by_adam(), lro.projectors.svd(), jnp.ones((6, 8))
    for error, match, options in [
        (TypeError, r"projector takes an object such as lro.projectors.svd\(\)", dict(projector=lro.projectors.svd)),
        (TypeError, r"carry takes an object .* 'rotate'", dict(carry="turn")),
        (TypeError, "residual takes an object", dict(residual="drop")),
        (ValueError, "side is one of 'short'", dict(side="top")),
        (ValueError, "use lro.projectors.rows", dict(side="entries")),
        (ValueError, "side='both' goes with", dict(side="both", carry="rotate")),
        (ValueError, "refresh all kernels together", dict(carry="reset_count", refresh=lro.refresh.doubling())),
        (ValueError, "adapt_rank sets columns", dict(adapt_rank=lro.projected.energy(), basis_dtype=jnp.bfloat16)),
        (ValueError, "moves it in every step", dict(projector=lro.projectors.dion(), basis_dtype=jnp.bfloat16)),
        *((ValueError, "a period is a number of steps", dict(refresh=x)) for x in (0, 2.5, "200")),
    ]:
        with pytest.raises(error, match=match):
            lro.subspace(adam, **{"projector": svd, "rank": 2, **options})
    for error, match, options, params in [
        (ValueError, "stores none", dict(projector=lro.projectors.dct(), adapt_rank=lro.projected.energy()), kernel),
        (
            ValueError,
            "stores a key, indices",
            dict(projector=lro.projectors.gaussian(), basis_dtype="bfloat16"),
            kernel,
        ),
        (ValueError, "rank 7 is larger than 6", dict(rank=7, where=lambda path, shape: True), {"a": kernel}),
        (TypeError, "'kernel' is a LowRank kernel", {}, lro.factorize({"kernel": kernel}, 2)),
        (ValueError, "only floating kernels", {}, {"kernel": jnp.ones((6, 8), int)}),
    ]:
        with pytest.raises(error, match=match):
            lro.subspace(adam, **{"projector": svd, "rank": 2, **options}).init(params)
    with pytest.raises(TypeError, match="refresh of coap is a number of steps"):
        lro.coap(1e-2, 2, refresh=lro.refresh.every(4))
    for alias in (lro.galore, lro.snsm, lro.fira):
        with pytest.raises(ValueError, match="bias is corrected is at least 0 and below 1, got 1"):
            alias(1e-2, 2, b2=1.0)
    with pytest.warns(UserWarning, match="projects none of the 1 matrices"):
        lro.subspace(adam, svd, rank=2).init({"weight": kernel})
    with pytest.warns(UserWarning, match="the rank 7 fits none"):
        lro.subspace(adam, svd, rank=7).init({"kernel": kernel})
    tx = lro.subspace(adam, svd, rank=2)
    with pytest.raises(ValueError, match="does not belong to these parameters"):
        tx.update({"b": {"kernel": kernel}}, tx.init({"kernel": kernel}))
    with pytest.raises(ValueError, match=r"ScaleBySomething.*first_moments"):
        lro.subspace(unknown(), svd, rank=2, carry="rotate").init(kernel)
    named = lro.subspace(unknown(), svd, rank=2, carry="rotate", first_moments=("memory",))
    named.update(kernel, named.init(kernel))


class ScaleBySomethingState(NamedTuple):
    memory: Any


def unknown():
    """A transformation whose state the library does not know."""

    def init(params):
        return ScaleBySomethingState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        return updates, ScaleBySomethingState(jax.tree.map(jnp.add, state.memory, updates))

    return optax.GradientTransformation(init, update)
