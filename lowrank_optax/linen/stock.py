"""The kernel axes that stock Flax layers declare, and their forward pass with a factored kernel."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import flax.linen as nn
import jax

from lowrank_optax.factorize import Axes
from lowrank_optax.lowrank import LowRank, absorb, contract

# Keyed by the forward function and not by the class, because a subclass that wraps `super().__call__` (and
# every class that nn.remat, nn.scan or nn.vmap makes) still reaches this one function.
_FORWARD = {inspect.unwrap(layer.__call__): layer for layer in (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose)}

# Hooks that create variables of their own (fp8) and therefore do not run on a detached layer.
_VARIABLE_HOOKS = ("dot_general_cls", "conv_general_dilated_cls")


def detach(layer: type[nn.Module], module: nn.Module, **changes: Any) -> nn.Module:
    """An unbound `layer` with the hyperparameters of `module`, except for `changes`."""
    shared = {f.name for f in dataclasses.fields(layer)} & {f.name for f in dataclasses.fields(module)}
    values = {name: getattr(module, name) for name in shared - {"parent", "name"}}
    return layer(**{**values, **changes, "parent": None})


def running(context: nn.module.InterceptorContext) -> nn.Module | None:
    """The stock layer whose forward pass an interceptor is about to run, detached; None for others."""
    layer = _FORWARD.get(getattr(context.orig_method, "func", None))
    # nn.ConvLocal runs the code of nn.Conv with a kernel of another meaning.
    if layer is None or not getattr(context.module, "shared_weights", True):
        return None
    return detach(layer, context.module)


def kernel_axes(layer: Any) -> Axes | None:
    """The axes of a stock layer's kernel, None where its kernel is not one matrix from inputs to outputs."""
    if any(getattr(layer, hook, None) is not None for hook in _VARIABLE_HOOKS):
        return None
    if isinstance(layer, nn.Dense):
        return Axes(0, 1)
    if isinstance(layer, nn.DenseGeneral):
        return Axes(len(_tuple(layer.batch_dims)), len(_tuple(layer.axis)))
    grouped = getattr(layer, "feature_group_count", 1) > 1
    if grouped or layer.mask is not None or getattr(layer, "transpose_kernel", False):
        return None
    return Axes(0, len(_tuple(layer.kernel_size)) + 1)


def forward(layer: Any, kernel: LowRank, bias: Any, inputs: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """The output of a detached stock layer whose kernel is `kernel`.

    The layer itself runs with U as its kernel, so padding, axes and dtypes are Flax's own; S and V
    act on its r output channels.
    """
    inputs, U, S, V, bias = layer.promote_dtype(inputs, kernel.U, kernel.S, kernel.V, bias, dtype=layer.dtype)
    dense = isinstance(layer, nn.Dense | nn.DenseGeneral)
    row = kernel.batch_shape + (kernel.in_shape if dense else kernel.in_shape[-1:])
    U, S, V = absorb(LowRank(U, S, V), inputs.size // math.prod(row), precision=layer.precision)
    narrow = layer.clone(features=kernel.width, use_bias=False, kernel_init=nn.initializers.zeros)
    y = narrow.apply({"params": {"kernel": U}}, inputs, *args, **kwargs)
    nbatch = len(kernel.batch_shape)
    batch = (tuple(range(nbatch)),) * 2
    for factor, axis in ((S, nbatch), (V, V.ndim - 1)):
        if factor is not None:
            y = contract(y, factor, (((y.ndim - 1,), (axis,)), batch), precision=layer.precision)
    if bias is None:
        return y
    free = (1,) * (y.ndim - nbatch - len(kernel.out_shape))
    return y + bias.reshape(kernel.batch_shape + free + kernel.out_shape)


def _tuple(x: Any) -> tuple[int, ...]:
    return (x,) if isinstance(x, int) else tuple(x)
