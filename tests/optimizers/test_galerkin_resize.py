"""A loop of galerkin keeps the room that its bases need, and is not cut in its middle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro


def start(max_rank: int):
    """With a linear rule, so that the choice of bases does not count."""
    params = lro.factorize({"kernel": jax.random.normal(jax.random.key(0), (8, 9))}, 2, max_rank=max_rank)
    tx = lro.galerkin(optax.sgd(0.01, momentum=0.9), local_steps=2)
    return params, tx, tx.init(params)


def step(params, tx, state):
    target = jax.random.normal(jax.random.key(1), (8, 9))
    grads = jax.grad(lambda p: jnp.sum((p["kernel"].to_dense() - target) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("max_rank", [4, 6])
def test_resize_by_default_leaves_twice_the_rank(max_rank):
    params, _, state = start(max_rank)
    new, _ = lro.resize(params, state)
    assert new["kernel"].width == 4


@pytest.mark.parametrize("rank", [2, 3])
def test_a_width_without_room_is_refused(rank):
    params, _, state = start(4)
    with pytest.raises(ValueError, match="twice the rank, 4 for 'kernel'"):
        lro.resize(params, state, rank)


def test_buckets_leave_the_room_that_they_are_told():
    params, _, state = start(4)
    with pytest.raises(ValueError, match="twice the rank"):
        lro.resize(params, state, lro.buckets(params, 1))
    new, _ = lro.resize(params, state, lro.buckets(params, 1, room=2))
    assert new["kernel"].width == 5  # twice the rank and one to grow


@pytest.mark.parametrize("rank", [None, 4, 6, 8])
def test_a_resize_inside_a_loop_is_refused_and_between_loops_changes_nothing(rank):
    params, tx, state = start(6)
    for phase in range(3):
        if phase:
            with pytest.raises(ValueError, match="inside a loop of galerkin"):
                lro.resize(params, state, rank)
        params, state = step(params, tx, state)
    assert int(optax.tree.get(state, "phase")) == 0
    other, other_state = lro.resize(params, state, rank)
    for _ in range(3):
        params, state = step(params, tx, state)
        other, other_state = step(other, tx, other_state)
    np.testing.assert_allclose(params["kernel"].to_dense(), other["kernel"].to_dense(), atol=1e-6)
