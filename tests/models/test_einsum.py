"""lowrank_optax.einsum: any equation of an activation and a matrix, and the axes that it tells."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests.jaxprs import traced

SIZES = dict(B=2, T=3, S=5, N=4, H=6, D=8, E=2, F=7, C=2, K=3)

# x,w->y, letters of the ellipsis, stacked axes, first group of axes
EQUATIONS = {
    "dense": ("...D,DF->...F", "BT", 0, 1),
    "dense, an ellipsis of no axis": ("...D,DF->...F", "", 0, 1),
    "ellipsis in the middle": ("B...D,DNH->B...NH", "TS", 0, 1),
    "no rows": ("D,DF->F", "", 0, 1),
    "grouped inputs": ("BTNH,NHD->BTD", "", 0, 2),
    "grouped inputs in another order": ("BHNT,NHD->BTD", "", 0, 2),
    "grouped outputs": ("BTD,DNH->BTNH", "", 0, 1),
    "scattered outputs": ("BTD,DNH->NBHT", "", 0, 1),
    "heads of y alone": ("BTD,NDH->BTNH", "", 1, 1),
    "keys and values": ("BSD,CKDH->CBSKH", "", 2, 1),
    "experts": ("EBD,EDF->EBF", "", 1, 1),
    "experts in the middle": ("BED,EDF->BFE", "", 1, 1),
    "heads in front of two inputs": ("BDH,NDHF->BNF", "", 1, 2),
    "experts and heads": ("EBD,ENDH->BENH", "", 2, 1),
    "spaces": ("B D , D F -> B F", "", 0, 1),
    "stored transposed": ("BTF,DF->BTD", "", 0, 1),
    "stored transposed, grouped": ("...F,NHF->...NH", "BT", 0, 2),
    "stored transposed, experts": ("EBF,EHF->EBH", "", 1, 1),
    "stored transposed, two inputs": ("BNH,DNH->BD", "", 0, 1),
}
NONE = {
    "implicit": ("BD,DF", "form"),
    "three operands": ("BD,DF,FK->BK", "form"),
    "a diagonal": ("BD,DD->BD", "repeats"),
    "an ellipsis in W": ("BD,D...->B...", "letter each"),
    "elementwise": ("BD,D->BD", "matrix"),
    "a vector": ("BD,D->B", "matrix"),
    "W summed alone": ("BD,DF->B", "one operand alone"),
    "x summed alone": ("BTD,DF->BF", "one operand alone"),
    "inputs apart": ("BDH,DKH->BK", "matrix"),
    "stacked behind": ("BD,DBF->BF", "matrix"),
    "stacked last": ("BD,DFB->BF", "matrix"),
    "outputs between stacked axes": ("EBF,HEF->EBH", "matrix"),
}


def shape_of(term: str, ellipsis: str) -> tuple[int, ...]:
    return tuple(SIZES[c] for c in term.replace("...", ellipsis))


def case(name: str, width: int | None = 2) -> tuple[str, jax.Array, lro.LowRank]:
    """An equation, an activation and a kernel with the axes of the table, in factors that are not special."""
    equation, ellipsis, nbatch, nfirst = EQUATIONS[name]
    x_term, w_term = equation.replace(" ", "").partition("->")[0].split(",")
    shape = shape_of(w_term, "")
    batch, first, last = shape[:nbatch], shape[nbatch : nbatch + nfirst], shape[nbatch + nfirst :]
    r = min(math.prod(first), math.prod(last)) if width is None else width
    rng = np.random.default_rng(0)
    factors = (rng.normal(size=s) for s in ((*batch, *first, r), (*batch, r, r), (*batch, *last, r)))
    return equation, jnp.asarray(rng.normal(size=shape_of(x_term, ellipsis))), lro.LowRank(*map(jnp.asarray, factors))


@pytest.mark.parametrize("name", EQUATIONS)
def test_axes_and_value_and_gradients_are_those_of_the_equation(name: str) -> None:
    equation, x, W = case(name)
    assert lro.einsum_axes(equation) == EQUATIONS[name][2:]

    def loss(product: Any, x: jax.Array, W: lro.LowRank) -> tuple[jax.Array, jax.Array]:
        y = product(x, W)
        return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y), y

    @jax.jit
    def both(x: jax.Array, W: lro.LowRank) -> Any:
        products = (
            lambda x, W: lro.einsum(equation, x, W),
            lambda x, W: jnp.einsum(equation.replace(" ", ""), x, W.to_dense()),
        )
        return [jax.value_and_grad(loss, argnums=(1, 2), has_aux=True)(f, x, W) for f in products]

    factored, dense = both(x, W)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), factored, dense)


@pytest.mark.parametrize("name", NONE)
def test_other_equations_are_refused_with_the_reason(name: str) -> None:
    equation, reason = NONE[name]
    with pytest.raises(ValueError, match=reason):
        lro.einsum_axes(equation)
    with pytest.raises(ValueError, match=reason):
        lro.einsum(equation, jnp.ones((2, 8)), lro.LowRank(jnp.ones((8, 2)), jnp.eye(2), jnp.ones((7, 2))))


def test_a_kernel_with_other_axes_is_refused_with_the_right_ones() -> None:
    equation, x, W = case("heads of y alone")
    heads_out = lro.LowRank(jnp.ones((4, 2)), jnp.eye(2), jnp.ones((8, 6, 2)))  # (N, D, H) as inputs N, outputs D, H
    with pytest.raises(ValueError, match=r"Axes\(batch=1, inputs=1\).*Axes\(batch=0, inputs=1\).*einsum_axes"):
        lro.einsum(equation, x, heads_out)
    with pytest.raises(ValueError, match="activation of 2 axes"):
        lro.einsum(equation, x[0], W)
    fewer = lro.LowRank(jnp.ones((4, 6, 2)), jnp.ones((4, 2, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="kernel of 3 axes"):
        lro.einsum(equation, x, fewer)


def test_a_dense_operand_goes_to_jnp_einsum() -> None:
    x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    np.testing.assert_array_equal(lro.einsum("ab,bc", x, w), x @ w)


@pytest.mark.parametrize("name", ["heads of y alone", "stored transposed, grouped", "experts in the middle"])
def test_no_value_is_larger_than_a_factor_or_an_activation(name: str) -> None:
    equation, x, W = case(name, width=1)

    def loss(x: jax.Array, W: lro.LowRank) -> jax.Array:
        return jnp.sum(lro.einsum(equation, x, W) ** 2)

    y = jax.eval_shape(lambda x, W: lro.einsum(equation, x, W), x, W)
    limit = max(x.size, y.size, *(f.size for f in jax.tree.leaves(W)))
    sizes = [v.aval.size for e in traced(jax.grad(loss, argnums=(0, 1)), x, W) for v in e.outvars]
    assert max(sizes) <= limit


def test_precision_and_type_reach_every_product() -> None:
    equation, x, W = case("experts and heads")
    x, W = x.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    options = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    products = [e for e in traced(lambda x, W: lro.einsum(equation, x, W, **options), x, W) if "precision" in e.params]
    products = [e for e in products if e.primitive.name == "dot_general"]
    assert len(products) == 3
    assert all(set(e.params["precision"]) == {jax.lax.Precision.HIGHEST} for e in products)
    assert all(e.outvars[0].aval.dtype == jnp.float32 for e in products)


@pytest.mark.parametrize("name", ["dense", "experts in the middle"])
def test_out_sharding_on_an_explicit_mesh(name: str) -> None:
    equation, x, W = case(name)
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, W = jax.device_put((x, W), NamedSharding(mesh, P()))
        spec = P("a", None, None)
        y = jax.jit(lambda x, W: lro.einsum(equation, x, W, out_sharding=spec))(x, W)
        assert jax.typeof(y).sharding.spec == spec
        np.testing.assert_allclose(y, jnp.einsum(equation, x, W.to_dense()), rtol=1e-9)
