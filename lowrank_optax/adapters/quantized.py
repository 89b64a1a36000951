"""Frozen kernels in eight or four bits."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import STATIC, Parts, is_parameter, node
from lowrank_optax.axes import Axes, Where, check_where, matrix_shape, split_axes
from lowrank_optax.boxes import closed, opened
from lowrank_optax.linalg import working_dtype
from lowrank_optax.paths import listed, path_name
from lowrank_optax.product import Product, is_kernel


@node
class Integers(Parts):
    """A kernel as integers and scales: the base class of both forms.

    A layer multiplies with the kernel in floating point, which it makes for itself and does not keep.

    Attributes:
      values: int8 or int4, in the shape of the kernel.
      scale: numbers in float32 or better, with the batch axes of the kernel.
      inputs: the number of input axes of the kernel; static.
      own: the number of axes of `scale` that are no batch axes.
    """

    own: ClassVar[int]

    values: jax.Array
    scale: jax.Array
    inputs: int = dataclasses.field(default=1, kw_only=True, metadata=STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the kernel as an array."""
        return self.scale.dtype

    @property
    def axes(self) -> Axes:
        """How the axes of the kernel split."""
        return Axes(self.scale.ndim - self.own, self.inputs)

    def through(self, product: Product) -> jax.Array:
        """The output of a layer with this kernel, in the dtype of its input and not of the scales."""
        # The integers themselves give that dtype, but a sum of them may overflow where the output does not.
        integers = self.values.astype(jnp.int8)  # JAX does not promote int4
        dtype = jnp.result_type(jax.eval_shape(product.times, integers).dtype, 1.0)
        return product.times(self.to_dense().astype(dtype))

    def to_dense(self) -> jax.Array:
        """The kernel as an array."""
        raise NotImplementedError


@node
class Quantized(Integers):
    r"""A frozen kernel :math:`W_{ij} = v_{ij}\, s_j` of 8-bit or 4-bit integers and a scale for each output.

    Attributes:
      values: int8 or int4, in the shape of the kernel.
      scale: `(batch..., n)` in float32 or better.
      inputs: the number of input axes of the kernel, 1 by default; static.
    """

    own: ClassVar[int] = 1

    def to_dense(self) -> jax.Array:
        """The kernel as an array."""
        batch, inputs = self.axes
        ones = (1,) * inputs
        scale = self.scale.reshape(*self.scale.shape[:-1], *ones, *self.shape[batch + inputs :])
        return self.values.astype(self.scale.dtype) * scale


@node
class GroupQuantized(Integers):
    r"""A frozen kernel :math:`W_{ij} = v_{ij}\, s_{g(i)\,j}` with a scale for each group of inputs and each output.

    Attributes:
      values: int4 or int8, in the shape of the kernel.
      scale: `(batch..., groups, n)` in float32 or better; a group has `ceil(m / groups)` inputs.
      inputs: the number of input axes of the kernel, 1 by default; static.
    """

    own: ClassVar[int] = 2

    def to_dense(self) -> jax.Array:
        """The kernel as an array."""
        m, _ = matrix_shape(self.shape, self.axes)
        rows = jnp.repeat(self.scale, -(-m // self.scale.shape[-2]), axis=-2)[..., :m, :]
        return self.values.astype(rows.dtype) * rows.reshape(self.shape)


def quantize(params: Any, *, bits: int = 8, group: int | None = None, where: Where | None = None) -> Any:
    r"""Frozen kernels rounded to 8 or 4 bits, for bases that are not trained; changes run on them as on others.

    With integers up to :math:`q = 2^{b - 1} - 1` each output has the scale :math:`\max |W| / q`, or one for each group
    of inputs. Starts that correct the base come first: `init`, then `quantize`.

    Args:
      params: the parameters of the base model.
      bits: 8 or 4. JAX holds 4-bit integers as `int4`, of which a device may keep two in a byte.
      group: the most inputs that share a scale, 32 or 64 say; None for all of them.
      where: which kernels, as in `init`.

    Returns:
      The tree with `Quantized` or `GroupQuantized` kernels, which run in `lowrank_optax.linen.apply` and `factored`.

    Raises:
      ValueError: for another number of bits, an empty group, or if there is no kernel to quantize.

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
    if bits not in (4, 8):
        raise ValueError(f"bits is 8 or 4, got {bits!r}")
    if group is not None and group < 1:
        raise ValueError(f"group is the number of inputs that share a scale, got {group!r}")
    most, dtype = 2.0 ** (bits - 1) - 1, jnp.int8 if bits == 8 else jnp.int4

    seen: list[str] = []
    found: list[str] = []

    def one(path: Any, box: Any) -> Any:
        leaf, name = opened(box), path_name(path)
        shape = tuple(jnp.shape(leaf))
        if len(shape) >= 2:
            seen.append(f"  {name} {shape}")
        axes = None if is_kernel(leaf) else split_axes(name, shape, where, 1)
        if axes is None:
            return box
        found.append(name)
        batch, (m, n) = shape[: axes.batch], matrix_shape(shape, axes)
        W = jnp.asarray(leaf).astype(working_dtype(leaf)).reshape(*batch, m, n)
        groups = 1 if group is None else -(-m // group)
        each = -(-m // groups)
        rows = jnp.pad(W, [(0, 0)] * len(batch) + [(0, each * groups - m), (0, 0)])
        rows = rows.reshape(*batch, groups, each, n)
        scale = jnp.max(jnp.abs(rows), axis=-2) / most
        values = jnp.round(rows / jnp.where(scale > 0, scale, 1.0)[..., None, :]).astype(dtype)
        values = values.reshape(*batch, groups * each, n)[..., :m, :].reshape(shape)
        if group is None:
            return closed(box, Quantized(values, scale[..., 0, :], inputs=axes.inputs))
        return closed(box, GroupQuantized(values, scale, inputs=axes.inputs))

    params = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_parameter)
    if not found:
        raise ValueError(f"no kernel to quantize. Parameters with two axes or more:\n{listed(seen)}")
    return params
