"""nnx models and optimizers as they are: training, accumulated gradients, ranks, diagnostics, resize, export."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from lowrank_optax.paths import refuse_nnx
from tests.models.nnx_models import LAYERS, Net, close, draw, kernels


class Small(nnx.Module):
    """Two kernels of two shapes, where more would only take longer to compile."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(5, 8, (3,), rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(nnx.relu(self.conv(x)))


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def trained(tx: Any, steps: int = 2, build: Any = Small, shape: Any = (4, 6, 5)) -> tuple[Any, Any, Any, list[float]]:
    """A factored model and its optimizer after some steps of one compiled function, and the losses."""
    model = build(rngs=nnx.Rngs(0))
    lro.nnx.factorize(model, 2, max_rank=3)
    kind = lro.nnx.Optimizer if isinstance(tx, optax.MultiSteps) else nnx.Optimizer
    optimizer = kind(model, tx, wrt=nnx.Param)
    x = draw(shape).astype(jnp.float32)
    traces = []

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        traces.append(None)
        value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    assert len(traces) == 1
    return model, optimizer, step, losses


# One of each kind: what the others compute is tested in test_nnx_factorize.py.
TRAINED = ["linear", "general, batch", "conv", "einsum, experts", "lora", "lstm", "vmapped linear"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_layer_trains_and_compiles_once_and_goes_on_after_resize(name: str) -> None:
    build, shape, axes = LAYERS[name]
    model, optimizer, step, losses = trained(lro.lowrank_adam(0.01), 20, build, shape)
    assert losses[-1] < losses[0]
    assert list(lro.ranks(model)) == list(axes) == list(lro.diagnostics(optimizer).kernels)
    before = {path: W.to_dense() for path, W in kernels(model).items()}
    lro.nnx.resize(model, optimizer)
    for path, W in kernels(model).items():
        assert W.width == 2
        close(W.to_dense(), before[path])
    assert float(step(model, optimizer)) < losses[0]


WRAPPERS = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.partition(
        {True: tx, False: optax.set_to_zero()}, lambda p: jax.tree.map(lambda _: True, p)
    ),
    "every two": lambda tx: optax.MultiSteps(tx, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ranks_and_diagnostics_read_models_optimizers_and_states(wrapper: str) -> None:
    model, optimizer, _, _ = trained(WRAPPERS[wrapper](lro.lowrank_adam(0.01, geometry=lro.Tangent())))
    expected = {path: 2 for path in ("conv/kernel", "head/kernel")}
    forms = [model, nnx.state(model), nnx.state(model, nnx.Param), nnx.to_pure_dict(nnx.state(model))]
    for params in (*forms, optimizer, nnx.state(optimizer)):
        found = lro.ranks(params)
        assert found == expected and all(isinstance(rank, jax.Array) for rank in found.values())
    assert nnx.jit(lro.ranks)(model) == expected

    reports = [
        lro.diagnostics(x)
        for x in (
            optimizer,
            optimizer.opt_state,
            nnx.state(optimizer),
            nnx.to_pure_dict(nnx.state(optimizer)),
            (model, optimizer),
        )
    ]
    for report in (*reports, nnx.jit(lro.diagnostics)(optimizer)):
        assert list(report.kernels) == list(expected) and all(isinstance(x, jax.Array) for x in jax.tree.leaves(report))
        close(report, reports[0], 0)
        assert (
            report.kernels["conv/kernel"].truncation is not None
            and float(report.kernels["conv/kernel"].gradient_norm) > 0
        )


@pytest.mark.slow
def test_diagnostics_of_a_geometry_that_never_truncates_and_of_no_state_of_ours() -> None:
    _, optimizer, _, _ = trained(lro.lowrank_adam(0.01))
    assert lro.diagnostics(nnx.state(optimizer)).kernels["head/kernel"].truncation is None
    other = nnx.Optimizer(Small(nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param)
    for x in (other, nnx.state(other)):
        with pytest.raises(ValueError, match="holds no FixedRankState"):
            lro.diagnostics(x)
        with pytest.raises(ValueError, match="holds no FixedRankState"):
            lro.ranks(x)


def test_a_model_is_exported_as_it_is(tmp_path: pathlib.Path) -> None:
    model = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    lro.nnx.factorize(model, 2)
    for name, tree in (("model", model), ("state", nnx.state(model))):
        with pytest.warns(UserWarning, match="layers/0/bias, layers/1/bias are not exported"):
            lro.export_lora(tmp_path / name, tree)
    for name in ("model", "state"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["target_modules"] == r"layers\.0|layers\.1"
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("model", "state")]
    assert files[0] == files[1]


# --- sums of gradients -----------------------------------------------------------------------------------------------


@nnx.jit
def gradient(model: Any, x: Any) -> Any:
    return nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)


@nnx.jit
def update(model: Any, optimizer: Any, grads: Any) -> None:
    optimizer.update(model, grads)


def gradients(model: Any, n: int = 3) -> list[Any]:
    return [gradient(model, draw((4, 6, 5), seed).astype(jnp.float32)) for seed in range(n)]


def of_variables(operation: Any, *trees: Any) -> Any:
    """A state whose variables hold the result of an operation on variables."""
    return jax.tree.map(lambda g, *rest: g.replace(operation(g, *rest)), *trees, is_leaf=is_variable)


def one_by_one(operation: Any) -> Any:
    """Folds gradients with `operation(accumulated, gradient, number)` of variables."""

    def fold(gs: list[Any]) -> Any:
        total = gs[0]
        for n, g in enumerate(gs[1:], 2):
            total = of_variables(lambda a, b, n=n: operation(a, b, n), total, g)
        return total

    return fold


ACCUMULATE = {
    "arrays": lambda gs: jax.tree.map(lambda *g: sum(g) / len(g), *gs),
    "jnp.add": lambda gs: jax.tree.map(lambda g: g / 3, jax.tree.map(jnp.add, jax.tree.map(jnp.add, *gs[:2]), gs[2])),
    "variables": lambda gs: of_variables(lambda g: g / 3, one_by_one(lambda a, b, n: a + b)(gs)),
    "sum of variables": lambda gs: of_variables(lambda *g: sum(g) * (1 / 3), *gs),
    "moving mean": one_by_one(lambda a, b, n: a + (b - a) / n),
    "weights": lambda gs: of_variables(lambda a, b, c: jnp.float32(1 / 3) * a + b / jnp.int32(3) + c / 3, *gs),
}


BALL = lro.lowrank_heavy_ball(0.1)  # one for all, so that one step is compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCUMULATE)
def test_a_step_with_accumulated_gradients_is_the_step_with_their_mean(name: str) -> None:
    models = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    for model in models:
        lro.nnx.factorize(model, 2)
    gs = gradients(models[0])
    mean = jax.tree.map(lambda *g: jnp.mean(jnp.stack(g), 0), *gs)
    for model, grads in zip(models, (ACCUMULATE[name](gs), mean), strict=True):
        assert jax.tree.structure(grads) == jax.tree.structure(gs[0])
        update(model, nnx.Optimizer(model, BALL, wrt=nnx.Param), grads)
    close(*(nnx.to_pure_dict(nnx.state(model)) for model in models), 1e-6)


@pytest.mark.slow
def test_multi_steps_move_as_one_step_with_the_mean() -> None:
    models = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    for model in models:
        lro.nnx.factorize(model, 2)
    gs = gradients(models[0])
    every_three = lro.nnx.Optimizer(models[0], optax.MultiSteps(BALL, 3), wrt=nnx.Param)
    for g in gs:
        update(models[0], every_three, g)
    once = nnx.Optimizer(models[1], BALL, wrt=nnx.Param)
    update(models[1], once, of_variables(lambda *g: sum(g) / 3, *gs))
    close(*(nnx.to_pure_dict(nnx.state(model)) for model in models), 1e-6)


COPIES = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_every": lambda tx: optax.chain(optax.apply_every(2), tx),
    "mixed": lambda tx: optax.MultiSteps(optax.chain(optax.clip(1.0), tx), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COPIES)
def test_states_with_copies_of_kernels_train_and_resize(name: str) -> None:
    model = Net(nnx.Rngs(0))
    lro.nnx.factorize(model, 2, max_rank=3)
    optimizer = lro.nnx.Optimizer(model, COPIES[name](lro.lowrank_adam(0.01)), wrt=nnx.Param)
    assert isinstance(optimizer, nnx.Optimizer)
    traces = []

    @nnx.jit
    def step(model: Any, optimizer: Any, grads: Any) -> None:
        traces.append(None)
        optimizer.update(model, grads)

    for g in gradients(model, 4):
        step(model, optimizer, g)
    assert len(traces) == 1 and int(optimizer.step[...]) == 4
    graphdef, state = nnx.split((model, optimizer))
    assert jax.tree.structure(nnx.split(nnx.merge(graphdef, state))[1]) == jax.tree.structure(state)
    if name == "apply_every":
        return  # resize refuses the copies of a transformation that it does not know
    lro.nnx.resize(model, optimizer)
    assert {W.width for W in kernels(model).values()} == {2}
    for g in gradients(model, 4):
        step(model, optimizer, g)


def test_a_variable_and_an_array_do_not_add_up() -> None:
    model = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    lro.nnx.factorize(model, 2)
    for operation in (lambda W: W + jnp.ones((6, 6)), lambda W: jnp.ones((6, 6)) - W, lambda W: W * W, lambda W: -W):
        with pytest.raises(TypeError, match=r"to_dense\(\)"):
            operation(model.kernel)


# --- the right call --------------------------------------------------------------------------------------------------


def test_trees_with_nnx_variables_are_told_the_right_call() -> None:
    model = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    instead = "lowrank_optax.nnx.factorize(model, rank)"
    for params in (model, nnx.state(model), {"model": nnx.state(model)}, optimizer, [model.kernel]):
        with pytest.raises(TypeError, match=r"factorize takes a tree of arrays.*nnx.factorize\(model, rank\)"):
            refuse_nnx(params, "factorize", instead)
    for params in (nnx.to_pure_dict(nnx.state(model)), {"kernel": np.ones(3)}, {}, None, jnp.ones(2)):
        refuse_nnx(params, "factorize", instead)


def test_the_values_of_an_attention_keep_their_name() -> None:
    model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    lro.nnx.factorize(model, 2)
    expected = ["key/kernel", "out/kernel", "query/kernel", "value/kernel"]
    assert list(lro.ranks(model)) == list(lro.ranks(nnx.state(model))) == expected
    names: list[str] = []
    lro.partition_specs(model, lambda path, shape: names.append(path))
    assert [name for name in names if name.endswith("kernel")] == expected
