"""Every wrapper of Optax, JAX, Flax and Orbax around our optimizers, and every kind of tree inside them."""

from __future__ import annotations

import functools
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import lowrank_optax as lro

slow = pytest.mark.slow

# Float64 throughout. EXACT allows for the order in which XLA fuses a step; a step is a few products of 6 x 6.
EXACT = dict(rtol=1e-12, atol=1e-13)
# Adam divides coefficients that are zero up to rounding, 1e-15, by its eps of 1e-8: steps agree to 1e-7 step sizes.
ADAM = dict(rtol=1e-6, atol=1e-7)
TARGET = 3 * jnp.sin(jnp.arange(30.0)).reshape(6, 5)


def tree(rank=2, max_rank=4, seed=0):
    W = jax.random.normal(jax.random.key(seed), (6, 5), jnp.float64)
    return lro.factorize({"kernel": W, "bias": jnp.ones(5)}, rank, max_rank=max_rank)


def loss(params, target=TARGET):
    """Neither W nor the target is of low rank."""
    return jnp.sum(jnp.square(jnp.eye(6) @ params["kernel"] + params["bias"][None] - target))


def close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **(tolerance or EXACT))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def apply(tx, params, state, steps=1, objective=loss):
    """Steps under jit; compiled once for an optimizer, an objective and shapes."""
    return _apply(params, state, tx, steps, objective)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _apply(params, state, tx, steps, objective):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), length=steps)[0]


def orthonormal(W, atol=1e-13):
    r = jnp.eye(W.rank)
    for basis in (W.U, W.V):
        np.testing.assert_allclose(basis.T @ basis, r, atol=atol)


# --- wrappers of optax ----------------------------------------------------------------


