"""Adapters go to PEFT itself and come from it. PEFT runs in a process with the Python of the variable `PEFT_PYTHON`."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

PYTHON = os.environ.get("PEFT_PYTHON") or (sys.executable if importlib.util.find_spec("peft") else "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("settings_of_a_user"),
    pytest.mark.skipif(not PYTHON, reason="PEFT IS NOT INSTALLED: set PEFT_PYTHON to a Python with torch and peft"),
]


class Model(nn.Module):
    """The model of `peft_process.py`."""

    dimensions: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(6, (3,) * self.dimensions, name="conv")(x)).mean(range(1, x.ndim - 1))
        return nn.Dense(5, name="down")(nn.tanh(nn.Dense(16, name="up")(x)))


def written(folder: pathlib.Path, dimensions: int):
    """Inputs and parameters, also in a file in the layout of torch."""
    x = jax.random.normal(jax.random.key(0), (4, *(5, 4, 3)[:dimensions], 3))
    params = Model(dimensions).init(jax.random.key(1), x)["params"]
    torch = {"x": np.moveaxis(x, -1, 1)}
    for name, layer in params.items():
        torch[f"{name}.weight"] = np.moveaxis(layer["kernel"], (-1, -2), (0, 1))
        torch[f"{name}.bias"] = np.asarray(layer["bias"])
    np.savez(folder / "model.npz", **torch)
    return x, params


def run(command: str, folder: pathlib.Path):
    script = pathlib.Path(__file__).with_name("peft_process.py")
    subprocess.run([PYTHON, str(script), command, str(folder)], check=True, timeout=600)
    return np.load(folder / "outputs.npz")


def trained(x, params, delta, steps=5):
    apply = lro.linen.apply(Model(x.ndim - 2))
    tx = lro.adapters.optimizer(optax.adamw(0.05))
    state = tx.init(delta)

    def loss(delta):
        return jnp.mean((apply({"params": params, "adapters": delta}, x) - 1.0) ** 2)

    @jax.jit
    def step(delta, state):
        updates, state = tx.update(jax.grad(loss)(delta), state, delta)
        return optax.apply_updates(delta, updates), state

    for _ in range(steps):
        delta, state = step(delta, state)
    return delta, float(loss(delta)), apply({"params": params, "adapters": delta}, x)


@pytest.mark.parametrize(("kind", "dimensions"), [("lora", 2), ("lowrank", 2), ("dora", 2), ("lora", 1), ("dora", 3)])
def test_an_adapter_trained_here_is_the_same_model_in_peft(kind: str, dimensions: int, tmp_path: pathlib.Path) -> None:
    x, params = written(tmp_path, dimensions)
    where = lro.linen.kernels(Model(dimensions), x)
    # DoRA of a convolution is another formula in PEFT, with norms over all but the output axis as here.
    _, delta = lro.adapters.init(jax.random.key(2), params, 3, kind=kind, alpha=4, scale="alpha/sqrt(r)", where=where)
    delta, _, y = trained(x, params, delta)
    lro.adapters.export(tmp_path / "adapter", delta, convolution=lambda path: path.startswith("conv"))
    outputs = run("read", tmp_path)
    np.testing.assert_allclose(outputs["adapted"], y, atol=1e-6)
    np.testing.assert_allclose(outputs["merged"], y, atol=1e-6)


@pytest.mark.parametrize(("kind", "dimensions"), [("lora", 2), ("dora", 2), ("dora", 1), ("lora", 3)])
def test_an_adapter_trained_in_peft_goes_on_here(kind: str, dimensions: int, tmp_path: pathlib.Path) -> None:
    """With a rank pattern, an alpha pattern and the scale of rank-stabilised LoRA."""
    x, params = written(tmp_path, dimensions)
    outputs = run(kind, tmp_path)
    delta = lro.adapters.load(tmp_path / "adapter", params, where=lro.linen.kernels(Model(dimensions), x))
    assert delta["down"]["kernel"].axes((16, 5)) == lro.Axes(0, 1)
    _, before, y = trained(x, params, delta, steps=0)
    np.testing.assert_allclose(outputs["adapted"], y, atol=1e-6)
    assert trained(x, params, delta)[1] < before
