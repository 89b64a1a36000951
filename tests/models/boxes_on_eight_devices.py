"""The tests of boxes that need eight devices; `test_boxes.py` runs this file in a process that has them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro

pytestmark = pytest.mark.usefixtures("settings_of_a_user")
LECUN = nn.initializers.lecun_normal()
RULES = (("embed", "fsdp"), ("mlp", "tensor"), ("layers", None))
X = np.random.default_rng(0).standard_normal((8, 4, 16), np.float32)
MESH = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
TX = lro.lowrank_adam(1e-2, eps=3e-3)  # `tests/distributed.py` has the reason for eps


class Block(nn.Module):
    """The MLP of lm1b and nanodo in small."""

    boxed: Any  # makes an initialiser of boxes from the names of axes

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        h = nn.gelu(nn.Dense(32, kernel_init=self.boxed("embed", "mlp"), name="up")(x))
        return x + nn.Dense(16, kernel_init=self.boxed("mlp", "embed"), use_bias=False, name="down")(h), None


class Model(nn.Module):
    boxed: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        stack = {nn.PARTITION_NAME: "layers" if self.boxed is logical else None}
        options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=2, metadata_params=stack)
        return nn.scan(Block, **options)(self.boxed, name="blocks")(x)[0]


def physical(*names: Any) -> Any:
    return nn.with_partitioning(LECUN, tuple(map(dict(RULES).get, names)))


def logical(*names: Any) -> Any:
    return nn.with_logical_partitioning(LECUN, names)


def bare(*names: Any) -> Any:
    return LECUN


def create(model: Any) -> TrainState:
    where = lro.linen.kernels(model, X)
    params = lro.factorize(model.init(jax.random.key(0), X)["params"], 4, where=where)  # the line
    return TrainState.create(apply_fn=lro.linen.apply(model), params=params, tx=TX)


def step(state: TrainState, x: Any) -> tuple[TrainState, Any]:
    loss = lambda params: jnp.mean((state.apply_fn({"params": params}, x) - 1) ** 2)  # noqa: E731
    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def run(train: Any, state: Any, x: Any) -> tuple[Any, list[float]]:
    losses = []
    for _ in range(4):
        state, value = train(state, x)
        losses.append(float(value))
    return state, losses


def test_the_recipe_of_flax() -> None:
    """Abstract state, specs, shardings, jitted initialisation and steps: the numbers are those of one device."""
    model = Model(logical)
    make = lambda: create(model)  # noqa: E731
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(jax.eval_shape(make)), MESH, RULES)
    with jax.set_mesh(MESH), nn.logical_axis_rules(RULES):
        state = jax.jit(make, out_shardings=shardings)()
        assert_lies_as_named(state)
        train = jax.jit(step, out_shardings=(shardings, None))
        state, losses = run(train, state, jax.device_put(X, NamedSharding(MESH, P("fsdp"))))
        assert_lies_as_named(state)
        assert train._cache_size() == 1
    _, expected = run(jax.jit(step), create(Model(bare)), X)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)  # sums in another order, single precision
    assert losses[-1] < losses[0]


def test_names_of_mesh_axes() -> None:
    """The same places without rules."""
    model, named = Model(physical), Model(logical)
    state = jax.eval_shape(lambda: create(model))
    of_rules = nn.get_partition_spec(jax.eval_shape(lambda: create(named)))
    pairs = zip(
        jax.tree.leaves(nn.get_sharding(state, MESH)),
        jax.tree.leaves(nn.logical_to_mesh_sharding(of_rules, MESH, RULES)),
        jax.tree.leaves(state),
        strict=True,
    )
    assert all(a.is_equivalent_to(b, x.ndim) for a, b, x in pairs)
    with jax.set_mesh(MESH):
        jax.eval_shape(step, state, X)  # JAX checks the constraints of boxes
        layer = lro.linen.LowRankDense(32, 4, kernel_init=physical("embed", "mlp"))
        drawn = layer.init(jax.random.key(0), X)["params"]["kernel"]
    assert (drawn.U.names, drawn.V.names) == (("fsdp", None), ("tensor", None))


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_updates_of_boxed_arrays_lie_where_they_lay(mode: Any) -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(mode,) * 2)
    with jax.set_mesh(mesh):
        W = nn.with_partitioning(lambda: jnp.asarray(X[:, 0]), ("fsdp", "tensor"))()
        W = jax.device_put(W, NamedSharding(mesh, P("fsdp", "tensor")))
        params = lro.factorize({"kernel": W}, 2)
        lies = nn.get_sharding(params, mesh)
        lies_so = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), nn.unbox(params), lies)
        assert all(jax.tree.leaves(lies_so))
        state = TX.init(params)
        updates, new = jax.jit(TX.update)(params, state, params)
        assert jax.tree.structure((updates, new)) == jax.tree.structure((params, state))
        if mode == AxisType.Explicit:
            for tree, like in ((updates, params), (new, state)):
                same = jax.tree.map(lambda x, y: jax.typeof(x) == jax.typeof(y), tree, like)
                assert all(jax.tree.leaves(same))


def assert_lies_as_named(state: TrainState) -> None:
    """Factors and their moments, which their shapes tell: rows are of length 16 along embed and 32 along mlp."""
    specs = {(2, 16, 4): P(None, "fsdp"), (2, 32, 4): P(None, "tensor")}
    found = [x for x in jax.tree.leaves(state) if x.shape in specs]
    assert len(found) >= 8  # four factors and as many rows of moments or more
    for x in found:
        assert x.sharding.is_equivalent_to(NamedSharding(MESH, specs[x.shape]), x.ndim), (x.sharding, x.shape)
