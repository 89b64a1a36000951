"""The tests that need eight devices; `tests/test_sharding.py` runs this file in a process that has them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests import distributed as d

STEPS = 100
pytestmark = pytest.mark.usefixtures("settings_of_a_user")


@functools.cache
def reference(name: str) -> tuple[Any, list[float]]:
    """Parameters and losses of the run on one device."""
    tx = d.OPTIMIZERS[name]()
    params = d.params()
    return run(jax.jit(functools.partial(d.step, tx)), params, tx.init(params), d.data())[::2]


def run(step: Any, params: Any, state: Any, data: Any) -> tuple[Any, Any, list[float]]:
    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state, *data)
        losses.append(float(jnp.mean(loss)))
    return params, state, losses


def assert_same_trajectory(name: str, params: Any, losses: list[float]) -> None:
    expected, expected_losses = reference(name)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(lro.densify(jax.device_get(params))), jax.tree.leaves(lro.densify(expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "mode", "name"),
    [(l,m,n) for l in d.LAYOUTS for m in ("auto","explicit") for n in (["adam"] if l!="fsdp-tensor" else d.OPTIMIZERS)]
)
def test_trajectory(layout, mode, name):
    tx, layout = d.OPTIMIZERS[name](), d.LAYOUTS[layout]
    mesh = layout.mesh(AxisType.Auto if mode == "auto" else AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, state, data = d.placed(layout, mesh, tx)
        before = jax.tree.map(lambda x: x.sharding, (params, state))
        step = jax.jit(functools.partial(d.step, tx))
        import time; t=time.process_time(); step.lower(params,state,*data).compile(); print("\ncompile", time.process_time()-t); t=time.process_time()
        params, state, losses = run(step, params, state, data)
    print("run+1compile", time.process_time()-t)
    for x, s in zip(jax.tree.leaves((params, state)), jax.tree.leaves(before), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    expected, expected_losses = reference(name)
    print(mode, name, losses[0], losses[-1], np.abs(np.array(losses)/np.array(expected_losses)-1).max(), [float(abs(a-b).max()) for a,b in zip(jax.tree.leaves(lro.densify(jax.device_get(params))), jax.tree.leaves(lro.densify(expected)))])
    assert_same_trajectory(name, params, losses)
