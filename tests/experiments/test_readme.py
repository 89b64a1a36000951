"""Every code block of the README and the guides runs, in order and in one namespace, as a reader would paste them."""

import pathlib
import re

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro

ROOT = pathlib.Path(__file__).parents[2]
# The guide to many devices needs them: tests/eight_devices.py runs it.
GUIDES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem != "distributed")


def blocks(language: str, path: pathlib.Path = ROOT / "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_python_blocks_run_and_the_first_one_learns():
    namespace: dict = {}
    # A reader has neither float64 nor the strict promotion of the other tests.
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        for i, block in enumerate(blocks("python")):
            exec(compile(block, f"README.md block {i}", "exec"), namespace)
            if i == 0:
                variance = float(np.var(namespace["y"]))
                # Predicting the mean leaves the variance of the targets; 200 steps must do far better.
                assert float(namespace["value"]) < 0.2 * variance


@pytest.mark.slow
@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_guides_run(path: pathlib.Path):
    namespace: dict = {}
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        for i, block in enumerate(blocks("python", path)):
            exec(compile(block, f"{path.name} block {i}", "exec"), namespace)


def test_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    commands = [line.split("#")[0].split() for block in blocks("bash") for line in block.splitlines()]
    assert commands
    for make, target in commands:
        assert make == "make" and target in targets


def test_the_guide_quotes_the_error_of_the_most_likely_mistake():
    """`model.apply` of factors cannot be caught, so a user will search for the words of Flax."""
    model = nn.Dense(6)
    params = lro.factorize(model.init(jax.random.key(0), jnp.ones((2, 8)))["params"], 3)
    with pytest.raises(flax.errors.ScopeParamShapeError) as caught:
        model.apply({"params": params}, jnp.ones((2, 8)))
    message = str(caught.value).replace('"/"', '"/..."').partition(". (https://")[0]
    guide = " ".join((ROOT / "docs" / "models.md").read_text().split())
    assert f"**`ScopeParamShapeError: {message}`.**" in guide
    assert "`ScopeParamShapeError`" in (ROOT / "README.md").read_text()