@slow
@pytest.mark.parametrize(
    "tx, tolerance",
    [
        pytest.param(lro.lowrank_heavy_ball(0.1), EXACT, id="heavy-ball"),
        pytest.param(lro.lowrank_adam(0.1, momentum="tangent"), ADAM, id="adam-tangent", marks=slow),
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
    parts = {"a": lro.fixed_rank(optax.sgd(0.01)), "b": lro.lowrank_heavy_ball(0.01)}
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
    """What a chain puts around `fixed_rank`, and what can be read off its state afterwards."""
    params = tree()
    inner = optax.chain(optax.snapshot("norm", optax.tree.norm), optax.clip_by_global_norm(1e-3), optax.sgd(1.0, 0.9))
    tx = optax.chain(optax.identity(), lro.fixed_rank(inner, momentum="coefficient"), optax.identity())
    state = tx.init(params)
    _, state = apply(tx, params, state)
    # Inside, a kernel is one matrix whose norm is the Riemannian norm.
    grads = jax.grad(loss)(params)
    np.testing.assert_allclose(optax.tree.get(state, "norm"), lro.tangent_norm(params, grads), **EXACT)
    trace = optax.tree.get(state, "trace")
    assert trace["kernel"].shape == (4, 4) and trace["bias"].shape == (5,)
    assert set(lro.diagnostics(state).kernels) == {"kernel"}
    mu = optax.tree.get(lro.lowrank_adam(0.1).init(params), "mu")
    assert mu["kernel"].U.shape == params["kernel"].U.shape and mu["bias"].shape == (5,)


@slow
def test_clipping_inside_acts_on_the_riemannian_norm():
    """|dW|_F of a clipped gradient step is the bound times the step size, to first order in the step size."""
    params, h, bound = tree(), 1e-6, 0.5
    no_bias = lambda p: loss({**params, **p})  # noqa: E731
    alone = {"kernel": params["kernel"]}
    transforms = (
        lro.fixed_rank(optax.chain(optax.clip_by_global_norm(bound), optax.sgd(h))),
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
        pytest.param(lro.lowrank_adamw(1.0, weight_decay=0.1, momentum="tangent"), 0.9, id="tangent", marks=slow),
        pytest.param(lro.lowrank_adamw(1.0, weight_decay=0.1, momentum="coefficient"), 0.9, id="coefficient"),
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
    tx = lro.fixed_rank(optax.sgd(0.1), ordinary=optax.set_to_zero())
    new, _ = apply(tx, params, tx.init(params))
    same(new["bias"], params["bias"])
    plain = lro.fixed_rank(optax.sgd(0.1))
    expected, _ = apply(plain, params, plain.init(params))
    close(new["kernel"], expected["kernel"])


# --- transformations of jax -----------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(lro.lowrank_heavy_ball(0.1), id="heavy-ball", marks=slow),
        pytest.param(lro.lowrank_heavy_ball(0.1, gradient="galerkin", local_steps=2), id="galerkin", marks=slow),
    ],
)
def test_vmap_over_seeds_equals_separate_runs(tx):
    seeds = jnp.arange(2)

    def start(seed):
        W = lro.lowrank_init(2, max_rank=4)(jax.random.key(seed), (6, 5), jnp.float64)
        params = {"kernel": W, "bias": jnp.zeros(5)}
        return params, tx.init(params)

    def run(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return lro.densify(params), state.kernels["kernel"].rank

    batched, rank = jax.jit(jax.vmap(lambda seed: run(*start(seed))))(seeds)
    starts = jax.jit(start)
    single = jax.jit(run)
    for i in range(2):
        one, r = single(*starts(i))
        # Batched QR and SVD are the same LAPACK calls; products of a batch sum in another order.
        close(jax.tree.map(lambda x: x[i], batched), one, rtol=1e-10, atol=1e-12)  # noqa: B023
        assert rank[i] == r


@slow
def test_scan_equals_a_loop_of_jitted_steps_with_donated_buffers():
    tx, params = lro.lowrank_heavy_ball(0.01), tree()
    state = tx.init(params)
    scanned = apply(tx, params, state, steps=4)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    # Copies: the first step would otherwise consume the parameters of this test.
    params, state = jax.tree.map(jnp.copy, (params, state))
    first = params["kernel"].U
    for _ in range(4):
        params, state = donating(params, state)
    assert first.is_deleted()
    close((params, state), scanned)


@slow
def test_gradients_of_a_kernel_shared_by_two_layers_add_up():
    """One node used twice, as in tied weights: jax.grad sums, and one step serves both."""
    W = tree()["kernel"]
    tied = lambda W: loss({"kernel": W, "bias": jnp.zeros(5)}) + jnp.sum((jnp.ones((2, 5)) @ W.T) ** 2)  # noqa: E731
    tx = lro.fixed_rank(optax.sgd(1e-3))
    new, _ = apply(tx, W, tx.init(W), objective=tied)
    assert tied(new) < tied(W)


# --- trees ----------------------------------------------------------------------------


class Model(NamedTuple):
    encoder: object
    decoder: object


def _trees():
    W, b = tree()["kernel"], jnp.ones(3)
    return {
        "empty": {},
        "no kernel": {"bias": b},
        "one kernel": W,
        "tuple": (W, b),
        "list": [b, W],
        "named tuple": Model(W, b),
        "none": {"kernel": W, "missing": None},
        "nested": Model([(W, None), {"b": b}], {"deep": ([], {}, (b,))}),
    }


@slow
@pytest.mark.parametrize("factory", [lro.lowrank_heavy_ball, lro.lowrank_muon])
@pytest.mark.parametrize("name", _trees())
def test_every_kind_of_tree(factory, name):
    """Traced only: structures, shapes and dtypes are what a tree can get wrong."""
    params, tx = _trees()[name], factory(0.1)
    state = tx.init(params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    for a, b in ((updates, params), (new, state)):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), a) == jax.tree.map(lambda x: (x.shape, x.dtype), b)
    assert len(lro.diagnostics(state).kernels) == (0 if name in ("empty", "no kernel") else 1)
    same(lro.resize(params, state, 4)[1], state)


@pytest.mark.parametrize("name", ["empty", "one kernel", pytest.param("nested", marks=slow)])
def test_every_kind_of_tree_moves(name):
    params, tx = _trees()[name], lro.lowrank_heavy_ball(0.1, momentum=None)
    half = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(lro.densify(p))) / 2 + 0.0  # noqa: E731
    new, _ = apply(tx, params, tx.init(params), objective=half)
    # The gradient of |x|^2 / 2 is x, for a kernel a tangent vector: everything shrinks by the step size.
    close(lro.densify(new), jax.tree.map(lambda x: 0.9 * x, lro.densify(params)))


# --- flax, checkpoints ----------------------------------------------------------------


@pytest.fixture(scope="module")
def train_state():
    params, tx = tree(), optax.chain(lro.lowrank_adam(0.1, weight_decay=0.01))
    apply_fn = lambda params, x: x @ params["kernel"] + params["bias"][None]  # noqa: E731
    return TrainState.create(apply_fn=apply_fn, params=params, tx=tx)


