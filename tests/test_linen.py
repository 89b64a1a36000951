"""lowrank_optax.linen: unmodified models on factors, low-rank layers, masks, serialisation."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import lowrank_optax as lro
from lowrank_optax.factorize import path_name


class Block(nn.Module):
    """Attention, dropout and a rematerialised dense layer, with a carry for nn.scan."""

    features: int = 8

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = x + nn.remat(nn.Dense)(self.features, name="mlp")(nn.relu(x))
        return x, None


class Stack(nn.Module):
    layers: int = 3
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        axes, rngs = {"params": self.axis}, {"params": True}
        blocks = nn.scan(Block, variable_axes=axes, split_rngs=rngs, length=self.layers)
        return blocks(name="blocks")(nn.Dense(8, name="in")(x), None)[0]


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)
        return dense(6, name="experts")(x)


class Activated(nn.Dense):
    """A subclass whose forward pass is not that of nn.Dense."""

    @nn.compact
    def __call__(self, inputs):
        return nn.relu(super().__call__(inputs)) + 1.0


class Image(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=2, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x)
        return nn.Dense(5, name="head")(x.mean((-3, -2)))


# model, shape of the input, number of factored kernels
CASES = {
    "dense": (nn.Dense(6), (4, 3, 8), 1),
    "dense without bias": (nn.Dense(6, use_bias=False), (8,), 1),
    "general": (nn.DenseGeneral((2, 5), axis=(1, -1)), (3, 4, 2, 6), 1),
    "general, batch": (nn.DenseGeneral(5, axis=(-2, -1), batch_dims=(0, 1)), (2, 3, 4, 3, 2), 1),
    "conv 1d causal": (nn.Conv(8, 3, padding="CAUSAL", kernel_dilation=2), (2, 9, 4), 1),
    "conv 2d same": (nn.Conv(8, (3, 3), strides=2), (7, 6, 3), 1),
    "conv 2d valid": (nn.Conv(8, (2, 3), padding="VALID", strides=(1, 2)), (2, 7, 6, 3), 1),
    "conv 2d circular": (nn.Conv(8, (3, 3), padding="CIRCULAR", kernel_dilation=(1, 2)), (2, 7, 6, 3), 1),
    "conv 2d explicit": (nn.Conv(8, (3, 3), padding=((1, 0), (2, 1)), input_dilation=2), (2, 5, 5, 3), 1),
    "conv transpose": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), (2, 5, 5, 4), 1),
    "conv transpose circular": (nn.ConvTranspose(6, (4,), strides=(2,), padding="CIRCULAR"), (2, 5, 4), 1),
    "scan, attention, remat": (Stack(), (2, 5, 8), 6),
    "vmap": (Experts(), (3, 4, 8), 1),
    "subclass": (Activated(6), (4, 8), 1),
    "recurrent": (nn.RNN(nn.GRUCell(6, param_dtype=jnp.float64)), (2, 4, 5), 6),
    "mixed": (Image(), (2, 8, 8, 3), 2),
}


def draw(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def draw_kernel(shape, axes, rank, seed=1):
    """A kernel in the canonical gauge; NumPy, because JAX would compile an SVD for every shape."""
    batch, inputs = shape[: axes.batch], shape[axes.batch : axes.batch + axes.inputs]
    outputs = shape[axes.batch + axes.inputs :]
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(*batch, math.prod(n), rank)))[0] for n in (inputs, outputs))
    S = np.broadcast_to(np.diag(np.linspace(2.0, 0.5, rank)), (*batch, rank, rank))
    factors = U.reshape(*batch, *inputs, rank), S, V.reshape(*batch, *outputs, rank)
    return lro.LowRank(*map(jnp.asarray, factors))


def init(model, x, rank=3, where=None):
    """Variables with LowRank kernels wherever `kernels` or `where` finds one."""
    where = where or lro.linen.kernels(model, jax.ShapeDtypeStruct(x.shape, x.dtype))

    def one(path, leaf):
        axes = where(path_name(path), leaf.shape)
        return draw_kernel(leaf.shape, axes, rank) if axes else 1.0 + 0.3 * draw(leaf.shape)

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    return jax.tree_util.tree_map_with_path(one, shapes)


def count_kernels(tree):
    return sum(map(lro.is_lowrank, jax.tree.leaves(tree, is_leaf=lro.is_lowrank)))


def close(a, b, tol=1e-9):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b)


def shapes_inside(jaxpr):
    """The shapes of all values that a jaxpr computes, in loops, branches and calls too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from shapes_inside(getattr(inner, "jaxpr", inner))


