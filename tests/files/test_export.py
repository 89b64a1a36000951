"""Exports: what is read back with safetensors and NumPy alone is the function that was trained."""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lowrank_optax as lro

pytestmark = pytest.mark.usefixtures("settings_of_a_user")
RNG = np.random.default_rng(0)


def delta(shape: tuple[int, ...], rank: int, axes: lro.Axes | None = None, max_rank: int | None = None) -> lro.LowRank:
    W = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
    return lro.factorize(W, rank, max_rank=max_rank, where=lambda path, shape: axes or lro.Axes(0, 1))


def read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors"), config


def adapted(config: dict, modules: list[str]) -> list[str]:
    """The modules of a model that PEFT adapts: it matches a pattern given as a string with full names."""
    assert isinstance(config["target_modules"], str)
    return [name for name in modules if re.fullmatch(config["target_modules"], name)]


def scale(config: dict, module: str) -> tuple[int, float]:
    """Rank and alpha / r of a module, by the rule by which PEFT looks patterns up."""

    def find(pattern: dict[str, int], default: int) -> int:
        return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    rank = find(config["rank_pattern"], config["r"])
    return rank, find(config["alpha_pattern"], config["lora_alpha"]) / rank


def test_a_layer_with_the_adapter_is_the_layer_that_was_trained(tmp_path: pathlib.Path) -> None:
    """Ranks differ, one of them is below its width, and one name ends another."""
    changes = {
        "dense": {"kernel": delta((8, 6), 2, max_rank=4), "bias": jnp.ones(6)},
        "encoder": {"layer_0": {"dense": {"kernel": delta((8, 6), 3)}}, "dense": {"kernel": delta((6, 8), 5)}},
    }
    with pytest.warns(UserWarning, match=r"changes of kernels only: dense/bias are not exported"):
        lro.export_lora(tmp_path / "adapter", changes, base_model="some/model")
    tensors, config = read(tmp_path / "adapter")
    modules = {
        "dense": (changes["dense"]["kernel"], 2),
        "encoder.layer_0.dense": (changes["encoder"]["layer_0"]["dense"]["kernel"], 3),
        "encoder.dense": (changes["encoder"]["dense"]["kernel"], 5),
    }
    others = ["head.dense", "encoder.layer_0.dense.dense", "encoderxdense", "encoder.layer_1.dense"]
    assert adapted(config, [*modules, *others]) == [*modules] and config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "some/model"
    assert len(tensors) == 2 * len(modules)
    for name, (W, rank) in modules.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        m, n = W.shape
        assert A.shape == (rank, m) and B.shape == (n, rank)
        assert scale(config, name) == (rank, 1.0)
        x, W0 = RNG.standard_normal((5, m)), RNG.standard_normal((m, n))
        # Products in float64 of factors in float32.
        np.testing.assert_allclose(x @ W0 + (x @ A.T) @ B.T, x @ (W0 + np.asarray(W.to_dense())), atol=1e-5)


AXES = {
    "heads": ((6, 2, 4), lro.Axes(0, 1)),
    "heads out": ((2, 4, 6), lro.Axes(0, 2)),
    "convolution": ((3, 2, 4, 5), lro.Axes(0, 3)),
}


@pytest.mark.parametrize("name", AXES)
def test_several_axes(name: str, tmp_path: pathlib.Path) -> None:
    W = delta(AXES[name][0], 2, AXES[name][1])
    lro.export_lora(tmp_path, {"layer": {"kernel": W}})
    tensors, _ = read(tmp_path)
    A, B = (tensors[f"base_model.model.layer.lora_{letter}.weight"] for letter in "AB")
    dense = np.asarray(W.to_dense())
    if name == "convolution":
        assert A.shape == (2, 4, 3, 2) and B.shape == (5, 2, 1, 1)
        np.testing.assert_allclose(np.einsum("rihw,or->hwio", A, B[:, :, 0, 0]), dense, atol=1e-5)
    else:
        m = int(np.prod(W.in_shape))
        np.testing.assert_allclose((B @ A).T, dense.reshape(m, -1), atol=1e-5)


def test_names_of_the_users_model(tmp_path: pathlib.Path) -> None:
    """A stack of three layers, in bfloat16."""
    W = delta((3, 8, 6), 2, lro.Axes(1, 1)).astype(jnp.bfloat16)
    changes = {"layers": {"query": {"kernel": W}}}

    def module(path: str, index: tuple[int, ...]) -> str:
        assert path == "layers/query/kernel"
        return f"model.layers.{index[0]}.self_attn.q_proj"

    lro.export_lora(tmp_path, changes, module=module)
    tensors, config = read(tmp_path)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    assert adapted(config, names) == names[:3]
    for i in range(3):
        A, B = (tensors[f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
        assert A.dtype == B.dtype == jnp.bfloat16
        product = A.T.astype(np.float32) @ B.T.astype(np.float32)
        # A is rounded to bfloat16, 2^-9 of each of its entries, which are at most about 4.
        np.testing.assert_allclose(product, np.asarray(W[i].astype(jnp.float32).to_dense()), atol=0.05)


def test_refusals(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"a": {"kernel": delta((4, 4), 1)}, "b": {"kernel": delta((4, 4), 1)}}
    with pytest.raises(ValueError, match="no LowRank node"):
        lro.export_lora(tmp_path, {"kernel": jnp.eye(3)})
    with pytest.raises(ValueError, match=r"names kernel 'b/kernel'  'x'"):
        lro.export_lora(tmp_path, two, module=lambda path, index: "x")
    with pytest.raises(ValueError, match="'kernel'"):
        lro.export_lora(tmp_path, {"kernel": delta((4, 4), 1)})
    with pytest.raises(ValueError, match=r"'kernel' stacks kernels: pass module=lambda path, index"):
        lro.export_lora(tmp_path, {"kernel": delta((3, 4, 4), 1, lro.Axes(1, 1))})
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "safetensors.flax", None)
    with pytest.raises(ImportError, match=r"pip install lowrank-optax\[export\]"):
        lro.export_lora(tmp_path, two)


def test_dense_kernels(tmp_path: pathlib.Path) -> None:
    """`densify` and safetensors' own writer: no export of ours is needed."""
    params = {"dense": {"kernel": delta((8, 6), 2), "bias": jnp.ones(6)}}
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(lro.densify(params))
    }
    safetensors.numpy.save_file(flat, tmp_path / "dense.safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "dense.safetensors")
    np.testing.assert_array_equal(tensors["dense.kernel"], params["dense"]["kernel"].to_dense())
