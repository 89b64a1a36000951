"""Frozen kernels in eight bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import node
from lowrank_optax.axes import Axes, Where, check_where, matrix_shape, split_axes
from lowrank_optax.boxes import closed, is_box, opened
from lowrank_optax.linalg import working_dtype
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import path_name
from lowrank_optax.product import Product, is_composed


@node
class Quantized:
    r"""A frozen kernel :math:`W_{ij} = v_{ij}\, s_j` of 8-bit integers and a scale for each output.

    A layer multiplies with the integers and scales its outputs: no kernel in floating point is kept.

    Attributes:
      values: int8, in the shape of the kernel.
      scale: `(batch..., n)` in float32 or better.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the kernel."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the kernel as an array."""
        return self.scale.dtype

    @property
    def axes(self) -> Axes:
        """How the axes of the kernel split."""
        batch = self.scale.ndim - 1
        for inputs in range(1, self.ndim - batch):
            if matrix_shape(self.shape, Axes(batch, inputs))[1] == self.scale.shape[-1]:
                return Axes(batch, inputs)
        raise ValueError(f"scales of shape {self.scale.shape} are none of a kernel of shape {self.shape}")

    def through(self, product: Product) -> jax.Array:
        """The output of a layer with this kernel."""
        y = product.times(self.values)
        scale = self.scale.reshape(*self.scale.shape[:-1], *self.shape[sum(self.axes) :])
        return y * product.columns(scale.astype(y.dtype), y.ndim)

    def to_dense(self) -> jax.Array:
        """The kernel as an array."""
        batch, inputs = self.axes
        ones = (1,) * inputs
        scale = self.scale.reshape(*self.scale.shape[:-1], *ones, *self.shape[batch + inputs :])
        return self.values.astype(self.scale.dtype) * scale


def quantize(params: Any, *, where: Where | None = None) -> Any:
    """Frozen kernels rounded to 8 bits, for bases that are not trained; changes run on them as on others.

    Each output has the scale `max |W| / 127`. Starts that correct the base come first: `init`, then `quantize`.

    Args:
      params: the parameters of the base model.
      where: which kernels, as in `init`.

    Returns:
      The tree with `Quantized` kernels, which run in `lowrank_optax.linen.apply` and `factored`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lowrank_optax as lro
      >>> model, x = nn.Dense(6), jnp.ones((2, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> params, delta = lro.adapters.init(jax.random.key(1), params, rank=2, kind="lora")
      >>> params = lro.adapters.quantize(params)
      >>> params["kernel"].values.dtype, lro.linen.apply(model)({"params": params, "adapters": delta}, x).shape
      (dtype('int8'), (2, 6))
    """
    check_where(where)

    def one(path: Any, box: Any) -> Any:
        leaf = opened(box)
        shape = tuple(jnp.shape(leaf))
        axes = None if is_lowrank(leaf) or is_composed(leaf) else split_axes(path_name(path), shape, where, 1)
        if axes is None:
            return box
        W = jnp.asarray(leaf).astype(working_dtype(leaf)).reshape(*shape[: axes.batch], *matrix_shape(shape, axes))
        scale = jnp.max(jnp.abs(W), axis=-2) / 127.0
        values = jnp.round(W / jnp.where(scale > 0, scale, 1.0)[..., None, :]).astype(jnp.int8)
        return closed(box, Quantized(values.reshape(shape), scale))

    is_leaf = lambda x: is_box(x) or is_lowrank(x) or is_composed(x)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_leaf)
