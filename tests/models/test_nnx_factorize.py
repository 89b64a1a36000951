"""`nnx.factorize`: every layer computes on factors, every other parameter has a reason to stay dense."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_optax as lro
from tests.models.nnx_models import LAYERS, Net, close, draw, kernels, layer, twins


@pytest.mark.parametrize("name", LAYERS)
def test_at_full_rank_a_model_and_its_gradients_are_those_of_the_dense_one(name: str) -> None:
    build, shape, axes = LAYERS[name]
    dense, model = twins(build)
    assert lro.nnx.kernels(model).axes == axes
    lro.nnx.factorize(model, 1.0)
    found = kernels(model)
    assert {path: lro.Axes(len(W.batch_shape), len(W.in_shape)) for path, W in found.items()} == axes
    x = draw(shape)

    @nnx.jit
    def value_and_grads(model: Any) -> Any:
        def loss(model: Any) -> Any:
            y = model(x)
            return jnp.sum(jnp.sin(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)) * y), y

        return nnx.value_and_grad(loss, has_aux=True)(model)

    ((_, y), grads), ((_, dense_y), dense_grads) = value_and_grads(model), value_and_grads(dense)
    close(y, dense_y, 1e-8)
    pure, dense_pure = nnx.to_pure_dict(grads), nnx.to_pure_dict(dense_grads)
    for path, g in jax.tree.leaves_with_path(pure, is_leaf=lro.is_lowrank):
        expected = functools.reduce(lambda tree, key: tree[key.key], path, dense_pure)
        if not lro.is_lowrank(g):
            close(g, expected, 1e-8)
            continue
        W = found["/".join(str(key.key) for key in path)]
        full = functools.partial(_gradients, W)
        close(g, full(expected), 1e-7)


def _gradients(W: lro.LowRank, G: Any) -> Any:
    """The gradients of the factors, from the gradient of the dense kernel."""
    return jax.grad(lambda W: jnp.sum(W.to_dense() * G))(W)


@pytest.mark.parametrize("name", ["linear", "general", "conv", "einsum, bias", "vmapped attention"])
def test_scale_multiplies_the_singular_values(name: str) -> None:
    build, _, _ = LAYERS[name]
    one, fifth = twins(build)
    lro.nnx.factorize(one, 2)
    lro.nnx.factorize(fifth, 2, max_rank=3, scale=0.2)
    for path, W in kernels(fifth).items():
        assert W.width == 3
        close(W.to_dense(), 0.2 * kernels(one)[path].to_dense(), 1e-8)


def test_equal_models_compile_once() -> None:
    traces = []

    @nnx.jit
    def run(model: Any, x: Any) -> Any:
        traces.append(None)
        return model(x)

    for seed in range(2):
        model = Net(nnx.Rngs(seed))
        lro.nnx.factorize(model, 2)
        run(model, draw((2, 6, 5)))
        nnx.update(model, nnx.state(model))
        run(model, draw((2, 6, 5)))
    assert len(traces) == 1


def test_a_dense_model_with_our_hooks_is_factored_again() -> None:
    model = Net(nnx.Rngs(0))
    lro.nnx.factorize(model, 3)
    before = model(draw((2, 6, 5)))
    dense = lro.densify(model)
    assert not kernels(dense)
    close(dense(draw((2, 6, 5))), before)
    lro.nnx.factorize(dense, 3)
    assert lro.ranks(dense) == lro.ranks(model) and len(kernels(dense)) == 4
    close(dense(draw((2, 6, 5))), before)


def test_a_promote_dtype_of_three_arrays_runs() -> None:
    def half(args: Any, *, dtype: Any = None) -> Any:
        inputs, kernel, bias = args  # the contract that Flax documents
        return inputs.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), bias.astype(jnp.bfloat16)

    model = nnx.Linear(8, 6, promote_dtype=half, rngs=nnx.Rngs(0))
    expected = model(draw((3, 8)))
    lro.nnx.factorize(model, 6)
    assert model(draw((3, 8))).dtype == jnp.bfloat16 == expected.dtype
    np.testing.assert_allclose(np.float32(model(draw((3, 8)))), np.float32(expected), atol=0.05)


# --- parameters that stay dense --------------------------------------------------------------------------------------


class Own(nnx.Module):
    """A module of a user that multiplies with its own parameter."""

    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(rngs.params.normal((8, 2, 3)))

    def __call__(self, x: Any) -> Any:
        return lro.einsum("bd,dnh->bnh", x, self.w[...])


def quantized(rngs: nnx.Rngs) -> Any:
    model = nnx.Linear(8, 8, rngs=rngs)
    model.kernel = nnx.Variable(jnp.ones((8, 8), jnp.int8))
    return model


def stacked_last(rngs: nnx.Rngs) -> Any:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=2)
    def make(rngs: nnx.Rngs) -> Any:
        return nnx.Linear(8, 6, use_bias=False, rngs=rngs)

    return make(rngs)


def tied(rngs: nnx.Rngs) -> Any:
    model = nnx.Sequential(nnx.Embed(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs))
    model.layers[1].kernel = model.layers[0].embedding
    return model


def tied_with_other_axes(rngs: nnx.Rngs) -> Any:
    heads_in = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
    heads_out = nnx.LinearGeneral(2, (4, 8), rngs=rngs)
    heads_out.kernel = heads_in.kernel
    return nnx.Sequential(heads_out, heads_in)


STAYS_DENSE = {
    "groups": (layer(nnx.Conv, 8, 8, (3,), feature_group_count=4), r"grouped, feature_group_count=4"),
    "mask": (layer(nnx.Conv, 8, 8, (3,), mask=jnp.ones((3, 8, 8))), r"has a mask"),
    "product": (
        layer(nnx.Linear, 8, 8, dot_general=functools.partial(jax.lax.dot_general)),
        r"product of its own, dot_general=partial",
    ),
    "class of products": (
        layer(nnx.LinearGeneral, 8, 8, dot_general_cls=lambda: jax.lax.dot_general),
        r"product of its own, dot_general_cls=",
    ),
    "einsum_op": (
        layer(nnx.Einsum, "bd,df->bf", (8, 8), einsum_op=lambda *args, **kwargs: jnp.einsum(*args, **kwargs)),
        r"product of its own, einsum_op=",
    ),
    "equation without inputs": (layer(nnx.Einsum, "bd,de->bde", (8, 8)), r"'bd,de->bde' is no matrix"),
    "embedding": (layer(nnx.Embed, 8, 8), r"Embed is no Linear, LinearGeneral, Conv or Einsum"),
    "transposed": (layer(nnx.ConvTranspose, 8, 8, (3,)), r"ConvTranspose is no Linear, LinearGeneral, Conv or Einsum"),
    "own module": (Own, r"Own is no Linear, LinearGeneral, Conv or Einsum"),
    "container": (lambda rngs: nnx.List([nnx.Param(jnp.ones((8, 8)))]), r"List is no Linear|belongs to a container"),
    "dtype": (quantized, r"dtype is int8"),
    "last axis": (stacked_last, r"of shape \(8, 6\), are stacked along another axis than the first"),
    "normalised": (
        lambda rngs: nnx.WeightNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs),
        r"within WeightNorm, which normalises arrays",
    ),
    "tied": (tied, r"shares it with another: Embed is no"),
    "tied with other axes": (tied_with_other_axes, r"use different axes: Axes\(batch=0, inputs=1\), Axes\(batch=0, i"),
    "rank": (layer(nnx.Linear, 8, 2), r"rank 3 is above min\(m, n\) = 2"),
    "nothing": (layer(nnx.LayerNorm, 8), r"  none$"),
}


@pytest.mark.parametrize("name", STAYS_DENSE)
def test_a_model_without_a_kernel_to_factor_is_an_error_that_lists_parameters_and_reasons(name: str) -> None:
    build, reason = STAYS_DENSE[name]
    model = build(rngs=nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(model))
    with pytest.raises(ValueError, match=rf"(?s)no kernel to factor at rank 3\..*{reason}"):
        lro.nnx.factorize(model, 3)
    assert all(x is y for x, y in zip(before, jax.tree.leaves(nnx.state(model)), strict=True))
    reasons = lro.nnx.kernels(model).reasons
    assert bool(reasons) == (name not in ("rank", "nothing"))


def test_the_reason_names_path_and_shape_and_the_list_is_short() -> None:
    with pytest.raises(ValueError, match=r"\n  kernel \(3, 2, 8\): its layer is grouped"):
        lro.nnx.factorize(nnx.Conv(8, 8, (3,), feature_group_count=4, rngs=nnx.Rngs(0)), 3)
    many = nnx.List([nnx.Embed(8, 8, rngs=nnx.Rngs(i)) for i in range(15)])
    with pytest.raises(ValueError, match=r"(?s)0/embedding \(8, 8\).*\n  and 3 more$") as error:
        lro.nnx.factorize(many, 3)
    assert len(str(error.value).splitlines()) == 14


def test_kernels_of_one_model_that_do_not_fit_stay_dense() -> None:
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    expected = {"layers/2/kernel": "rank 4 is above min(m, n) = 2"}
    assert lro.nnx.kernels(model, 4).reasons == expected and not lro.nnx.kernels(model).reasons
    lro.nnx.factorize(model, 4)
    assert list(kernels(model)) == ["layers/0/kernel"] and lro.nnx.kernels(model, 4).reasons == expected


def test_a_kernel_of_two_layers_is_factored_once_for_both() -> None:
    model = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)))
    model.layers[1].kernel = model.layers[0].kernel
    expected = model(draw((3, 8)))
    lro.nnx.factorize(model, 8)
    assert model.layers[1].kernel is model.layers[0].kernel and len(kernels(model)) == 1
    close(model(draw((3, 8))), expected)


# --- where -----------------------------------------------------------------------------------------------------------


def test_where_may_take_parameters_of_modules_of_ones_own() -> None:
    model = Own(nnx.Rngs(0))
    expected = model(draw((4, 8)))
    lro.nnx.factorize(model, 6, where=lambda path, shape: lro.Axes(0, 1) if path == "w" else False)
    assert model.w[...].in_shape == (8,) and model.w[...].out_shape == (2, 3)
    close(model(draw((4, 8))), expected)


@pytest.mark.parametrize("name", ["groups", "transposed", "embedding", "normalised"])
def test_where_may_not_force_layers_that_cannot_run(name: str) -> None:
    build, reason = STAYS_DENSE[name]
    with pytest.raises(ValueError, match=rf"`where` returned Axes\(batch=0, inputs=1\) for '.*'.*{reason}"):
        lro.nnx.factorize(build(rngs=nnx.Rngs(0)), 2, where=lambda path, shape: lro.Axes(0, 1))


def test_where_may_not_split_a_kernel_against_its_layer() -> None:
    model = nnx.LinearGeneral(8, (2, 4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"Axes\(batch=0, inputs=2\) for 'kernel'.*uses Axes\(batch=0, inputs=1\)"):
        lro.nnx.factorize(model, 2, where=lambda path, shape: path == "kernel" and lro.Axes(0, 2))


def test_where_chooses_among_kernels() -> None:
    model = Net(nnx.Rngs(0))
    where = lro.nnx.kernels(model)
    lro.nnx.factorize(model, 2, where=lambda path, shape: path != "head/kernel" and where(path, shape))
    assert sorted(kernels(model)) == ["conv/kernel", "heads/kernel", "mix/kernel"]
    with pytest.raises(ValueError, match=r"head/kernel \(8, 8\): `where` leaves it dense"):
        lro.nnx.factorize(Net(nnx.Rngs(0)), 2, where=lambda path, shape: False)
    with pytest.raises(ValueError, match=r"rank 9 .*'head/kernel'"):
        lro.nnx.factorize(Net(nnx.Rngs(0)), 9, where=lambda path, shape: path == "head/kernel")


def test_modules_in_containers_are_factored() -> None:
    pair = [nnx.Linear(8, 8, rngs=nnx.Rngs(0)), {"head": nnx.Linear(8, 4, rngs=nnx.Rngs(0))}]
    lro.nnx.factorize(pair, 2)
    assert lro.ranks(pair) == {"0/kernel": 2, "1/head/kernel": 2}


@pytest.mark.parametrize("argument", [nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), {"kernel": jnp.ones((2, 2))}])
def test_trees_that_are_no_modules_are_refused(argument: Any) -> None:
    with pytest.raises(TypeError, match=r"nnx\.factorize changes an nnx module in place, got"):
        lro.nnx.factorize(argument, 1)
