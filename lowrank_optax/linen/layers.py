"""Flax layers whose kernel is a `LowRank` from the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_optax.axes import Rank
from lowrank_optax.boxes import unboxed
from lowrank_optax.grids import Blocks
from lowrank_optax.initialize import lowrank_init
from lowrank_optax.linen.stock import detach, forward, kernel_axes

Init = Callable[..., Any]


class _LowRankLayer(nn.Module):
    """The common part: the stock layer gives the shapes of the parameters, and `apply` shares the forward pass."""

    stock: ClassVar[Any]

    def _base_init(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return self.kernel_init(key, shape, dtype)

    @nn.compact
    def __call__(self, inputs: Any) -> jax.Array:
        layer: Any = detach(self.stock, self, kernel_init=nn.initializers.zeros)
        shapes = unboxed(jax.eval_shape(layer.init, jax.random.key(0), inputs)["params"])[0]
        own: Any = self
        options = dict(max_rank=own.max_rank, axes=kernel_axes(layer), blocks=own.blocks)
        init = lowrank_init(own.rank, self._base_init, **options)
        kernel = self.param("kernel", init, shapes["kernel"].shape, own.param_dtype)
        bias = None
        if own.use_bias:
            bias = self.param("bias", own.bias_init, shapes["bias"].shape, own.param_dtype)
        return forward(layer, kernel, bias, inputs)


class LowRankDense(_LowRankLayer):
    """`nn.Dense` with a `LowRank` kernel of shape `(in, features)`.

    Attributes:
      features: number of output features.
      rank: int, fraction of `min(in, features)`, or callable of path and shape.
      max_rank: width of the factors, default `rank`.
      blocks: a grid of blocks, see `lowrank_optax.factorize`.
      use_bias, dtype, param_dtype, precision, bias_init: as in `nn.Dense`.
      kernel_init: dense initialiser that sets the scale of the kernel; `nn.with_partitioning` around it names the axes
        of the factors.

    Raises:
      ValueError: on init, if the rank exceeds `min(in, features)`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.linen.LowRankDense(features=6, rank=2)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((3, 8)))
      >>> variables["params"]["kernel"].U.shape, layer.apply(variables, jnp.ones((3, 8))).shape
      ((8, 2), (3, 6))
    """

    stock: ClassVar[Any] = nn.Dense

    features: int
    rank: Rank
    max_rank: Rank | None = None
    blocks: Blocks | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Init = nn.initializers.lecun_normal()
    bias_init: Init = nn.initializers.zeros


class LowRankDenseGeneral(_LowRankLayer):
    """`nn.DenseGeneral` with a `LowRank` kernel of shape `(batch..., in..., features...)`.

    Attributes:
      features: number, or shape, of the output features.
      rank: int, fraction of `min(m, n)`, or callable of path and shape, where m and n are the products of
        the input and of the output axes.
      max_rank: width of the factors, default `rank`.
      blocks: a grid of blocks, see `lowrank_optax.factorize`.
      axis, batch_dims, use_bias, dtype, param_dtype, precision, bias_init: as in `nn.DenseGeneral`.
      kernel_init: dense initialiser that sets the scale, called as `nn.DenseGeneral` does, with two axes.

    Raises:
      ValueError: on init, if the rank exceeds `min(m, n)`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.linen.LowRankDenseGeneral(features=(2, 4), rank=3)
      >>> kernel = layer.init(jax.random.key(0), jnp.ones((3, 8)))["params"]["kernel"]
      >>> kernel.shape, kernel.U.shape, kernel.V.shape
      ((8, 2, 4), (8, 3), (2, 4, 3))
    """

    stock: ClassVar[Any] = nn.DenseGeneral

    features: int | Sequence[int]
    rank: Rank
    max_rank: Rank | None = None
    blocks: Blocks | None = None
    axis: int | Sequence[int] = -1
    batch_dims: Sequence[int] = ()
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Init = nn.initializers.lecun_normal()
    bias_init: Init = nn.initializers.zeros

    def _base_init(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        n = math.prod(self.features) if isinstance(self.features, Sequence) else self.features
        return self.kernel_init(key, (math.prod(shape) // n, n), dtype)


class LowRankConv(_LowRankLayer):
    """`nn.Conv` with a `LowRank` kernel of shape `(kernel_size..., in, features)`, m = kernel_size x in.

    U is a convolution to r channels, S and V a 1 x 1 convolution to the features.

    Attributes:
      features: number of output channels.
      kernel_size: window, an int or one int for each spatial axis.
      rank: int, fraction of `min(m, features)`, or callable of path and shape.
      max_rank: width of the factors, default `rank`.
      blocks: a grid of blocks, see `lowrank_optax.factorize`.
      strides, padding, input_dilation, kernel_dilation, use_bias, dtype, param_dtype, precision, bias_init:
        as in `nn.Conv`.
      kernel_init: dense initialiser that sets the scale of the kernel.

    Raises:
      ValueError: on init, if the rank exceeds `min(m, features)`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.linen.LowRankConv(features=8, kernel_size=(3, 3), rank=2)
      >>> kernel = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 4)))["params"]["kernel"]
      >>> kernel.U.shape, kernel.V.shape
      ((3, 3, 4, 2), (8, 2))
    """

    stock: ClassVar[Any] = nn.Conv

    features: int
    kernel_size: int | Sequence[int]
    rank: Rank
    max_rank: Rank | None = None
    blocks: Blocks | None = None
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Init = nn.initializers.lecun_normal()
    bias_init: Init = nn.initializers.zeros
