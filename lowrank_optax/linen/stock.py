"""The kernel axes that stock Flax layers declare, and their forward pass with a factored kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors

from lowrank_optax.axes import Axes
from lowrank_optax.blocks import BlockLowRank, grouped_kernel, padded_channels
from lowrank_optax.einsum import einsum, einsum_axes, output_sizes, product
from lowrank_optax.linen.registry import register
from lowrank_optax.lowrank import LowRank, absorb, contract, dot_general, is_lowrank
from lowrank_optax.product import Product, axes_of, is_composed, trailing_columns

# Hooks that create variables of their own (fp8) and therefore do not run on a detached layer.
_VARIABLE_HOOKS = ("dot_general_cls", "conv_general_dilated_cls")


def detach(layer: type[nn.Module], module: nn.Module, **changes: Any) -> nn.Module:
    """An unbound `layer` with the hyperparameters of `module`, except for `changes`."""
    shared = {f.name for f in dataclasses.fields(layer)} & {f.name for f in dataclasses.fields(module)}
    values = {name: getattr(module, name) for name in shared - {"parent", "name"}}
    return layer(**{**values, **changes, "parent": None})


def kernel_axes(layer: Any, *args: Any, **kwargs: Any) -> Axes:
    """The axes of a stock layer's kernel; ValueError, with the reason, where it is no matrix from inputs to outputs."""
    hook = next((hook for hook in _VARIABLE_HOOKS if getattr(layer, hook, None) is not None), None)
    if hook is not None:
        raise ValueError(f"its layer has a {hook}, which may make variables of its own")
    if isinstance(layer, nn.Dense):
        return Axes(0, 1)
    if isinstance(layer, nn.DenseGeneral):
        return Axes(len(_tuple(layer.batch_dims)), len(_tuple(layer.axis)))
    if layer.mask is not None:
        raise ValueError("its convolution has a mask")
    if getattr(layer, "feature_group_count", 1) > 1:
        raise ValueError(f"its convolution has {layer.feature_group_count} groups")
    if getattr(layer, "transpose_kernel", False):
        raise ValueError("its convolution has transpose_kernel=True")
    return Axes(0, len(_tuple(layer.kernel_size)) + 1)


def _kernel_shape(layer: Any, inputs: Any) -> tuple[int, ...]:
    """The shape that a stock layer declares for its kernel."""
    shape = tuple(jax.numpy.shape(inputs))
    if isinstance(layer, nn.Dense):
        return shape[-1], layer.features
    if isinstance(layer, nn.DenseGeneral):
        axes = sorted(axis % len(shape) for axis in _tuple(layer.axis))
        return (*(shape[i] for i in (*sorted(_tuple(layer.batch_dims)), *axes)), *_tuple(layer.features))
    return (*_tuple(layer.kernel_size), shape[-1], layer.features)


