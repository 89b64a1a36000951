"""Our optimizers under transformations of JAX, and every kind of tree inside them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from tests.trees import apply, close, loss, same, tree

slow = pytest.mark.slow


# --- transformations of jax -----------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(lro.lowrank_heavy_ball(0.1), id="heavy-ball", marks=slow),
        pytest.param(lro.galerkin(optax.sgd(0.1, 0.9), 2), id="galerkin", marks=slow),
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
        return lro.densify(params), lro.diagnostics(state).kernels["kernel"].rank

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
    tx = lro.fixed_rank(optax.sgd(1e-3), geometry=lro.Tangent())
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
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(a)] == [(x.shape, x.dtype) for x in jax.tree.leaves(b)]
    assert len(lro.diagnostics(state).kernels) == (0 if name in ("empty", "no kernel") else 1)
    same(lro.resize(params, state, 4)[1], state)


@pytest.mark.parametrize("name", ["empty", "one kernel", pytest.param("nested", marks=slow)])
def test_every_kind_of_tree_moves(name):
    params, tx = _trees()[name], lro.lowrank_heavy_ball(0.1, momentum=None)
    half = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(lro.densify(p))) / 2 + 0.0  # noqa: E731
    new, _ = apply(tx, params, tx.init(params), objective=half)
    # The gradient of |x|^2 / 2 is x, for a kernel a tangent vector: everything shrinks by the step size.
    close(lro.densify(new), jax.tree.map(lambda x: 0.9 * x, lro.densify(params)))
