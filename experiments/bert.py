"""A BERT encoder in Flax linen whose layer kernels are all plain two-axis `nn.Dense` kernels, and its weights."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.task import DataError, Params

PAD = 0  # the token that fills short texts; nothing looks at it
EPSILON = 1e-12  # of BERT's norms

# Where the layer's modules are in the files of Hugging Face.
NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "norm_attention": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm_mlp": "output.LayerNorm",
}


@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """Sizes of the encoder; by default the sizes of all-MiniLM-L6-v2."""

    d: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536
    vocabulary: int = 30522
    positions: int = 512


class Layer(nn.Module):
    """Self-attention to the places that `mask` shows, and an MLP with the exact GELU; a norm after each residual."""

    config: BERTConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        heads = (*x.shape[:-1], c.heads, c.d // c.heads)
        q, k, v = (nn.Dense(c.d, name=name)(x).reshape(heads) for name in ("query", "key", "value"))
        h = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(x.shape)
        x = nn.LayerNorm(EPSILON, name="norm_attention")(x + nn.Dense(c.d, name="output")(h))

        h = nn.gelu(nn.Dense(c.hidden, name="up")(x), approximate=False)
        return nn.LayerNorm(EPSILON, name="norm_mlp")(x + nn.Dense(c.d, name="down")(h))


class Encoder(nn.Module):
    """Maps tokens (batch, length) to the mean (batch, d) of the outputs of the last layer."""

    config: BERTConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        mask = tokens != PAD
        small = nn.initializers.normal(0.02)
        x = nn.Embed(c.vocabulary, c.d, embedding_init=small, name="embedding")(tokens)
        x = x + self.param("positions", small, (c.positions, c.d))[: tokens.shape[1]]
        x = nn.LayerNorm(EPSILON, name="norm")(x)
        for i in range(c.layers):
            x = Layer(c, name=f"layer_{i}")(x, mask)
        return jnp.mean(x, axis=1, where=mask[..., None])


class Classifier(nn.Module):
    """Maps tokens (batch, length) to logits (batch, classes)."""

    config: BERTConfig
    classes: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return nn.Dense(self.classes, name="head")(Encoder(self.config, name="encoder")(tokens))


def is_layer_kernel(path: str, shape: tuple[int, ...]) -> bool:
    """The kernels that are factored: those inside the layers, not the head."""
    return "layer_" in path and path.endswith("kernel") and len(shape) == 2


def module_name(path: str, index: tuple[int, ...]) -> str:
    """The name of the layer of a kernel of the encoder in the files of Hugging Face."""
    _, layer, name, _ = path.split("/")
    return f"encoder.layer.{layer.removeprefix('layer_')}.{NAMES[name]}"


def load(path: Path, config: BERTConfig) -> Params:
    """The parameters of an `Encoder` from a safetensors file with the names of Hugging Face."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        file = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: {error}") from None
    try:
        params = _encoder(file, config)
    except KeyError as error:
        raise DataError(f"{path}: no tensor {error}") from None
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    expected = jax.eval_shape(Encoder(config).init, jax.random.key(0), tokens)["params"]
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, expected):
        raise DataError(f"{path}: the weights of a model of another size")
    return params


def _encoder(file: dict[str, np.ndarray], config: BERTConfig) -> Params:
    # All texts are of type 0, so the embedding of that type is a part of the positions.
    types = file["embeddings.token_type_embeddings.weight"]
    return {
        "embedding": {"embedding": file["embeddings.word_embeddings.weight"]},
        "positions": file["embeddings.position_embeddings.weight"] + types[0],
        "norm": _module(file, "embeddings.LayerNorm"),
        **{
            f"layer_{i}": {name: _module(file, f"encoder.layer.{i}.{theirs}") for name, theirs in NAMES.items()}
            for i in range(config.layers)
        },
    }


def _module(file: dict[str, np.ndarray], name: str) -> Params:
    weight, bias = file[f"{name}.weight"], file[f"{name}.bias"]
    return {"scale": weight, "bias": bias} if "LayerNorm" in name else {"kernel": weight.T, "bias": bias}
