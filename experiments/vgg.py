"""A small VGG-style convolutional network in Flax linen, normalised image by image: it has no mutable state."""

import flax.linen as nn
import jax


class VGG(nn.Module):
    """Maps images (batch, height, width, channels) to logits (batch, classes).

    Three pairs of 3 x 3 convolutions of `width`, `2 width` and `4 width` channels, each pair with max-pooling after it,
    and a hidden dense layer of `4 width` features.
    """

    classes: int
    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i in range(6):
            x = nn.Conv(self.width * 2 ** (i // 2), (3, 3), use_bias=False, name=f"conv_{i}")(x)
            x = nn.relu(nn.GroupNorm(1, name=f"norm_{i}")(x))
            if i % 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(4 * self.width, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(self.classes, name="head")(x)


def is_kernel(path: str, shape: tuple[int, ...]) -> bool:
    """The kernels that are factored: all but the kernels of the first convolution and of the classifier."""
    return path.endswith("kernel") and not path.startswith(("conv_0/", "head/"))
