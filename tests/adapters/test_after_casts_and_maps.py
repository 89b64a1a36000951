"""Changes after a cast, factors without full rank, and states of optimizers through maps of Optax and of nnx."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from tests.adapters.every_kind import NAMES, moved, start
from tests.models.linen_models import close, draw

KEY = jax.random.key(0)
ad = lro.adapters
WITH_POSITIONS = ("fourier", "rosa", "shira")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", NAMES)
def test_a_cast_is_close_or_refused(kind: str, dtype) -> None:
    """Positions of entries have no place in two bytes; all else is rounded."""
    params, delta = start(kind, {"kernel": draw((9, 18))})
    delta = moved(delta)
    cast = jax.tree.map(lambda x: x.astype(dtype), delta)
    if kind not in WITH_POSITIONS:
        W = ad.merge(params, delta)["kernel"]
        assert jnp.linalg.norm(ad.merge(params, cast)["kernel"] - W) < 0.05 * jnp.linalg.norm(W)
        return
    at_once = f"the positions of a change of kind '.*' are in {jnp.dtype(dtype)}, which moved them: cast the arrays"
    with pytest.raises(ValueError, match=at_once):
        ad.merge(params, cast)
    with pytest.raises(ValueError, match=at_once):
        jnp.ones((2, 9)) @ ad.attach(params, cast)["kernel"]
    labels = ad.labels(delta)
    trained = jax.tree.map(lambda label, x: x.astype(dtype) if label == "trained" else x, labels, delta)
    assert bool(jnp.isfinite(ad.merge(params, trained)["kernel"]).all())


@pytest.mark.parametrize("rule", ["precondition", "frozen_a", "pro", "rite", "muon"])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("factor", ["zero", "of rank one", "of full rank"])
def test_factors_without_full_rank_have_finite_steps(rule: str, damping: float, factor: str) -> None:
    """In single precision, in which a small damping does not lift the smallest eigenvalues above rounding."""
    key, r = jax.random.key(2), 8
    full = jax.random.normal(key, (r, 16), jnp.float32)
    one = jnp.outer(jnp.arange(r, dtype=jnp.float32), jnp.ones(16, jnp.float32))
    few = {"zero": jnp.zeros_like(full), "of rank one": one, "of full rank": full}[factor]
    G = jax.random.normal(jax.random.key(3), (16, 16), jnp.float32)
    for A, B in ((full.T, few), (few.T, full)):
        delta = {"kernel": ad.LoRA(A, B, jnp.ones((), jnp.float32))}
        grads = {"kernel": ad.LoRA(G @ B.T, A.T @ G, jnp.zeros((), jnp.float32))}
        tx = ad.optimizer(optax.sgd(1.0), rule=rule, damping=damping)
        updates = tx.update(grads, tx.init(delta), delta)[0]["kernel"]
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))
        if rule == "precondition" and factor == "of full rank":  # the inverse of the formula
            eye = damping * jnp.eye(r)
            close(updates.A, -grads["kernel"].A @ jnp.linalg.inv(B @ B.T + eye), 1e-3)
            close(updates.B, -jnp.linalg.inv(A.T @ A + eye) @ grads["kernel"].B, 1e-3)


@pytest.mark.parametrize("score", ["adalora", "sensitivity"])
@pytest.mark.parametrize("steps", [2, 5])
def test_states_of_budgets_through_maps(score: str, steps: int) -> None:
    """Moments and sensitivities are forgotten; the choice of components, which is fixed in the end, is not."""
    where = lambda path, shape: lro.Axes(len(shape) - 2, 1)  # noqa: E731
    params = {"a": {"kernel": draw((6, 5))}, "b": {"kernel": draw((2, 4, 6))}}
    _, delta = ad.init(KEY, params, 3, kind="adalora", where=where)
    delta = {"changes": moved(delta), "head": draw((3,))}
    tx = ad.optimizer(optax.adam(0.1), rank=ad.budget(4, begin=1, end=3, score=score))
    state = tx.init(delta)
    for seed in range(steps):
        grads = jax.tree.map(lambda x, seed=seed: draw(x.shape, 20 + seed), delta)
        updates, state = tx.update(grads, state, delta)
        delta = optax.apply_updates(delta, updates)
    counts = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.int32]  # noqa: E731
    for mapped in (ad.forget(tx, state), optax.tree.map_params(tx, lambda x: 0 * x, state)):
        assert jax.tree.structure(mapped) == jax.tree.structure(state)
        close(counts(mapped), counts(state), 0)
        np.testing.assert_array_equal(mapped.kept, state.kept)
        assert not any(x.any() for x in jax.tree.leaves(mapped) if jnp.issubdtype(x.dtype, jnp.floating))
    kept = int(state.kept.sum())
    assert kept == 4 if steps == 5 else kept == 9
    close(int(sum(jnp.count_nonzero(x["kernel"].E) for x in delta["changes"].values())), kept, 0)


RULES = ("plain", "plus", "precondition", "pro", "frozen_a", "muon", "rite", "manifold")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pure", [False, True], ids=["variables", "arrays"])
def test_states_of_nnx_get_updates_of_their_own_form(rule: str, pure: bool) -> None:
    """Variables where the gradients have variables, so that `optax.apply_updates` adds them, as with plain Optax."""
    model = nnx.Linear(6, 6, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    lro.nnx.adapt(model, 2, kind="lowrank" if rule == "manifold" else "lora")
    graph, delta, rest = nnx.split(model, lro.nnx.AdapterParam, ...)
    delta = nnx.as_pure(delta) if pure else delta
    tx = ad.optimizer(optax.sgd(0.1), rule=rule)
    state, loss = tx.init(delta), lambda delta: jnp.mean(nnx.merge(graph, delta, rest)(jnp.ones((4, 6))) ** 2)
    updates, state = tx.update(jax.grad(loss)(delta), state, delta)
    assert jax.tree.structure(updates) == jax.tree.structure(delta)
    assert jax.tree.structure(optax.apply_updates(delta, updates)) == jax.tree.structure(delta)
