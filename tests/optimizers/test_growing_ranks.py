"""`resize(..., grow=True)` raises ranks between two steps, under geometries that keep ranks within a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from tests.one_kernel import run

TARGET = jax.random.normal(jax.random.key(1), (12, 9))
OPTIMIZERS = {
    "balanced": lambda: lro.lowrank_adam(0.03),
    "tangent": lambda: lro.lowrank_adam(0.03, geometry=lro.Tangent()),
    "coefficient": lambda: lro.lowrank_adam(0.03, geometry=lro.Coefficient()),
    "heavy ball": lambda: lro.lowrank_heavy_ball(0.1, 0.5),
    "muon": lambda: lro.lowrank_muon(0.1),
    "accumulated": lambda: optax.MultiSteps(lro.lowrank_adam(0.03), 2),
}


def best_loss(rank):
    """The least squared error of a rank, by Eckart and Young."""
    return 0.5 * np.sum(np.linalg.svd(np.asarray(TARGET), compute_uv=False)[rank:] ** 2)


def loss(params):
    return 0.5 * jnp.sum((params["kernel"].to_dense() - TARGET) ** 2)


@pytest.mark.parametrize("blocks", [None, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_grow_to_the_width_and_are_used(name, blocks):
    if blocks and name == "coefficient":
        pytest.skip("grids have no coefficient geometry")
    tx = OPTIMIZERS[name]()
    params = {"kernel": lro.factorize(jax.random.normal(jax.random.key(0), (12, 9)), 2, blocks=blocks)}
    width = params["kernel"].width
    params, state = run(tx, params, tx.init(params), 4, loss)
    new, state = lro.resize(params, state, 2 * width, grow=True)
    np.testing.assert_allclose(new["kernel"].to_dense(), params["kernel"].to_dense(), atol=1e-5)
    new, state = run(tx, new, state, 120, loss)
    assert np.all(np.asarray(lro.ranks(new)["kernel"]) == 2 * width)
    assert loss(new) < 0.8 * best_loss(2)  # out of reach of one matrix of rank 2


def test_columns_that_were_there_unused_come_into_use():
    params = {"kernel": lro.factorize(jax.random.normal(jax.random.key(0), (12, 9)), 2, max_rank=4)}
    tx = lro.lowrank_adam(0.03)
    params, state = run(tx, params, tx.init(params), 4, loss)
    assert lro.ranks(params)["kernel"] == 2
    params, state = lro.resize(params, state, 4, grow=True)
    params, state = run(tx, params, state, 4, loss)
    assert lro.ranks(params)["kernel"] == 4


def test_without_grow_a_fixed_rank_stays():
    params = {"kernel": lro.factorize(jax.random.normal(jax.random.key(0), (12, 9)), 2)}
    tx = lro.lowrank_adam(0.03)
    params, state = lro.resize(params, tx.init(params), 4)
    params, _ = run(tx, params, state, 4, loss)
    assert lro.ranks(params)["kernel"] == 2


def test_galerkin_grows_to_half_of_its_width():
    params = {"kernel": lro.factorize(jax.random.normal(jax.random.key(0), (12, 9)), 2, max_rank=4)}
    tx = lro.galerkin(optax.adam(0.03))
    params, state = run(tx, params, tx.init(params), 4, loss)
    params, state = lro.resize(params, state, 8, grow=True)
    params, state = run(tx, params, state, 8, loss)
    assert lro.ranks(params)["kernel"] == 4


def test_grow_without_a_state_is_refused():
    params = {"kernel": lro.factorize(jnp.eye(6), 2)}
    with pytest.raises(ValueError, match="grow=True raises the ranks that an optimizer state holds"):
        lro.resize(params, None, 4, grow=True)


def test_nnx_grows_in_place():
    model = nnx.Linear(9, 6, rngs=nnx.Rngs(0))
    lro.nnx.factorize(model, rank=2)
    optimizer = nnx.Optimizer(model, lro.lowrank_adam(0.03), wrt=nnx.Param)
    lro.nnx.resize(model, optimizer, 4, grow=True)
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (20, 9))
        optimizer.update(model, nnx.grad(lambda model, x=x: jnp.mean((model(x) - x[:, :6]) ** 2))(model))
    assert lro.ranks(nnx.to_pure_dict(nnx.state(model)))["kernel"] == 4
