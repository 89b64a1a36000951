"""`factored` and `apply`: unmodified Flax models whose kernels are factored."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
from flax.core import meta

from lowrank_optax.boxes import opened
from lowrank_optax.linen import stock as stock  # registers Flax's own layers
from lowrank_optax.linen.misfit import LayerError, misfit, refuse_normalized, refused, stacked_misfit
from lowrank_optax.linen.registry import Layer, declared_axes, find, leaves_of, normalizer
from lowrank_optax.lowrank import arithmetic_refused
from lowrank_optax.product import axes_of, is_kernel

ADAPTERS = "adapters"  # the collection of changes of frozen kernels


@contextlib.contextmanager
def factored() -> Iterator[None]:
    r"""Runs linen models on `LowRank` kernels, :math:`y = x U S V^\top + b`, whatever calls them.

    Within the context every `nn.Dense`, `nn.DenseGeneral`, `nn.Conv`, `nn.ConvTranspose`, `nn.Einsum` and layer of
    `register` that finds a factored kernel runs on the factors: in `model.apply`, `bind`, `nn.apply`, a wrapper's
    `self.module.apply`, at any depth of `nn.scan`, `nn.vmap`, `nn.remat`, `nn.jit` or attention. Every other layer runs
    as always.

    It acts while Python calls the model. Of a function under `jax.jit`, `grad` or `scan` that is when it is traced:
    also at its first call with new shapes, and in the thread that makes the call. As a decorator below `jax.jit` it is
    active at every trace.

    Raises:
      TypeError: when a `LowRank` kernel sits in a module that cannot run on factors, or is split into other axes
        than its layer declares.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lowrank_optax as lro
      >>> model, x = nn.Dense(6), jnp.ones((2, 8))
      >>> params = lro.factorize(model.init(jax.random.key(0), x)["params"], rank=3)
      >>> with lro.linen.factored():
      ...     jax.jit(model.apply)({"params": params}, x).shape
      (2, 6)
      >>> @jax.jit
      ... @lro.linen.factored()
      ... def forward(params, x):
      ...     return model.apply({"params": params}, x)
      >>> forward(params, x).shape
      (2, 6)
    """
    with nn.intercept_methods(_intercept):
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class apply:
    r"""`model.apply` for parameters that hold `LowRank` kernels: one call of it within `factored`.

    Args:
      model: a linen module.

    Returns:
      Callable with the signature of `model.apply`: `(variables, *args, rngs=..., method=..., mutable=...)`.

    Raises:
      TypeError: on call, as in `factored`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lowrank_optax as lro
      >>> model, x = nn.Dense(6), jnp.ones((2, 8))
      >>> params = lro.factorize(model.init(jax.random.key(0), x)["params"], rank=3)
      >>> lro.linen.apply(model)({"params": params}, x).shape
      (2, 6)
    """

    model: nn.Module

    # Compared by identity, like the bound method `model.apply`: train states of one model have one tree structure, and
    # models with arrays among their fields, which have no hash, work too.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, apply) and self.model is other.model

    def __hash__(self) -> int:
        return hash((apply, id(self.model)))

    def __call__(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        with factored():
            return self.model.apply(variables, *args, **kwargs)


def _intercept(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Runs a registered layer with factored kernels by its `forward`, anything else unchanged."""
    module: Any = context.module
    _attach_adapters(module.scope)
    if normalizer(module) is not None:
        refuse_normalized(module)
    own = _own_parameters(module)
    kernels = {name: leaf for name, leaf in own.items() if is_kernel(leaf)}
    layer = find(module, getattr(context.orig_method, "func", None)) if kernels else None
    if layer is not None and set(kernels) <= set(layer.leaves):
        weights = _checked(layer, module, own, args, kwargs)
        return layer.forward(module, *weights, *args, **kwargs)
    if context.method_name == "setup" and kernels and set(kernels) <= leaves_of(type(module)):
        with _parameters_as_they_are(module, kernels):
            return next_fun(*args, **kwargs)
    try:
        with arithmetic_refused() if kernels else contextlib.nullcontext():
            return next_fun(*args, **kwargs)  # A module may be written for LowRank parameters.
    except Exception as e:
        error = refused(e, module, kernels) or stacked_misfit(e, module, context.method_name, args, kwargs)
        if error is None:
            raise
        raise error from e


def _attach_adapters(scope: Any) -> None:
    """Puts the collection "adapters" of a call into its parameters, where lifted transformations find it.

    `nn.scan` and `nn.vmap` hand on the collections that a model names, and no model names this one. The scope belongs
    to this call, and its dict of collections is no dict of the user's.
    """
    root = None if scope is None else scope.root
    if root is None or ADAPTERS not in root._variables:
        return
    from lowrank_optax.adapters.trees import attach  # needs nothing of Flax, and loads with the first adapter

    delta = root._variables.pop(ADAPTERS)
    root._variables["params"] = attach(root._variables.get("params", {}), delta)


def _own_parameters(module: Any) -> dict[str, Any]:
    """The parameters that belong to this very module, boxes opened."""
    if module.scope is None:
        return {}
    params = module.scope.variables().get("params", {})
    return {name: _fetched(leaf) for name, leaf in params.items()}


def _fetched(leaf: Any) -> Any:
    """The factors of a kernel out of their boxes, which constrain them to their names as Flax constrains parameters.

    A box around the whole kernel has the names of the dense axes, which would be wrong constraints of the factors.
    """
    value = opened(leaf)
    return meta.unbox(value) if is_kernel(value) else leaf


def _checked(layer: Layer, module: Any, own: dict[str, Any], args: Any, kwargs: Any) -> list[Any]:
    """The kernels of a layer in its order, those factored with the axes that it declares."""
    declared = declared_axes(layer, module, args, kwargs)
    for name, axes in declared.items():
        W: Any = own.get(name)
        if not is_kernel(W):
            continue
        path = "/".join((*module.path, name))
        if isinstance(axes, str):
            raise LayerError(
                f"{type(module).__name__} cannot run with a LowRank parameter at {path!r}: {axes}. Leave it dense: "
                "lowrank_optax.factorize(..., where=lowrank_optax.linen.kernels(model, *inputs)), or a `where` that "
                "returns False for it"
            )
        if axes != axes_of(W) or W.ndim <= sum(axes):
            raise misfit(path, type(module).__name__, W, axes)
    return [own[name] if is_kernel(own.get(name)) else meta.unbox(own.get(name)) for name in layer.leaves]


@contextlib.contextmanager
def _parameters_as_they_are(module: Any, kernels: dict[str, Any]) -> Iterator[None]:
    """`module.param` gives factored kernels without the check of their shape, which expects one array."""

    def param(name: str, *args: Any, **kwargs: Any) -> Any:
        return kernels[name] if name in kernels else type(module).param(module, name, *args, **kwargs)

    object.__setattr__(module, "param", param)
    try:
        yield
    finally:
        object.__delattr__(module, "param")
