"""`apply`: an unmodified Flax model whose kernels are factored."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
from flax import errors
from flax.core import meta

from lowrank_optax.linen.stock import forward, kernel_axes, running
from lowrank_optax.lowrank import LowRank, is_lowrank


@dataclasses.dataclass(frozen=True, eq=False)
class apply:
    r"""`model.apply` for parameters that hold `LowRank` kernels, :math:`y = x U S V^\top + b`.

    The model does not change. An `nn.Dense`, `nn.DenseGeneral`, `nn.Conv` or `nn.ConvTranspose` that finds a
    `LowRank` kernel, at any depth of `nn.scan`, `nn.vmap`, `nn.remat` or attention, runs on the factors. Every
    other layer runs as always.

    Args:
      model: a linen module.

    Returns:
      Callable with the signature of `model.apply`: `(variables, *args, rngs=..., method=..., mutable=...)`.

    Raises:
      TypeError: on call, if a `LowRank` kernel sits in a module that cannot run on factors.

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
        with nn.intercept_methods(_intercept):
            return self.model.apply(variables, *args, **kwargs)


def _intercept(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Runs a stock layer with a factored kernel by `forward`, anything else unchanged."""
    module: Any = context.module
    factored = _factored(module)
    if not factored:
        return next_fun(*args, **kwargs)
    layer = running(context)
    if layer is not None and set(factored) == {"kernel"} and kernel_axes(layer) is not None:
        bias = meta.unbox(module.get_variable("params", "bias")) if module.use_bias else None
        return forward(layer, factored["kernel"], bias, *args, **kwargs)
    try:
        return next_fun(*args, **kwargs)  # A module may be written for LowRank parameters.
    except (errors.ScopeParamShapeError, TypeError, ValueError) as e:
        names = ["/".join((*module.path, name)) for name in factored]
        raise TypeError(
            f"{type(module).__name__} cannot run with a LowRank parameter at {names}: factors run in Dense, "
            "DenseGeneral, Conv and ConvTranspose without groups, mask, transpose_kernel or *_cls hooks. "
            "Leave it dense: lowrank_optax.factorize(..., where=lowrank_optax.linen.kernels(model, *inputs)), "
            "or a `where` that returns False for it"
        ) from e


def _factored(module: nn.Module) -> dict[str, LowRank]:
    """The LowRank parameters that belong to this very module."""
    if module.scope is None:
        return {}
    params = module.scope.variables().get("params", {})
    # The content of each box, because Partitioned.unbox would constrain each factor by the names of the dense axes.
    content: dict[str, Any] = {
        name: getattr(leaf, "value", leaf) if isinstance(leaf, meta.AxisMetadata) else leaf
        for name, leaf in params.items()
    }
    return {name: leaf for name, leaf in content.items() if is_lowrank(leaf)}
