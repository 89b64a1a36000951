"""Train states of Flax, through steps, through Orbax and through pickle."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import lowrank_optax as lro
from tests.trees import TARGET, loss, orthonormal, same, tree


@pytest.fixture(scope="module")
def train_state():
    params, tx = tree(), optax.chain(lro.lowrank_adamw(0.1, weight_decay=0.01))
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