def largest(fun, *args):
    """The number of entries of the largest array that `fun` computes."""
    return max(math.prod(s) for s in shapes_inside(jax.make_jaxpr(fun)(*args).jaxpr))


SLOW = ("layers", "mixed", "scan, attention, remat")


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
def test_other_modules_refuse_factors_and_kernels_leaves_them_dense(layer, shape, axes, rank):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(name="inner")(x)

    x = draw(shape) if len(shape) > 1 else jnp.zeros(shape, int)
    assert count_kernels(init(Model(), x)) == 0
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


LAYERS = {
    "dense": (lro.linen.LowRankDense(6, 3), nn.Dense(6), (4, 8)),
    "general": (
        lro.linen.LowRankDenseGeneral((3, 4), 3, axis=(-2, -1), batch_dims=(0,)),
        nn.DenseGeneral((3, 4), axis=(-2, -1), batch_dims=(0,)),
        (2, 5, 4, 6),
    ),
    "conv": (
        lro.linen.LowRankConv(8, (3, 3), 0.25, strides=2, padding="CIRCULAR", kernel_dilation=(1, 2)),
        nn.Conv(8, (3, 3), strides=2, padding="CIRCULAR", kernel_dilation=(1, 2)),
        (2, 7, 6, 4),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_their_dense_counterparts(name):
    layer, stock, shape = LAYERS[name]
    layer, x = layer.clone(max_rank=4), draw(shape)
    shapes, dense = (jax.eval_shape(m.init, jax.random.key(0), x)["params"] for m in (layer, stock))
    assert shapes["kernel"].rank == 4
    assert jax.tree.map(jnp.shape, jax.eval_shape(lro.densify, shapes)) == jax.tree.map(jnp.shape, dense)
    variables = {"params": jax.tree.map(lambda s: draw(s.shape), shapes)}
    y = stock.apply(lro.densify(variables), x)
    for run in (layer.apply, lro.linen.apply(layer), lro.linen.apply(stock)):
        close(run(variables, x), y)
    assert set(jax.eval_shape(layer.clone(use_bias=False).init, jax.random.key(0), x)["params"]) == {"kernel"}
    with pytest.raises(ValueError, match="does not fit"):
        layer.clone(rank=99).init(jax.random.key(0), x)


@pytest.mark.slow
def test_layers_have_the_scale_of_the_dense_initialiser():
    # LeCun normal of the axes (16, 2, 8) would take 32 for the fan-in where nn.DenseGeneral takes 16.
    layer, x = lro.linen.LowRankDenseGeneral((2, 8), 4), draw((1, 16))
    kernel = jax.jit(layer.init)(jax.random.key(0), x)["params"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel.to_dense()), math.sqrt(2 * 8), rtol=0.1)


@pytest.mark.slow
def test_layers_stack_under_scan():
    axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=3)

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return lro.linen.LowRankDense(8, 2)(x), None

    model, x = nn.scan(Step, **axes)(), draw((4, 8))
    variables = jax.jit(model.init)(jax.random.key(0), x, None)
    kernel = variables["params"]["LowRankDense_0"]["kernel"]
    assert kernel.batch_shape == (3,)
    expected = functools.reduce(lambda y, W: y @ W, kernel.to_dense(), x)
    close(model.apply(variables, x, None)[0], expected, 1e-5)


