"""`kernels`: the axes of every kernel of a model, read off the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from lowrank_optax.axes import Axes, in_stack
from lowrank_optax.boxes import unboxed
from lowrank_optax.linen.registry import declared_axes, find, leaves_of, normalizer
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import listed, path_name


class IfItFits(Axes):
    """Axes of a kernel that may be factored: it stays dense where its rank exceeds min(m, n)."""

    __slots__ = ()
    optional = True


class Declared(NamedTuple):
    """A layer's declaration of its kernel: the shape that one call sees, and the axes or the reason to stay dense."""

    shape: tuple[int, ...]
    axes: Axes | str

    def axes_in(self, shape: tuple[int, ...]) -> Axes | str:
        """The axes of the whole kernel, with those that nn.scan or nn.vmap stack in front."""
        if isinstance(self.axes, str):
            return self.axes
        found = in_stack(self.axes, self.shape, shape)
        return found if isinstance(found, str) else IfItFits(*found)


def declarations(run: Callable[[], Any]) -> tuple[dict[str, Declared], dict[str, type[nn.Module]], Any]:
    """Traces `run`: what layers declare by path of kernel, the class of modules by path, and the shapes returned."""
    declared: dict[str, Declared] = {}
    classes: dict[str, type[nn.Module]] = {}
    within: list[str | None] = [None]

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        within.append(normalizer(module) or within[-1])
        try:
            out = next_fun(*args, **kwargs)
        finally:
            within.pop()
        path = "/".join(module.path) if module.scope is not None else ""
        if path.rpartition("/")[-1] == (module.name or ""):  # The classes that nn.scan makes have the path above.
            classes.setdefault(path, type(module))  # the innermost: lifted classes return later
        layer = find(module, getattr(context.orig_method, "func", None))
        if layer is None:
            return out
        for leaf, axes in declared_axes(layer, module, args, kwargs).items():
            if not module.has_variable("params", leaf):
                continue
            value = jax.tree.leaves(meta.unbox(module.get_variable("params", leaf)))[0]
            name = f"{path}/{leaf}".removeprefix("/")
            axes = axes if within[-1] is None else f"its layer runs within {within[-1]}, which normalises arrays"
            new = Declared(tuple(jnp.shape(value)), axes)
            old = declared.setdefault(name, new)
            if old != new and not isinstance(old.axes, str):
                declared[name] = Declared(old.shape, f"its layer runs with {old.axes} and with {new.axes}")
        return out

    with nn.intercept_methods(record):
        shapes = jax.eval_shape(run)
    return declared, classes, shapes


class Kernels:
    """The `where` of `factorize` that `kernels` returns.

    Attributes:
      reasons: for the path of every parameter that stays dense and has two axes or more, why.
    """

    def __init__(self, declared: dict[str, Declared], reasons: dict[str, str]) -> None:
        self._declared = declared
        self.reasons = reasons

    def __call__(self, path: str, shape: tuple[int, ...]) -> Axes | bool:
        entry = self._declared.get(path) or self._declared.get(path.removeprefix("params/"))
        axes = "" if entry is None else entry.axes_in(tuple(shape))
        return axes if isinstance(axes, Axes) else False


def kernels(model: nn.Module, *args: Any, **kwargs: Any) -> Kernels:
    """The kernels of a linen model that can be factored, as the `where` of `factorize`.

    `model.init` is traced without computing anything. Every `nn.Dense`, `nn.DenseGeneral`, `nn.Conv`,
    `nn.ConvTranspose`, `nn.Einsum` and layer of `register` that runs is recorded with its input axes, its batch axes
    and the axes that `nn.scan` or `nn.vmap` stack in front. As without `where`, `factorize` leaves a kernel dense whose
    min(m, n) is below the rank. Grouped and masked convolutions, embeddings and the parameters of other modules stay
    dense, and so do kernels stacked along another axis than the first; `reasons` says why.

    Args:
      model: a linen module.
      *args: example inputs of `model.init`, arrays or `jax.ShapeDtypeStruct`.
      **kwargs: further arguments of `model.init`, e.g. `train=False` or `method`.

    Returns:
      Callable `(path, shape) -> Axes | False`, with paths relative to the variables or to their `"params"`. Its
      attribute `reasons` is a dict from the paths of parameters that stay dense to the reason.

    Raises:
      ValueError: if the model has no kernel that can be factored.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lowrank_optax as lro
      >>> model, x = nn.MultiHeadDotProductAttention(num_heads=2), jax.ShapeDtypeStruct((1, 5, 8), jnp.float32)
      >>> where = lro.linen.kernels(model, x)
      >>> where("query/kernel", (8, 2, 4)), where("out/kernel", (2, 4, 8)), where("out/bias", (8,))
      (IfItFits(batch=0, inputs=1), IfItFits(batch=0, inputs=2), False)
      >>> where.reasons["query/bias"]
      'it is no kernel of its layer, DenseGeneral'
    """

    def init() -> Any:
        inputs, options = jax.tree.map(_concrete, (args, kwargs))
        return model.init(jax.random.key(0), *inputs, **options)

    declared, classes, variables = declarations(init)
    reasons: dict[str, str] = {}
    layers: list[str] = []
    chosen = 0
    for path, leaf in jax.tree.leaves_with_path(unboxed(variables.get("params", {}))[0], is_leaf=is_lowrank):
        name, shape = path_name(path), tuple(leaf.shape)
        chosen += is_lowrank(leaf)  # of a layer that is low-rank from the start
        if len(shape) < 2 or is_lowrank(leaf):
            continue
        axes = declared[name].axes_in(shape) if name in declared else None
        if isinstance(axes, Axes):
            chosen += 1
            continue
        module, _, _ = name.rpartition("/")
        owner = classes.get(module, type(model))
        known = "it is no kernel of" if leaves_of(owner) else "nothing is registered for"
        reasons[name] = axes or f"{known} its layer, {owner.__name__}"
        layers.append(f"  {name} {shape}: {reasons[name]}")
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no kernel that can be factored. Parameters with two axes or more:\n"
            + listed(layers)
            + "\nFor a layer of your own say how it runs: lowrank_optax.linen.register(ModuleClass, leaf='kernel', "
            "axes=lowrank_optax.Axes(0, 1), forward=lambda module, W, x: x @ W)"
        )
    return Kernels(declared, reasons)


def _concrete(x: Any) -> Any:
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
