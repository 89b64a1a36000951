"""A geometry of one's own plugs in with public pieces only."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.geometry import Geometry, Settled

# --- weights without negative entries --------------------------------------------------------------------------------


class NonNegative(Geometry):
    """Matrices without negative entries: a step is followed by the projection that clips them."""

    def owns(self, leaf: Any) -> bool:
        return getattr(leaf, "ndim", 0) == 2

    def settle(self, frame: Any, proposal: jax.Array, rank: None) -> Settled:
        return Settled(jnp.maximum(proposal, 0.0), (), (), ())


# --- rotations: a frame of its own, something carried beside the moments, diagnostics ---------------------------------


class RotationFrame(NamedTuple):
    grad: jax.Array
    weight: jax.Array
    rotation: jax.Array
    steps: jax.Array


class Rotations(Geometry):
    """Orthogonal matrices Q. Coordinates are the skew part of Q^T G; a step goes along the Cayley transform."""

    def owns(self, leaf: Any) -> bool:
        return getattr(leaf, "ndim", 0) == 2

    def init(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((), jnp.int32), jnp.zeros((), weight.dtype)

    def frame(self, weight: jax.Array, grad: jax.Array, aux: jax.Array) -> RotationFrame:
        inside = weight.T @ grad
        return RotationFrame((inside - inside.T) / 2, jnp.zeros_like(weight), weight, aux)

    def propose(self, frame: RotationFrame, step: jax.Array) -> jax.Array:
        eye, half = jnp.eye(len(step), dtype=step.dtype), (step - step.T) / 4
        return frame.rotation @ jnp.linalg.solve(eye - half, eye + half)

    def settle(self, frame: RotationFrame, proposal: jax.Array, rank: None) -> Settled:
        return Settled(proposal, frame.steps + 1, jnp.linalg.norm(frame.grad), ())


# --- both, under whatever inner transformation ------------------------------------------------------------------------


def train(geometry: Geometry, params: Any, loss: Any, inner: Any, steps: int = 200) -> Any:
    tx = lro.in_coordinates(inner, geometry)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


INNER = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.05, 0.8),
    "adam": optax.adam(optax.cosine_decay_schedule(0.1, 200)),
    "masked": optax.chain(optax.masked(optax.trace(0.5), {"a": True, "b": False, "bias": False}), optax.scale(-0.05)),
}


@pytest.mark.parametrize("inner", INNER)
def test_weights_without_negative_entries(inner: str) -> None:
    """The minimiser of a squared distance is the target without its negative entries."""
    rng = np.random.default_rng(0)
    targets = {"a": rng.standard_normal((5, 4)), "b": rng.standard_normal((5, 4)), "bias": rng.standard_normal(3)}
    loss = lambda p: sum(jnp.sum((p[k] - targets[k]) ** 2) / 2 for k in targets)  # noqa: E731
    params, _ = train(NonNegative(), jax.tree.map(lambda x: jnp.ones(x.shape), targets), loss, INNER[inner])
    for name, target in targets.items():
        expected = target if name == "bias" else np.maximum(target, 0)
        np.testing.assert_allclose(params[name], expected, atol=1e-3)
        assert name == "bias" or np.all(params[name] >= 0)


@pytest.mark.parametrize("inner", ["sgd", "momentum", "adam"])
def test_rotations(inner: str) -> None:
    """The nearest rotation to a matrix is its polar factor."""
    rng = np.random.default_rng(1)
    U, _, Vt = np.linalg.svd(rng.standard_normal((3, 3)))
    sign = np.linalg.det(U @ Vt)
    U[:, -1] *= sign  # of determinant 1, which the rotations from the identity have
    targets = {"a": (U * [2.0, 1.5, 1.0]) @ Vt, "b": np.eye(3)}
    loss = lambda p: sum(jnp.sum((p[k] - targets[k]) ** 2) / 2 for k in targets)  # noqa: E731
    params, state = train(Rotations(), {k: jnp.eye(3) for k in targets}, loss, INNER[inner], 400)
    np.testing.assert_allclose(params["a"], U @ Vt, atol=1e-3)
    np.testing.assert_allclose(params["a"].T @ params["a"], np.eye(3), atol=1e-12)
    loop = state.inner_state
    assert {k: int(x) for k, x in loop.aux.items()} == {"a": 400, "b": 400}
    assert float(loop.info["a"]) < 1e-2


def test_what_a_geometry_does_not_write_is_that_of_ordinary_leaves() -> None:
    """A geometry of no methods but `owns` trains as plain Optax does."""

    class Plain(Geometry):
        def owns(self, leaf: Any) -> bool:
            return getattr(leaf, "ndim", 0) == 2

    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    loss = lambda p: sum(jnp.sum(x**4) for x in p.values())  # noqa: E731
    inner = optax.adamw(0.01)
    ours, _ = train(Plain(), params, loss, inner, 20)
    state, plain = inner.init(params), params
    for _ in range(20):
        updates, state = inner.update(jax.grad(loss)(plain), state, plain)
        plain = optax.apply_updates(plain, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), ours, plain)