def test_metadata_boxes():
    model = nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out")))
    x = draw((4, 8))
    variables = init(model, x)
    assert count_kernels(variables) == 1 and isinstance(variables["params"]["kernel"], nn.Partitioned)
    close(lro.linen.apply(model)(variables, x), model.apply(lro.densify(variables), x))


@pytest.mark.slow
def test_path_mask_is_one_bool_a_kernel_and_optax_takes_it():
    params = {
        "a": {"kernel": draw_kernel((6, 5), lro.Axes(0, 1), 2), "bias": jnp.ones(5)},
        "b": {"kernel": draw((5, 4))},
    }
    mask = lro.linen.path_mask(r"kernel$")
    expected = {"a": {"kernel": True, "bias": False}, "b": {"kernel": True}}
    assert mask(params) == expected == mask(lro.densify(params))
    assert lro.linen.path_mask(lambda path: path.startswith("b/"))(params)["b"]["kernel"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    decayed = {"a": {"kernel": 0.9, "bias": 1.0}, "b": {"kernel": 0.9}}
    for tx in (
        optax.add_decayed_weights(-0.1, mask=mask),
        optax.partition({True: optax.add_decayed_weights(-0.1), False: optax.sgd(1.0)}, mask),
    ):
        updates, _ = tx.update(zeros, tx.init(params), params)
        new = optax.apply_updates(params, updates)
        jax.tree.map(lambda s, x, y: close(jax.tree.map(lambda x: s * x, x), y), decayed, params, new)
    decay = optax.chain(optax.add_decayed_weights(0.1, mask=mask), optax.sgd(1.0))
    for momentum in ("coefficient", "tangent"):
        tx = lro.fixed_rank(decay, momentum=momentum)
        updates, _ = tx.update(zeros, tx.init(params), params)
        new = lro.densify(optax.apply_updates(params, updates))
        close(jax.tree.map(lambda s, x: s * x, decayed, lro.densify(params)), new)


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(lro.linen.LowRankConv(8, (3,), 3)(x))
        x = nn.relu(lro.linen.LowRankDenseGeneral((2, 4), 3)(x))
        return nn.Dense(3)(nn.relu(lro.linen.LowRankDense(6, 3)(x.reshape(*x.shape[:-2], 8))))


def training(name):
    """A train state and a jitted step towards the output of a nearby model."""
    model, shape, _ = CASES.get(name, (Layers(), (4, 6, 5), 3))
    x = draw(shape)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    if name != "layers":
        variables = init(model, x)
    apply = lro.linen.apply(model)
    target = apply(jax.tree.map(lambda v: v + 0.1 * draw(v.shape, 7), variables), x)
    rest = {k: v for k, v in variables.items() if k != "params"}
    state = TrainState.create(apply_fn=apply, params=variables["params"], tx=lro.lowrank_adam(0.01))
    traces = []

    @jax.jit
    def step(state):
        traces.append(None)

        def loss(params):
            return jnp.mean((state.apply_fn({"params": params, **rest}, x) - target) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    return state, step, traces


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["general, batch"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("layers", "mixed", "scan, attention, remat")],
)
def test_training_reduces_the_loss(name):
    state, step, traces = training(name)
    state, first = step(state)
    for _ in range(60):
        state, last = step(state)
    assert last < first / 4
    assert len(traces) == 1


@pytest.mark.slow
def test_train_state_serialises():
    state, _, _ = training("dense")
    trained = jax.tree.map(lambda v: v + 1, state)
    restored = serialization.from_bytes(state, serialization.to_bytes(trained))
    assert jax.tree.structure(restored) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, restored, trained)
    kernel = draw_kernel((4, 4), lro.Axes(0, 1), 2)
    with pytest.raises(ValueError, match="LowRank"):
        serialization.from_state_dict(kernel, {"U": kernel.U})


def test_routes_of_one_model_are_equal_even_with_arrays_in_it():
    model = nn.Conv(4, 3, mask=np.ones((3, 4, 4)))
    a, b = lro.linen.apply(model), lro.linen.apply(model)
    assert a == b and hash(a) == hash(b) and a != lro.linen.apply(nn.Dense(4))
