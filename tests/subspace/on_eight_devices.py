"""Subspaces on sharded parameters, in a process with eight devices: `test_devices.py` runs this file."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro

STEPS, R = 5, 4
CASES = {
    "galore": lambda: lro.galore(0.1, R, refresh=2),
    "frugal": lambda: lro.frugal(0.1, R, refresh=2),
    "ldadam": lambda: lro.ldadam(0.1, R),
}
SPECS = {
    "wide": {"kernel": P("fsdp", "tensor")},
    "tall": {"kernel": P("fsdp", "tensor")},
    "conv": {"kernel": P(None, None, "fsdp", "tensor")},
    "bias": P("tensor"),
}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request: Any) -> Any:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(request.param,) * 2)


def gradients() -> Any:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"wide": (16, 24), "tall": (24, 16), "conv": (3, 3, 4, 8), "bias": (8,)}
    draws = {n: jax.random.normal(k, (STEPS, *s), jnp.float32) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return {n: x if n == "bias" else {"kernel": x} for n, x in draws.items()}


def placed(tree: Any, mesh: Any) -> Any:
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS)


def run(tx: Any, grads: Any, params: Any, place: Any = lambda x: x) -> Any:
    """The parameters after all steps, the last state, and how often the step was compiled."""
    state = tx.init(params)

    @jax.jit
    def step(g: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(STEPS):
        params, state = step(place(jax.tree.map(lambda x: x[t], grads)), state, params)  # noqa: B023
    return params, state, step._cache_size()


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_run_is_the_run_of_one_device(name: str, mesh: Any) -> None:
    tx, grads = CASES[name](), gradients()
    start = jax.tree.map(lambda x: x[0], grads)
    expected, *_ = run(tx, grads, start)
    params, state, compilations = run(tx, grads, placed(start, mesh), lambda g: placed(g, mesh))
    for ours, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        # Float32; sums in another order, divided by roots of second moments.
        np.testing.assert_allclose(jax.device_get(ours), other, atol=2e-3)
    for x, spec in zip(jax.tree.leaves(params), jax.tree.leaves(SPECS), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    assert compilations <= 2  # The counters of `init` lie on one device, and those of a step on all.
    if name == "galore":
        check_state(state, mesh)


def check_state(state: Any, mesh: Any) -> None:
    """Rows of a basis lie like the shorter side of the kernel, columns of moments like the longer one."""
    basis, mu = optax.tree.get(state, "basis"), optax.tree.get(state, "mu")
    for name, of_basis, of_moment in (("wide", P("fsdp"), P(None, "tensor")), ("tall", P("tensor"), P(None, "fsdp"))):
        for x, spec in ((basis[name]["kernel"], of_basis), (mu[name]["kernel"], of_moment)):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (name, x.sharding)
    assert mu["bias"].sharding.is_equivalent_to(NamedSharding(mesh, P("tensor")), 1)


def test_init_within_jit(mesh: Any) -> None:
    params = placed(jax.tree.map(lambda x: x[0], gradients()), mesh)
    tx = lro.galore(0.1, R)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        if mesh.axis_types[0] == AxisType.Explicit:
            check_state(state, mesh)
        jax.jit(tx.update)(params, state, params)


def test_injected_hyperparameters(mesh: Any) -> None:
    params = placed(jax.tree.map(lambda x: x[0], gradients()), mesh)
    tx = optax.inject_hyperparams(lambda learning_rate: lro.fira(learning_rate, R))(learning_rate=0.1)
    with jax.set_mesh(mesh):
        jax.block_until_ready(jax.jit(tx.update)(params, tx.init(params), params))
    specs = lro.state_specs(jax.eval_shape(tx.init, params), params, SPECS)
    assert optax.tree.get(specs, "basis")["wide"]["kernel"] == P("fsdp")
    assert optax.tree.get(specs, "mu")["tall"]["kernel"] == P(None, "fsdp")
    assert optax.tree.get(specs, "mu")["conv"]["kernel"] == P()  # (8 outputs, 36 inputs): columns mix three axes
    assert optax.tree.get(specs, "basis")["conv"]["kernel"] == P("tensor")


def test_a_projection_gathers_no_gradient(mesh: Any) -> None:
    """Between refreshes devices exchange coordinates of rank R, and no array of the size of a kernel."""
    params = {"kernel": jax.device_put(jnp.ones((256, 512)), NamedSharding(mesh, P("fsdp", "tensor")))}
    fixed = lro.projectors.Projector(lambda stored, at: jnp.eye(*stored.shape, dtype=stored.dtype))
    tx = lro.subspace(optax.scale_by_adam(), fixed, rank=R, residual=lro.residuals.scaled())
    state = tx.init(params)
    program = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    exchanged = [line for line in program.splitlines() if "all-gather(" in line or "all-to-all(" in line]
    exchanged += [line for line in program.splitlines() if "all-reduce(" in line]
    assert exchanged
    for line in exchanged:
        shape = line.split("[")[1].split("]")[0].split("{")[0]
        size = np.prod([int(n) for n in shape.split(",") if n])
        assert size <= 2 * R * 512, line
