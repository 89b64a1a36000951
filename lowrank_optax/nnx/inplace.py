"""`factorize` for nnx modules."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from lowrank_optax.factorize import Axes, Rank, Where, fits
from lowrank_optax.factorize import factorize as factorize_tree
from lowrank_optax.lowrank import dot_general, is_lowrank
from lowrank_optax.nnx.hooks import PromoteLeaves, conv_general_dilated

_STOCK_PRODUCTS = (None, jax.lax.dot_general, jax.lax.conv_general_dilated)


def factorize(model: Any, rank: Rank, *, max_rank: Rank | None = None, where: Where | None = None) -> None:
    r"""Replaces the kernels of an nnx model by their truncated SVD, in place.

    .. math:: W \approx U S V^\top, \quad y = x U S V^\top + b

    The kernels of `nnx.Linear`, `nnx.LinearGeneral` (hence `nnx.MultiHeadAttention`) and `nnx.Conv` without
    groups and mask become `nnx.Param(LowRank)`. The layers stay the stock ones, and their `dot_general`,
    `conv_general_dilated` and `promote_dtype` hooks run the factors. Axes are read off the layers; further
    axes in front, from `nnx.vmap`, index independent kernels. Call it before you create the `nnx.Optimizer`.

    Args:
      model: an nnx module.
      rank: an int, a fraction of `min(m, n)` in (0, 1], or a callable of path and dense shape.
      max_rank: width of the factors, default `rank`.
      where: callable of the path (`"block/linear/kernel"`) and the dense shape that returns False to leave a
        kernel dense, True to factor it, or `Axes`. Default: every kernel with `min(m, n) >= rank`.

    Raises:
      ValueError: if no kernel is left to factor, or the rank exceeds `min(m, n)` of a kernel that `where`
        chose.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
      >>> lro.nnx.factorize(model, rank=2)
      >>> model.kernel[...].U.shape, model(jnp.ones((3, 8))).shape
      ((8, 2), (3, 6))
    """
    layers = {
        "/".join((*map(str, path), "kernel")): layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, nnx.Linear | nnx.LinearGeneral | nnx.Conv)
    }
    kernels = {name: layer.kernel.get_value() for name, layer in layers.items()}
    axes = {name: _axes(layer, kernels[name]) for name, layer in layers.items()}

    def chosen(name: str, shape: tuple[int, ...]) -> bool | Axes | None:
        split = axes[name]
        if split is None:
            return False
        if where is None:
            return split if fits(rank, name, shape, split) else False
        answer = where(name, shape)
        return split if answer is True else answer

    factored = factorize_tree(kernels, rank, max_rank=max_rank, where=chosen)
    factored = {name: kernel for name, kernel in factored.items() if is_lowrank(kernel)}
    if not factored:
        found = [(name, tuple(kernel.shape)) for name, kernel in kernels.items()][:5]
        raise ValueError(
            f"no kernel to factor at rank {rank}: nnx.factorize takes Linear, LinearGeneral and Conv kernels "
            f"without groups, mask or custom products with min(m, n) >= rank, and found {found}"
        )
    for name, kernel in factored.items():
        _install(layers[name], kernel)


def _axes(layer: Any, kernel: Any) -> Axes | None:
    """The axes of a layer's kernel, None where it stays dense."""
    products = ("dot_general", "dot_general_cls", "conv_general_dilated")
    if any(getattr(layer, hook, None) not in _STOCK_PRODUCTS for hook in products):
        return None
    if isinstance(layer, nnx.Conv):
        if layer.feature_group_count > 1 or layer.mask is not None:
            return None
        declared, axes = tuple(layer.kernel_shape), Axes(0, len(layer.kernel_shape) - 1)
    elif isinstance(layer, nnx.LinearGeneral):
        batch = tuple(layer.batch_axis.values())
        declared = (*batch, *layer.in_features, *layer.out_features)
        axes = Axes(len(batch), len(layer.in_features))
    else:
        declared, axes = (layer.in_features, layer.out_features), Axes(0, 1)
    stacked = len(kernel.shape) - len(declared)
    if stacked < 0 or tuple(kernel.shape[stacked:]) != declared:
        return None
    return Axes(stacked + axes.batch, axes.inputs)


def _install(layer: Any, kernel: Any) -> None:
    """Puts a factored kernel and the hooks that run it into a stock layer."""
    layer.kernel.set_value(kernel)
    # The mesh axes of a dense kernel do not fit its factors.
    if layer.kernel.has_metadata("out_sharding"):
        layer.kernel.del_metadata("out_sharding")
    if not isinstance(layer.promote_dtype, PromoteLeaves):
        layer.promote_dtype = PromoteLeaves(layer.promote_dtype)
    if isinstance(layer, nnx.Conv):
        layer.conv_general_dilated = conv_general_dilated
    else:
        layer.dot_general = dot_general
