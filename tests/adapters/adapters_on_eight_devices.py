"""Adapters on meshes; `test_adapter_meshes.py` runs this file in a process with eight devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro

pytestmark = pytest.mark.usefixtures("settings_of_a_user")
MODEL = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(8)])
X = np.random.default_rng(0).standard_normal((8, 8), np.float32)
KEY = jax.random.key(1)


@functools.cache
def start():
    return MODEL.init(jax.random.key(0), X)["params"]


def train(params, x, kind):
    """The loss after two steps."""
    params, delta = lro.adapters.init(KEY, params, 2, kind=kind, alpha=3)
    # eps is large, so that entries of gradients of the size of rounding do not move.
    tx = lro.adapters.optimizer(optax.adam(1e-2, eps=1e-3), rule="manifold" if kind == "lowrank" else "plain")
    state = tx.init(delta)

    def loss(delta, params, x):
        return jnp.mean((lro.linen.apply(MODEL)({"params": params, "adapters": delta}, x) - 1) ** 2)

    @jax.jit
    def step(delta, state, params, x):
        grads = jax.grad(loss)(delta, params, x)
        updates, state = tx.update(grads, state, delta)
        return optax.apply_updates(delta, updates), state

    for _ in range(2):
        delta, state = step(delta, state, params, x)
    merged = lro.adapters.merge(params, delta)
    value = jax.jit(loss)(delta, params, x)
    return float(value), float(jax.jit(lambda p: jnp.mean((MODEL.apply({"params": p}, x) - 1) ** 2))(merged))


def sharded(mesh, params, rows=None):
    spec = lambda x: P(rows, "tensor") if x.ndim == 2 else P("tensor")  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), params)


@pytest.mark.parametrize("kind", ["lowrank", "lora", "dora", "core", "vera", "loha", "hra"])
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_base_trains_as_one_on_one_device(mode, kind):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(mode,) * 2)
    expected = train(start(), jnp.asarray(X), kind)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("fsdp", None)))
        np.testing.assert_allclose(train(sharded(mesh, start()), x, kind), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["pissa", "olora", "gradient"])
def test_starts_leave_the_base_where_it_lies(name):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params = sharded(mesh, start(), "fsdp")
        how = lro.adapters.gradient(params) if name == "gradient" else name
        base, delta = lro.adapters.init(KEY, params, 2, kind="lora", start=how)
        kernel = base["layers_0"]["kernel"]
        assert jax.typeof(kernel).sharding.spec == P("fsdp", "tensor")
        merged = lro.adapters.merge(base, delta)["layers_0"]["kernel"]
        np.testing.assert_allclose(merged, start()["layers_0"]["kernel"], atol=1e-6)
