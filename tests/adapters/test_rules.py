"""Optimizers of changes: recorded trajectories, formulas in NumPy, and no state for what is not trained."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.adapters.peft_numbers import DATA
from tests.models.linen_models import close, draw

RULES = ("plain", "plus", "precondition", "pro", "frozen_a")


def pair():
    _, delta = lro.adapters.init(jax.random.key(0), {"kernel": draw((8, 6))}, 2, kind="lora", alpha=3)
    move = lambda label, x: x + draw(x.shape, 5) if label == "trained" else x  # noqa: E731
    return jax.tree.map(move, lro.adapters.labels(delta), delta)


class State(NamedTuple):
    count: jax.Array
    mu: jax.Array
    nu: jax.Array


def adam_of_the_released_code(lr, b1, b2, eps):
    """Adam with the deviations of LoRA-Pro's code: a count one ahead, squares of rounded gradients from step 2 on."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return State(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads, state, params=None):
        t = state.count + 2

        def squares(g):
            return jnp.where(state.count > 0, g.astype(jnp.float32).astype(jnp.bfloat16).astype(g.dtype), g) ** 2

        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * squares(g), state.nu, grads)
        step = lambda m, v: -lr * (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)  # noqa: E731
        return jax.tree.map(step, mu, nu), State(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(("name", "shape"), [("bzero", "wide"), ("bnonzero", "tall")])
def test_the_trajectory_of_lora_pro(name: str, shape: str) -> None:
    """Sixteen steps in closed loop with the Adam of the released code as `inner`."""
    file = np.load(DATA / "lora_pro.npz")
    s = json.loads(str(file["meta"]))["cases"][name]
    X, Y, batch = (file[f"problem.{shape}.{key}"] for key in ("X", "Y", "batch"))
    A, B, W0 = (file[f"{name}.{shape}.{key}"] for key in ("A", "B", "W0"))
    params = {"kernel": jnp.asarray(W0.T)}
    scale = jnp.asarray(s["scaling"])
    delta = {"kernel": lro.adapters.LoRA(jnp.asarray(A[0].T), jnp.asarray(B[0].T), scale)}
    inner = adam_of_the_released_code(s["lr"], s["beta1"], s["beta2"], s["eps"])
    tx = lro.adapters.optimizer(inner, rule="pro", damping=s["delta"])
    state = tx.init(delta)

    @jax.jit
    def step(delta, state, x, y):
        loss = lambda d: jnp.sum((x @ lro.adapters.attach(params, d)["kernel"] - y) ** 2) / 48  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(delta), state, delta)
        return optax.apply_updates(delta, updates), state

    for t in range(16):
        delta, state = step(delta, state, jnp.asarray(X[batch[t]]), jnp.asarray(Y[batch[t]]))
        # Closed loop: the first steps from B = 0 divide by B B^T of size 1e-4.
        np.testing.assert_allclose(delta["kernel"].A.T, A[t + 1], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(delta["kernel"].B.T, B[t + 1], rtol=1e-9, atol=1e-9)
    assert delta["kernel"].scale == scale


def adam_of_transformers(lr, eps=1e-6):
    """Adam whose eps stands beside the root of the uncorrected second moment."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return State(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads, state, params=None):
        t = state.count + 1
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state.nu, grads)
        size = -lr * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        return jax.tree.map(lambda m, v: size * m / (jnp.sqrt(v) + eps), mu, nu), State(t, mu, nu)

    return optax.GradientTransformation(init, update)


OF_PEFT = {
    "riemannian_sgd": lro.adapters.optimizer(optax.sgd(0.05), rule="precondition", damping=1e-2),
    "riemannian_adamw": lro.adapters.optimizer(optax.adamw(0.02, weight_decay=0.1), rule="precondition", damping=1e-2),
    "loraplus": lro.adapters.optimizer(optax.adam(0.01), rule="plus", ratio=4.0),
    "lorafa": lro.adapters.optimizer(adam_of_transformers(0.02), rule="frozen_a", damping=1e-8),
}


@pytest.mark.parametrize("name", OF_PEFT)
def test_the_trajectories_of_optimizers_of_peft(name: str) -> None:
    """Eight steps in closed loop."""
    file, tx = np.load(DATA / "more.npz"), OF_PEFT[name]
    x, y, base, A, B = (jnp.asarray(file[f"{name}.{key}"]) for key in ("x", "y_target", "base_weight", "A", "B"))
    params, delta = {"kernel": base.T}, {"kernel": lro.adapters.LoRA(A[0].T, B[0].T, jnp.asarray(2.0))}
    state = tx.init(delta)

    @jax.jit
    def step(delta, state):
        loss = lambda d: jnp.mean((x @ lro.adapters.attach(params, d)["kernel"] - y) ** 2)  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(delta), state, delta)
        return optax.apply_updates(delta, updates), state

    for t in range(8):
        delta, state = step(delta, state)
        # Roundings of float64 through eight normalised steps.
        np.testing.assert_allclose(delta["kernel"].A.T, A[t + 1], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(delta["kernel"].B.T, B[t + 1], rtol=1e-9, atol=1e-9)


def test_formulas_of_one_step() -> None:
    """Gradient descent of step 1, on stacked kernels with several axes, against each kernel as matrices in NumPy."""
    where = lambda path, shape: lro.Axes(1, 1)  # noqa: E731
    _, delta = lro.adapters.init(
        jax.random.key(0), {"kernel": draw((3, 8, 2, 3))}, 2, kind="lora", alpha=3, where=where
    )
    fill = lambda x, seed: x + draw(x.shape, seed)  # noqa: E731
    d = delta["kernel"]
    delta = {"kernel": lro.adapters.LoRA(fill(d.A, 1), fill(d.B, 2), d.scale)}
    grads = {"kernel": lro.adapters.LoRA(draw(d.A.shape, 3), draw(d.B.shape, 4), jnp.zeros_like(d.scale))}

    def expected(rule, gA, gB, A, B):
        eye = np.eye(2)
        if rule == "plus":
            return gA, 4.0 * gB
        if rule == "precondition":
            return gA @ np.linalg.inv(B @ B.T + 0.1 * eye), np.linalg.inv(A.T @ A + 0.1 * eye) @ gB
        if rule == "frozen_a":
            return 0 * gA, np.linalg.inv(A.T @ A + 0.1 * eye) @ gB / 1.5**2
        return gA, gB

    for rule in ("plain", "plus", "precondition", "frozen_a"):
        tx = lro.adapters.optimizer(optax.sgd(1.0), rule=rule, ratio=4.0, damping=0.1)
        updates = tx.update(grads, tx.init(delta), delta)[0]["kernel"]
        assert not updates.scale.any()
        for i in range(3):
            g, x = grads["kernel"], delta["kernel"]
            flat = [
                np.asarray(y[i]).reshape(shape)
                for y, shape in ((g.A, (8, 2)), (g.B, (2, 6)), (x.A, (8, 2)), (x.B, (2, 6)))
            ]
            want = expected(rule, *flat)
            np.testing.assert_allclose(-updates.A[i], want[0], rtol=1e-10)
            np.testing.assert_allclose(-updates.B[i].reshape(2, 6), want[1], rtol=1e-10)


def test_lora_pro_moves_the_kernel_along_the_projected_gradient() -> None:
    """With gradient descent inside, `s (dA B + A dB)` is the part of G in the tangent space of the product."""
    delta = pair()
    G = np.asarray(draw((8, 6), 9))
    d = delta["kernel"]
    A, B, s = np.asarray(d.A), np.asarray(d.B), float(d.scale)
    grads = {"kernel": lro.adapters.LoRA(jnp.asarray(s * G @ B.T), jnp.asarray(s * A.T @ G), jnp.zeros(()))}
    tx = lro.adapters.optimizer(optax.sgd(1.0), rule="pro", damping=0.0)
    u = tx.update(grads, tx.init(delta), delta)[0]["kernel"]
    left, right = A @ np.linalg.pinv(A), np.linalg.pinv(B) @ B
    np.testing.assert_allclose(-s * (u.A @ B + A @ u.B), G @ right + left @ G @ (np.eye(6) - right), atol=1e-10)


@pytest.mark.parametrize("kind", ["lora", "dora", "lowrank", "core", "vera", "loha", "lokr", "fourier", "hra"])
def test_nothing_but_trained_arrays_has_state(kind: str) -> None:
    params = {"a": {"kernel": draw((8, 6))}, "b": {"kernel": draw((6, 8))}}
    params, delta = lro.adapters.init(jax.random.key(0), params, 2, kind=kind, alpha=3)
    tx = lro.adapters.optimizer(optax.adamw(0.1, weight_decay=0.5))
    trained = sum(
        sum(x.size for x in jax.tree.leaves(y))
        for label, y in zip(
            jax.tree.leaves(lro.adapters.labels(delta)),
            jax.tree.structure(lro.adapters.labels(delta)).flatten_up_to(delta),
            strict=True,
        )
        if label == "trained"
    )
    state = tx.init(delta)
    # And the counts; on the manifold also the rank and what `diagnostics` shows, of two kernels.
    assert sum(x.size for x in jax.tree.leaves(state)) - 2 * trained <= (3 if kind != "lowrank" else 13)
    grads = jax.tree.map(jnp.ones_like, delta)
    updates, _ = tx.update(grads, state, delta)

    def check(label, u):
        assert all(bool(jnp.any(x)) == (label == "trained") for x in jax.tree.leaves(u))

    jax.tree.map(check, lro.adapters.labels(delta), updates)


@pytest.mark.parametrize("rule", [*RULES, "manifold"])
def test_every_rule_fits_a_change(rule: str) -> None:
    """A target of the rank of the change, under jit and the wrappers of Optax."""
    kind = "lowrank" if rule == "manifold" else "lora"
    target = draw((8, 2), 1) @ draw((2, 6), 2)
    W0 = draw((8, 6))
    params, delta = lro.adapters.init(jax.random.key(0), {"kernel": W0}, 2, kind=kind)

    def loss(delta):
        return jnp.mean((jnp.eye(8) @ lro.adapters.attach(params, delta)["kernel"] - W0 - target) ** 2)

    tx = lro.adapters.optimizer(optax.adam(optax.cosine_decay_schedule(0.1, 400)), rule=rule, ratio=2.0)
    tx = optax.apply_if_finite(tx, 3)

    @jax.jit
    def train(delta):
        def step(carry, _):
            delta, state = carry
            updates, state = tx.update(jax.grad(loss)(delta), state, delta)
            return (optax.apply_updates(delta, updates), state), None

        return jax.lax.scan(step, (delta, tx.init(delta)), None, 400)[0][0]

    after = train(delta)
    least = 0.0
    if rule == "frozen_a":  # Only the part of the target in the range of A can be fitted.
        A = delta["kernel"].A
        close(after["kernel"].A, A)
        least = jnp.mean((target - A @ jnp.linalg.pinv(A) @ target) ** 2)
    assert loss(after) - least < 1e-2 * (loss(delta) - least)


@pytest.mark.parametrize("rule", [*RULES, "manifold"])
def test_wrappers_of_optax(rule: str) -> None:
    """Accumulated gradients are the mean gradient, hyperparameters are arrays, and states map like their parameters."""
    kind = "lowrank" if rule == "manifold" else "dora" if rule == "pro" else "lora"
    _, delta = lro.adapters.init(jax.random.key(0), {"kernel": draw((8, 6))}, 2, kind=kind, alpha=3)
    delta = jax.tree.map(lambda x: x + 0.1 if rule != "manifold" else x, delta)
    tx = lro.adapters.optimizer(optax.adam(1e-2), rule=rule, ratio=3.0, damping=1e-2)
    grads = jax.tree.map(lambda x: draw(x.shape, 3), delta)
    once = tx.update(grads, tx.init(delta), delta)[0]

    several = optax.MultiSteps(tx, 2)
    state = several.init(delta)
    update = jax.jit(several.update)
    for factor in (0.5, 1.5):
        updates, state = update(jax.tree.map(lambda g, by=factor: by * g, grads), state, delta)
    close(updates, once)

    make = lambda ratio, damping: lro.adapters.optimizer(optax.adam(1e-2), rule, ratio=ratio, damping=damping)  # noqa: E731
    injected = optax.inject_hyperparams(make)(ratio=3.0, damping=1e-2)
    close(injected.update(grads, injected.init(delta), delta)[0], once, 1e-6)  # numbers in float32

    counted = []
    optax.tree.map_params(tx, counted.append, tx.init(delta))
    assert counted


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"rule is one of \['frozen_a', .*, got 'rotate'"):
        lro.adapters.optimizer(optax.sgd(1.0), rule="rotate")
    lora, (_, lowrank) = pair(), lro.adapters.init(jax.random.key(0), {"kernel": draw((8, 6))}, 2)
    with pytest.raises(ValueError, match="rule 'pro' is for changes of kind 'lora' or 'dora', and the tree has none"):
        lro.adapters.optimizer(optax.sgd(1.0), rule="pro").init(lowrank)
    with pytest.raises(ValueError, match="rule 'manifold' is for changes of kind 'lowrank', and the tree has none"):
        lro.adapters.optimizer(optax.sgd(1.0), rule="manifold").init(lora)
