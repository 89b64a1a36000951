"""The tests that need eight devices; `tests/test_sharding.py` runs this file in a process that has them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests import distributed as d

STEPS = 100
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
pytestmark = pytest.mark.usefixtures("settings_of_a_user")


def run(step: Any, params: Any, state: Any, data: Any) -> tuple[Any, Any, list[float]]:
    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state, *data)
        losses.append(
            float(jnp.mean(loss))
        )  # Waits, so that collectives of two steps never queue for the same threads.
    return params, state, losses


@functools.cache
def reference(name: str) -> tuple[Any, list[float]]:
    """Dense parameters and losses of the run on one device."""
    tx, params = d.OPTIMIZERS[name](), d.params()
    params, _, losses = run(jax.jit(functools.partial(d.step, tx)), params, tx.init(params), d.data())
    return lro.densify(params), losses


def assert_same_trajectory(name: str, params: Any, losses: list[float]) -> None:
    """Float32 sums in another order differ by about 1e-7 a step; these problems do not amplify it."""
    expected, expected_losses = reference(name)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    params = lro.densify(jax.device_get(params))
    if "kernel" in params["blocks"]:
        params["blocks"] = {str(i): {"kernel": x} for i, x in enumerate(params["blocks"]["kernel"])}
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def where(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def assert_lies_as(tree: Any, expected: Any) -> None:
    for (path, x), sharding in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (jax.tree_util.keystr(path), x.sharding, sharding)


@pytest.mark.parametrize(
    ("layout", "mode", "name"),
    [
        ("data", "auto", "muon"),
        ("fsdp", "auto", "adam"),
        ("fsdp", "explicit", "muon"),
        ("tensor", "auto", "muon-tangent"),
        ("fsdp-tensor", "auto", "adam-tangent"),
        ("fsdp-tensor", "explicit", "adam-tangent"),
        ("layers", "auto", "adam"),
    ],
)
def test_trajectory_of_one_device(layout, mode, name):
    """Every layout gives the run of one device, and parameters and state stay where they were put."""
    tx, layout = d.OPTIMIZERS[name](), d.LAYOUTS[layout]
    mesh = layout.mesh(MODES[mode])
    traces = 0

    def step(*args):
        nonlocal traces
        traces += 1
        return d.step(tx, *args)

    with jax.set_mesh(mesh):
        params, state, data = d.placed(layout, mesh, tx)
        before = where((params, state))
        # In auto mode XLA may split what is replicated, unless it is told; in explicit mode types say it.
        out = (*before, None) if mode == "auto" else None
        params, state, losses = run(jax.jit(step, out_shardings=out), params, state, data)
    assert traces == 1
    assert_lies_as((params, state), before)
    assert_same_trajectory(name, params, losses)


def test_pmap():
    """Replicas stay identical to the bit."""
    tx, n = d.OPTIMIZERS["adam"](), jax.device_count()

    @functools.partial(jax.pmap, axis_name="batch")
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(d.loss)(params, x, y)
        updates, state = tx.update(jax.lax.pmean(grads, "batch"), state, params)
        return optax.apply_updates(params, updates), state, value

    params = d.params()
    params, state = jax.tree.map(lambda x: jnp.stack([x] * n), (params, tx.init(params)))
    data = jax.tree.map(lambda x: x.reshape(n, -1, x.shape[-1]), d.data())
    params, state, losses = run(step, params, state, data)
    for x in jax.tree.leaves(jax.device_get((params, state))):
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
    assert_same_trajectory("adam", jax.tree.map(lambda x: x[0], params), losses)


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_shard_map(layout):
    """The data axis by hand, with explicit sums; other axes, over which factors are sharded, are left to XLA."""
    tx, layout = d.OPTIMIZERS["muon"](), d.LAYOUTS[layout]
    mesh = layout.mesh(AxisType.Auto)

    def local(params, state, x, y):
        # Differentiating with respect to replicated parameters sums over the axis.
        value, grads = jax.value_and_grad(lambda p: d.loss(p, x, y) / mesh.shape["data"])(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, jax.lax.psum(value, "data")

    specs = (P(), P(), P("data"), P("data"))
    f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), axis_names={"data"})
    with jax.set_mesh(mesh):
        params, state, data = d.placed(layout, mesh, tx)
        before = where(params)
        step = jax.jit(f, out_shardings=(before, where(state), None))
        params, state, losses = run(step, params, state, data)
    assert_lies_as(params, before)
    assert_same_trajectory("muon", params, losses)
