"""Do GaLore, Fira and FRUGAL go where the code of their authors went?"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.subspace.recorded import LR, PERIOD, aligned, array, error, replayed, run, settings

# Closed loop, float64 throughout: a few hundred roundings, raised by divisions by the root of second moments.
CLOSED = 1e-9
# The recorded bases were computed in float32.
OWN = 1e-5
SHAPES = ("wide", "tall")
SIDES = {"std": "short", "reverse_std": "long", "left": "left", "right": "right", "full": "both"}


def bases(prefix, case, shape, side="short"):
    m, n = (12, 20) if shape == "wide" else (20, 12)
    right = {"short": m > n, "long": m < n, "left": False, "right": True}[side]
    recorded = array(prefix, case, shape, "basis")
    return np.swapaxes(recorded, 1, 2) if right else recorded


def check_moments(state, prefix, case, shape, tolerance=CLOSED):
    """Moments are the recorded ones or their transposes."""
    for name in ("mu", "nu"):
        (ours,), expected = np.asarray(optax.tree.get(state, name)["kernel"])[None], array(prefix, case, shape, name)[0]
        ours = ours if ours.shape == expected.shape else ours.T
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


# --- GaLore -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["std", "reverse_std", "left", "right", "std_fullrank"])
def test_galore_with_recorded_bases(case, shape):
    options, side = settings("galore", case), SIDES.get(case, "short")
    projector = replayed(bases("galore", case, shape, side))
    tx = lro.galore(LR, options["rank"], refresh=PERIOD, scale=options["scale"], side=side, projector=projector)
    # The authors decay weights after the step, and Optax before it: the same up to the square of the step size.
    Ws, state = run(tx, shape, decay_after=LR * options["weight_decay"])
    assert error(Ws, "galore", case, shape) < CLOSED
    check_moments(state, "galore", case, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_on_both_sides(shape):
    left, right = (array("galore", "full", shape, name) for name in ("basis_left", "basis_right"))
    left, right = jnp.asarray(left), jnp.asarray(np.swapaxes(right, 1, 2))

    def refresh(stored, at):
        of_rows = at.gradient.shape == (left.shape[1], right.shape[1])
        return (left if of_rows else right)[at.count // PERIOD]

    tx = lro.galore(LR, 4, refresh=PERIOD, side="both", projector=lro.projectors.Projector(refresh))
    Ws, state = run(tx, shape)
    assert error(Ws, "galore", "full", shape) < CLOSED
    check_moments(state, "galore", "full", shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["std", "reverse_std"])
def test_galore_with_bases_of_our_own(case, shape):
    options, side = settings("galore", case), SIDES[case]
    projector = aligned(lro.projectors.svd(), bases("galore", case, shape, side))
    tx = lro.galore(LR, 4, refresh=PERIOD, side=side, projector=projector)
    Ws, _ = run(tx, shape, decay_after=LR * options["weight_decay"])
    # Vectors of the long side lose more digits in float32, by the gap between the fourth and the fifth value.
    assert error(Ws, "galore", case, shape) < (OWN if case == "std" else 5 * OWN)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_kernel_of_flax_is_the_transpose(shape):
    projector = replayed(bases("galore", "std", shape))
    Ws, _ = run(lro.galore(LR, 4, refresh=PERIOD, projector=projector), shape, flax=True, decay_after=LR * 0.1)
    assert error(Ws, "galore", "std", shape) < CLOSED


# --- Fira -------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["alpha025", "alpha1"])
def test_fira(case, shape, own):
    options, recorded = settings("fira", case), bases("fira", case, shape)
    projector = aligned(lro.projectors.svd(), recorded) if own else replayed(recorded)
    tx = lro.fira(LR, 4, refresh=PERIOD, scale=options["alpha"], projector=projector, as_released=True)
    Ws, state = run(tx, shape, decay_after=LR * options["weight_decay"])
    assert error(Ws, "fira", case, shape) < (OWN if own else CLOSED)
    if not own:
        check_moments(state, "fira", case, shape)
        (norm,) = [x for x in [optax.tree.get(state, "residual")["kernel"]]]
        np.testing.assert_allclose(norm, array("fira", case, shape, "residual_norm")[-1], rtol=CLOSED)


def test_fira_as_published_leaves_out_the_part_inside():
    """With alpha = 1 the authors' residual is the one of the paper."""
    projector = replayed(bases("fira", "alpha1", "wide"))
    Ws, _ = run(lro.fira(LR, 4, refresh=PERIOD, scale=1.0, projector=projector), "wide", decay_after=LR * 0.05)
    assert error(Ws, "fira", "alpha1", "wide") < CLOSED


