"""The stock nnx layers: the axes of their kernels, and the hooks that run a factored one."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_optax.axes import Axes, in_stack
from lowrank_optax.einsum import einsum, einsum_axes
from lowrank_optax.lowrank import dot_general
from lowrank_optax.nnx.hooks import PromoteLeaves, conv_general_dilated

# The attribute of a layer that holds its product, the products that a hook may replace, and the hook.
_PRODUCTS: dict[type, tuple[str, Any, Any]] = {
    nnx.Linear: ("dot_general", jax.lax.dot_general, dot_general),
    nnx.LinearGeneral: ("dot_general", jax.lax.dot_general, dot_general),
    nnx.Conv: ("conv_general_dilated", jax.lax.conv_general_dilated, conv_general_dilated),
    nnx.Einsum: ("einsum_op", jnp.einsum, einsum),
}


class Declared(NamedTuple):
    """The kernel of one layer: the shape that one call sees, and its axes."""

    shape: tuple[int, ...]
    axes: Axes

    def axes_in(self, shape: tuple[int, ...]) -> Axes | str:
        """The axes of the whole kernel, with those that nnx.vmap stacks in front, or the reason to stay dense."""
        return in_stack(self.axes, self.shape, shape)


def declared(layer: Any) -> Declared | str:
    """The kernel of a layer, or the reason why it cannot run on factors."""
    kind = _kind(layer)
    if kind is None:
        return f"{type(layer).__name__} is no Linear, LinearGeneral, Conv or Einsum"
    hook, stock, ours = _PRODUCTS[kind]
    for name in (hook, hook + "_cls"):
        if getattr(layer, name, None) not in (None, stock, ours):
            return f"its layer has a product of its own, {name}={_name(getattr(layer, name))}"
    if kind is nnx.Conv:
        if layer.feature_group_count > 1:
            return f"its layer is grouped, feature_group_count={layer.feature_group_count}"
        if layer.mask is not None:
            return "its layer has a mask"
        return Declared(tuple(layer.kernel_shape), Axes(0, len(layer.kernel_shape) - 1))
    if kind is nnx.LinearGeneral:
        batch = tuple(layer.batch_axis.values())
        shape = (*batch, *layer.in_features, *layer.out_features)
        return Declared(shape, Axes(len(batch), len(layer.in_features)))
    if kind is nnx.Einsum:
        if layer.einsum_str is None:
            return "its layer has no einsum_str and gets one with each call"
        try:
            return Declared(tuple(layer.kernel_shape), einsum_axes(layer.einsum_str))
        except ValueError as error:
            return str(error)
    return Declared((layer.in_features, layer.out_features), Axes(0, 1))


def install(layer: Any) -> None:
    """Puts the hooks that run a factored kernel into a stock layer; they run a dense one unchanged."""
    hook, ours = hook_of(layer)
    setattr(layer, hook, ours)
    if not isinstance(layer.promote_dtype, PromoteLeaves):
        layer.promote_dtype = PromoteLeaves(layer.promote_dtype)


def hook_of(layer: Any) -> tuple[str, Any]:
    """The attribute of a stock layer that holds its product, and the product that runs factors."""
    kind = _kind(layer)
    assert kind is not None
    hook, _, ours = _PRODUCTS[kind]
    return hook, ours


def _kind(layer: Any) -> type | None:
    return next((kind for kind in _PRODUCTS if isinstance(layer, kind)), None)


def _name(product: Any) -> str:
    return getattr(product, "__qualname__", None) or type(product).__name__
