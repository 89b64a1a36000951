"""A small vision transformer in Flax linen, pre-norm, whose block kernels are all plain two-axis `nn.Dense` kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Self-attention and a squared-ReLU MLP of four times the width, each with a residual."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=False, name=name)

        h = nn.LayerNorm(name="norm_attention")(x)
        heads = (*h.shape[:-1], self.heads, d // self.heads)
        q, k, v = (dense(d, name)(h).reshape(heads) for name in ("query", "key", "value"))
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + dense(d, "output")(h)

        h = nn.LayerNorm(name="norm_mlp")(x)
        h = jnp.square(nn.relu(dense(4 * d, "up")(h)))  # GELU doubles the cost on a CPU
        return x + dense(d, "down")(h)


class ViT(nn.Module):
    """Maps images (batch, height, width, channels) to logits (batch, classes).

    Height and width are multiples of `patch`, `d` is a multiple of `heads`.
    """

    classes: int
    d: int = 64
    layers: int = 3
    heads: int = 4
    patch: int = 4

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        n, height, width, channels = images.shape
        p = self.patch
        x = images.reshape(n, height // p, p, width // p, p, channels).swapaxes(2, 3)
        x = nn.Dense(self.d, name="patches")(x.reshape(n, -1, p * p * channels))
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for i in range(self.layers):
            x = Block(self.heads, name=f"block_{i}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))


def is_kernel(path: str, shape: tuple[int, ...]) -> bool:
    """The kernels that are factored: those inside the transformer blocks."""
    return "block_" in path and path.endswith("kernel")
