"""lowrank_optax.linen: unmodified models on factors, and the kernels that can be factored."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from lowrank_optax.paths import path_name
from tests.models.linen_models import CASES, Image, Stack, close, count_kernels, draw, draw_kernel, init, largest

SLOW = ("recurrent", "mixed", "scan, attention, remat")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_apply_and_its_gradient_equal_the_dense_model(name):
    model, shape, kernels = CASES[name]
    x = draw(shape)
    variables = init(model, x)
    assert count_kernels(variables) == kernels

    def loss(params, apply, convert):
        y = apply(convert({**variables, "params": params}), x)
        return jnp.sum(jnp.sin(jnp.arange(y.size).reshape(y.shape)) * y), y

    @jax.jit
    def both(params):
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        factored = value_and_grad(params, lro.linen.apply(model), lambda v: v)
        return factored, value_and_grad(params, model.apply, lro.densify)

    close(*both(variables["params"]))


@pytest.mark.slow
def test_dropout_statistics_and_methods_pass_through():
    model, x = Image(), draw((2, 8, 8, 3))
    variables = init(model, x)
    options = dict(train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)})
    run = lro.linen.apply(model)
    close(run(variables, x, **options), model.apply(lro.densify(variables), x, **options))
    seen = run(variables, x, method=lambda m, x: m(x) * 2)
    close(seen, 2 * run(variables, x))
    _, state = run(variables, x, capture_intermediates=True)
    assert state["intermediates"]["conv"]["__call__"][0].shape == (2, 4, 4, 8)


def test_compute_dtype_and_precision_reach_every_product():
    model = nn.Dense(6, dtype=jnp.bfloat16, precision=jax.lax.Precision.HIGHEST)
    x = draw((4, 8)).astype(jnp.float32)
    variables = jax.tree.map(jnp.float32, init(model, x))
    y = lro.linen.apply(model)(variables, x)
    assert y.dtype == jnp.bfloat16 and variables["params"]["kernel"].dtype == jnp.float32
    close(y.astype(jnp.float32), model.apply(lro.densify(variables), x).astype(jnp.float32), 3e-2)
    eqns = jax.make_jaxpr(lro.linen.apply(model))(variables, x).eqns
    products = [e for e in eqns if e.primitive.name == "dot_general"]
    assert len(products) == 3
    assert all(set(e.params["precision"]) == {jax.lax.Precision.HIGHEST} for e in products)
    assert all(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars)


class Wide(nn.Module):
    """Kernels far larger than the activations, in a scan and outside."""

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(nn.remat(WideBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x = layer(name="layers")(x, None)[0]
        return nn.Conv(256, (3,), name="conv")(x[:, None])


class WideBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.DenseGeneral((4, 64))(x)
        return nn.DenseGeneral(256, axis=(-2, -1))(nn.relu(h)), None


def test_no_array_of_the_size_of_a_kernel():
    model, x = Wide(), draw((2, 256))
    variables = init(model, x, 2)
    assert count_kernels(variables) == 3

    def size(run, variables):
        return largest(jax.jit(jax.grad(lambda v: jnp.sum(run(v, x) ** 2))), variables)

    # The stacked factors, 2 x 256 x 2, and U of the convolution, 3 x 256 x 2, are the largest.
    assert size(lro.linen.apply(model), variables) <= 3 * 256 * 2
    assert size(model.apply, lro.densify(variables)) >= 256 * 256


class Custom(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.dot(x, self.param("kernel", nn.initializers.ones, (4, 4)))


class Native(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", lro.lowrank_init(2), (8, 6))


@pytest.mark.parametrize("rank", [2, 4])  # At rank 4 the factors have the shapes of kernels.
@pytest.mark.parametrize(
    ("layer", "shape", "axes"),
    [
        (functools.partial(nn.Conv, 4, (3,), feature_group_count=2), (1, 5, 8), lro.Axes(0, 2)),
        (functools.partial(nn.Conv, 4, (3,), mask=np.ones((3, 4, 4))), (1, 5, 4), lro.Axes(0, 2)),
        (functools.partial(nn.ConvTranspose, 4, (3,), transpose_kernel=True), (1, 5, 4), lro.Axes(0, 2)),
        (functools.partial(nn.ConvLocal, 4, (3,)), (1, 5, 4), lro.Axes(1, 1)),
        (functools.partial(nn.Embed, 4, 4), (2,), lro.Axes(0, 1)),
        (Custom, (2, 4), lro.Axes(0, 1)),
    ],
    ids=["grouped", "masked", "transposed", "local", "embed", "custom"],
)
def test_other_modules_refuse_factors_and_kernels_says_so(layer, shape, axes, rank):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(name="inner")(x)

    x = draw(shape) if len(shape) > 1 else jnp.zeros(shape, int)
    with pytest.raises(
        ValueError, match=r"no kernel that can be factored(?s:.*)inner/(kernel|embedding)(?s:.*)register"
    ):
        lro.linen.kernels(Model(), x)
    variables = init(Model(), x, rank, lambda path, _: None if "bias" in path else axes)
    assert count_kernels(variables) == 1
    with pytest.raises(TypeError, match=r"inner/(kernel|embedding).*where"):
        lro.linen.apply(Model())(variables, x)


def test_module_written_for_factors_runs_as_it_is():
    x, W = draw((3, 8)), draw_kernel((8, 6), lro.Axes(0, 1), 2)
    variables = {"params": {"kernel": W}}
    close(lro.linen.apply(Native())(variables, x), x @ W.to_dense())


def test_kernels_reads_axes_off_the_model():
    x = draw((2, 5, 8))
    where = lro.linen.kernels(Stack(), x)
    leaves = jax.tree.leaves_with_path(jax.eval_shape(Stack().init, jax.random.key(0), x)["params"])
    shapes = {path_name(path): leaf.shape for path, leaf in leaves}
    found = {path: where(path, shape) for path, shape in shapes.items() if where(path, shape)}
    expected = {
        "in/kernel": (0, 1),
        "blocks/mlp/kernel": (1, 1),
        **{f"blocks/attention/{k}/kernel": (1, 1) for k in ("query", "key", "value")},
        "blocks/attention/out/kernel": (1, 2),
    }
    assert found == expected
    assert where("params/in/kernel", (8, 8)) == (0, 1) and where("params/in/bias", (8,)) is False
    # Layers stacked along another axis cannot be factored one by one.
    where = lro.linen.kernels(Stack(axis=1), x)
    assert where("blocks/mlp/kernel", (8, 3, 8)) is False and where("in/kernel", (8, 8)) == (0, 1)
    where = lro.linen.kernels(Image(), draw((2, 8, 8, 3)), train=True)
    assert where("conv/kernel", (3, 3, 3, 8)) == (0, 3) and where("grouped/kernel", (3, 3, 2, 8)) is False


def test_metadata_boxes():
    model = nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out")))
    x = draw((4, 8))
    variables = init(model, x)
    assert count_kernels(variables) == 1 and isinstance(variables["params"]["kernel"], nn.Partitioned)
    close(lro.linen.apply(model)(variables, x), model.apply(lro.densify(variables), x))


def test_routes_of_one_model_are_equal_even_with_arrays_in_it():
    model = nn.Conv(4, 3, mask=np.ones((3, 4, 4)))
    a, b = lro.linen.apply(model), lro.linen.apply(model)
    assert a == b and hash(a) == hash(b) and a != lro.linen.apply(nn.Dense(4))