@jax.jit
def _train_step(state, x):
    objective = lambda p: jnp.sum((state.apply_fn(p, x) - TARGET) ** 2)  # noqa: E731
    return state.apply_gradients(grads=jax.grad(objective)(state.params))


def test_train_state(train_state):
    new = _train_step(train_state, jnp.eye(6))
    assert int(new.step) == 1
    assert loss(new.params) < loss(train_state.params)
    assert jax.tree.structure(new) == jax.tree.structure(train_state)
    orthonormal(new.params["kernel"])


def test_checkpoint_continues_to_the_bit(train_state, tmp_path):
    """Train state through Orbax: one step, save, restore into an abstract target, one more step."""
    once = _train_step(train_state, jnp.eye(6))
    twice = _train_step(once, jnp.eye(6))
    saved = {"params": once.params, "opt_state": once.opt_state, "step": once.step}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
        restored = checkpointer.restore(tmp_path / "step", abstract)
    same(restored, saved)
    assert lro.is_lowrank(restored["params"]["kernel"])
    # The functions of the train state are not part of a checkpoint, so they stay those of the run.
    same(_train_step(once.replace(**restored), jnp.eye(6)), twice)


def test_checkpoint_of_a_whole_train_state(train_state, tmp_path):
    once = _train_step(train_state, jnp.eye(6))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", once)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, once))
    same(restored, once)


def test_leaves_and_nodes_can_be_pickled():
    tx, params = lro.lowrank_adam(0.1), tree()
    state = tx.init(params)
    leaves, structure = jax.tree.flatten((params, state))
    loaded = pickle.loads(pickle.dumps([np.asarray(x) for x in leaves]))
    same(jax.tree.unflatten(structure, loaded), (params, state))
    same(pickle.loads(pickle.dumps((params, state))), (params, state))


# --- resize and averages --------------------------------------------------------------


def _inject(learning_rate):
    return lro.lowrank_heavy_ball(learning_rate)


RESIZED = {
    "heavy-ball-chain": lambda: optax.chain(lro.lowrank_heavy_ball(0.02)),
    "inject": lambda: optax.inject_hyperparams(_inject)(0.02),
    "multi-steps": lambda: optax.MultiSteps(lro.lowrank_heavy_ball(0.02), 2),
    "adam": lambda: lro.lowrank_adam(0.02),
    "adam-tangent": lambda: lro.lowrank_adam(0.02, momentum="tangent"),
    "muon": lambda: lro.lowrank_muon(0.02),
}


@slow
@pytest.mark.parametrize(
    "name, width",
    [pytest.param(n, 5, marks=() if n == "inject" else slow) for n in RESIZED]
    + [pytest.param("adam-tangent", None, marks=slow)],
)
def test_resize_keeps_the_kernel_and_the_trajectory(name, width):
    """Three steps, a change of width, three steps: the same W as without, for odd phases of MultiSteps too."""
    tx, params = RESIZED[name](), tree(rank=2, max_rank=3)
    params, state = apply(tx, params, tx.init(params), steps=3)
    wide, wide_state = lro.resize(params, state, width)
    assert wide["kernel"].rank == (5 if width else 2)
    np.testing.assert_allclose(wide["kernel"].to_dense(), params["kernel"].to_dense(), **EXACT)
    orthonormal(wide["kernel"])
    assert int(lro.ranks(wide)["kernel"]) == 2
    a, state_a = apply(tx, params, state, steps=3)
    b, state_b = apply(tx, wide, wide_state, steps=3)
    # Adam and muon amplify rounding, the one by its eps of 1e-8, the other by Newton-Schulz near zero (3.4^5).
    close(lro.densify(b), lro.densify(a), rtol=1e-6, atol=1e-6)
    for k in ("gradient_norm", "truncation"):
        x, y = (getattr(lro.diagnostics(s).kernels["kernel"], k) for s in (state_a, state_b))
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@slow
def test_resize_below_the_rank_truncates_and_says_so():
    tx, params = lro.lowrank_heavy_ball(0.05), tree(rank=4, max_rank=4)
    state = tx.init(params)
    small, small_state = lro.resize(params, state, 2)
    P, sigma, Qt = np.linalg.svd(params["kernel"].to_dense())
    np.testing.assert_allclose(small["kernel"].to_dense(), (P[:, :2] * sigma[:2]) @ Qt[:2], **EXACT)
    lost = np.linalg.norm(sigma[2:]) / np.linalg.norm(sigma)
    report = lro.diagnostics(small_state).kernels["kernel"]
    np.testing.assert_allclose(report.truncation, lost, **EXACT)
    assert int(report.rank) == 2
    assert optax.tree.get(small_state, "trace")["kernel"].U.shape == (6, 2)
    after, _ = apply(tx, small, small_state)
    assert loss(after) < loss(small)
    same(lro.resize(params, None, 2)[0], small)
    assert lro.resize(params, None, 2)[1] is None


