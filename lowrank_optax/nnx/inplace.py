"""`factorize` for nnx modules."""

from __future__ import annotations

from typing import Any

from flax import nnx

from lowrank_optax.axes import Axes, Rank, Where, check_where
from lowrank_optax.factorize import factorize as factorize_tree
from lowrank_optax.grids import Blocks
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.nnx.specs import keep_dense_spec
from lowrank_optax.nnx.stock import declared, install
from lowrank_optax.nnx.where import Parameter, axes_at, counted, parameters
from lowrank_optax.paths import listed
from lowrank_optax.share import at_budget, check_rank_or_budget


def factorize(
    model: Any,
    rank: Rank | None = None,
    *,
    budget: float | None = None,
    max_rank: Rank | None = None,
    where: Where | None = None,
    scale: float = 1.0,
    blocks: Blocks | None = None,
) -> None:
    r"""Replaces the kernels of an nnx model by their truncated SVD, in place.

    .. math:: W \approx U S V^\top, \quad y = x U S V^\top + b

    The kernels of `nnx.Linear`, `nnx.LinearGeneral` (hence `nnx.MultiHeadAttention`), `nnx.Einsum`, and `nnx.Conv`
    without groups and mask become `nnx.Param(LowRank)`. The layers stay the stock ones: their `dot_general`,
    `einsum_op`, `conv_general_dilated` and `promote_dtype` hooks run the factors. Axes are read off the layers; further
    axes in front, from `nnx.vmap`, index independent kernels. `kernels(model, rank).reasons` says why others stay
    dense. Call it before you create the `nnx.Optimizer`.

    Args:
      model: an nnx module.
      rank: an int, a fraction of `min(m, n)` in (0, 1], or a callable of path and dense shape.
      budget: in place of `rank`, the share in (0, 1) of the model's parameters (`nnx.Param`) that is left, see
        `lowrank_optax.factorize`.
      max_rank: width of the factors, default `rank`.
      where: callable of the path (`"block/linear/kernel"`) and the dense shape that returns False to leave a kernel
        dense, or True to factor it if its layer can run on factors. For a parameter of a module of your own it may
        return `Axes`; the module must then multiply with `x @ W` or `lowrank_optax.einsum`. Sums and multiples of W are
        not refused there as they are in linen: nothing tells a kernel in a module of nnx from a gradient outside of it,
        so `2.0 * W` multiplies each factor by 2 and is 8 W. Default: every kernel of the layers above with
        `min(m, n) >= rank`.
      scale: factor on the singular values, see `lowrank_optax.factorize`.
      blocks: a grid of blocks for every kernel, see `lowrank_optax.factorize`.

    Raises:
      TypeError: for arguments of another type, or unless either `rank` or `budget` is given.
      ValueError: if no kernel is left to factor, if the rank exceeds `min(m, n)` of a kernel that `where` chose, if
        `where` returns `Axes` for a stock layer that uses other ones, or if the least ranks exceed the budget.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
      >>> lro.nnx.factorize(model, rank=2)
      >>> model.kernel[...].U.shape, model(jnp.ones((3, 8))).shape
      ((8, 2), (3, 6))
    """
    if not any(True for _ in nnx.iter_modules(model)):
        raise TypeError(f"nnx.factorize changes an nnx module in place, got {type(model).__name__}")
    check_where(where)
    check_rank_or_budget(rank, budget, max_rank)
    found = parameters(model)
    if rank is None:
        rank, where = at_budget(float(budget or 0.0), dict(counted(model)), _kernel_axes(found, where), blocks)
    axes: dict[str, Axes] = {}
    reasons: dict[str, str] = {}
    for name, parameter in found.items():
        answer = axes_or_reason(name, parameter, rank, where)
        if isinstance(answer, Axes):
            axes[name] = answer
        else:
            reasons[name] = answer
    if not axes:
        raise ValueError(nothing(rank, found, reasons))
    dense = {name: found[name].variable.get_value() for name in axes}
    chosen = lambda name, shape: axes[name]  # noqa: E731
    factored = factorize_tree(dense, rank, max_rank=max_rank, where=chosen, scale=scale, blocks=blocks)
    for name, kernel in factored.items():
        variable, layers, _ = found[name]
        variable.set_value(kernel)
        keep_dense_spec(variable)
        for layer in layers:
            if not isinstance(declared(layer), str):
                install(layer)


def _kernel_axes(found: dict[str, Parameter], where: Where | None) -> dict[str, Axes]:
    """The split of every dense kernel that `factorize` takes at rank 1."""
    dense = {name: p for name, p in found.items() if not is_lowrank(p.variable.get_raw_value())}
    answers = {name: axes_or_reason(name, parameter, 1, where) for name, parameter in dense.items()}
    return {name: axes for name, axes in answers.items() if isinstance(axes, Axes)}


def axes_or_reason(name: str, parameter: Parameter, rank: Rank, where: Where | None) -> Axes | str:
    """The axes of a parameter that is to be factored, or the reason why it stays dense."""
    shape, axes = parameter.shape, parameter.axes
    if is_lowrank(parameter.variable.get_raw_value()):
        return axes if isinstance(axes, Axes) else Axes()  # It stays as it is.
    if where is None:
        return axes_at(name, parameter, rank)
    answer = where(name, shape)
    if answer is None or answer is False:
        return "`where` leaves it dense"
    if answer is True:
        return axes
    stock = any(not isinstance(declared(layer), str) for layer in parameter.layers)
    if answer != axes and (stock or not _is_own(parameter)):
        needs = f"its layer uses {axes}" if isinstance(axes, Axes) else axes
        raise ValueError(f"`where` returned {answer} for {name!r} of shape {shape}, but {needs}")
    return Axes(*answer)


def _is_own(parameter: Parameter) -> bool:
    """Whether all owners are modules of the user, which can be written for factors, and no layers of Flax."""
    bases = [next(c for c in type(layer).__mro__ if c.__module__.startswith("flax.")) for layer in parameter.layers]
    return all(base is nnx.Module for base in bases)


def nothing(rank: Rank, found: dict[str, Parameter], reasons: dict[str, str], verb: str = "factor") -> str:
    """The message of a model that has no kernel for a call, with the reasons."""
    lines = [f"  {name} {found[name].shape}: {reason}" for name, reason in reasons.items()]
    return f"no kernel to {verb} at rank {rank}. Parameters with two axes or more:\n{listed(lines)}"
