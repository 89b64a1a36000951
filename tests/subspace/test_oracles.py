"""Is every published method its formula, written again in NumPy?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.subspace import oracles

R, STEPS = 3, 11
# Float64: a few hundred roundings, raised by divisions by roots of second moments.
EXACT = 1e-9


def gradients(m=6, n=9):
    """Gradients that drift, as those of a run do, with a noise on top."""
    rng = np.random.default_rng(0)
    start, end = rng.standard_normal((2, m, n))
    decay = 0.6 ** np.arange(m)[:, None]
    return [
        ((1 - t / STEPS) * start + t / STEPS * end) * decay + 0.05 * rng.standard_normal((m, n)) for t in range(STEPS)
    ]


def directions(tx, grads, transposed, record=lambda state: None):
    """The directions of an optimizer with learning rate 1, and what `record` finds in the state after every step."""
    turned = [g.T if transposed else g for g in grads]
    params = jnp.ones_like(turned[0])
    state, out, found = tx.init(params), [], []
    update = jax.jit(tx.update)
    for g in turned:
        updates, state = update(jnp.asarray(g), state, params)
        out.append(-np.asarray(updates).T if transposed else -np.asarray(updates))
        found.append(record(state))
    return out, found


def check(ours, expected, tolerance=EXACT):
    for t, (a, b) in enumerate(zip(ours, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)), err_msg=f"step {t}")


def random_basis(state):
    """The Gaussian basis that was used in the last step."""
    stored = optax.tree.get(state, "basis")
    return np.asarray(lro.projectors.gaussian().basis(stored, jnp.zeros((6, 9)), R))


tall = pytest.param(True, marks=pytest.mark.slow, id="tall")
transposed = pytest.mark.parametrize("transposed", [pytest.param(False, id="wide"), tall])


@transposed
@pytest.mark.parametrize("per", ["column", "tensor"])
def test_apollo(per, transposed):
    grads = gradients()
    tx = lro.apollo(1.0, R, refresh=4, scale=7.0, per=per)
    ours, bases = directions(tx, grads, transposed, random_basis)
    assert not np.array_equal(bases[0], bases[4]) and np.array_equal(bases[0], bases[3])
    check(ours, oracles.apollo(grads, bases, 7.0, tensor=per == "tensor"))


@transposed
def test_ldadam(transposed):
    grads = gradients()
    check(directions(lro.ldadam(1.0, R), grads, transposed)[0], oracles.ldadam(grads, R))


@transposed
def test_adarankgrad(transposed):
    grads = gradients()
    refresh = lro.refresh.converged(0.9, at_most=4)
    tx = lro.adarankgrad(1.0, 5, lost=0.1, refresh=refresh, scale=0.5, projector=lro.projectors.svd())
    ours, ranks = directions(tx, grads, transposed, lambda state: int(optax.tree.get(state, "rank")))
    # With eight columns of oversampling a range finder of a 6 x 9 matrix is exact.
    same = directions(lro.adarankgrad(1.0, 5, lost=0.1, refresh=refresh, scale=0.5), grads, transposed)[0]
    assert len(set(ranks)) > 1 and max(ranks) < 5
    expected = list(oracles.adarankgrad(grads, 5, 0.1, 0.9, 4, 0.5))
    check(ours, expected)
    check(same, expected)


@transposed
def test_online_subspace(transposed):
    grads = gradients()
    tx = lro.online_subspace(1.0, R, basis_optimizer=optax.adam(0.02))
    check(directions(tx, grads, transposed)[0], oracles.online_subspace(grads, R, 0.02, 0.25))


def test_online_subspace_leaves_its_first_basis_alone():
    """The slope there is rounding, which Adam would bring to the size of its learning rate."""
    g = jnp.asarray(gradients()[0], jnp.float32)
    tx = lro.online_subspace(1.0, R)
    _, state = tx.update(g, tx.init(g), g)
    P = optax.tree.get(state, "basis").matrix
    np.testing.assert_allclose(P.T @ P, np.eye(R), atol=1e-5)


@transposed
def test_coap(transposed):
    grads = gradients()
    starts = []
    projector = lro.projectors.coap(2, 3, 0.3)

    def refresh(stored, at):
        jax.debug.callback(lambda key: starts.append(np.asarray(key)), jax.random.key_data(at.key))
        return projector.refresh(stored, at)

    tx = lro.coap(1.0, R, refresh=2, projector=projector._replace(refresh=refresh))
    ours, _ = directions(tx, grads, transposed)
    jax.effects_barrier()
    key = jax.random.wrap_key_data(jnp.asarray(starts[0]), impl="threefry2x32")
    start = np.asarray(jax.random.normal(key, (6, R), jnp.float64))
    check(ours, oracles.coap(grads, R, 2, 3, 0.3, start, int(transposed)), 1e-5)  # differences, as above


@transposed
def test_subtrack(transposed):
    grads = gradients()
    tx = lro.subtrack(1.0, R, basis_learning_rate=0.1, refresh=3)
    check(directions(tx, grads, transposed)[0], oracles.subtrack(grads, R, 0.1, 3, 0.25))


@transposed
@pytest.mark.parametrize("kind", [2, 3])
def test_dct_adam(kind, transposed):
    grads = gradients()
    tx = lro.dct_adam(1.0, R, projector=lro.projectors.dct(kind))
    check(directions(tx, grads, transposed)[0], oracles.dct_adam(grads, R, kind))


@transposed
@pytest.mark.parametrize("with_present", [False, True])
@pytest.mark.parametrize("least", [128, 1])
def test_flora(least, with_present, transposed):
    """Of parameters with root mean square 1, whose scale changes nothing."""
    grads = gradients()
    rms = optax.scale_by_factored_rms(min_dim_size_to_factor=least)
    state, scaled, params = rms.init(jnp.ones((6, 9))), [], jnp.ones((6, 9))
    for g in grads:
        u, state = rms.update(jnp.asarray(g), state, params)
        scaled.append(np.asarray(u))
    options = dict(refresh=lro.refresh.every(4, offset=3), with_present=with_present, min_dim_size_to_factor=least)
    ours, bases = directions(lro.flora(1.0, R, **options), grads, transposed, random_basis)
    assert np.array_equal(bases[0], bases[2]) and not np.array_equal(bases[2], bases[3])
    expected = oracles.flora_momentum(scaled, bases, 0.9, with_present)
    check(ours, [u / max(1, np.sqrt(np.mean(u**2))) for u in expected])
    absolute = lro.flora(1.0, R, multiply_by_parameter_scale=False, **options)
    check(directions(absolute, grads, transposed)[0], ours)


@transposed
def test_sumo(transposed):
    grads = gradients()
    tx = lro.sumo(1.0, R, refresh=4, projector=lro.projectors.svd())
    check(directions(tx, grads, transposed)[0], oracles.sumo(grads, R, 4, 0.95))


@transposed
def test_snsm(transposed):
    grads = gradients()
    check(directions(lro.snsm(1.0, R, refresh=4), grads, transposed)[0], oracles.snsm(grads, R, 4))


@transposed
@pytest.mark.parametrize(
    "options", [{}, dict(outside=0.3, reciprocal=0.2), dict(outside=0.3, old_bases=True), dict(nesterov=True)], ids=str
)
def test_mofasgd(options, transposed):
    grads = gradients()
    tx = lro.mofasgd(1.0, R, momentum=0.9, **options)
    options = {"most" if name == "reciprocal" else name: x for name, x in options.items()}
    check(directions(tx, grads, transposed)[0], oracles.mofasgd(grads, R, 0.9, **{"outside": 0.0, **options}))


def test_mofasgd_waits_for_a_gradient():
    """Zero gradients make no momentum, and a stack starts each of its kernels when its own gradient arrives."""
    g = jnp.asarray(np.stack(gradients()[:2]))
    tx = lro.mofasgd(1.0, R, where=lambda path, shape: lro.Axes(1, 1))
    state, update = tx.init(g), jax.jit(tx.update)
    first, state = update(g.at[0].set(0), state, g)
    second, state = update(g, state, g)
    alone = lro.mofasgd(1.0, R)
    expected, _ = alone.update(g[0], alone.init(g[0]), g[0])
    assert not np.any(first[0]) and np.any(first[1])
    np.testing.assert_allclose(second[0], expected, atol=1e-12)


@transposed
def test_dion(transposed):
    grads = gradients()
    tx = lro.dion(1.0, R, weight_decay=0.0)
    start = np.asarray(optax.tree.get(tx.init(jnp.ones((9, 6) if transposed else (6, 9))), "basis"))
    ours, _ = directions(tx, grads, transposed)
    shape = np.sqrt(6 / 9) if transposed else np.sqrt(9 / 6)  # outputs over inputs
    check(ours, [shape * u for u in oracles.dion(grads, start, 0.95)])


@transposed
def test_trion(transposed):
    grads = gradients()
    tx = lro.trion(1.0, R, weight_decay=0.0)
    shape = 1 if transposed else np.sqrt(9 / 6)
    check(directions(tx, grads, transposed)[0], [shape * u for u in oracles.trion(grads, R, 0.95, 5)])


def test_golore_turns_to_random_bases():
    """Before the switch it is GaLore with moments that turn; after it the bases are orthonormal and random."""
    grads = gradients()
    tx = lro.golore(1.0, R, random_from=6, refresh=3)
    _, bases = directions(tx, grads, False, lambda state: np.asarray(optax.tree.get(state, "basis")))
    for t, basis in enumerate(bases):
        np.testing.assert_allclose(basis.T @ basis, np.eye(R), atol=1e-12)
        singular = np.abs(oracles.top(grads[t // 3 * 3], R).T @ basis)
        assert np.allclose(singular, np.eye(R), atol=1e-6) == (t < 6)


def test_q_galore_stores_four_bits_and_doubles_its_period():
    """On a gradient that keeps its directions the window fills in five refreshes, and the period doubles once."""
    tx = lro.q_galore(1.0, R, refresh=lro.refresh.doubling(2, 0.4, 2, window=2))
    grads = [gradients()[0] + 1e-3 * g for g in gradients()]
    _, found = directions(
        tx, grads, False, lambda state: (optax.tree.get(state, "clock"), optax.tree.get(state, "basis"))
    )
    # Refreshes at 0, 2, 4: two overlaps, the period is 4. At 8 the first overlap of a new window.
    assert [int(clock.period) for clock, _ in found] == [2] * 4 + [4] * 7
    assert [int(clock.filled) for clock, _ in found] == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    packed = found[0][1]
    assert packed.codes.dtype == jnp.uint8 and packed.codes.size == 6 * R / 2
    basis = lro.projected.storage.unpack(packed, (6, R), jnp.float64)
    expected = np.abs(oracles.top(grads[0], R))
    step = (np.max(basis) - np.min(basis)) / 15
    np.testing.assert_allclose(np.abs(basis), expected, atol=0.51 * step)
