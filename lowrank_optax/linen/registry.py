"""The layers that can run with factored kernels, and `register`, which adds a layer of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from lowrank_optax.axes import Axes


class Layer(NamedTuple):
    """The kernels of a class of modules: their names, their axes, and the product that uses them."""

    leaves: tuple[str, ...]
    axes: Any
    forward: Callable[..., Any]


# By class and function that runs, because a subclass that wraps `super().__call__` (and every class that nn.remat,
# nn.scan or nn.vmap makes) still reaches the function of the registered class.
_LAYERS: dict[tuple[type, Any], Layer] = {}


def register(
    layer: type[nn.Module],
    *,
    axes: Axes | Sequence[Axes | None] | Callable[..., Any],
    forward: Callable[..., Any],
    leaf: str | Sequence[str] = "kernel",
    method: str = "__call__",
) -> None:
    """Teaches `factored`, `apply` and `kernels` a layer of one's own.

    Where a module of this class holds a factored parameter called `leaf`, `forward` runs in the place of its method.
    Modules with dense parameters run as always. A class registered again takes the new functions.

    Args:
      layer: class of linen modules. Subclasses that do not replace the method are included.
      axes: the axes of the kernel as it is stored, an `Axes` or a callable `(module, *args, **kwargs) -> Axes | None`
        that gets the arguments of the call. None, or a ValueError that gives the reason, leaves the kernel dense.
      forward: callable `(module, W, *args, **kwargs) -> y`. W is a `LowRank`: use `x @ W`, `W.T` or
        `lowrank_optax.einsum`. The module is bound: `module.param("bias", module.bias_init, shape)` reads its bias in a
        compact method, its attributes do after `setup`.
      leaf: name of the parameter. With several names `forward` takes one kernel for each, in this order, factored or
        dense, and `axes` has one entry for each.
      method: name of the method that `forward` replaces.

    Raises:
      TypeError: if `layer` is no class of linen modules.
      ValueError: if Flax does not see calls of this method.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lowrank_optax as lro
      >>> class Transposed(nn.Module):  # a kernel stored as (outputs, inputs)
      ...     features: int
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         w = self.param("w", nn.initializers.lecun_normal(), (self.features, x.shape[-1]))
      ...         return x @ w.T
      >>> lro.linen.register(Transposed, leaf="w", axes=lro.Axes(0, 1), forward=lambda module, W, x: x @ W.T)
      >>> model, x = Transposed(6), jnp.ones((2, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> params = lro.factorize(params, rank=3, where=lro.linen.kernels(model, x))
      >>> with lro.linen.factored():
      ...     model.apply({"params": params}, x).shape
      (2, 6)
    """
    if not (inspect.isclass(layer) and issubclass(layer, nn.Module)):
        raise TypeError(f"register takes a class of flax.linen modules, got {layer!r}")
    leaves = (leaf,) if isinstance(leaf, str) else tuple(leaf)
    _LAYERS[layer, _intercepted(layer, method)] = Layer(leaves, axes, forward)


def _intercepted(layer: type[nn.Module], method: str) -> Any:
    """The function that an interceptor sees when this method runs, within nn.remat or nn.scan as a decorator."""
    wrapper, function = getattr(layer, method, None), None
    while wrapper is not None:
        inner = getattr(wrapper, "__wrapped__", None)
        if hasattr(wrapper, "method_handler_wrapped") and inner is not None:
            function = inner
        wrapper = inner
    if function is None:
        raise ValueError(f"{layer.__name__}.{method} is no method that Flax intercepts (missing, nn.nowrap or a field)")
    return function


def find(module: nn.Module, function: Any) -> Layer | None:
    """The entry for a function that is about to run on a module."""
    found = (_LAYERS.get((cls, function)) for cls in type(module).__mro__)
    return next((layer for layer in found if layer is not None), None)


def normalizer(module: nn.Module) -> str | None:
    """The name of a module that normalises each array among the parameters of another one, which factors are not."""
    return type(module).__name__ if isinstance(module, nn.WeightNorm | nn.SpectralNorm) else None


def leaves_of(module_class: type) -> set[str]:
    """The names of all kernels that are registered for a class, whatever the method."""
    return {name for (cls, _), layer in _LAYERS.items() if issubclass(module_class, cls) for name in layer.leaves}


def declared_axes(layer: Layer, module: nn.Module, args: Any, kwargs: Any) -> dict[str, Axes | str]:
    """For each leaf its axes, or the reason why it stays dense."""
    try:
        found = layer.axes(module, *args, **kwargs) if callable(layer.axes) else layer.axes
    except ValueError as e:
        found = str(e)
    if len(layer.leaves) == 1 or found is None or isinstance(found, str):
        found = (found,) * len(layer.leaves)
    if isinstance(found, Axes) or len(found) != len(layer.leaves):
        raise TypeError(
            f"the axes registered for {type(module).__name__} must have one for each of {layer.leaves}, got {found}"
        )
    dense = f"the axes registered for {type(module).__name__} are None"
    return {
        name: dense if axes is None else axes if isinstance(axes, str) else Axes(*axes)
        for name, axes in zip(layer.leaves, found, strict=True)
    }
