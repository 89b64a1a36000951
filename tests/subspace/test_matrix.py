"""Every projector with every inner transformation, carry and residual: do the invariants of a subspace hold?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.projected.base import Refreshing

P = lro.projectors
PROJECTORS = {
    "svd": P.svd(),
    "randomized": P.randomized(),
    "power": P.power(),
    "gaussian": P.gaussian(),
    "orthogonal": P.orthogonal(),
    "dct": P.dct(),
    "dct-3": P.dct(3),
    "rows": P.rows(),
    "blocks": P.blocks(),
    "oja": P.oja(optax.adam(1e-2)),
    "grassmann": P.grassmann(0.01),
    "coap": P.coap(3),
    "dion": P.dion(),
    "switch": P.switch(P.svd(), P.orthogonal(), 2),
}
# Bases that stay orthonormal; Gaussian ones never are, those of Oja and COAP drift between recalibrations.
ORTHONORMAL = set(PROJECTORS) - {"gaussian", "oja", "coap"}
EACH_ORTHONORMAL = [
    pytest.param(name, marks=() if name in ("svd", "rows") else pytest.mark.slow) for name in sorted(ORTHONORMAL)
]
INNER = {
    "identity": optax.identity(),
    "adam": optax.scale_by_adam(),
    "trace": optax.trace(0.9),
    "lion": optax.scale_by_lion(),
    "adabelief": optax.scale_by_belief(),
}
EACH_INNER = ["adam", *(pytest.param(name, marks=pytest.mark.slow) for name in INNER if name != "adam")]
CARRIES = ["keep", "reset", "reset_count", "rotate", "lift", "rotate-corrected"]
RESIDUALS = {
    "drop": lro.residuals.drop(),
    "sgd": lro.residuals.sgd(),
    "sign": lro.residuals.sign(0.1),
    "scaled": lro.residuals.scaled(),
    "apollo": lro.residuals.scaled(of="gradient", per="tensor"),
    "feedback": lro.residuals.feedback(),
    "leak": lro.residuals.feedback(keep=0.5, leak=1.0),
}
SHAPE, R = (6, 9), 3
# Float64 and matrices of norm 1 to 10: some hundred roundings.
EXACT = dict(rtol=1e-10, atol=1e-11)


def carry(name):
    return lro.carry.rotate(0.9, 0.999) if name == "rotate-corrected" else name


@functools.cache
def gradients(steps=5, shape=SHAPE):
    return jax.random.normal(jax.random.key(1), (steps, *shape), jnp.float64)


def run(tx, grads, start=None):
    """Updates and states of all steps from the same parameters."""
    state = tx.init(grads[0]) if start is None else start

    def step(state, g):
        updates, state = tx.update(g, state, g)
        return state, (updates, state)

    _, out = jax.jit(lambda state, grads: jax.lax.scan(step, state, grads))(state, grads)
    return out


@functools.cache
def bases(name, rank=R):
    """The bases of five steps, and the function pair down and up of each."""
    projector = PROJECTORS[name]
    stored, found = projector.init(jax.random.key(0), SHAPE, rank, jnp.float64), []
    for t, a in enumerate(gradients()):
        at = Refreshing(a, jnp.zeros((rank, SHAPE[1])), jax.random.key(t), jnp.int32(t), jnp.asarray(t == 0))
        stored = projector.refresh(stored, at)
        basis = projector.basis(stored, a, rank)
        found.append(basis)
        stored = projector.after(stored, basis, a, projector.down(basis, a), jnp.int32(t))
    return found


# --- one basis --------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH_ORTHONORMAL)
def test_down_after_up_is_the_identity_and_up_after_down_a_projection(name):
    projector = PROJECTORS[name]
    x = gradients()[0] + 0.1
    for basis in bases(name):
        low = projector.down(basis, x)
        high = projector.up(basis, low, SHAPE[0])
        np.testing.assert_allclose(projector.down(basis, high), low, **EXACT)
        np.testing.assert_allclose(projector.up(basis, projector.down(basis, high), SHAPE[0]), high, **EXACT)
        # An orthogonal projection: what is left out is orthogonal to what stays.
        rest = projector.outside(basis, x, high)
        np.testing.assert_allclose(jnp.vdot(high, rest), 0, atol=1e-11)
        np.testing.assert_allclose(high + rest, x, **EXACT)


@pytest.mark.parametrize("name", EACH_ORTHONORMAL)
def test_overlap_is_down_after_up(name):
    projector = PROJECTORS[name]
    old, new = bases(name)[1:3]
    x = jnp.eye(R, dtype=jnp.float64)
    expected = projector.down(new, projector.up(old, x, SHAPE[0]))
    np.testing.assert_allclose(projector.overlap(old, new), expected, **EXACT)


def test_gaussian_bases_are_the_identity_on_average():
    draw = jax.vmap(lambda key: P.gaussian().basis(jax.random.key_data(key), jnp.zeros((4, 5)), 3))
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 4000)
    mean = jnp.mean(jnp.einsum("kpr,kqr->kpq", *[draw(keys)] * 2), axis=0)
    np.testing.assert_allclose(mean, np.eye(4), atol=0.1)  # five standard errors


def test_blocks_take_turns():
    """All rows once in a round, whatever the order; the last block overlaps where rows do not divide."""
    for order, p in [("ascending", 6), ("descending", 6), ("random", 6), ("random", 7)]:
        projector, a = P.blocks(order), jnp.ones((p, 2))
        stored, rounds = projector.init(None, (p, 2), 2, None), []
        for t in range(2 * -(-p // 2)):
            at = Refreshing(a, None, jax.random.key(t), None, None)
            stored = projector.refresh(stored, at)
            rounds.append(tuple(np.asarray(projector.basis(stored, a, 2))))
        half = len(rounds) // 2
        for part in (rounds[:half], rounds[half:]):
            assert {int(i) for block in part for i in block} == set(range(p))


# --- with a loop around it ----------------------------------------------------------------


def combinations():
    """Every projector twice; every residual with every carry; inner transformations in turn."""
    pairs = [(residual, rule) for residual in RESIDUALS for rule in CARRIES]
    for k, (residual, rule) in enumerate(pairs):
        name, inner = list(PROJECTORS)[k % len(PROJECTORS)], list(INNER)[k % len(INNER)]
        marks = () if k % 14 == 0 else pytest.mark.slow
        yield pytest.param(name, inner, residual, rule, marks=marks, id=f"{name}-{inner}-{residual}-{rule}")


@pytest.mark.parametrize("name, inner, residual, rule", list(combinations()))
def test_every_combination_runs_with_a_stable_state(name, inner, residual, rule):
    """A scan refuses a state whose structure, shape or dtype changes."""
    tx = lro.subspace(
        INNER[inner], PROJECTORS[name], rank=R, refresh=2, carry=carry(rule), residual=RESIDUALS[residual]
    )
    updates, states = run(tx, gradients())
    assert np.all(np.isfinite(updates)) and np.any(updates != 0, axis=(1, 2)).all()
    (nu,) = [x.nu for x in jax.tree.leaves(states.inner_state.inner, is_leaf=has_nu) if has_nu(x)] or [np.zeros(1)]
    assert np.all(np.asarray(nu) >= 0)


def has_nu(x):
    return hasattr(x, "nu")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["svd", "orthogonal", "rows", "dct"])
def test_gradient_descent_at_full_rank_is_gradient_descent(name, transposed):
    grads = jnp.swapaxes(gradients(), 1, 2) if transposed else gradients()
    updates, _ = run(lro.subspace(optax.identity(), PROJECTORS[name], rank=6, refresh=2), grads)
    np.testing.assert_allclose(updates, grads, **EXACT)


@pytest.mark.parametrize("inner", EACH_INNER)
def test_all_rows_are_the_inner_transformation_itself(inner):
    updates, _ = run(lro.subspace(INNER[inner], P.rows(), rank=6, refresh=2), gradients())
    expected, _ = run(INNER[inner], gradients())
    np.testing.assert_allclose(updates, expected, **EXACT)


@pytest.mark.parametrize("inner", EACH_INNER)
def test_full_rank_is_the_inner_transformation_on_the_rotated_problem(inner):
    Q = jnp.linalg.qr(jax.random.normal(jax.random.key(5), (6, 6), jnp.float64))[0]
    tx = lro.subspace(INNER[inner], P.Projector(lambda stored, at: Q), rank=6, refresh=2)
    updates, _ = run(tx, gradients())
    expected, _ = run(INNER[inner], jnp.einsum("pr,tpq->trq", Q, gradients()))
    np.testing.assert_allclose(updates, jnp.einsum("pr,trq->tpq", Q, expected), **EXACT)


@pytest.mark.parametrize("name", ["svd", "orthogonal", "rows", "dct", "blocks", "power"])
def test_error_feedback_telescopes(name):
    """The sum of the updates and the last error is the sum of the gradients."""
    tx = lro.subspace(optax.identity(), PROJECTORS[name], rank=R, refresh=1, residual=lro.residuals.feedback())
    updates, states = run(tx, gradients())
    error = optax.tree.get(states, "residual")[-1]
    np.testing.assert_allclose(jnp.sum(updates, 0) + error, jnp.sum(gradients(), 0), **EXACT)


@pytest.mark.parametrize("rule", ["keep", "rotate"])
@pytest.mark.parametrize("inner", EACH_INNER)
def test_signs_of_vectors_change_nothing(inner, rule):
    """Each vector of the first basis may point the other way: the later ones follow, and moments with them."""
    signs = jnp.array([1.0, -1.0, -1.0])

    def refresh(stored, at):
        new = P.svd().refresh(stored, at)
        return jnp.where(at.first, new * signs[None], new)

    runs = [
        run(lro.subspace(INNER[inner], projector, rank=R, refresh=2, carry=rule), gradients())[0]
        for projector in (P.svd(), P.Projector(refresh))
    ]
    np.testing.assert_allclose(*runs, **EXACT)


@pytest.mark.parametrize("rule", ["rotate", "rotate-corrected", "lift"])
def test_moments_stay_where_the_basis_stays(rule):
    fixed = P.Projector(lambda stored, at: jnp.eye(*stored.shape, dtype=stored.dtype))
    kept, moved = (
        run(lro.subspace(optax.scale_by_adam(), fixed, rank=R, refresh=1, carry=carry(c)), gradients())[0]
        for c in ("keep", rule)
    )
    np.testing.assert_allclose(moved, kept, **EXACT)


def test_lift_is_rotate_for_first_moments():
    rotated, lifted = (
        run(lro.subspace(optax.trace(0.9), P.svd(), rank=R, refresh=2, carry=c), gradients())[0]
        for c in ("rotate", "lift")
    )
    np.testing.assert_allclose(rotated, lifted, **EXACT)


def test_reset_starts_a_run_anew_and_reset_count_its_bias_correction_too():
    grads = gradients(4)
    fixed = P.Projector(lambda stored, at: jnp.eye(*stored.shape, dtype=stored.dtype))
    tx = {c: lro.subspace(optax.scale_by_adam(), fixed, rank=R, refresh=2, carry=c) for c in ("reset", "reset_count")}
    first, _ = run(tx["reset_count"], grads[2:])
    again, states = run(tx["reset_count"], grads)
    np.testing.assert_allclose(again[2:], first, **EXACT)
    assert optax.tree.get(states.inner_state.inner, "count").tolist() == [1, 2, 1, 2]
    # Without the count Adam divides moments of one step by the corrections of three steps.
    other, _ = run(tx["reset"], grads)
    ratio = np.sqrt(1 - 0.999**3) / (1 - 0.9**3) * (1 - 0.9) / np.sqrt(1 - 0.999)
    np.testing.assert_allclose(other[2], ratio * again[2], rtol=1e-6)


def test_the_sides_of_a_matrix():
    """`right` is `left` of the transpose; `short` and `long` take the side by its length."""
    grads = gradients()
    make = functools.partial(lro.subspace, optax.scale_by_adam(), P.svd(), rank=R, refresh=2)
    left, right, short, long = (run(make(side=s), grads) for s in ("left", "right", "short", "long"))
    of_transpose, _ = run(make(side="right"), jnp.swapaxes(grads, 1, 2))
    np.testing.assert_allclose(left[0], jnp.swapaxes(of_transpose, 1, 2), **EXACT)
    np.testing.assert_allclose(short[0], left[0], **EXACT)
    np.testing.assert_allclose(long[0], right[0], **EXACT)
    assert optax.tree.get(left[1], "basis").shape[1:] == (6, R) and optax.tree.get(left[1], "mu").shape[1:] == (R, 9)
    assert optax.tree.get(right[1], "basis").shape[1:] == (9, R) and optax.tree.get(right[1], "mu").shape[1:] == (R, 6)
    both, states = run(make(side="both"), grads)
    assert optax.tree.get(states, "mu").shape[1:] == (R, R)
    singular = jnp.linalg.svd(grads[0])
    # The first step of Adam has the signs of the coordinates, which are the singular values.
    expected = singular[0][:, :R] @ singular[2][:R]
    np.testing.assert_allclose(both[0], expected, atol=1e-6)


def test_as_many_groups_as_rows():
    """The scales of four-bit numbers then have the shape of a basis of one vector, and are none."""
    tx = lro.galore(1.0, 4, refresh=2, basis_dtype=lro.projected.int4(4))
    updates, states = run(tx, gradients())
    assert optax.tree.get(states, "basis").scale.shape[1:] == (6, 1)
    assert np.linalg.matrix_rank(np.asarray(updates[0]), tol=1e-6) == 4


def test_stored_in_fewer_bits():
    """A basis in bfloat16 loses three digits, one in four bits a tenth; both train, and int4 halves bytes of bytes."""
    exact, _ = run(lro.subspace(optax.identity(), P.svd(), rank=R, refresh=2), gradients())
    # A group of six makes as many scales as there are vectors.
    cases = [(jnp.bfloat16, 0.02), *((lro.projected.int4(group), 0.3) for group in (6, 2, 4))]
    for dtype, tolerance in cases:
        tx = lro.subspace(optax.identity(), P.svd(), rank=R, refresh=2, basis_dtype=dtype)
        rounded, states = run(tx, gradients())
        assert 0 < np.max(np.abs(rounded - exact)) < tolerance * np.max(np.abs(exact))
    codes = optax.tree.get(states, "basis").codes
    assert codes.dtype == jnp.uint8 and codes[0].size == 10  # 18 numbers in groups of four, two to a byte
