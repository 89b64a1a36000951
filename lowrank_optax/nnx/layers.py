"""nnx layers whose kernel is a `LowRank` from the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_optax.axes import Rank
from lowrank_optax.grids import Blocks
from lowrank_optax.initialize import lowrank_init
from lowrank_optax.nnx.specs import DENSE_SHARDING, dense_spec, factor_specs
from lowrank_optax.nnx.stock import declared, install

_DEFAULT_INIT = nnx.initializers.lecun_normal()
_NONE: Mapping[str, Any] = MappingProxyType({})


def _build(
    layer: Any,
    stock: Callable[..., None],
    *args: Any,
    rank: Rank,
    max_rank: Rank | None,
    blocks: Blocks | None,
    kernel_init: Any,
    kernel_metadata: Mapping[str, Any],
    **kwargs: Any,
) -> None:
    """Runs the stock constructor and puts a low-rank draw and the hooks that run it in the place of its kernel."""
    metadata: dict[str, Any] = {}
    drawn: list[tuple[Any, tuple[int, ...], Any]] = []

    def placeholder(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        drawn.append((key, shape, dtype))
        return jnp.zeros(shape, dtype)

    stock(*args, kernel_init=placeholder, **kwargs)
    kernel = declared(layer)
    if isinstance(kernel, str):
        raise ValueError(f"{type(layer).__name__} cannot run on factors: {kernel}")
    ((key, init_shape, dtype),) = drawn

    def base(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        # nnx.LinearGeneral draws its kernel with two axes; nnx.with_partitioning adds metadata to a draw.
        draw = kernel_init(key, init_shape, dtype)
        metadata.update(getattr(draw, "metadata", {}))
        return jnp.reshape(getattr(draw, "raw_value", draw), shape)

    W = lowrank_init(rank, base, max_rank=max_rank, axes=kernel.axes, blocks=blocks)(key, kernel.shape, dtype)
    metadata.update(kernel_metadata)
    if (out_sharding := metadata.pop("out_sharding", metadata.pop("sharding", None))) is not None:
        metadata[DENSE_SHARDING] = axes = dense_spec(out_sharding, W.ndim)
        W = _placed(W, factor_specs(W, axes), metadata)
    layer.kernel.set_value(W)
    if metadata:
        layer.kernel.set_metadata(**metadata)
    install(layer)


def _placed(W: Any, specs: Any, metadata: dict[str, Any]) -> Any:
    """The factors where Flax puts variables of these shardings when it makes them."""
    options = {k: metadata[k] for k in ("mesh", "sharding_rules", "eager_sharding") if k in metadata}
    return jax.tree.map(lambda x, spec: nnx.Param(x, out_sharding=tuple(spec), **options).get_value(), W, specs)


class LowRankLinear(nnx.Linear):
    """`nnx.Linear` with a `LowRank` kernel of shape `(in_features, out_features)`.

    Args:
      in_features: number of input features.
      out_features: number of output features.
      rank: int, fraction of `min(in_features, out_features)`, or callable of path (here `""`) and shape.
      max_rank: width of the factors, default `rank`.
      blocks: a grid of blocks, see `lowrank_optax.factorize`.
      kernel_init: dense initialiser that sets the scale of the kernel, default LeCun normal. `nnx.with_partitioning`
        states the sharding of the dense kernel, see `get_partition_spec`.
      kernel_metadata: metadata of the kernel, `out_sharding` as above.
      rngs: random streams.
      **kwargs: as in `nnx.Linear`, e.g. `use_bias`, `dtype`, `param_dtype`, `precision`, `bias_init`.

    Raises:
      ValueError: if the rank exceeds `min(in_features, out_features)`, or for a `dot_general` of your own.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.nnx.LowRankLinear(8, 6, rank=2, rngs=nnx.Rngs(0))
      >>> layer.kernel[...].width, layer(jnp.ones((3, 8))).shape
      (2, (3, 6))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Rank,
        *,
        max_rank: Rank | None = None,
        blocks: Blocks | None = None,
        kernel_init: Any = _DEFAULT_INIT,
        kernel_metadata: Mapping[str, Any] = _NONE,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        form: dict[str, Any] = dict(rank=rank, max_rank=max_rank, blocks=blocks)
        options = dict(**form, kernel_init=kernel_init, kernel_metadata=kernel_metadata)
        _build(self, super().__init__, in_features, out_features, rngs=rngs, **options, **kwargs)


class LowRankLinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` with a `LowRank` kernel of shape `(batch..., in_features..., out_features...)`.

    Args:
      in_features: number, or shape, of the input features.
      out_features: number, or shape, of the output features.
      rank: int, fraction of `min(m, n)`, or callable of path (here `""`) and shape, where m and n are the products of
        the input and of the output features.
      max_rank: width of the factors, default `rank`.
      blocks: a grid of blocks, see `lowrank_optax.factorize`.
      kernel_init: dense initialiser that sets the scale, called as `nnx.LinearGeneral` does, with two axes.
      kernel_metadata: metadata of the kernel, see `LowRankLinear`.
      rngs: random streams.
      **kwargs: as in `nnx.LinearGeneral`, e.g. `axis`, `batch_axis`, `use_bias`, `dtype`, `param_dtype`, `precision`.

    Raises:
      ValueError: if the rank exceeds `min(m, n)`, or for a `dot_general` of your own.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.nnx.LowRankLinearGeneral(8, (2, 4), rank=3, rngs=nnx.Rngs(0))
      >>> layer.kernel[...].U.shape, layer.kernel[...].V.shape, layer(jnp.ones((3, 8))).shape
      ((8, 3), (2, 4, 3), (3, 2, 4))
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        rank: Rank,
        *,
        max_rank: Rank | None = None,
        blocks: Blocks | None = None,
        kernel_init: Any = _DEFAULT_INIT,
        kernel_metadata: Mapping[str, Any] = _NONE,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        form: dict[str, Any] = dict(rank=rank, max_rank=max_rank, blocks=blocks)
        options = dict(**form, kernel_init=kernel_init, kernel_metadata=kernel_metadata)
        _build(self, super().__init__, in_features, out_features, rngs=rngs, **options, **kwargs)


class LowRankConv(nnx.Conv):
    """`nnx.Conv` with a `LowRank` kernel of shape `(kernel_size..., in, out)`, m = kernel_size x in, n = out.

    U is a convolution to r channels, S and V a 1 x 1 convolution to the output features.

    Args:
      in_features: number of input channels.
      out_features: number of output channels.
      kernel_size: window, an int or one int for each spatial axis.
      strides: as in `nnx.Conv`.
      rank: int, fraction of `min(m, n)`, or callable of path (here `""`) and shape.
      max_rank: width of the factors, default `rank`.
      blocks: a grid of blocks, see `lowrank_optax.factorize`.
      kernel_init: dense initialiser that sets the scale of the kernel, default LeCun normal.
      kernel_metadata: metadata of the kernel, see `LowRankLinear`.
      rngs: random streams.
      **kwargs: as in `nnx.Conv`, e.g. `padding`, `kernel_dilation`, `use_bias`, `dtype`, `param_dtype`, `precision`.

    Raises:
      ValueError: if the rank exceeds `min(m, n)`, for groups, a mask, or a `conv_general_dilated` of your own.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.nnx.LowRankConv(4, 8, (3, 3), rank=2, rngs=nnx.Rngs(0))
      >>> layer.kernel[...].U.shape, layer.kernel[...].V.shape, layer(jnp.ones((1, 5, 5, 4))).shape
      ((3, 3, 4, 2), (8, 2), (1, 5, 5, 8))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        rank: Rank,
        max_rank: Rank | None = None,
        blocks: Blocks | None = None,
        kernel_init: Any = _DEFAULT_INIT,
        kernel_metadata: Mapping[str, Any] = _NONE,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        form: dict[str, Any] = dict(rank=rank, max_rank=max_rank, blocks=blocks)
        options = dict(**form, kernel_init=kernel_init, kernel_metadata=kernel_metadata)
        _build(self, super().__init__, in_features, out_features, kernel_size, strides, rngs=rngs, **options, **kwargs)


class LowRankEinsum(nnx.Einsum):
    """`nnx.Einsum` with a `LowRank` kernel, whose axes `lowrank_optax.einsum_axes` reads off the equation.

    Args:
      einsum_str: equation `x,w->y` of the inputs and the kernel.
      kernel_shape: shape of the dense kernel.
      bias_shape: shape of the bias, None for none.
      rank: int, fraction of `min(m, n)`, or callable of path (here `""`) and shape, where m and n are the products of
        the input and of the output axes.
      max_rank: width of the factors, default `rank`.
      blocks: a grid of blocks, see `lowrank_optax.factorize`.
      kernel_init: dense initialiser that sets the scale of the kernel, default LeCun normal.
      kernel_metadata: metadata of the kernel, see `LowRankLinear`.
      rngs: random streams.
      **kwargs: as in `nnx.Einsum`, e.g. `dtype`, `param_dtype`, `precision`, `bias_init`.

    Raises:
      ValueError: if the rank exceeds `min(m, n)`, for an equation whose kernel is no matrix, or an `einsum_op` of your
        own.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.nnx.LowRankEinsum("btd,ndh->btnh", (2, 8, 4), rank=3, rngs=nnx.Rngs(0))
      >>> layer.kernel[...].U.shape, layer.kernel[...].V.shape, layer(jnp.ones((1, 5, 8))).shape
      ((2, 8, 3), (2, 4, 3), (1, 5, 2, 4))
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        rank: Rank,
        max_rank: Rank | None = None,
        blocks: Blocks | None = None,
        kernel_init: Any = _DEFAULT_INIT,
        kernel_metadata: Mapping[str, Any] = _NONE,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        shapes = (tuple(kernel_shape), None if bias_shape is None else tuple(bias_shape))
        form: dict[str, Any] = dict(rank=rank, max_rank=max_rank, blocks=blocks)
        options = dict(**form, kernel_init=kernel_init, kernel_metadata=kernel_metadata)
        _build(self, super().__init__, einsum_str, *shapes, rngs=rngs, **options, **kwargs)
