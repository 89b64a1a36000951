"""A Llama decoder in Flax linen, with the module names of Hugging Face, a cache of keys and values, and generation."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.task import Params


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder; by default the sizes of SmolLM2-135M."""

    d: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3  # each serves `heads / kv_heads` queries that follow each other
    hidden: int = 1536
    vocabulary: int = 49152
    theta: float = 1e5  # the longest wave of the positions, over 2 pi
    epsilon: float = 1e-5  # of the norms

    @property
    def head(self) -> int:
        return self.d // self.heads


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions of heads (batch, length, heads, size): number i of a head turns with number i + size / 2."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[:, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


class Attention(nn.Module):
    """Causal attention in which several queries share a key and a value; `cache` is the number of places kept."""

    config: LlamaConfig
    cache: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        c = self.config

        def project(name: str, heads: int) -> jax.Array:
            return nn.Dense(heads * c.head, use_bias=False, name=name)(x).reshape(*x.shape[:2], heads, c.head)

        q = rotate(project("q_proj", c.heads), positions, c.theta)
        k = rotate(project("k_proj", c.kv_heads), positions, c.theta)
        v = project("v_proj", c.kv_heads)
        if self.cache:
            k, v = self.kept("keys", k, positions[0]), self.kept("values", v, positions[0])
        seen = jnp.arange(k.shape[1]) <= positions[:, None]
        h = jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])
        return nn.Dense(c.d, use_bias=False, name="o_proj")(h.reshape(*x.shape[:2], -1))

    def kept(self, name: str, new: jax.Array, start: jax.Array) -> jax.Array:
        """All places of the cache, the new ones written from `start` on."""
        shape = (new.shape[0], self.cache, *new.shape[2:])
        variable = self.variable("cache", name, jnp.zeros, shape, new.dtype)
        variable.value = jax.lax.dynamic_update_slice_in_dim(variable.value, new, start, axis=1)
        return variable.value


class MLP(nn.Module):
    """The gated MLP with SiLU."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = (nn.Dense(self.config.hidden, use_bias=False, name=f"{n}_proj")(x) for n in ("gate", "up"))
        return nn.Dense(self.config.d, use_bias=False, name="down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
    """Attention and the MLP, a norm before each."""

    config: LlamaConfig
    cache: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        norm = functools.partial(nn.RMSNorm, epsilon=self.config.epsilon)
        attention = Attention(self.config, self.cache, name="self_attn")
        x = x + attention(norm(name="input_layernorm")(x), positions)
        return x + MLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x))


class Llama(nn.Module):
    """Maps tokens (batch, length) to logits (batch, length, vocabulary); the head is the embedding transposed.

    With a cache the tokens stand at `start` and after it, and attend to the tokens of earlier calls.
    """

    config: LlamaConfig
    cache: int = 0

    @nn.compact
    def __call__(self, tokens: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        c = self.config
        embed = nn.Embed(c.vocabulary, c.d, embedding_init=nn.initializers.normal(0.02), name="embed_tokens")
        x, positions = embed(tokens), start + jnp.arange(tokens.shape[1])
        for i in range(c.layers):
            x = Layer(c, self.cache, name=f"layers_{i}")(x, positions)
        return embed.attend(nn.RMSNorm(epsilon=c.epsilon, name="norm")(x))


def is_layer_kernel(path: str, shape: tuple[int, ...]) -> bool:
    """The kernels of attention and MLP."""
    return path.startswith("layers_") and path.endswith("kernel") and len(shape) == 2


def module_name(path: str, index: tuple[int, ...]) -> str:
    """The name of the layer of a kernel in the files of Hugging Face."""
    return "model." + path.removesuffix("/kernel").replace("layers_", "layers.").replace("/", ".")


def generate(apply: Any, variables: Params, prompt: jax.Array, new: int) -> jax.Array:
    """The likeliest continuation of prompts (batch, length), token by token: (batch, new).

    Args:
      apply: the apply function of a `Llama` whose cache has a place for every token.
      variables: its variables, `{"params": ...}` and perhaps `"adapters"`.
      prompt: tokens, all texts of one length.
      new: the number of tokens to add.
    """
    logits, kept = apply(variables, prompt, mutable=["cache"])
    first = logits[:, -1].argmax(-1)

    def step(carry: tuple[Any, jax.Array], place: jax.Array) -> tuple[tuple[Any, jax.Array], jax.Array]:
        cache, token = carry
        logits, kept = apply({**variables, "cache": cache}, token[:, None], place, mutable=["cache"])
        return (kept["cache"], logits[:, -1].argmax(-1)), token

    places = prompt.shape[1] + jnp.arange(new)
    _, tokens = jax.lax.scan(step, (kept["cache"], first), places)
    return tokens.T
