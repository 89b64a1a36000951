"""The tests of nnx that need eight devices; `test_nnx_meshes.py` runs this file in a process that has them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro

MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
LECUN = nnx.initializers.lecun_normal()
pytestmark = pytest.mark.usefixtures("settings_of_a_user")


@pytest.fixture(params=MODES)
def mesh(request: Any) -> Any:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(MODES[request.param],) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def is_explicit(mesh: Any) -> bool:
    return bool(mesh.axis_types[0] == AxisType.Explicit)


def sharded(*axes: Any, **options: Any) -> Any:
    return nnx.with_partitioning(LECUN, axes, **options)


def put(mesh: Any, spec: Any, *shape: int) -> Any:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return jax.device_put(x, NamedSharding(mesh, spec))


def assert_lies_as(tree: Any, specs: Any, mesh: Any) -> None:
    def one(x: Any, spec: P) -> None:
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (x.sharding, spec)

    jax.tree.map(one, tree, specs)


layer = functools.partial
# For each layer: constructor, the dense spec of its kernel, the spec and shape of the input, and the specs of U and V.
LAYERS: dict[str, tuple[Any, tuple[Any, ...], tuple[Any, tuple[int, ...]], tuple[P, P]]] = {
    "linear": (layer(lro.nnx.LowRankLinear, 16, 8), ("fsdp", "tensor"), (P("fsdp"), (8, 16)), (P("fsdp"), P("tensor"))),
    "general": (
        layer(lro.nnx.LowRankLinearGeneral, 16, (4, 2)),
        ("fsdp", "tensor", None),
        (P("fsdp"), (8, 16)),
        (P("fsdp"), P("tensor")),
    ),
    "conv": (
        layer(lro.nnx.LowRankConv, 16, 8, (3,)),
        (None, "fsdp", "tensor"),
        (P("fsdp"), (8, 5, 16)),
        (P(None, "fsdp"), P("tensor")),
    ),
    "einsum": (
        layer(lro.nnx.LowRankEinsum, "btd,dnh->btnh", (16, 4, 2)),
        ("fsdp", "tensor", None),
        (P("fsdp"), (8, 5, 16)),
        (P("fsdp"), P("tensor")),
    ),
}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "initialiser") for name in LAYERS),
        ("linear", "metadata"),
        ("linear", "within jit"),
        ("general", "within jit"),
    ],
)
def test_layers_are_born_where_the_dense_spec_says(name: str, form: str, mesh: Any) -> None:
    make, axes, (x_spec, x_shape), (u_spec, v_spec) = LAYERS[name]
    options = {"kernel_metadata": {"out_sharding": axes}} if form == "metadata" else {"kernel_init": sharded(*axes)}
    build = lambda: make(rank=4, rngs=nnx.Rngs(0), **options)  # noqa: E731
    model = nnx.jit(build)() if form == "within jit" else build()
    specs = lro.LowRank(u_spec, P(), v_spec)
    assert_lies_as(model.kernel.get_value(), specs, mesh)
    found = lro.nnx.get_partition_spec(nnx.state(model))["kernel"].get_value()
    assert (u_spec, P(), v_spec) == (found.U, found.S, found.V)

    x = put(mesh, x_spec, *x_shape)
    y = nnx.jit(lambda model, x: model(x))(model, x)
    with jax.set_mesh(jax.make_mesh((1,), ("one",), axis_types=(AxisType.Auto,))):
        alone = make(rank=4, rngs=nnx.Rngs(0))
        alone.kernel.set_value(jax.tree.map(jnp.asarray, jax.device_get(model.kernel.get_value())))
        expected = alone(jnp.asarray(jax.device_get(x)))
    np.testing.assert_allclose(jax.device_get(y), jax.device_get(expected), atol=1e-4)

    grads = nnx.jit(nnx.grad(lambda model: jnp.sum(model(x) ** 2)))(model)
    if is_explicit(mesh):
        assert_lies_as(grads["kernel"].get_value(), specs, mesh)


def test_logical_axes_become_axes_of_the_mesh(mesh: Any) -> None:
    rules = [("embed", "fsdp"), ("mlp", "tensor")]
    with logical_axis_rules(rules):
        of_context = lro.nnx.LowRankLinear(16, 8, 4, kernel_init=sharded("embed", "mlp"), rngs=nnx.Rngs(0))
        specs = [lro.nnx.get_partition_spec(nnx.state(of_context))["kernel"].get_value()]
    init = sharded("embed", "mlp", sharding_rules=rules)
    of_layer = lro.nnx.LowRankLinear(16, 8, 4, kernel_init=init, rngs=nnx.Rngs(0))
    specs += [lro.nnx.get_partition_spec(nnx.state(of_layer))["kernel"].get_value()]
    for model, spec in zip((of_context, of_layer), specs, strict=True):
        assert (P("fsdp"), P(), P("tensor")) == (spec.U, spec.S, spec.V)
        assert_lies_as(model.kernel.get_value(), spec, mesh)


class Net(nnx.Module):
    def __init__(self, linear: Any, rngs: nnx.Rngs):
        self.up = linear(16, 32, kernel_init=sharded("fsdp", "tensor"), rngs=rngs)
        self.down = linear(32, 16, kernel_init=sharded("tensor", "fsdp"), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(nnx.relu(self.up(x)))


def lowrank_net() -> Any:
    return Net(layer(lro.nnx.LowRankLinear, rank=4), nnx.Rngs(0))


def factored_net() -> Any:
    model = Net(nnx.Linear, nnx.Rngs(0))
    lro.nnx.factorize(model, 4)
    return model


@pytest.mark.parametrize("build", [lowrank_net, factored_net])
def test_a_sharded_model_trains_where_it_lies(build: Any, mesh: Any) -> None:
    model = build()
    params = nnx.state(model, nnx.Param)
    specs = lro.nnx.get_partition_spec(params)
    expected = {"up": (P("fsdp"), P("tensor")), "down": (P("tensor"), P("fsdp"))}
    for name, of_factors in expected.items():
        spec = specs[name]["kernel"].get_value()
        assert of_factors == (spec.U, spec.V)
        assert_lies_as(getattr(model, name).kernel.get_value(), spec, mesh)
    optimizer = nnx.Optimizer(model, lro.lowrank_adam(1e-2), wrt=nnx.Param)
    state_specs = lro.state_specs(optimizer.opt_state, params, specs)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs)
    nnx.update(optimizer.opt_state, nnx.state(jax.device_put(optimizer.opt_state, shardings)))
    x = put(mesh, P("fsdp"), 8, 16)
    traces = []

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        traces.append(None)
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert len(traces) <= 2  # In auto mode XLA may choose other shardings for what is replicated, once.
    for name in expected:
        W, spec = getattr(model, name).kernel.get_value(), specs[name]["kernel"].get_value()
        assert_lies_as(W, spec, mesh)
        mu = optax.tree.get(nnx.as_pure(optimizer.opt_state), "mu")[name]["kernel"]
        assert_lies_as((mu.A, mu.B), (spec.U, spec.V), mesh)


def test_the_recipe_of_flax_within_jit() -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):

        @nnx.jit
        def create() -> Any:
            model = factored_net()
            state = nnx.state(model)
            nnx.update(model, jax.lax.with_sharding_constraint(state, lro.nnx.get_partition_spec(state)))
            return model

        model = create()
    assert_lies_as(model.up.kernel.get_value(), lro.LowRank(P("fsdp"), P(), P("tensor")), mesh)
    # Flax's own function has one spec for a variable: it says replicated, and never a spec that does not fit.
    assert nnx.get_partition_spec(nnx.state(model))["up"]["kernel"].get_value() == P()


def test_layers_that_vmap_stacks(mesh: Any) -> None:
    axis = {nnx.PARTITION_NAME: "fsdp", "dense_sharding": "fsdp"}

    @nnx.split_rngs(splits=4)
    @nnx.vmap(transform_metadata=axis)
    def stack(rngs: nnx.Rngs) -> Any:
        return lro.nnx.LowRankLinear(16, 16, 4, kernel_init=sharded(None, "tensor"), rngs=rngs)

    @nnx.jit
    def run(model: Any, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=axis)
        def one(layer: Any, x: Any) -> Any:
            return layer(x, out_sharding=P("fsdp")) if is_explicit(mesh) else layer(x)

        return one(model, x)

    model = stack(nnx.Rngs(0))
    for _ in range(2):
        spec = lro.nnx.get_partition_spec(nnx.state(model))["kernel"].get_value()
        assert (P("fsdp"), P("fsdp"), P("fsdp", "tensor")) == (spec.U, spec.S, spec.V)
        assert run(model, put(mesh, P("fsdp"), 8, 16)).shape == (8, 16)
