"""lowrank_optax.linen: low-rank layers, masks by path, training, serialisation."""

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
from tests.models.linen_models import CASES, close, draw, draw_kernel, init

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
    assert shapes["kernel"].width == 4
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
    for geometry in (lro.Coefficient(), lro.Tangent()):
        tx = lro.fixed_rank(decay, geometry=geometry)
        updates, _ = tx.update(zeros, tx.init(params), params)
        new = lro.densify(optax.apply_updates(params, updates))
        close(jax.tree.map(lambda s, x: s * x, decayed, lro.densify(params)), new)


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(lro.linen.LowRankConv(8, (3,), 3)(x))
        x = nn.relu(lro.linen.LowRankDenseGeneral((2, 4), 3)(x))
        return nn.Dense(3)(nn.relu(lro.linen.LowRankDense(6, 3)(x.reshape(*x.shape[:-2], 8))))


def training(name, geometry=lro.Balanced()):  # noqa: B008
    """A train state and a jitted step towards the output of a nearby model."""
    model, shape, _ = CASES.get(name, (Layers(), (4, 6, 5), 3))
    x = draw(shape)
    variables = jax.jit(model.init)(jax.random.key(0), x) if name == "layers" else init(model, x)
    apply = lro.linen.apply(model)
    target = apply(jax.tree.map(lambda v: v + 0.1 * draw(v.shape, 7), variables), x)
    rest = {k: v for k, v in variables.items() if k != "params"}
    state = TrainState.create(apply_fn=apply, params=variables["params"], tx=lro.lowrank_adam(0.01, geometry=geometry))
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
@pytest.mark.parametrize("geometry", [lro.Balanced(), lro.Tangent(), lro.Coefficient()], ids=lambda g: type(g).__name__)
def test_train_state_serialises(geometry):
    state, _, _ = training("dense", geometry)
    trained = jax.tree.map(lambda v: v + 1, state)
    restored = serialization.from_bytes(state, serialization.to_bytes(trained))
    assert jax.tree.structure(restored) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, restored, trained)
    kernel = draw_kernel((4, 4), lro.Axes(0, 1), 2)
    with pytest.raises(ValueError, match="LowRank"):
        serialization.from_state_dict(kernel, {"U": kernel.U})
