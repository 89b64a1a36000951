"""Products with a factored kernel: few rows and many, tall and wide kernels, all derivatives, symbolic sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests import problems

R = 2
LAYOUTS = {
    "tall": problems.Layout((9,), (5,)),
    "wide": problems.Layout((5,), (9,)),
    "axes": problems.Layout((3, 2), (2, 5)),
    "batch": problems.Layout((9,), (5,), batch=(3,)),
}


def kernel(layout: problems.Layout) -> lro.LowRank:
    """Factors without orthonormal columns, and S without symmetry: the product must not depend on a gauge."""
    rng = np.random.default_rng(0)
    shapes = [(layout.slices, *shape) for shape in ((layout.m, R), (R, R), (layout.n, R))]
    return jax.tree.map(jnp.asarray, layout.kernel(*map(rng.standard_normal, shapes)))


def draw(layout: problems.Layout, rows: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((*layout.batch, *rows, *layout.inputs)))


def dense(x: Any, U: Any, S: Any, V: Any, layout: problems.Layout) -> np.ndarray:
    """`x U S V^T` with one batch axis, one axis of rows, one of inputs and one of outputs."""
    s = layout.slices
    U, S, V = np.reshape(U, (s, layout.m, R)), np.reshape(S, (s, R, R)), np.reshape(V, (s, layout.n, R))
    return np.einsum("btm,bmi,bij,bnj->btn", np.reshape(x, (s, -1, layout.m)), U, S, V)


@pytest.mark.parametrize("rows", [(), (2,), (3, 7)], ids=["one", "few", "many"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_value_and_derivatives_are_those_of_the_dense_product(name: str, rows: tuple[int, ...]) -> None:
    layout = LAYOUTS[name]
    x, W = draw(layout, rows), kernel(layout)
    y, pullback = jax.vjp(lambda x, W: x @ W, x, W)
    assert y.shape == (*layout.batch, *rows, *layout.outputs)
    parts = [x, W.U, W.S, W.V]
    np.testing.assert_allclose(np.reshape(y, -1), dense(*parts, layout).ravel(), rtol=1e-12, atol=1e-12)

    cotangent = np.cos(np.arange(y.size)).reshape(y.shape)
    grads = pullback(jnp.asarray(cotangent))
    # The product is linear in each of its four parts: the derivative in a direction is the product with it.
    for i, grad in enumerate((grads[0], *jax.tree.leaves(grads[1]))):
        step = np.random.default_rng(2 + i).standard_normal(parts[i].shape)
        moved = dense(*(step if j == i else part for j, part in enumerate(parts)), layout)
        np.testing.assert_allclose(np.sum(grad * step), np.sum(moved.ravel() * cotangent.ravel()), rtol=1e-10)
        tangents = [step if j == i else np.zeros(part.shape) for j, part in enumerate(parts)]
        forward = jax.jvp(lambda x, *W: x @ lro.LowRank(*W), parts, list(map(jnp.asarray, tangents)))[1]
        np.testing.assert_allclose(np.reshape(forward, -1), moved.ravel(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(64, 256), (256, 64)], ids=["wide", "tall"])
def test_the_core_meets_the_smaller_of_activation_and_basis(m: int, n: int) -> None:
    """Operations of forward and backward pass: 6 T r (m + n), and 6 r^2 for each row that S is multiplied with."""
    r = 8
    W = lro.LowRank(*(jnp.ones(shape, jnp.float32) for shape in ((m, r), (r, r), (n, r))))

    def operations(rows: int) -> int:
        def loss(x: jax.Array, W: lro.LowRank) -> jax.Array:
            return jnp.sum((x @ W) ** 2)

        program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.ones((rows, m), jnp.float32), W)
        total = 0
        for eqn in program.jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (lhs, _), _ = eqn.params["dimension_numbers"]
                contracted = np.prod([eqn.invars[0].aval.shape[i] for i in lhs])
                total += 2 * int(contracted) * eqn.outvars[0].aval.size
        return total

    for rows, of_core in ((16, 16), (64, 64), (65, 64), (4096, 64)):
        assert operations(rows) == 6 * rows * r * (m + n) + 6 * r * r * of_core


@pytest.mark.parametrize("name", ["tall", "wide", "axes"])
def test_a_symbolic_number_of_rows(name: str) -> None:
    layout = LAYOUTS[name]
    W = kernel(layout)
    (rows,) = jax.export.symbolic_shape("rows")
    shapes = jax.ShapeDtypeStruct((rows, *layout.inputs), W.U.dtype), jax.eval_shape(lambda: W)
    exported = jax.export.export(jax.jit(lambda x, W: x @ W))(*shapes)
    for x in (draw(layout, (1,)), draw(layout, (40,))):
        np.testing.assert_allclose(exported.call(x, W), x @ W, rtol=1e-12, atol=1e-12)


def test_half_precision_rounds_as_the_factors_do() -> None:
    """Rows are the same whether there are few or many: to the rounding of bfloat16, of which each product has one."""
    W = kernel(LAYOUTS["tall"]).astype(jnp.bfloat16)
    x = draw(LAYOUTS["tall"], (40,)).astype(jnp.bfloat16)
    whole, parts = x @ W, jnp.concatenate([part @ W for part in jnp.split(x, 10)])
    assert whole.dtype == parts.dtype == jnp.bfloat16
    exact = dense(*(np.asarray(y, np.float64) for y in (x, W.U, W.S, W.V)), LAYOUTS["tall"])[0]
    for y in (whole, parts):
        assert np.abs(np.asarray(y, np.float64) - exact).max() < 3 * 2**-8 * np.abs(exact).max()