def forward(layer: Any, kernel: Any, bias: Any, inputs: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """The output of a detached stock layer whose kernel is factored, or composed of arrays and factored parts."""
    axes = axes_of(kernel)
    times = functools.partial(_times, layer, bias, inputs, args, kwargs)
    y = kernel.through(Product(times, trailing_columns(axes.batch))) if is_composed(kernel) else times(kernel)
    if bias is None:
        return y
    inner = axes.batch + axes.inputs
    free = (1,) * (y.ndim - kernel.ndim + axes.inputs)
    return y + bias.astype(y.dtype).reshape(kernel.shape[: axes.batch] + free + kernel.shape[inner:])


def _times(layer: Any, bias: Any, inputs: Any, args: Any, kwargs: Any, kernel: Any) -> jax.Array:
    """The output without bias, whose dtype counts."""
    without_bias = dict(use_bias=False, kernel_init=nn.initializers.zeros)
    if not is_lowrank(kernel):
        inputs, kernel, _ = layer.promote_dtype(inputs, kernel, bias, dtype=layer.dtype)
        return layer.clone(**without_bias).apply({"params": {"kernel": kernel}}, inputs, *args, **kwargs)
    inputs, U, S, V, _ = layer.promote_dtype(inputs, kernel.U, kernel.S, kernel.V, bias, dtype=layer.dtype)
    W = type(kernel)(U, S, V)
    run = _through_grid if isinstance(W, BlockLowRank) else _through_basis
    return run(layer, W, inputs, *args, **kwargs)


def _through_basis(layer: Any, W: LowRank, inputs: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """The layer itself runs with U as its kernel, so padding and axes are Flax's own; S and V act on r channels."""
    dense = isinstance(layer, nn.Dense | nn.DenseGeneral)
    row = W.batch_shape + (W.in_shape if dense else W.in_shape[-1:])
    U, S, V = absorb(W, inputs.size // math.prod(row), precision=layer.precision)
    narrow = layer.clone(features=W.width, use_bias=False, kernel_init=nn.initializers.zeros)
    y = narrow.apply({"params": {"kernel": U}}, inputs, *args, **kwargs)
    nbatch = len(W.batch_shape)
    batch = (tuple(range(nbatch)),) * 2
    for factor, axis in ((S, nbatch), (V, V.ndim - 1)):
        if factor is not None:
            y = contract(y, factor, (((y.ndim - 1,), (axis,)), batch), precision=layer.precision)
    return y


def _through_grid(layer: Any, W: BlockLowRank, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """A dense layer contracts with the grid; a convolution runs with the rows of blocks as its groups."""
    if isinstance(layer, nn.ConvTranspose):
        raise TypeError(
            f"ConvTranspose cannot run with a grid of blocks, here of shape {W.shape}: Flax has no groups for it. "
            "factorize it with blocks=1"
        )
    if isinstance(layer, nn.Conv) and W.is_cheaper_dense(inputs.size // inputs.shape[-1]):
        return layer.clone(use_bias=False).apply({"params": {"kernel": W.to_dense()}}, inputs, *args, **kwargs)
    if isinstance(layer, nn.Conv):
        U, S, V = W.absorb(inputs.size // inputs.shape[-1], precision=layer.precision)
        inputs = padded_channels(inputs, W)
        groups, (b, c) = grouped_kernel(U, W), W.grid
        narrow = layer.clone(
            features=groups.shape[-1], feature_group_count=b, use_bias=False, kernel_init=nn.initializers.zeros
        )
        z: Any = narrow.apply({"params": {"kernel": groups}}, inputs, *args, **kwargs)
        z = jnp.moveaxis(z.reshape(*z.shape[:-1], b, c, W.width), -3, 0)
        return W.second_stage(z, S, V, precision=layer.precision)
    if getattr(layer, "dot_general", None) is not None:
        raise TypeError(
            f"{type(layer).__name__} has a dot_general of its own, which a grid of blocks would not call: "
            f"factorize the kernel of shape {W.shape} with blocks=1"
        )
    # Flax sorts the axes that a layer names, so the axes of the kernel are in that order.
    axes, batch = (
        sorted(axis % inputs.ndim for axis in _tuple(x))
        for x in (getattr(layer, "axis", -1), getattr(layer, "batch_dims", ()))
    )
    k = len(batch)
    numbers = (tuple(axes), tuple(range(k, k + len(axes)))), (tuple(batch), tuple(range(k)))
    return dot_general(inputs, W, numbers, precision=layer.precision)


def _running(stock: type[nn.Module]) -> Callable[..., jax.Array]:
    """`forward` for the modules of a stock class, with the checks of shapes that Flax makes for a dense kernel."""

    def run(module: Any, W: Any, inputs: Any, *args: Any, **kwargs: Any) -> jax.Array:
        layer = detach(stock, module)
        _check_shape(module, W, _kernel_shape(layer, inputs))
        batch, n = axes_of(W)
        return forward(layer, W, _bias(module, W.shape[:batch] + W.shape[batch + n :]), inputs, *args, **kwargs)

    return run


def _einsum_equation(module: Any, inputs: Any, einsum_str: str | None = None) -> str:
    return nn.merge_param("einsum_str", module.einsum_str, einsum_str)


def _run_einsum(module: Any, W: Any, inputs: Any, einsum_str: str | None = None) -> jax.Array:
    """`nn.Einsum` with a factored kernel."""
    equation = _einsum_equation(module, inputs, einsum_str)
    _check_shape(module, W, tuple(module.shape))
    sizes = output_sizes(equation, jax.numpy.ndim(inputs), W.shape)
    bias = _bias(module, tuple(size for size in sizes if size is not None))
    options = dict(precision=module.precision, preferred_element_type=module.preferred_element_type)

    def times(K: Any) -> jax.Array:
        x, _, *leaves = module.promote_dtype(inputs, bias, *jax.tree.leaves(K), dtype=module.dtype)
        return einsum(equation, x, jax.tree.unflatten(jax.tree.structure(K), leaves), **options)

    y = W.through(product(equation, inputs, times)) if is_composed(W) else times(W)
    return y if bias is None else y + bias.astype(y.dtype).reshape([1 if size is None else size for size in sizes])


def _check_shape(module: Any, W: Any, declared: tuple[int, ...]) -> None:
    if W.shape != declared:
        raise errors.ScopeParamShapeError("kernel", module.scope.path_text, W.shape, declared)


def _bias(module: Any, shape: tuple[int, ...]) -> Any:
    """The bias, whose shape Flax checks; its own initialiser may be one for other axes."""
    return module.param("bias", nn.initializers.zeros, shape, module.param_dtype) if module.use_bias else None


def _tuple(x: Any) -> tuple[int, ...]:
    return (x,) if isinstance(x, int) else tuple(x)


for _stock in (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose):
    register(_stock, axes=kernel_axes, forward=_running(_stock))
register(
    nn.Einsum,
    axes=lambda module, *args, **kwargs: einsum_axes(_einsum_equation(module, *args, **kwargs)),
    forward=_run_einsum,
)
