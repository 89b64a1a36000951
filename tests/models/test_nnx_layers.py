"""Low-rank nnx layers: scale, random streams and options are those of the stock layer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_optax as lro
from tests.models.nnx_models import close, draw, layer

# For each layer: ours, the stock one, common arguments, and the shape of the input.
KINDS: dict[str, tuple[Any, Any, dict[str, Any], tuple[int, ...]]] = {
    "linear": (
        layer(lro.nnx.LowRankLinear, 8, 6),
        layer(nnx.Linear, 8, 6),
        {},
        (4, 8),
    ),
    "general": (
        layer(lro.nnx.LowRankLinearGeneral, (4, 6), (2, 5)),
        layer(nnx.LinearGeneral, (4, 6), (2, 5)),
        {"axis": (1, -1)},
        (3, 4, 2, 6),
    ),
    "general, batch": (
        layer(lro.nnx.LowRankLinearGeneral, 6, (2, 4)),
        layer(nnx.LinearGeneral, 6, (2, 4)),
        {"batch_axis": {0: 3}},
        (3, 5, 6),
    ),
    "conv": (
        layer(lro.nnx.LowRankConv, 3, 8, (3, 3), 2),
        layer(nnx.Conv, 3, 8, (3, 3), 2),
        {"padding": "CIRCULAR"},
        (2, 7, 6, 3),
    ),
    "einsum": (
        layer(lro.nnx.LowRankEinsum, "btd,ndh->btnh", (2, 8, 6), (2, 6)),
        layer(nnx.Einsum, "btd,ndh->btnh", (2, 8, 6), (2, 6)),
        {},
        (2, 5, 8),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_computes_as_the_stock_layer_with_its_dense_kernel(name: str) -> None:
    ours, stock, options, shape = KINDS[name]
    options = {**options, "param_dtype": jnp.float64, "bias_init": nnx.initializers.normal()}
    model = ours(rank=2, max_rank=3, rngs=nnx.Rngs(0), **options)
    dense = stock(rngs=nnx.Rngs(0), **options)
    W, x = model.kernel[...], draw(shape)
    assert lro.is_lowrank(W) and W.width == 3 and W.shape == dense.kernel.shape and W.U.dtype == jnp.float64
    assert jnp.all(lro.ranks(model)["kernel"] == 2)
    # The draw has the norm of the dense one, and other streams are untouched.
    np.testing.assert_allclose(jnp.linalg.norm(W.to_dense()), jnp.linalg.norm(dense.kernel[...]), rtol=0.5)
    np.testing.assert_array_equal(model.bias[...], dense.bias[...])
    dense.kernel.set_value(W.to_dense())
    close(model(x), dense(x), 1e-10)
    assert isinstance(model, type(dense)) and nnx.graphdef(model) == nnx.graphdef(nnx.clone(model))

    grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
    dense_grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(dense)
    expected = jax.grad(lambda W: jnp.sum(W.to_dense() * dense_grads["kernel"][...]))(W)
    close(grads["kernel"].get_value(), expected, 1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_options_of_the_stock_layer(name: str) -> None:
    ours, _, options, shape = KINDS[name]
    few = {k: v for k, v in options.items() if k != "padding"}
    scaled = functools.partial(nnx.initializers.normal(1.0))
    one, ten = (
        ours(rank=0.5, kernel_init=lambda *a, c=c: c * scaled(*a), dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **few)
        for c in (1.0, 10.0)
    )
    assert one(draw(shape)).dtype == jnp.bfloat16 and one.kernel[...].dtype == jnp.float32
    close(ten.kernel[...].to_dense(), 10 * one.kernel[...].to_dense(), 1e-4)
    if name != "einsum":
        assert ours(rank=1, use_bias=False, rngs=nnx.Rngs(0), **few).bias is None


@pytest.mark.parametrize("name", KINDS)
def test_layers_are_made_within_jit_and_vmap(name: str) -> None:
    ours, _, options, shape = KINDS[name]
    eager = ours(rank=2, rngs=nnx.Rngs(0), **options)
    jitted = nnx.jit(lambda rngs: ours(rank=2, rngs=rngs, **options))(nnx.Rngs(0))
    close(eager(draw(shape)), jitted(draw(shape)))
    assert nnx.graphdef(eager) == nnx.graphdef(jitted)

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stack(rngs: nnx.Rngs) -> Any:
        return ours(rank=2, rngs=rngs, **options)

    W = stack(nnx.Rngs(0)).kernel[...]
    assert W.batch_shape == (2, *eager.kernel[...].batch_shape) and W.width == 2


MISTAKES = {
    "rank": (layer(lro.nnx.LowRankLinear, 8, 4, rank=5), r"rank 5 .*does not fit"),
    "product": (
        layer(lro.nnx.LowRankLinear, 8, 4, rank=2, dot_general=lambda *args, **kwargs: None),
        r"LowRankLinear cannot run on factors: its layer has a product of its own",
    ),
    "groups": (
        layer(lro.nnx.LowRankConv, 8, 8, 3, rank=2, feature_group_count=2),
        r"LowRankConv cannot run on factors: its layer is grouped",
    ),
    "mask": (layer(lro.nnx.LowRankConv, 8, 8, 3, rank=2, mask=jnp.ones((3, 8, 8))), r"has a mask"),
    "equation": (
        layer(lro.nnx.LowRankEinsum, "bd,de->bde", (8, 8), rank=2),
        r"LowRankEinsum cannot run on factors: W in 'bd,de->bde'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    make, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        make(rngs=nnx.Rngs(0))
