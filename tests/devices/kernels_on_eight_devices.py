"""Dense kernels that lie on a mesh, without `jit`; `test_sharding.py` runs this file in a process that has devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests import problems

RANK = 3
SIGMA = np.array([8.0, 5.0, 3.0, 1.0, 0.5, 0.2])
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
pytestmark = pytest.mark.usefixtures("settings_of_a_user")

# Layout of the kernel, its dense spec, and the modes of the mesh.
KERNELS = {
    "both axes": (problems.Layout((16,), (24,)), P("fsdp", "tensor"), ["auto"]),
    "an axis that eight does not divide": (problems.Layout((6,), (12,)), P("tensor", "fsdp"), ["auto"]),
    "stack": (problems.Layout((16,), (8,), batch=(4,)), P("fsdp", None, "tensor"), ["explicit"]),
    "later input axis": (problems.Layout((3, 3, 8), (16,)), P(None, None, "fsdp", "tensor"), ["auto", "explicit"]),
    "later output axis": (problems.Layout((16,), (3, 8)), P("tensor", None, "fsdp"), ["explicit"]),
}


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, (_, _, modes) in KERNELS.items() for mode in modes])
def test_a_kernel_is_factored_and_moves_where_it_lies(name: str, mode: str) -> None:
    layout, spec, _ = KERNELS[name]
    dense = np.stack(problems.starts(layout, sigma=SIGMA))
    u, sigma, vt = np.linalg.svd(dense)
    best = (u[..., :RANK] * sigma[:, None, :RANK]) @ vt[..., :RANK, :]
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(MODES[mode],) * 2)
    shape = (*layout.batch, *layout.inputs, *layout.outputs)
    with jax.set_mesh(mesh):
        W = jax.device_put(dense.reshape(shape).astype(np.float32), NamedSharding(mesh, spec))
        axes = lro.Axes(len(layout.batch), len(layout.inputs))
        params = lro.factorize({"kernel": W}, RANK, where=lambda path, shape: axes)
        specs = lro.partition_specs(params, {"kernel": spec})
        assert_lies_as(params, specs, mesh)
        # A Gram matrix in float32: a few roundings of 6e-8 of the largest singular value.
        np.testing.assert_allclose(jax.device_get(lro.densify(params)["kernel"]).reshape(best.shape), best, atol=2e-5)
        tx = lro.lowrank_heavy_ball(0.1, geometry=lro.Balanced())
        state = tx.init(params)
        moments = optax.tree.get(state, "trace")["kernel"]
        rows = lro.state_specs(state, params, specs)
        if mode == "explicit":
            assert_lies_as(moments, optax.tree.get(rows, "trace")["kernel"], mesh)
        updates, _ = tx.update(gradients(params), state, params)
        moved = optax.apply_updates(params, updates)
        if mode == "explicit":
            assert_lies_as(moved, specs, mesh)
        found = jax.device_get(lro.densify(moved)["kernel"])
    alone = jax.tree.map(jnp.asarray, jax.device_get(params))
    updates, _ = jax.jit(tx.update)(gradients(alone), tx.init(alone), alone)
    expected = lro.densify(optax.apply_updates(alone, updates))["kernel"]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert float(np.abs(found - jax.device_get(lro.densify(params)["kernel"])).max()) > 1e-3


def gradients(params: Any) -> Any:
    return jax.grad(lambda p: jnp.sum(jnp.sin(lro.densify(p)["kernel"])))(params)


def assert_lies_as(tree: Any, specs: Any, mesh: Any) -> None:
    def one(x: Any, spec: P) -> None:
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (x.sharding, spec)

    jax.tree.map(one, tree, specs)
