"""Folders of PEFT: what is written is read back by rules of PEFT, and what is wrong with a folder is said in a line."""

import json
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lowrank_optax as lro
from tests.adapters.peft_numbers import CASES, Case
from tests.models.linen_models import close, draw


def peft_layer(folder: pathlib.Path, name: str, x: np.ndarray, W0: np.ndarray) -> np.ndarray:
    """The output of a layer of weight W0 `(out, in)` with the adapter of the folder, by PEFT's formulas in NumPy."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")

    def find(pattern: dict, default: float) -> float:
        return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    r, alpha = find(config["rank_pattern"], config["r"]), find(config["alpha_pattern"], config["lora_alpha"])
    assert r == A.shape[0] and re.fullmatch(config["target_modules"], name)
    scale = alpha / np.sqrt(r) if config["use_rslora"] else alpha / r
    W = W0 + scale * B @ A
    if config["use_dora"]:
        length = tensors[f"base_model.model.{name}.lora_magnitude_vector"]
        W = W * (length / np.linalg.norm(W, axis=1))[:, None]
    return x @ W.T


def moved(delta):
    def one(label, x):
        return jax.tree.map(lambda y: y + 0.1 * draw(y.shape, 7), x) if label == "trained" else x

    return jax.tree.map(one, lro.adapters.labels(delta), delta)


@pytest.mark.parametrize("kind", ["lowrank", "lora", "core", "svfit", "dora"])
def test_a_layer_of_peft_computes_the_same_and_comes_back(kind: str, tmp_path: pathlib.Path) -> None:
    """Two ranks and two scales; the alphas are no integers."""
    params = {"a": {"kernel": draw((8, 6))}, "b": {"kernel": draw((6, 5))}}
    rank = lambda path, shape: 2 if path.startswith("a") else 3  # noqa: E731
    _, delta = lro.adapters.init(jax.random.key(0), params, rank, kind=kind, alpha=5, scale="alpha/sqrt(r)")
    delta = moved(delta)
    lro.adapters.export(tmp_path, delta, base_model="some/model")
    dense = lro.adapters.merge(params, delta)
    for name in "ab":
        W0, x = np.asarray(params[name]["kernel"]).T, np.asarray(draw((3, params[name]["kernel"].shape[0])))
        np.testing.assert_allclose(peft_layer(tmp_path, name, x, W0), x @ dense[name]["kernel"], rtol=1e-10, atol=1e-10)
    again = lro.adapters.load(tmp_path, params)
    close(lro.adapters.merge(params, again), dense, 1e-10)
    assert isinstance(again["a"]["kernel"], lro.adapters.Magnitude if kind == "dora" else lro.adapters.LoRA)


def write(folder: pathlib.Path, tensors: dict, **config: object) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    named = {f"base_model.model.{name}": np.asarray(x, order="C") for name, x in tensors.items()}
    safetensors.numpy.save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("lora", "rslora", "dora")], ids=lambda c: c.name + c.shape
)
def test_files_with_the_recorded_arrays_of_peft(case: Case, tmp_path: pathlib.Path) -> None:
    tensors = {f"x.lora_{letter}.weight": case[f"param.lora_{letter}.default.weight"] for letter in "AB"}
    if case.name == "dora":
        tensors["x.lora_magnitude_vector"] = case["param.lora_magnitude_vector.default.weight"]
    folder = write(tmp_path, tensors, use_rslora=case.name == "rslora", use_dora=case.name == "dora")
    params = {"x": {"kernel": jnp.asarray(case.base)}}
    merged = lro.adapters.merge(params, lro.adapters.load(folder, params))
    np.testing.assert_allclose(merged["x"]["kernel"], case.merged, rtol=1e-12, atol=1e-12)


def test_stacks_heads_and_convolutions(tmp_path: pathlib.Path) -> None:
    """Layers of a stack have names of their own; ranks may differ, and a layer may be missing."""
    params = {"stack": {"kernel": draw((3, 6, 2, 4))}, "conv": {"kernel": draw((3, 2, 4, 5))}}
    axes = {"stack/kernel": lro.Axes(1, 1), "conv/kernel": lro.Axes(0, 3)}
    where = lambda path, shape: axes[path]  # noqa: E731
    module = lambda path, index: f"layers.{index[0]}.q" if index else "conv"  # noqa: E731
    _, delta = lro.adapters.init(jax.random.key(0), params, 2, kind="dora", alpha=3, where=where)
    delta = moved(delta)
    lro.adapters.export(tmp_path / "all", delta, module=module)
    close(lro.adapters.load(tmp_path / "all", params, module=module, where=where), delta, 1e-12)

    A, B = np.asarray(draw((1, 6))), np.asarray(draw((8, 1), 2))
    tensors = {"layers.0.q.lora_A.weight": A, "layers.0.q.lora_B.weight": B}
    tensors |= {"layers.2.q.lora_A.weight": np.tile(A, (2, 1)), "layers.2.q.lora_B.weight": np.tile(B, (1, 2))}
    folder = write(tmp_path / "some", tensors, r=2, rank_pattern={"0.q": 1}, alpha_pattern={"0.q": 1}, lora_alpha=4)
    merged = lro.adapters.merge(params, lro.adapters.load(folder, params, module=module, where=where))
    change = (merged["stack"]["kernel"] - params["stack"]["kernel"]).reshape(3, 6, 8)
    close(change, np.stack([(B @ A).T, 0 * (B @ A).T, 4 * (B @ A).T]), 1e-12)


WINDOWS = [(3,), (3, 2), (2, 3, 2), (4, 4), (1,), (1, 1)]
OF_WINDOWS = lambda path, shape: lro.Axes(0, len(shape) - 1)  # noqa: E731


def of_torch(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """The kernel `(window..., in, out)` of the convolutions A `(r, in, window...)` and B `(out, r, 1...)`."""
    window = "dhw"[: A.ndim - 2]
    return np.einsum(f"or,ri{window}->{window}io", B.reshape(B.shape[:2]), A)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_convolutions_of_peft(kind: str, window: tuple[int, ...], tmp_path: pathlib.Path) -> None:
    ones = (1,) * len(window)
    A, B = np.asarray(draw((2, 4, *window))), np.asarray(draw((5, 2, *ones), 2))
    lengths = np.asarray(draw((5,), 3))
    tensors = {"c.lora_A.weight": A, "c.lora_B.weight": B}
    if kind == "dora":
        tensors["c.lora_magnitude_vector"] = lengths.reshape(1, 5, *ones)
    params = {"c": {"kernel": draw((*window, 4, 5), 4)}}
    folder = write(tmp_path, tensors, r=2, lora_alpha=6, use_dora=kind == "dora")
    merged = lro.adapters.merge(params, lro.adapters.load(folder, params, where=OF_WINDOWS))["c"]["kernel"]
    want = np.asarray(params["c"]["kernel"]) + 3 * of_torch(A, B)
    if kind == "dora":
        want = want * lengths / np.linalg.norm(want.reshape(-1, 5), axis=0)
    np.testing.assert_allclose(merged, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", ["lowrank", "lora", "dora"])
def test_convolutions_are_written_as_peft_has_them(kind: str, window: tuple[int, ...], tmp_path: pathlib.Path) -> None:
    """Two and three axes of a window tell a convolution, one needs a word."""
    params = {"c": {"kernel": draw((*window, 4, 5))}}
    start = lro.adapters.init(jax.random.key(0), params, 2, kind=kind, alpha=3, where=OF_WINDOWS)[1]
    delta = moved(start)
    said = dict(convolution=lambda path: path == "c/kernel") if len(window) == 1 else {}
    lro.adapters.export(tmp_path, delta, **said)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.c.lora_{letter}.weight"] for letter in "AB")
    ones = (1,) * len(window)
    assert A.shape == (2, 4, *window) and B.shape == (5, 2, *ones)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    merged = np.asarray(lro.adapters.merge(params, delta)["c"]["kernel"])
    want = np.asarray(params["c"]["kernel"]) + config["lora_alpha"] / 2 * of_torch(A, B)
    if kind == "dora":
        lengths = tensors["base_model.model.c.lora_magnitude_vector"]
        assert lengths.shape == (1, 5, *ones)
        want = want * lengths.reshape(5) / np.linalg.norm(want.reshape(-1, 5), axis=0)
    np.testing.assert_allclose(merged, want, rtol=1e-10, atol=1e-10)
    again = lro.adapters.load(tmp_path, params, where=OF_WINDOWS)
    close(lro.adapters.merge(params, again)["c"]["kernel"], merged, 1e-10)
    if kind != "lowrank":
        close(again, delta, 1e-12)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 4, 1, 3), (5, 2, 1, 1)),  # its window turned round
        ((2, 3, 4, 1), (5, 2, 1, 1)),  # a window of its channels
        ((2, 4, 3), (5, 2, 1)),
        ((2, 4, 3, 1, 1), (5, 2, 1, 1, 1)),
        ((2, 4, 3, 1), (5, 2)),
        ((2, 4, 3, 1), (5, 2, 1)),
        ((2, 12), (5, 2, 1, 1)),
        ((12, 2), (5, 2)),
        ((2, 12), (2, 5)),
    ],
    ids=str,
)
def test_factors_with_axes_of_another_layer(a: tuple[int, ...], b: tuple[int, ...], tmp_path: pathlib.Path) -> None:
    """All of them have the numbers of entries of a convolution."""
    params = {"c": {"kernel": draw((3, 1, 4, 5))}}
    tensors = {"c.lora_A.weight": draw(a), "c.lora_B.weight": draw(b)}
    message = f"lora_A and lora_B of 'c' have shapes {a} and {b}, and its kernel of (3, 1, 4) inputs and (5,) outputs"
    with pytest.raises(ValueError, match=re.escape(message)):
        lro.adapters.load(write(tmp_path, tensors, r=a[0]), params)


@pytest.mark.parametrize("shape", [(), (2,)], ids=str)
@pytest.mark.parametrize("letter", "AB")
def test_factors_that_are_no_matrices(letter: str, shape: tuple[int, ...], tmp_path: pathlib.Path) -> None:
    key = f"x.lora_{letter}.weight"
    message = rf"has '.*{key}' of shape {re.escape(str(shape))}, which is no matrix$"
    with pytest.raises(ValueError, match=message):
        lro.adapters.load(write(tmp_path, {**LAYER, key: draw(shape)}), PARAMS)


@pytest.mark.parametrize("shape", [(), (5,), (1, 6), (2, 3), (6, 1, 1)], ids=str)
def test_lengths_of_another_shape(shape: tuple[int, ...], tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path, {**LAYER, "x.lora_magnitude_vector": draw(shape)}, use_dora=True)
    with pytest.raises(ValueError, match=rf"lora_magnitude_vector.* shape {re.escape(str(shape))}, "):
        lro.adapters.load(folder, PARAMS)


@pytest.mark.parametrize(
    ("shape", "inputs"),
    [((2, 4, 6), 2), ((6, 2, 4), 1), ((2, 3, 2, 2), 2), ((2, 3, 2, 2, 3), 3), ((2, 1, 2, 2, 3, 2), 4)],
    ids=str,
)
def test_linear_layers_of_several_axes_are_matrices(shape: tuple[int, ...], inputs: int, tmp_path) -> None:
    params = {"x": {"kernel": draw(shape)}}
    where = lambda path, shape: lro.Axes(0, inputs)  # noqa: E731
    delta = moved(lro.adapters.init(jax.random.key(0), params, 2, kind="dora", alpha=3, where=where)[1])
    lro.adapters.export(tmp_path, delta)
    m, n = np.prod(shape[:inputs]), np.prod(shape[inputs:])
    x, W0 = np.asarray(draw((3, m), 5)), np.asarray(params["x"]["kernel"]).reshape(m, n)
    dense = lro.adapters.merge(params, delta)["x"]["kernel"].reshape(m, n)
    np.testing.assert_allclose(peft_layer(tmp_path, "x", x, W0.T), x @ dense, rtol=1e-10, atol=1e-10)
    close(lro.adapters.load(tmp_path, params, where=where), delta, 1e-12)


def test_a_convolution_without_a_window_is_refused(tmp_path: pathlib.Path) -> None:
    delta = lro.adapters.init(jax.random.key(0), PARAMS, 2, kind="lora")[1]
    with pytest.raises(ValueError, match=r"names kernel 'x/kernel', whose inputs \(8,\) are no window and channels"):
        lro.adapters.export(tmp_path, delta, convolution=lambda path: True)


@pytest.mark.parametrize("ranks", [(2, 2, 4), (4, 4, 2), (1, 2, 3), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("alpha", [None, 10, 0.3], ids=str)
def test_the_config_has_the_largest_rank(ranks: tuple[int, ...], alpha: float | None, tmp_path: pathlib.Path) -> None:
    """All other ranks, and alphas, are in patterns. Without alpha it is the rank, so that the scale is 1."""
    params = {name: {"kernel": draw((8, 6))} for name in "abc"}
    rank = lambda path, shape: ranks["abc".index(path[0])]  # noqa: E731
    lro.adapters.export(tmp_path, lro.adapters.init(jax.random.key(0), params, rank, kind="lora", alpha=alpha)[1])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    alphas = ranks if alpha is None else (alpha,) * 3
    assert config["r"] == max(ranks) and config["lora_alpha"] == (alpha or max(ranks))
    assert config["rank_pattern"] == {f"^{x}": r for x, r in zip("abc", ranks, strict=True) if r != max(ranks)}
    others = {f"^{x}": a for x, a in zip("abc", alphas, strict=True) if a != config["lora_alpha"]}
    assert config["alpha_pattern"] == others


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=lambda x: x.__name__)
@pytest.mark.parametrize("rank", [3, 7, 49])
@pytest.mark.parametrize("alpha", [10, 16, 0.1, 123456], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_alphas_are_written_as_they_were_given(kind: str, alpha: float, rank: int, dtype, tmp_path) -> None:
    """Numbers like 10 / 3 are rounded to the dtype of the change."""
    params = {"x": {"kernel": draw((64, 50)).astype(dtype)}}
    delta = lro.adapters.init(jax.random.key(0), params, rank, kind=kind, alpha=alpha)[1]
    change = delta["x"]["kernel"].change if kind == "dora" else delta["x"]["kernel"]
    assert change.scale.dtype == dtype
    lro.adapters.export(tmp_path, delta)
    text = (tmp_path / "adapter_config.json").read_text()
    assert f'"lora_alpha": {alpha},' in text
    again = lro.adapters.load(tmp_path, params)["x"]["kernel"]
    assert float((again.change if kind == "dora" else again).scale) == float(change.scale)


def test_a_start_off_zero_is_written_for_the_base_as_it_was(tmp_path: pathlib.Path) -> None:
    before = {"x": {"kernel": draw((8, 6))}}
    params, start = lro.adapters.init(jax.random.key(0), before, 2, kind="lora", alpha=3, start="pissa")
    delta = moved(start)
    lro.adapters.export(tmp_path, lro.adapters.add(delta, start, weights=(1, -1)))
    close(lro.adapters.merge(before, lro.adapters.load(tmp_path, before)), lro.adapters.merge(params, delta), 1e-12)


def test_other_trained_parameters_go_along(tmp_path: pathlib.Path) -> None:
    params = {"x": {"kernel": draw((8, 6))}}
    _, delta = lro.adapters.init(jax.random.key(0), params, 2, kind="lora")
    lro.adapters.export(tmp_path, delta, save={"head.weight": draw((3, 6)), "head.bias": draw((3,))})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(tensors["base_model.model.head.weight"], draw((3, 6)))
    with pytest.warns(UserWarning, match=r"not loaded, because they are no adapters: head\.bias, head\.weight"):
        lro.adapters.load(tmp_path, params)


def test_bad_folders_are_told_in_one_line(tmp_path: pathlib.Path) -> None:
    params = {"x": {"kernel": draw((8, 6))}}
    A, B = np.asarray(draw((4, 8))), np.asarray(draw((6, 4)))
    good = {"x.lora_A.weight": A, "x.lora_B.weight": B}

    def refused(message: str, folder: pathlib.Path) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            lro.adapters.load(folder, params)
        assert "\n" not in str(caught.value)

    refused("nowhere has no adapter_config.json", tmp_path / "nowhere")
    folder = write(tmp_path / "a", good)
    lro.adapters.load(folder, params)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-40])
    refused("adapter_model.safetensors is damaged or no safetensors", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04" + whole)
    refused("adapter_model.safetensors is damaged or no safetensors", folder)
    (folder / "adapter_model.safetensors").unlink()
    refused("has no adapter_model.safetensors$", folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    refused("but a pickle, which may run code when it is read: save it again as safetensors", folder)
    (folder / "adapter_config.json").write_text("{")
    refused("adapter_config.json is no JSON", folder)
    refused("peft_type 'VERA', and only LORA is read", write(tmp_path / "b", good, peft_type="VERA"))
    refused("lora_A of 'x' has rank 4, and adapter_config.json says 8", write(tmp_path / "c", good, r=8))
    refused(
        "no kernels for 1 layers of the file, pass module=... to map the names: y",
        write(tmp_path / "d", {f"y{key[1:]}": x for key, x in good.items()}),
    )
    refused(r"shapes \(4, 7\) and \(6, 4\)", write(tmp_path / "e", {**good, "x.lora_A.weight": A[:, :7]}))
    refused("not all of, or more than, lora_A, lora_B for 'x'", write(tmp_path / "f", {"x.lora_A.weight": A}))
    refused("lora_A, lora_B, lora_magnitude_vector for 'x'", write(tmp_path / "g", good, use_dora=True))
    refused(r"no LoRA of a layer: x\.bias", write(tmp_path / "h", {**good, "x.bias": B[:, 0]}))
    refused("has lora_bias", write(tmp_path / "i", good, lora_bias=True))


LAYER = {"x.lora_A.weight": np.asarray(draw((4, 8))), "x.lora_B.weight": np.asarray(draw((6, 4)))}
PARAMS = {"x": {"kernel": draw((8, 6))}}
NO_NUMBERS = [
    ("null", None),
    ("text", "abc"),
    ("list", [1]),
    ("nan", float("nan")),
    ("inf", float("inf")),
    ("bool", True),
]
DAMAGED = {
    **{f"r {name}": ({"r": value}, f"r {re.escape(repr(value))}, which is no rank") for name, value in NO_NUMBERS},
    "r zero": ({"r": 0}, "r 0, which is no rank"),
    **{
        f"alpha {name}": ({"lora_alpha": value}, f"lora_alpha {re.escape(repr(value))}, which is no finite number")
        for name, value in NO_NUMBERS
    },
    **{
        f"{field} {name}": ({field: value}, f"{field} {message}")
        for field, what in (("rank_pattern", "rank"), ("alpha_pattern", "finite number"))
        for name, value, message in (
            ("list", ["x"], r"\['x'\], which is no object of names and values"),
            ("no pattern", {"(": 4}, r"with '\(', which is no pattern: missing \)"),
            ("text", {"x": "4"}, f"with 'x': '4', which is no {what}"),
        )
    },
    "modules text": ({"modules_to_save": "head"}, "modules_to_save 'head', which is no list of names"),
    "modules numbers": ({"modules_to_save": [1]}, r"modules_to_save \[1\], which is no list of names"),
    **{
        f"{field} {value!r}": ({field: value}, f"{field} {re.escape(repr(value))}, which is no true or false")
        for field in ("use_rslora", "use_dora", "lora_bias", "use_qalora")
        for value in ("false", "true", "", [0], [], 0, 1, 1.0, None, {})
    },
    **{
        name: ({name: value}, f"{name}, which has no counterpart here")
        for name, value in {
            "lora_bias": True,
            "alora_invocation_tokens": [1, 2],
            "use_qalora": True,
            "use_bdlora": {"nblocks": 2},
            "layer_replication": [[0, 1]],
            "trainable_token_indices": [1],
            "monteclora_config": {"num_samples": 2},
            "arrow_config": {"top_k": 2},
            "kasa_config": {"beta": 1.0},
        }.items()
    },
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_configs_are_told_with_file_and_field(name: str, tmp_path: pathlib.Path) -> None:
    fields, message = DAMAGED[name]
    folder = write(tmp_path, LAYER, **fields)
    with pytest.raises(ValueError, match=f"adapter_config.json has {message}") as caught:
        lro.adapters.load(folder, PARAMS)
    assert "\n" not in str(caught.value)


def test_configs_without_alpha_or_rank_have_those_of_peft(tmp_path: pathlib.Path) -> None:
    """Both are 8 there."""
    folder = write(tmp_path / "a", LAYER)
    config = json.loads((folder / "adapter_config.json").read_text())
    without = lambda field: json.dumps({k: v for k, v in config.items() if k != field})  # noqa: E731
    (folder / "adapter_config.json").write_text(without("lora_alpha"))
    assert float(lro.adapters.load(folder, PARAMS)["x"]["kernel"].scale) == 2.0
    (folder / "adapter_config.json").write_text(without("r"))
    with pytest.raises(ValueError, match=r"has rank 4, and adapter_config.json says 8 by r, which is 8 where it is mi"):
        lro.adapters.load(folder, PARAMS)


@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize("value", [np.nan, np.inf, None], ids=["nan", "inf", "integers"])
def test_factors_that_are_no_numbers(letter: str, value: float | None, tmp_path: pathlib.Path) -> None:
    key = f"x.lora_{letter}.weight"
    x = LAYER[key].copy()
    if value is None:
        x = x.astype(np.int32)
    else:
        x[1, 2] = value
    with pytest.raises(ValueError, match=rf"safetensors has '.*{key}' in \w+, not all of it finite floating numbers"):
        lro.adapters.load(write(tmp_path, {**LAYER, key: x}), PARAMS)


def test_exports_that_are_refused(tmp_path: pathlib.Path) -> None:
    params = {"a": {"kernel": draw((8, 6))}, "b": {"kernel": draw((8, 6))}}
    make = lambda kind: lro.adapters.init(jax.random.key(0), params, 2, kind=kind)[1]  # noqa: E731
    with pytest.raises(ValueError, match="the change of 'a/kernel' is a VeRA, which has no LoRA file: merge it"):
        lro.adapters.export(tmp_path, make("vera"))
    with pytest.raises(ValueError, match="of all layers at once whether they are of kind 'dora'"):
        lro.adapters.export(tmp_path, {"a": make("dora")["a"], "b": make("lora")["b"]})
    with pytest.raises(ValueError, match="a name must be new"):
        lro.adapters.export(tmp_path, make("lora"), module=lambda path, index: "x")
    with pytest.raises(ValueError, match="there is no change to export"):
        lro.adapters.export(tmp_path, {})
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot be made a folder, because it is a file or lies below one$"):
            lro.adapters.export(folder, make("lora"))


def test_one_base_with_several_adapters(tmp_path: pathlib.Path) -> None:
    """Adapters are trees: a program that is compiled once runs them all."""
    model, x = nn.Dense(6, param_dtype=jnp.float64), draw((3, 8))
    params = model.init(jax.random.key(0), x)["params"]
    for name in "ab":
        _, delta = lro.adapters.init(jax.random.key(ord(name)), params, 2, kind="lora")
        lro.adapters.export(tmp_path / name, moved(delta), module=lambda path, index: "x")
    forward = jax.jit(lambda delta: lro.linen.apply(model)({"params": params, "adapters": delta}, x))
    for name in "ab":
        delta = lro.adapters.load(tmp_path / name, params, module=lambda path, index: "x")
        close(forward(delta), model.apply({"params": lro.adapters.merge(params, delta)}, x))
    assert forward._cache_size() == 1
