"""Flax models of every kind of layer on grids of blocks, against the dense kernels that the grids stand for."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import lowrank_optax as lro
from tests.models import linen_models, nnx_models

LINEN = [name for name in linen_models.CASES if "transpose" not in name]
FAST = ("general", "conv 2d same", "vmap")


def are_grids(tree: Any) -> bool:
    return all(
        isinstance(x, lro.BlockLowRank) for x in jax.tree.leaves(tree, is_leaf=lro.is_lowrank) if lro.is_lowrank(x)
    )


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in LINEN])
def test_linen_layers_and_their_gradients_equal_the_dense_model(name: str) -> None:
    model, shape, _ = linen_models.CASES[name]
    x = linen_models.draw(shape)
    variables = lro.densify(linen_models.init(model, x))
    where = lro.linen.kernels(model, x)
    params = jax.jit(lambda p: lro.factorize(p, 4, where=where, blocks=(3, 2)))(variables["params"])
    assert are_grids(params)

    def loss(params: Any, apply: Any, convert: Any) -> Any:
        y = apply(convert({**variables, "params": params}), x)
        return jnp.sum(jnp.sin(jnp.arange(y.size).reshape(y.shape)) * y), y

    @jax.jit
    def both(params: Any) -> Any:
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        factored = value_and_grad(params, lro.linen.apply(model), lambda v: v)
        return factored, value_and_grad(params, model.apply, lro.densify)

    linen_models.close(*both(params))


@pytest.mark.parametrize("axis", [(-1, -2), (2, 1), (-2, -1)])
@pytest.mark.parametrize("batch", [(), (0,)])
def test_axes_in_any_order_are_those_of_the_dense_layer(axis: tuple[int, ...], batch: tuple[int, ...]) -> None:
    """Equal sizes, so that a wrong order would be silent."""
    x = jax.random.normal(jax.random.key(1), (3, 8, 8))
    model = nn.DenseGeneral(6, axis=axis, batch_dims=batch, use_bias=False)
    variables = model.init(jax.random.key(0), x)
    axes = lro.Axes(len(batch), 2)
    params = lro.factorize(variables["params"], 1.0, where=lambda path, shape: axes, blocks=2)
    y = lro.linen.apply(model)({"params": params}, x)
    np.testing.assert_allclose(y, model.apply({"params": lro.densify(params)}, x), atol=1e-5)


def test_batch_axes_in_any_order_are_those_of_the_dense_layer() -> None:
    x = jax.random.normal(jax.random.key(1), (3, 3, 8))
    model = nn.DenseGeneral(6, axis=-1, batch_dims=(1, 0), use_bias=False)
    variables = model.init(jax.random.key(0), x)
    params = lro.factorize(variables["params"], 1.0, where=lambda path, shape: lro.Axes(2, 1), blocks=2)
    y = lro.linen.apply(model)({"params": params}, x)
    np.testing.assert_allclose(y, model.apply({"params": lro.densify(params)}, x), atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Dense, nn.DenseGeneral])
def test_a_dot_general_of_the_layer_is_refused_and_not_ignored(layer: Any) -> None:
    model, x = layer(6, dot_general=jax.lax.dot_general), jnp.ones((2, 8))
    params = lro.factorize(model.init(jax.random.key(0), x)["params"], 4, blocks=2)
    with pytest.raises(TypeError, match="dot_general of its own"):
        lro.linen.apply(model)({"params": params}, x)


def test_a_transposed_convolution_says_that_it_has_no_groups() -> None:
    model, x = nn.ConvTranspose(6, (3, 3)), jnp.ones((1, 5, 5, 4))
    params = lro.factorize(model.init(jax.random.key(0), x)["params"], 4, blocks=2)
    with pytest.raises(TypeError, match="blocks=1"):
        lro.linen.apply(model)({"params": params}, x)


@pytest.mark.parametrize(
    "name", ["linear", "general, batch", "conv", "einsum, heads out", "einsum, heads in", "einsum, experts"]
)
def test_nnx_layers_equal_the_dense_ones(name: str) -> None:
    build, shape, _ = nnx_models.LAYERS[name]
    dense, model = nnx_models.twins(build)
    lro.nnx.factorize(model, 4, blocks=2)
    found = nnx_models.kernels(model)
    assert are_grids(found)
    for path, W in found.items():
        parent = dense
        *parts, leaf = path.split("/")
        for part in parts:
            parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
        getattr(parent, leaf).set_value(W.to_dense())
    x = nnx_models.draw(shape)
    nnx_models.close(model(x), dense(x), 1e-9)


def test_layers_that_start_as_grids_train_and_compile_once() -> None:
    layer = lro.linen.LowRankDense(8, rank=2, blocks=4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)))
    params = layer.init(jax.random.key(0), x)["params"]
    assert params["kernel"].grid == (4, 4)
    assert lro.nnx.LowRankLinear(8, 8, rank=2, blocks="auto", rngs=nnx.Rngs(0)).kernel[...].grid == (4, 4)
    tx = optax.inject_hyperparams(lro.lowrank_adamw)(1e-2)
    state = tx.init(params)
    traces = []

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        traces.append(1)
        loss = lambda p: jnp.mean((layer.apply({"params": p}, x) - x) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(20):
        params, state, value = step(params, state)
        values.append(float(value))
    assert len(traces) == 1 and values[-1] < 0.9 * values[0]
    restored = serialization.from_bytes((params, state), serialization.to_bytes((params, state)))
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves((params, state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoints_and_what_comes_back_without_a_target(tmp_path: Any) -> None:
    params = {"dense": {"kernel": lro.factorize({"kernel": jnp.eye(8)}, 2, blocks=4)["kernel"]}}
    state = lro.lowrank_adam(1e-2).init(params)
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path) as manager:
        lro.checkpoint.save(manager, 1, {"params": params, "state": state})
        manager.wait_until_finished()
        back = lro.checkpoint.restore(manager, {"params": params, "state": state})
    for a, b in zip(
        jax.tree.leaves(back.tree if hasattr(back, "tree") else back),
        jax.tree.leaves({"params": params, "state": state}),
        strict=False,
    ):
        np.testing.assert_array_equal(a, b)
    W = params["dense"]["kernel"]
    rebuilt = lro.checkpoint.rebuild({"kernel": {"U": W.U, "S": W.S, "V": W.V}})["kernel"]
    assert isinstance(rebuilt, lro.BlockLowRank)
