"""What is laid out for the compiler computes the same as what is not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import linalg
from lowrank_optax.xla import alike, apart, apply_if, barrier, join, together

BATCHES: list[tuple[int, ...]] = [(), (3,), (2, 5), (1,), (0,), (4, 5)]


def matrices(m: int = 4, n: int = 3) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((*batch, m, n))) for batch in BATCHES]


def test_together_is_one_by_one_with_one_call_a_shape() -> None:
    xs = [*matrices(), *matrices(5, 3), jnp.ones((4, 3), jnp.float32)]
    weights = [x[..., :1, :] for x in xs]
    calls = []

    def f(x: jax.Array, weight: jax.Array) -> Any:
        calls.append(x.shape)
        return {"matrix": x * weight, "vector": x[..., 0, :], "number": x.sum((-2, -1)), "bool": x > 0}

    results = together(f, xs, weights)
    assert calls == [s for m in (4, 5) for s in ((5, m, 3), (6, 5, m, 3))] + [(4, 3)]
    for x, weight, result in zip(xs, weights, results, strict=True):
        expected = f(x, weight)
        assert jax.tree.map(lambda y: (y.shape, y.dtype), result) == jax.tree.map(
            lambda y: (y.shape, y.dtype), expected
        )
        jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_together_of_trees_and_of_nothing() -> None:
    rows = [(x, {"y": x}) for x in matrices()]
    results = together(lambda row: row[0] + row[1]["y"], rows)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(2 * x, y), matrices(), results)
    assert together(lambda x: x, []) == []


def test_apart_is_the_inverse_of_join() -> None:
    groups = [(4, 2), (1, 2), (0, 2)]
    trees = [{"x": jnp.full((*s, 3), 1.0 + i), "y": jnp.full((*s[:1], 1, 1), i)} for i, s in enumerate(groups)]
    one = jax.tree.map(lambda x: x[0], trees[0])
    assert alike([*trees, {**one, "y": jnp.ones((1, 2))}, one]) == [[0, 1, 2, 4], [3]]
    both = apart([(join(trees), [(4,), (1,), (0,)]), (join([one, trees[1]]), [(), (1,)])])
    jax.tree.map(np.testing.assert_array_equal, both, [trees, [one, trees[1]]])
    assert apart([]) == []
    (whole,) = apart([(jnp.ones((6, 2)), [(2, 3)])])
    assert [x.shape for x in whole] == [(2, 3, 2)]


@pytest.mark.parametrize("when", [False, True])
def test_apply_if(when: bool) -> None:
    x = {"a": jnp.arange(3.0), "b": jnp.ones((), jnp.int32)}
    result = jax.jit(lambda when, x: apply_if(when, lambda x: jax.tree.map(lambda y: 2 * y, x), x))(when, x)
    jax.tree.map(lambda y, z: np.testing.assert_array_equal((1 + when) * y, z), x, result)


def test_what_is_behind_a_barrier_may_be_mapped_and_differentiated() -> None:
    f = lambda x: jnp.exp(barrier({"x": jnp.sin(x)})["x"])  # noqa: E731
    xs = jnp.linspace(0, 1, 5)
    np.testing.assert_allclose(jax.vmap(f)(xs), np.exp(np.sin(xs)), rtol=1e-14)
    np.testing.assert_allclose(jax.grad(f)(0.3), np.exp(np.sin(0.3)) * np.cos(0.3), rtol=1e-14)
    assert barrier({"empty": None}) == {"empty": None}


@pytest.mark.parametrize("f", [barrier, lambda x: x])
def test_a_barrier_keeps_code_apart(f: Any) -> None:
    """Without it a product and the sum that uses it are one piece of code."""
    text = jax.jit(lambda x: f(x * 2) + x).lower(jnp.ones(8)).compile({"xla_backend_optimization_level": 1}).as_text()
    bodies = [body for body in text.split("\n\n") if not body.startswith("ENTRY")]
    assert any("multiply(" in body and "add(" in body for body in bodies) == (f is not barrier), text


def test_bases_of_any_height_are_extended_together() -> None:
    """The one that needs several passes does not change what comes of the others."""
    rng = np.random.default_rng(1)
    bases, xs = [], []
    for batch, rows, condition in (((2,), 9, 1.0), ((1,), 20, 1e9), ((3, 2), 6, 1e3), ((3,), 6, 1e3), ((), 7, 1.0)):
        u = np.linalg.qr(rng.standard_normal((*batch, rows, 3)))[0]
        bases.append(jnp.asarray(u))
        xs.append(jnp.asarray(rng.standard_normal((*batch, rows, 3)) * np.geomspace(1, 1 / condition, 3)))
    xs[1] = xs[1].at[..., 1].set(xs[1][..., 0] + xs[1][..., 2])
    for basis, x, e in zip(bases, xs, linalg.extend(bases, xs), strict=True):
        q = np.concatenate([basis, e.block], axis=-1) @ e.mix
        np.testing.assert_allclose(
            np.swapaxes(q, -1, -2) @ q, np.broadcast_to(np.eye(6), (*q.shape[:-2], 6, 6)), atol=1e-13
        )
        np.testing.assert_allclose(q @ e.x, x, atol=1e-13)
        np.testing.assert_allclose(q @ e.basis, basis, atol=1e-13)
        (alone,) = linalg.extend([basis], [x])
        size = np.abs(x).max(axis=-2, keepdims=True)
        # Another pass brings other roundings, which the condition of x magnifies only in directions that it hardly has.
        np.testing.assert_allclose(e.x / size, alone.x / size, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_all_finite(bad: float, dtype: Any) -> None:
    big = jnp.full((40, 70), jnp.finfo(dtype).max, dtype)
    good = {"big": -big, "count": jnp.arange(3), "none": jnp.zeros((0, 4), dtype), "scalar": 1.5}
    assert bool(linalg.all_finite(good)) and bool(linalg.all_finite({}))
    assert not bool(linalg.all_finite({**good, "bad": big.at[13, 69].set(bad)}))
