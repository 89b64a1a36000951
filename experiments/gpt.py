"""A byte-level GPT in Flax linen, pre-norm, whose block kernels are all plain two-axis `nn.Dense` kernels."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model, and the `dtype` of the activations; parameters stay float32."""

    d: int = 128
    layers: int = 3
    heads: int = 4
    context: int = 64
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.d % self.heads:
            raise ValueError(f"d={self.d} is not a multiple of heads={self.heads}")


class Block(nn.Module):
    """Causal self-attention and a squared-ReLU MLP of four times the width, each with a residual."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=False, dtype=c.dtype, name=name)

        h = nn.LayerNorm(dtype=c.dtype, name="norm_attention")(x)
        heads = (*h.shape[:-1], c.heads, c.d // c.heads)
        q, k, v = (dense(c.d, name)(h).reshape(heads) for name in ("query", "key", "value"))
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + dense(c.d, "output")(h)

        h = nn.LayerNorm(dtype=c.dtype, name="norm_mlp")(x)
        h = jnp.square(nn.relu(dense(4 * c.d, "up")(h)))  # GELU doubles the cost on a CPU
        return x + dense(c.d, "down")(h)


class GPT(nn.Module):
    """Maps bytes (batch, length) to float32 logits (batch, length, 256)."""

    config: GPTConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        small = nn.initializers.normal(0.02)
        x = nn.Embed(VOCABULARY, c.d, embedding_init=small, dtype=c.dtype, name="embedding")(tokens)
        positions = self.param("positions", small, (c.context, c.d))
        x = x + positions[: tokens.shape[1]].astype(x.dtype)
        for i in range(c.layers):
            x = Block(c, name=f"block_{i}")(x)
        x = nn.LayerNorm(dtype=c.dtype, name="norm")(x)
        return nn.Dense(VOCABULARY, use_bias=False, dtype=c.dtype, name="head")(x).astype(jnp.float32)


def is_block_kernel(path: str, shape: tuple[int, ...]) -> bool:
    """The kernels that are factored: those inside the transformer blocks, not the head."""
    return "block_" in path and path.endswith("kernel") and len(shape) == 2
