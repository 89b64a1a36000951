"""Flax's serialisation of changes, banks, kernels in integers, and train states with adapters."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import lowrank_optax as lro
from tests.adapters.every_kind import NAMES, moved, start
from tests.models.linen_models import draw

ad = lro.adapters


def comes_back(tree, target):
    """The tree through bytes, into a target with other numbers."""
    restored = serialization.from_bytes(target, serialization.to_bytes(tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    assert all(
        jnp.asarray(x).dtype == jnp.asarray(y).dtype
        for x, y in zip(*map(jax.tree.leaves, (restored, tree)), strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_changes_of_every_kind(name: str) -> None:
    params, delta = start(name, {"dense": {"kernel": draw((9, 18))}})
    tx = ad.optimizer(optax.adam(0.1))
    state = tx.init(delta)
    other = jax.tree.map(jnp.zeros_like, (delta, state))
    comes_back((moved(delta), jax.tree.map(lambda x: x + 1, state)), other)
    comes_back(ad.attach(params, delta), ad.attach(params, other[0]))


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group": 3}])
def test_kernels_in_integers(options: dict) -> None:
    where = lambda path, shape: lro.Axes(1, 2)  # noqa: E731
    tree = ad.quantize({"kernel": draw((2, 3, 3, 4))}, where=where, **options)
    comes_back(tree, jax.tree.map(jnp.zeros_like, tree))


def test_a_train_state_with_adapters() -> None:
    model = nn.Dense(18)
    _, delta = start("dora", {"kernel": draw((9, 18))})
    tx = ad.optimizer(optax.adam(0.1), rule="plus")
    state = TrainState.create(apply_fn=lro.linen.apply(model), params=delta, tx=tx)
    comes_back(state.apply_gradients(grads=jax.tree.map(jnp.ones_like, delta)), state)


def test_a_kind_of_ones_own_and_another_kind() -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Shift(ad.Change):
        shift: jax.Array

    comes_back({"kernel": Shift(jnp.arange(3.0))}, {"kernel": Shift(jnp.zeros(3))})
    _, delta = start("hra", {"kernel": draw((9, 18))})
    with pytest.raises(ValueError, match=r"a Householder node is restored from \('U',\), got \['shift'\]"):
        serialization.from_state_dict(delta["kernel"], {"shift": np.zeros(3)})
