"""lowrank_optax.nnx: stock modules on factors, low-rank layers, the stock optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_optax as lro
from tests.models.linen_models import close, draw, draw_kernel, largest


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.mlp = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.mlp(nnx.relu(x + self.attention(x)))


class Stack(nnx.Module):
    """Blocks whose parameters are stacked along the first axis."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(rngs)

        self.blocks = blocks(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return run(self.blocks, x)


class Mixed(nnx.Module):
    """Layers that are factored beside layers that are not."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3,), feature_group_count=4, rngs=rngs)
        self.masked = nnx.Conv(8, 8, (3,), mask=jnp.ones((3, 8, 8), jnp.float32), rngs=rngs)
        self.custom = nnx.Linear(8, 8, dot_general=functools.partial(jax.lax.dot_general), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, tokens):
        x = self.grouped(self.conv(self.embed(tokens)))
        return self.head(self.norm(self.custom(nnx.relu(self.masked(x)))))


layer = functools.partial
# constructor, shape of the input, paths of the factored kernels
CASES = {
    "linear": (layer(nnx.Linear, 8, 6), (4, 3, 8), ["kernel"]),
    "general": (layer(nnx.LinearGeneral, (4, 6), (2, 5), axis=(1, -1)), (3, 4, 2, 6), ["kernel"]),
    "general, batch": (layer(nnx.LinearGeneral, 6, (2, 4), batch_axis={0: 3}), (3, 5, 6), ["kernel"]),
    "conv circular": (layer(nnx.Conv, 3, 8, (3, 3), padding="CIRCULAR", strides=2), (2, 7, 6, 3), ["kernel"]),
    "conv causal": (layer(nnx.Conv, 4, 8, 3, padding="CAUSAL", kernel_dilation=2), (2, 9, 4), ["kernel"]),
    "conv unbatched": (layer(nnx.Conv, 3, 8, (3, 3), padding="VALID", use_bias=False), (7, 6, 3), ["kernel"]),
    "stacked attention": (
        Stack,
        (2, 5, 8),
        ["blocks/mlp/kernel", *(f"blocks/attention/{k}/kernel" for k in ("key", "out", "query", "value"))],
    ),
    "mixed": (Mixed, (2, 9), ["conv/kernel"]),
}


def kernels(model):
    """path -> LowRank of a model."""
    state = nnx.to_pure_dict(nnx.state(model))
    leaves = jax.tree.leaves_with_path(state, is_leaf=lro.is_lowrank)
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves if lro.is_lowrank(leaf)}


SLOW = ("stacked attention", "mixed")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_factored_model_and_its_gradient_equal_the_dense_model(name):
    build, shape, paths = CASES[name]
    stock, model = build(rngs=nnx.Rngs(0)), build(rngs=nnx.Rngs(0))
    lro.nnx.factorize(model, 3)
    assert sorted(kernels(model)) == sorted(paths)
    x = jnp.arange(np.prod(shape)).reshape(shape) % 7 if name == "mixed" else draw(shape)
    rest = nnx.split(model, nnx.Param, ...)[2]
    graphdef, dense_graphdef = nnx.graphdef(model), nnx.graphdef(stock)

    def loss(params, graphdef, convert):
        y = nnx.merge(graphdef, convert(params), rest)(x)
        return jnp.sum(jnp.sin(jnp.arange(y.size).reshape(y.shape)) * y), y

    @jax.jit
    def both(params):
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        factored = value_and_grad(params, graphdef, lambda p: p)
        return factored, value_and_grad(params, dense_graphdef, lro.densify)

    (y, grads), (dense_y, dense_grads) = both(nnx.state(model, nnx.Param))
    close(y, dense_y, 1e-5)
    close(nnx.to_pure_dict(grads), nnx.to_pure_dict(dense_grads), 2e-4)


@pytest.mark.slow
def test_ranks_where_and_errors():
    model = Mixed(nnx.Rngs(0))
    lro.nnx.factorize(model, lambda path, shape: 2, max_rank=4, where=lambda path, shape: path.endswith("kernel"))
    assert {path: W.width for path, W in kernels(model).items()} == {"conv/kernel": 4, "head/kernel": 2}
    assert kernels(model)["conv/kernel"].in_shape == (3, 8)
    lro.nnx.factorize(model, 2)  # Factored kernels stay as they are.
    assert kernels(model)["conv/kernel"].width == 4
    with pytest.raises(ValueError, match=r"rank 3 .*'head/kernel'"):
        lro.nnx.factorize(Mixed(nnx.Rngs(0)), 3, where=lambda path, shape: path == "head/kernel")
    with pytest.raises(ValueError, match="no kernel to factor"):
        lro.nnx.factorize(Mixed(nnx.Rngs(0)), 100)
    with pytest.raises(ValueError, match="does not fit"):
        lro.nnx.LowRankLinear(8, 4, rank=5, rngs=nnx.Rngs(0))


def test_dtype_and_size_of_the_products():
    model = nnx.Linear(256, 256, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    lro.nnx.factorize(model, 2)
    x = draw((3, 256)).astype(jnp.float32)
    y = model(x)
    assert y.dtype == jnp.bfloat16 and model.kernel[...].dtype == jnp.float32
    expected = x @ model.kernel[...].to_dense()
    close(y.astype(jnp.float32), expected, 5e-2)
    graphdef, params = nnx.split(model)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(x) ** 2)))
    assert largest(gradient, params) <= 3 * 256


@pytest.mark.slow
def test_low_rank_linear():
    model = lro.nnx.LowRankLinear(8, 6, 2, max_rank=3, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = draw((4, 8))
    assert model.kernel[...].width == 3 and np.linalg.matrix_rank(model.kernel[...].to_dense()) == 2
    close(model(x), x @ model.kernel[...].to_dense())
    assert nnx.graphdef(model) == nnx.graphdef(nnx.clone(model))


def test_equal_models_compile_once():
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(None)
        return model(x)

    for seed in range(2):
        model = nnx.Linear(8, 6, rngs=nnx.Rngs(seed))
        model.kernel.set_value(draw_kernel((8, 6), lro.Axes(0, 1), 2, seed))
        lro.nnx.factorize(model, 2)
        close(run(model, draw((4, 8))), model(draw((4, 8))))
    assert len(traces) == 1


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(5, 8, (3,), rngs=rngs)
        self.hidden = lro.nnx.LowRankLinear(8, 8, 3, rngs=rngs)
        self.out = nnx.LinearGeneral(8, (2, 4), rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(nnx.relu(self.conv(x)))))


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [lro.Coefficient(), lro.Tangent()], ids=["coefficient", "tangent"])
def test_training_with_the_stock_optimizer_reduces_the_loss(geometry):
    tx = lro.lowrank_adam(0.02, geometry=geometry)
    x = draw((4, 6, 5)).astype(jnp.float32)
    target = Net(nnx.Rngs(1))(x)
    model = Net(nnx.Rngs(0))
    lro.nnx.factorize(model, 3)
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, opt):
        traces.append(None)
        value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - target) ** 2))(model)
        opt.update(model, grads)
        return value

    first = step(model, opt)
    for _ in range(80):
        last = step(model, opt)
    assert last < first / 4
    assert len(traces) == 1
    assert len(kernels(model)) == 3
    for W in kernels(model).values():
        U = W.U.reshape(-1, W.width)
        close(U.T @ U, jnp.eye(W.width, dtype=U.dtype), 1e-5)


@pytest.mark.parametrize("name", ["value", "raw_value"])
def test_layers_with_the_name_of_a_wrapper_keep_it(name):
    """The projection of an attention is called `value`, as the key that nnx puts around values."""

    class Pair(nnx.Module):
        def __init__(self, rngs):
            setattr(self, name, nnx.Linear(6, 6, rngs=rngs))
            self.query = nnx.Linear(6, 6, rngs=rngs)

    model = Pair(nnx.Rngs(0))
    lro.nnx.factorize(model, 2)
    assert set(lro.ranks(nnx.state(model))) == {f"{name}/kernel", "query/kernel"}
    assert set(lro.ranks(model)) == {f"{name}/kernel", "query/kernel"}
