"""`resize` and `buckets`: the new widths, the state beside them, and arguments that are refused."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.one_kernel import distance, kernel
from tests.trees import EXACT, apply, loss, same, tree

slow = pytest.mark.slow


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
    assert optax.tree.get(small_state, "trace")["kernel"].Up.shape == (6, 2)
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


# --- buckets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "width", "expected"),
    [
        (5, 5, 8),  # room for one more
        (8, 8, 16),  # full
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (7, 8, 8),
                (8, 40, 16),
                (5, 16, 16),  # half a bucket is not enough to shrink
                (4, 16, 16),
                (3, 16, 8),
                (0, 8, 8),
                (40, 40, 40),  # min(m, n)
            )
        ),
    ],
)
def test_buckets_by_hand(rank: int, width: int, expected: int) -> None:
    basis = jnp.eye(40, width)
    params = {"a": {"kernel": lro.LowRank(basis, jnp.diag(jnp.arange(width) < rank) * 1.0, basis)}}
    assert lro.buckets(params)("a/kernel", (40, 40)) == expected
    assert lro.buckets(params, max_rank=12)("a/kernel", (40, 40)) == min(expected, 12)
    wide, _ = lro.resize(params, None, lro.buckets(params))
    assert wide["a"]["kernel"].width == expected
    assert lro.buckets(wide)("a/kernel", (40, 40)) == expected  # once is enough


@pytest.mark.parametrize("name", ["size", "room"])
@pytest.mark.parametrize(("number", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_buckets_of_no_size_are_refused(name: str, number: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        lro.buckets({"kernel": kernel()}, **{name: number})


def test_resize_to_the_same_width_changes_no_bit() -> None:
    params = {"kernel": kernel((3.0, 2.0), width=4), "bias": jnp.ones(3)}
    state = lro.lowrank_adam(0.1, geometry=lro.Tangent()).init(params)
    before, after = jax.tree.leaves((params, state)), jax.tree.leaves(lro.resize(params, state, 4))
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_resize_takes_no_dense_leaf_for_a_mirror() -> None:
    """A dense leaf of r x r whose path ends like that of a kernel."""
    params = {"kernel": kernel(width=5), "head": {"kernel": jnp.arange(25.0).reshape(5, 5)}}
    for geometry in (lro.Coefficient(), lro.Balanced(), lro.Tangent()):
        tx = lro.lowrank_adam(0.1, geometry=geometry)
        _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        _, smaller = lro.resize(params, state, 3)
        for field in ("mu", "nu"):
            before, after = (optax.tree.get(s, field)["head"]["kernel"] for s in (state, smaller))
            np.testing.assert_array_equal(before, after)


def test_resize_refuses_a_state_that_is_not_ours() -> None:
    params = {"kernel": kernel(width=5)}
    for state in (optax.adam(0.1).init(params), optax.trace(0.9).init(lro.densify(params))):
        with pytest.raises(ValueError, match="found no state of fixed_rank"):
            lro.resize(params, state, 3)
    stray = lro.lowrank_adam(0.1).init({"other": kernel(width=5)})
    with pytest.raises(ValueError, match=r"'.*other'.*no kernel of these parameters"):
        lro.resize(params, stray, 3)
    with pytest.raises(ValueError, match="keeps factors at '1/z/kernel' outside of fixed_rank"):
        lro.resize(params, (lro.lowrank_adam(0.1).init(params), {"z": params}), 3)


def test_resize_refuses_factors_that_are_not_orthonormal() -> None:
    W = kernel(width=5)
    with pytest.raises(ValueError, match=r"columns of U of 'kernel' are not orthonormal.*orthonormalize"):
        lro.resize({"kernel": lro.LowRank(2 * W.U, W.S, W.V)}, None, 3)


@pytest.mark.slow
def test_resize_turns_gradients_that_a_wrapper_accumulated() -> None:
    params = {"kernel": kernel(width=5)}
    tx = optax.MultiSteps(lro.lowrank_adam(0.1), 3)
    state = tx.init(params)
    _, state = tx.update(jax.grad(distance)(params), state, params)
    smaller, state = lro.resize(params, state, 3)
    found = jax.tree.map(lambda x: x.astype(jnp.float64), state.acc_grads)
    # The running mean of one gradient, in float32.
    chex.assert_trees_all_close(found, jax.grad(distance)(smaller), atol=1e-5)
