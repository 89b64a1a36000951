"""Grids of blocks on eight devices; `test_sharding.py` runs this file in a process that has them."""

from __future__ import annotations

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
from tests.distributed import shardings

# Each optimizer once: a program for eight devices takes many seconds to compile.
CASES = {
    "both, adam": (P("fsdp", "tensor"), lambda: lro.lowrank_adam(1e-2, eps=1e-3)),
    "inputs, muon": (P(("fsdp", "tensor")), lambda: lro.lowrank_muon(1e-2)),
}


def start() -> Any:
    rng = np.random.default_rng(0)
    dense = {"up": {"kernel": rng.standard_normal((16, 32))}, "down": {"kernel": rng.standard_normal((32, 16))}}
    return lro.factorize(jax.tree.map(jnp.asarray, dense), 8, blocks=8)


def loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"] - x) ** 2)


def train(tx: Any, params: Any, state: Any, x: Any, out_shardings: Any = None, steps: int = 4) -> Any:
    @functools.partial(jax.jit, out_shardings=out_shardings)
    def step(params: Any, state: Any, x: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state, x)
    return params, state


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_run_is_the_run_on_one_device(mode: Any, case: str) -> None:
    spec, make = CASES[case]
    tx = make()
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(mode, mode))
    params, x = start(), jnp.asarray(np.random.default_rng(1).standard_normal((8, 16)))
    state = tx.init(params)
    want, _ = train(tx, params, state, x)
    specs = lro.partition_specs(params, lambda path, shape: spec)
    of_params, of_state = shardings(mesh, specs), shardings(mesh, lro.state_specs(state, params, specs))
    rows = jax.device_put(x, NamedSharding(mesh, P()))
    # In auto mode XLA would choose the shardings of results.
    chosen = (of_params, of_state) if mode == AxisType.Auto else None
    got, end = train(tx, jax.device_put(params, of_params), jax.device_put(state, of_state), rows, chosen)
    for a, b in zip(jax.tree.leaves(lro.densify(got)), jax.tree.leaves(lro.densify(want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for a, sharding in zip(jax.tree.leaves((got, end)), jax.tree.leaves((of_params, of_state)), strict=True):
        assert a.sharding.is_equivalent_to(sharding, a.ndim)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_kernels_on_a_mesh_become_grids_that_lie_as_their_specs_say(mode: Any) -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(mode, mode))
    dense = jnp.asarray(np.random.default_rng(0).standard_normal((16, 32)))
    placed = jax.device_put(dense, NamedSharding(mesh, P("fsdp", "tensor")))
    W = lro.factorize({"kernel": placed}, 4, blocks=4)["kernel"]
    for x, spec in ((W.U, P("fsdp")), (W.V, P("tensor"))):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    want = lro.factorize({"kernel": dense}, 4, blocks=4)["kernel"].to_dense()
    if mode == AxisType.Explicit:  # Four rows of blocks are not split over eight devices: their moments are replicated.
        split = jax.device_put(dense, NamedSharding(mesh, P(("fsdp", "tensor"))))
        params = {"kernel": lro.factorize({"kernel": split}, 4, blocks=4)["kernel"]}
        assert jax.tree.leaves(lro.lowrank_adam(1e-3).init(params))
    np.testing.assert_allclose(W.to_dense(), want, atol=1e-6)
