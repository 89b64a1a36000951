"""Training after `resize` is training without it: plain loops, wrappers, masks, Linen and NNX."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from tests.one_kernel import GEOMETRIES, distance, kernel, run
from tests.trees import EXACT, apply, close, orthonormal, tree

slow = pytest.mark.slow


# --- resize ----------------------------------------------------------------------------------------------------------

RESIZED = {
    "heavy ball balanced": lro.lowrank_heavy_ball(0.02, geometry=lro.Balanced()),
    "heavy ball tangent": lro.lowrank_heavy_ball(0.02),
    "heavy ball coefficient": lro.lowrank_heavy_ball(0.02, geometry=lro.Coefficient()),
    "adam balanced": lro.lowrank_adam(0.02, eps=1e-2),
    "adam tangent": lro.lowrank_adam(0.02, eps=1e-2, geometry=lro.Tangent()),
    "adam coefficient": lro.lowrank_adam(0.02, eps=1e-2, geometry=lro.Coefficient()),
}


@slow
# From 6 to 3 and back: two programs serve both.
@pytest.mark.parametrize(("layers", "width", "changed"), [("one", 6, 3), ("one", 3, 6), ("stacked", 5, 3)])
@pytest.mark.parametrize("name", RESIZED)
def test_fifty_steps_after_resize_are_those_of_a_run_never_resized(
    name: str, layers: str, width: int, changed: int
) -> None:
    tx = RESIZED[name]
    if layers == "one":
        params = {"kernel": kernel(width=width)}
    else:
        stack = [kernel(width=width, seed=s) for s in (1, 2)]
        params = {"kernel": jax.tree.map(lambda *x: jnp.stack(x), *stack)}
    params, state = run(tx, params, tx.init(params), 5)
    other, other_state = lro.resize(params, state, changed)
    assert other["kernel"].width == changed
    params, state = run(tx, params, state, 50)
    other, other_state = run(tx, other, other_state, 50)
    # Fifty steps raise the rounding of a change of basis.
    np.testing.assert_allclose(other["kernel"].to_dense(), params["kernel"].to_dense(), atol=1e-7)
    a, b = (lro.diagnostics(s).kernels["kernel"].gradient_norm for s in (state, other_state))
    np.testing.assert_allclose(a, b, rtol=1e-5)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(5)(nn.tanh(nn.Dense(8)(x)))


class Nnx(nnx.Module):
    def __init__(self) -> None:
        self.first, self.second = nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 5, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.tanh(self.first(x)))


X, Y = (np.random.default_rng(i).standard_normal((20, k)).astype(np.float32) for i, k in enumerate((6, 5)))


def linen_runs(tx: Any) -> list[Any]:
    """The outputs of a run as it is, and of one whose kernels change their width on the way."""
    model = Linen()
    params = lro.factorize(jax.jit(model.init)(jax.random.key(0), X)["params"], 2, max_rank=4)
    apply = jax.jit(lro.linen.apply(model))
    loss = lambda p: jnp.mean((apply({"params": p}, X) - Y) ** 2)  # noqa: E731
    params, state = run(tx, params, tx.init(params), 5, loss)
    ends = [run(tx, *point, 50, loss)[0] for point in ((params, state), lro.resize(params, state))]
    return [apply({"params": params}, X) for params in ends]


@nnx.jit
def nnx_step(model: Any, optimizer: Any) -> None:
    optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model))


@nnx.jit
def nnx_forward(model: Any) -> Any:
    return model(X)


def nnx_runs(tx: Any) -> list[Any]:
    ends = []
    for resized in (False, True):
        model = Nnx()
        lro.nnx.factorize(model, rank=2, max_rank=4)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(5):
            nnx_step(model, optimizer)
        if resized:
            lro.nnx.resize(model, optimizer)
            assert model.first.kernel[...].width == 2
        for _ in range(50):
            nnx_step(model, optimizer)
        ends.append(nnx_forward(model))
    return ends


@slow
@pytest.mark.parametrize(
    ("runs", "geometry"),
    [(linen_runs, "balanced"), (nnx_runs, "balanced"), (nnx_runs, "tangent"), (nnx_runs, "coefficient")],
    ids=["linen", "nnx balanced", "nnx tangent", "nnx coefficient"],
)
def test_fifty_steps_after_resize_in_flax(runs: Any, geometry: str) -> None:
    with jax.numpy_rank_promotion("allow"):
        ends = runs(lro.lowrank_adam(0.02, eps=1e-2, geometry=GEOMETRIES[geometry]))
    np.testing.assert_allclose(*ends, atol=1e-3)  # float32


def test_resize_of_nnx_looks_through_variables() -> None:
    model = Nnx()
    lro.nnx.factorize(model, rank=2, max_rank=4)
    optimizer = nnx.Optimizer(model, optax.chain(lro.lowrank_adam(0.02)), wrt=nnx.Param)
    params, state = lro.resize(nnx.state(model, nnx.Param), optimizer.opt_state, 3)
    assert params["first"]["kernel"].get_raw_value().width == 3
    moments = [x for x in jax.tree.leaves(nnx.as_pure(state)) if x.ndim == 2]
    assert {x.shape[-1] for x in moments} == {3}
    assert model.first.kernel[...].width == 4  # the model itself is as it was
    with pytest.raises(ValueError, match="found no state of fixed_rank"):
        foreign = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        lro.nnx.resize(model, foreign, 3)
    assert model.first.kernel[...].width == 4
    lro.nnx.resize(model, None, 3)
    assert model.first.kernel[...].width == 3


@slow
@pytest.mark.parametrize("geometry", ["balanced", "tangent", "coefficient"])
def test_resize_of_states_with_masks(geometry: str) -> None:
    """Kernels that an inner mask leaves out have no moment; masks per leaf look like one per kernel."""
    params = {"a": kernel(width=5), "b": kernel(seed=1, width=5), "bias": jnp.ones(3)}
    per_leaf = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)  # noqa: E731
    masks = [
        optax.masked(optax.trace(0.9), {"a": False, "b": True, "bias": True}),
        optax.masked(optax.trace(0.5), per_leaf),
    ]
    tx = lro.fixed_rank(optax.chain(*masks, optax.scale(-0.01)), geometry=GEOMETRIES[geometry])
    loss = lambda p: distance({k: p[k] for k in "ab"}) + jnp.sum(p["bias"] ** 2)  # noqa: E731
    params, state = run(tx, params, tx.init(params), 3, loss)
    other, _ = run(tx, *lro.resize(params, state, 3), 5, loss)
    params, _ = run(tx, params, state, 5, loss)
    chex.assert_trees_all_close(lro.densify(other), lro.densify(params), atol=1e-9)


# --- wrappers -----------------------------------------------------------------------------------------------------


def _inject(learning_rate):
    return lro.lowrank_heavy_ball(learning_rate)


WRAPPED = {
    "heavy-ball-chain": lambda: optax.chain(lro.lowrank_heavy_ball(0.02)),
    "inject": lambda: optax.inject_hyperparams(_inject)(0.02),
    "multi-steps": lambda: optax.MultiSteps(lro.lowrank_heavy_ball(0.02), 2),
    "adam-tangent": lambda: lro.lowrank_adam(0.02, geometry=lro.Tangent()),
    "muon": lambda: lro.lowrank_muon(0.02),
}


@slow
@pytest.mark.parametrize(
    "name, width",
    [(n, 5) for n in WRAPPED if n != "adam-tangent"] + [("adam-tangent", None)],
)
def test_resize_keeps_the_kernel_and_the_trajectory(name, width):
    """Three steps, a change of width, three steps: the same W as without, for odd phases of MultiSteps too."""
    tx, params = WRAPPED[name](), tree(rank=2, max_rank=3)
    params, state = apply(tx, params, tx.init(params), steps=3)
    wide, wide_state = lro.resize(params, state, width)
    assert wide["kernel"].width == (5 if width else 2)
    np.testing.assert_allclose(wide["kernel"].to_dense(), params["kernel"].to_dense(), **EXACT)
    orthonormal(wide["kernel"])
    assert int(lro.ranks(wide)["kernel"]) == 2
    a, state_a = apply(tx, params, state, steps=3)
    b, state_b = apply(tx, wide, wide_state, steps=3)
    # Adam and muon amplify rounding, the one by its eps of 1e-8, the other by Newton-Schulz near zero (3.4^5).
    close(lro.densify(b), lro.densify(a), rtol=1e-6, atol=1e-6)
    close(*(lro.diagnostics(s).kernels for s in (state_a, state_b)), rtol=1e-6, atol=1e-6)
