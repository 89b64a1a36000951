"""A small tree with a kernel and a bias, its loss, compiled steps, and comparisons of trees."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

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
    r = jnp.eye(W.width)
    for basis in (W.U, W.V):
        np.testing.assert_allclose(basis.T @ basis, r, atol=atol)