@slow
def test_resize_takes_fractions_and_callables_and_batches():
    stacked = jax.random.normal(jax.random.key(0), (3, 6, 5), jnp.float64)
    params = lro.factorize({"w": stacked}, 2, where=lambda path, shape: lro.Axes(1, 1))
    for rank in (0.8, 4, lambda path, shape: 4 if (path, shape) == ("w", (3, 6, 5)) else 1):
        wide, _ = lro.resize(params, None, rank)
        assert wide["w"].U.shape == (3, 6, 4)
        np.testing.assert_allclose(wide["w"].to_dense(), params["w"].to_dense(), **EXACT)
        gram = jnp.swapaxes(wide["w"].U, -1, -2) @ wide["w"].U
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(4), gram.shape), atol=1e-13)


@slow
def test_incremental_update_averages_kernels():
    a, b = tree(seed=1), tree(seed=2)
    mean = jax.jit(lambda a, b: lro.incremental_update(a, b, 0.25))(a, b)
    np.testing.assert_allclose(mean["bias"], 0.25 * a["bias"] + 0.75 * b["bias"], **EXACT)
    dense = 0.25 * a["kernel"].to_dense() + 0.75 * b["kernel"].to_dense()
    P, sigma, Qt = np.linalg.svd(dense)
    np.testing.assert_allclose(mean["kernel"].to_dense(), (P[:, :2] * sigma[:2]) @ Qt[:2], **EXACT)
    orthonormal(mean["kernel"])
    # Equal kernels in different bases average to themselves.
    W = a["kernel"]
    flipped = lro.LowRank(-W.U, W.S, -W.V)
    again = lro.incremental_update({"kernel": flipped}, {"kernel": W}, 0.5)
    np.testing.assert_allclose(again["kernel"].to_dense(), W.to_dense(), **EXACT)


# --- factorize, densify, initialisers -------------------------------------------------


@slow
def test_factorize_is_the_best_approximation_and_densify_its_inverse():
    W = jax.random.normal(jax.random.key(0), (6, 5), jnp.float64)
    P, sigma, Qt = np.linalg.svd(W)
    for rank, width in ((1, 1), (3, 3), (2, 4), (5, 5), (2, 50)):
        got = lro.factorize({"kernel": W}, rank, max_rank=width)["kernel"]
        assert got.rank == min(width, 5) and int(lro.ranks(got)[""]) == rank
        np.testing.assert_allclose(got.to_dense(), (P[:, :rank] * sigma[:rank]) @ Qt[:rank], **EXACT)
        orthonormal(got)
    small = lro.factorize(W.astype(jnp.bfloat16), 2, scale=0.25, where=lambda path, shape: True)
    whole = lro.factorize(W.astype(jnp.bfloat16), 2, where=lambda path, shape: True)
    assert small.S.dtype == jnp.bfloat16
    np.testing.assert_array_equal(small.S, whole.S / 4)  # a power of two is exact
    full = {"a": {"kernel": W, "bias": jnp.ones(5)}, "b": [W]}
    np.testing.assert_allclose(lro.densify(lro.factorize(full, 5))["a"]["kernel"], W, **EXACT)
    again = lro.factorize(lro.factorize(full, 2), 4)
    assert again["a"]["kernel"].rank == 2 and again["b"][0] is W and again["a"]["bias"] is full["a"]["bias"]


