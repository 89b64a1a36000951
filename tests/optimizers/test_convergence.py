"""Every optimizer converges on small targets, with ordinary parameters and with factored kernels.

The targets are those of the suite for contributed optimizers in Optax (`optax.contrib`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.optimizers.cases import CASES, is_galerkin, names

MATRIX = jnp.array([[3.0, -2.0], [1.0, 4.0]])


VECTOR = jnp.array([1.0, -1.0, 1.0])


BIAS = jnp.arange(4.0)


RANK_TWO = jnp.asarray(
    np.array([[1.0, 0], [0, 1], [1, 1], [1, -1], [0, 2]]) @ np.array([[2.0, 1, 0, -1], [0, 1, 1, 1]])
)


def square(final):
    return lambda x: jnp.sum(jnp.square(lro.densify(x) - final))


def rosenbrock(x):
    # The valley is ten times as narrow as it is curved (a hundred in the suite of Optax, which takes 30 000 steps);
    # 0.2 brings its steep direction near the curvature of the other targets, so that one step size serves all.
    return 0.2 * ((1 - x[0]) ** 2 + 10 * (x[1] - x[0] ** 2) ** 2)


def mixed(kernel):
    return lambda p: square(BIAS)(p["bias"]) + square(kernel)(p["kernel"])


# Name to the initial value, the final value, and the objective; objectives are added up and run as one tree.
PLAIN = {
    "parabola": (jnp.array([-1.0, 10.0, 1.0]), VECTOR, square(VECTOR)),
    "rosenbrock": (jnp.zeros(2), jnp.ones(2), rosenbrock),
    "matrix": (jnp.zeros((2, 2)), MATRIX, square(MATRIX)),
    "mixed": (
        {"bias": jnp.zeros(4), "kernel": jnp.zeros((5, 4))},
        {"bias": BIAS, "kernel": RANK_TWO},
        mixed(RANK_TWO),
    ),
}


def kernels():
    start = jax.random.normal(jax.random.key(1), (5, 4))
    mixed_start = {"bias": jnp.zeros(4), "kernel": lro.factorize(start, 2, max_rank=4)}
    return {
        # From beside zero, which is no matrix of rank 1.
        "rosenbrock kernel": (
            lro.factorize(jnp.array([[0.5], [0.0]]), 1),
            jnp.ones((2, 1)),
            lambda W: rosenbrock(W.to_dense()[:, 0]),
        ),
        "mixed kernel": (mixed_start, {"bias": BIAS, "kernel": RANK_TWO}, mixed(RANK_TWO)),
    }


def more_kernels():
    return {
        "parabola kernel": (lro.factorize(jnp.array([[-1.0, 10.0, 1.0]]), 1), VECTOR[None], square(VECTOR[None])),
        # Full rank, from the zero kernel, which may use its whole width.
        "matrix kernel": (lro.factorize(jnp.zeros((2, 2)), 2), MATRIX, square(MATRIX)),
    }


# With coefficient momentum Adam knows no second moment for the directions that are new in a step, and moves there
# by (1 - b1) / sqrt(1 - b2) = 3 step sizes whatever the gradient. A narrow valley wants that to be small.
LEARNING_RATES = {"adam": 0.01, "rmsprop": 0.01, "adabelief": 0.01, "lion": 0.01, "muon": 0.02}


def converge(name, problems):
    h = next((h for prefix, h in LEARNING_RATES.items() if name.startswith(prefix)), 0.05)
    steps = 10_000 if is_galerkin(name) else 5_000  # Every second step of a galerkin loop moves the bases alone.
    # The schedule ends at zero: methods whose steps do not shrink with the gradient need that to converge.
    tx = CASES[name](optax.cosine_decay_schedule(h, steps))
    params = {k: start for k, (start, _, _) in problems.items()}
    loss = lambda params: sum(f(params[k]) for k, (_, _, f) in problems.items())  # noqa: E731
    state = optax.tree.map_params(tx, lambda x: x, tx.init(params))

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=steps)[0]

    params, state = run(params, state)
    for k, (_, final, _) in problems.items():
        for got, want in zip(jax.tree.leaves(lro.densify(params[k])), jax.tree.leaves(final), strict=True):
            # The tolerance of the suite of Optax; the decay of 1e-4 in adamw moves the limits by less.
            np.testing.assert_allclose(got, want, rtol=3e-2, atol=3e-2, err_msg=k)
    for W in jax.tree.leaves(params, is_leaf=lro.is_lowrank):
        for basis in (W.U, W.V) if lro.is_lowrank(W) else ():
            # Every step orthonormalises anew, so rounding does not add up: a small multiple of eps = 2e-16.
            np.testing.assert_allclose(basis.T @ basis, np.eye(W.width), atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", names("heavy-ball"))
def test_converges(name):
    problems = PLAIN | kernels()
    if is_galerkin(name):
        del problems["rosenbrock kernel"]  # Too small for factors of twice its rank.
    converge(name, problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "heavy-ball-tangent"])
def test_converges_at_full_rank(name):
    converge(name, more_kernels())
