"""`kernels`: the axes of every kernel of a model, read off the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_optax.factorize import Axes
from lowrank_optax.linen.stock import kernel_axes, running


def kernels(model: nn.Module, *args: Any, **kwargs: Any) -> Callable[[str, tuple[int, ...]], Axes | bool]:
    """The kernels of a linen model that can be factored, as the `where` of `factorize`.

    `model.init` is traced without computing anything. Every `nn.Dense`, `nn.DenseGeneral`, `nn.Conv` and
    `nn.ConvTranspose` that runs is recorded with its input axes, its `batch_dims` and the axes that
    `nn.scan` or `nn.vmap` stack in front; grouped and masked convolutions, embeddings and the parameters
    of other modules stay dense, and so do kernels stacked along another axis than the first.

    Args:
      model: a linen module.
      *args: example inputs of `model.init`, arrays or `jax.ShapeDtypeStruct`.
      **kwargs: further arguments of `model.init`, e.g. `train=False` or `method`.

    Returns:
      Callable `(path, shape) -> Axes | False`, with paths relative to the variables or to their `"params"`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lowrank_optax as lro
      >>> model, x = nn.MultiHeadDotProductAttention(num_heads=2), jax.ShapeDtypeStruct((1, 5, 8), jnp.float32)
      >>> where = lro.linen.kernels(model, x)
      >>> where("query/kernel", (8, 2, 4)), where("out/kernel", (2, 4, 8)), where("out/bias", (8,))
      (Axes(batch=0, inputs=1), Axes(batch=0, inputs=2), False)
    """
    declared: dict[str, tuple[tuple[int, ...], Axes]] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = next_fun(*args, **kwargs)
        layer = running(context)
        axes = None if layer is None else kernel_axes(layer)
        if axes is not None:
            leaves = jax.tree.leaves(context.module.get_variable("params", "kernel"))
            name = "/".join((*context.module.path, "kernel"))
            declared[name] = (jnp.shape(leaves[0]), axes)
        return out

    def init() -> Any:
        inputs, options = jax.tree.map(_concrete, (args, kwargs))
        return model.init(jax.random.key(0), *inputs, **options)

    with nn.intercept_methods(record):
        jax.eval_shape(init)

    def where(path: str, shape: tuple[int, ...]) -> Axes | bool:
        entry = declared.get(path) or declared.get(path.removeprefix("params/"))
        if entry is None:
            return False
        inner, axes = entry
        stacked = len(shape) - len(inner)
        if stacked < 0 or tuple(shape[stacked:]) != tuple(inner):
            return False
        return Axes(stacked + axes.batch, axes.inputs)

    return where


def _concrete(x: Any) -> Any:
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