def test_factorize_chooses_ranks_and_leaves():
    params = {
        "x": {"kernel": jnp.ones((8, 6)), "scale": jnp.ones(6)},
        "y": {"kernel": jnp.ones((4, 4))},
        "z": jnp.ones((8, 8)),
    }
    half = lro.factorize(params, 0.5)
    assert half["x"]["kernel"].rank == 3 and half["y"]["kernel"].rank == 2 and half["z"].shape == (8, 8)
    # The default leaves kernels dense that are smaller than the rank.
    assert lro.factorize(params, 5)["y"]["kernel"].shape == (4, 4)
    assert not lro.is_lowrank(lro.factorize(params, 5)["y"]["kernel"])
    ranked = lro.factorize(
        params, lambda path, shape: {"x/kernel": 2, "y/kernel": 1.0}[path], max_rank=lambda path, shape: 4
    )
    assert ranked["x"]["kernel"].U.shape == (8, 4) and ranked["y"]["kernel"].rank == 4
    chosen = lro.factorize(params, 2, where=lambda path, shape: path == "z")
    assert [lro.is_lowrank(chosen[k]) for k in "z"] == [True] and chosen["x"] is not None
    assert not lro.is_lowrank(chosen["x"]["kernel"])
    shapes = jax.eval_shape(lambda p: lro.factorize(p, 2), params)
    assert shapes["x"]["kernel"].U.shape == (8, 2)


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((6, 5), lro.Axes()),
        ((3, 6, 5), lro.Axes(1, 1)),
        pytest.param((4, 2, 5), lro.Axes(0, 2), marks=slow),
        pytest.param((2, 2, 3, 4, 6), lro.Axes(2, 2), marks=slow),
    ],
)
def test_factorize_splits_axes(shape, axes):
    W = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    got = lro.factorize({"w": W}, 2, where=lambda path, shape: axes)["w"]
    assert got.shape == shape and got.batch_shape == shape[: axes.batch]
    assert got.in_shape == shape[axes.batch : axes.batch + axes.inputs]
    batch, m = shape[: axes.batch], int(np.prod(got.in_shape))
    P, sigma, Qt = np.linalg.svd(W.reshape(*batch, m, -1), full_matrices=False)
    best = (P[..., :2] * sigma[..., None, :2]) @ Qt[..., :2, :]
    np.testing.assert_allclose(got.to_dense(), best.reshape(shape), **EXACT)
    x = jax.random.normal(jax.random.key(1), (*batch, 7, *got.in_shape), jnp.float64)
    dense = x.reshape(*batch, 7, m) @ best
    np.testing.assert_allclose(x @ got, dense.reshape(*batch, 7, *got.out_shape), **EXACT)


@slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowrank_init_has_the_norm_of_the_dense_draw(dtype):
    base = jax.nn.initializers.he_normal()
    init = lro.lowrank_init(4, base, max_rank=8)
    W = init(jax.random.key(0), (48, 32), dtype)
    assert W.dtype == dtype and W.rank == 8 and int(lro.ranks(W)[""]) == 4
    # |W|_F^2 of he_normal is m n (2 / m) = 64 on average, with relative deviation sqrt(2 / (m n)) = 0.036, about half
    # of it in the norm: four deviations are 0.08.
    norm = float(jnp.sqrt(jnp.sum(jnp.square(jnp.diagonal(W.S.astype(jnp.float32))))))
    assert abs(norm / 8 - 1) < 0.08
    # Each entry is rounded by the QR, by a product over eight columns, and when it is cast: ten eps in all.
    gram = W.U.astype(jnp.float32).T @ W.U.astype(jnp.float32)
    np.testing.assert_allclose(gram, np.eye(8), atol=10 * float(jnp.finfo(dtype).eps))


@slow
def test_lowrank_init_draws_are_isotropic_and_differ_by_key():
    init = lro.lowrank_init(2)
    draws = jax.vmap(lambda key: init(key, (4, 3), jnp.float64).to_dense())(jax.random.split(jax.random.key(0), 500))
    # LeCun normal has variance 1 / 4 an entry; the mean over 500 draws of 12 entries has deviation
    # about sqrt(2 / 6000) = 2 %, entries of one draw being correlated somewhat more: 10 % is beyond four.
    np.testing.assert_allclose(jnp.mean(draws**2), 0.25, rtol=0.1)
    # The mean of an entry has deviation 0.5 / sqrt(500) = 0.022; twelve of them stay within four and a half.
    np.testing.assert_allclose(jnp.mean(draws, axis=0), np.zeros((4, 3)), atol=0.1)
    assert not np.allclose(draws[0], draws[1])


def test_orthonormalize_keeps_the_kernel():
    W = lro.LowRank(
        *(jax.random.normal(jax.random.key(i), s, jnp.float64) for i, s in enumerate([(6, 2), (2, 2), (5, 2)]))
    )
    fixed = lro.orthonormalize({"kernel": W, "bias": jnp.ones(3)})["kernel"]
    np.testing.assert_allclose(fixed.to_dense(), W.to_dense(), **EXACT)
    orthonormal(fixed)
    lro.lowrank_adam(0.1).init(fixed)