# --- FRUGAL -----------------------------------------------------------------------------

RESIDUALS = {
    "svd_sign": lro.residuals.sign(),
    "svd_sgd": lro.residuals.sgd(0.5),
    "svd_no": lro.residuals.drop(),
    "svd_keep": lro.residuals.sign(),
    "random_sign": lro.residuals.sign(),
    "randperm_sign": lro.residuals.sign(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", RESIDUALS)
def test_frugal_in_subspaces(case, shape):
    options = settings("frugal", case)
    carry = "keep" if case == "svd_keep" else "reset_count"
    tx = lro.frugal(
        LR,
        3,
        refresh=PERIOD,
        weight_decay=options["weight_decay"],
        projector=replayed(bases("frugal", case, shape)),
        residual=RESIDUALS[case],
        carry=carry,
    )
    Ws, state = run(tx, shape)
    assert error(Ws, "frugal", case, shape) < CLOSED
    check_moments(state, "frugal", case, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["svd_sign", "svd_keep"])
def test_frugal_with_bases_of_our_own(case, shape):
    options = settings("frugal", case)
    projector = aligned(lro.projectors.svd(), bases("frugal", case, shape))
    carry = "keep" if case == "svd_keep" else "reset_count"
    tx = lro.frugal(LR, 3, refresh=PERIOD, weight_decay=options["weight_decay"], projector=projector, carry=carry)
    assert error(run(tx, shape)[0], "frugal", case, shape) < OWN


def chosen(indices):
    """The projector of recorded rows."""
    indices = jnp.asarray(indices, jnp.int32)
    return lro.projectors.coordinates(lambda stored, at: indices[at.count // PERIOD])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case, side", [("rows_sign", "left"), ("columns_sign", "right"), ("randk_sign", "entries")])
def test_frugal_in_coordinates(case, side, shape):
    if side == "entries":
        rows, columns = (array("frugal", case, shape, name) for name in ("index_row", "index_col"))
        index = rows * (20 if shape == "wide" else 12) + columns
    else:
        index = array("frugal", case, shape, "index")
    tx = lro.frugal(LR, index.shape[1], refresh=PERIOD, projector=chosen(index), side=side)
    Ws, state = run(tx, shape)
    assert error(Ws, "frugal", case, shape) < CLOSED
    ours, expected = (
        np.asarray(x) for x in (optax.tree.get(state, "nu")["kernel"], array("frugal", case, shape, "nu")[0])
    )
    np.testing.assert_allclose(np.sort(ours.ravel()), np.sort(expected.ravel()), rtol=0, atol=CLOSED)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_frugal_in_blocks_by_our_own_order(order, shape):
    rank = 3 if shape == "wide" else 5
    tx = lro.frugal(LR, rank, refresh=PERIOD, projector=lro.projectors.blocks(order), side="left")
    assert error(run(tx, shape)[0], "frugal", f"block_{order}", shape) < CLOSED


@pytest.mark.parametrize("shape", SHAPES)
def test_frugal_in_recorded_blocks(shape):
    rank = 3 if shape == "wide" else 5
    active = np.argmax(array("frugal", "block_random", shape, "active"), axis=1)
    index = rank * active[:, None] + np.arange(rank)
    tx = lro.frugal(LR, rank, refresh=PERIOD, projector=chosen(index), side="left")
    assert error(run(tx, shape)[0], "frugal", "block_random", shape) < CLOSED
