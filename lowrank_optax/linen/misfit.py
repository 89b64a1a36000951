"""Errors of models whose factored kernels do not fit their layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors

from lowrank_optax import blocks, factors, lowrank
from lowrank_optax.axes import Axes
from lowrank_optax.boxes import unboxed
from lowrank_optax.linen.where import declarations
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import path_name
from lowrank_optax.product import axes_of, is_composed, is_kernel

_ADVICE = (
    "lowrank_optax.factorize(params, rank, where=lowrank_optax.linen.kernels(model, *inputs)) reads the axes off the "
    "model"
)
_COMPOSED_ADVICE = (
    "lowrank_optax.adapters.init and quantize with where=lowrank_optax.linen.kernels(model, *inputs) read the axes off "
    "the model"
)
# Products whose errors concern shapes of activations, in modules written for LowRank parameters.
_PRODUCTS = {"matmul", "dot_general"}
# Errors that slices meet; an AssertionError comes from boxes whose first name is not the name of the stack.
_OF_SLICES = (TypeError, ValueError, IndexError, AssertionError, errors.ScopeParamShapeError)
_FILES = {module.__file__ for module in (factors, lowrank, blocks)}


class LayerError(TypeError):
    """A factored kernel in a layer that cannot run with it."""


class SlicedError(LayerError):
    """Factors that nn.scan or nn.vmap sliced along an axis they do not share; a module above can say more."""


def refused(error: Exception, module: Any, kernels: Mapping[str, Any]) -> LayerError | None:
    """The error of a module that takes its kernels for arrays; None if something else is wrong."""
    if not kernels or not _about_factors(error, module, kernels):
        return None
    names = ["/".join((*module.path, name)) for name in kernels]
    if any(map(is_composed, kernels.values())):
        return LayerError(
            f"{type(module).__name__} cannot run with a changed kernel at {names}: changes run in the layers that run "
            "factors. Register it with lowrank_optax.linen.register, or leave it out: lowrank_optax.adapters.init(..., "
            "where=lowrank_optax.linen.kernels(model, *inputs))"
        )
    return LayerError(
        f"{type(module).__name__} cannot run with a LowRank parameter at {names}: factors run in Dense, DenseGeneral, "
        "Conv, ConvTranspose (without groups, mask, transpose_kernel or *_cls hooks), Einsum, and layers of "
        "lowrank_optax.linen.register. Register it, or leave it dense: lowrank_optax.factorize(..., "
        "where=lowrank_optax.linen.kernels(model, *inputs)), or a `where` that returns False for it"
    )


def _about_factors(error: Exception, module: Any, kernels: Mapping[str, Any]) -> bool:
    """True for Flax's check of the shape of one of these kernels, and for operations that a LowRank has not."""
    text = str(error)
    if isinstance(error, errors.ScopeParamShapeError):
        return any(text.startswith(f'For parameter "{name}" in "{module.scope.path_text}"') for name in kernels)
    classes = {type(kernel) for kernel in kernels.values()}
    # in words of JAX or Python
    if any(f"{c.__module__}.{c.__qualname__}" in text or f"'{c.__name__}' object" in text for c in classes):
        return isinstance(error, TypeError | ValueError | AttributeError)
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    code = None if at is None else at.tb_frame.f_code
    return code is not None and code.co_filename in _FILES and code.co_name not in _PRODUCTS


def refuse_normalized(module: Any) -> None:
    """Raises LayerError if the layer of an nn.WeightNorm or nn.SpectralNorm holds factored kernels."""
    scope = getattr(module.layer_instance, "scope", None)
    params = {} if scope is None else scope.variables().get("params", {})
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_lowrank)
    names = ["/".join((*module.layer_instance.path, path_name(path))) for path, W in leaves if is_lowrank(W)]
    if names:
        raise LayerError(
            f"{type(module).__name__} normalises each array of a layer, and would normalise the factors of {names}. "
            f"Leave those dense: {_ADVICE}"
        )


def misfit(path: str, owner: str, W: Any, axes: Axes) -> LayerError:
    """The error of a kernel that is split into other axes than its layer declares."""
    if not is_composed(W) and min(W.U.ndim, W.S.ndim, W.V.ndim) < 2:
        return SlicedError(
            f"the kernel {path!r} has factors of shapes {W.U.shape}, {W.S.shape}, {W.V.shape}, but its layer {owner} "
            f"declares {axes}: {_ADVICE}"
        )
    advice = _COMPOSED_ADVICE if is_composed(W) else _ADVICE
    return LayerError(
        f"the kernel {path!r} of shape {W.shape} is split into {_split(W.shape, axes_of(W))}, but its layer {owner} "
        f"declares {_split(W.shape, axes)}: {advice}"
    )


def _split(shape: tuple[int, ...], axes: Axes) -> str:
    inner = sum(axes)
    return f"batch {shape[: axes.batch]}, inputs {shape[axes.batch : inner]} and outputs {shape[inner:]}"


def stacked_misfit(error: Exception, module: Any, method: str, args: Any, kwargs: Any) -> LayerError | None:
    """The error of a kernel below that nn.scan or nn.vmap stacks otherwise than it is split.

    JAX refuses to slice such factors, or their layer meets odd slices. The axes that the layers declare are found by a
    trace with dense kernels, which only this failure costs.
    """
    known = isinstance(error, LayerError) and not isinstance(error, SlicedError)
    if known or module.scope is None or not isinstance(error, _OF_SLICES):
        return None
    params = unboxed(module.scope.variables().get("params", {}))[0]
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_kernel)
    kernels = {path_name(path): W for path, W in leaves if is_kernel(W)}
    if not kernels:
        return None

    def run() -> Any:
        unbound, variables = module.unbind()
        dense = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if is_kernel(x) else x,
            unboxed(dict(variables))[0],
            is_leaf=is_kernel,
        )
        rngs = {name: jax.random.key(0) for name in module.scope.rngs}
        return unbound.apply(dense, *args, method=method, rngs=rngs, mutable=True, **kwargs)

    try:
        declared, classes, _ = declarations(run)
    except Exception:  # The model fails with dense kernels too, or its kernels are slices: a module above can say more.
        return None
    for name, W in kernels.items():
        if name not in declared:
            continue
        path, axes = "/".join((*module.path, name)), declared[name].axes_in(W.shape)
        if isinstance(axes, str):
            return LayerError(f"the kernel {path!r} of shape {W.shape} has to stay dense: {axes}")
        if axes != axes_of(W):
            return misfit(path, classes.get(name.rpartition("/")[0], type(module)).__name__, W, axes)
    return None
