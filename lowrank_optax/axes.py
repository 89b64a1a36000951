"""Which leaves are kernels, how their axes split, and the rank that an argument gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank_optax.rank import if_injected


class Axes(NamedTuple):
    """How the axes of a dense kernel split: `batch` stacked axes, then `inputs` input axes, the rest outputs.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layers = {"w": jnp.ones((12, 64, 32))}  # twelve stacked 64 x 32 kernels
      >>> lro.factorize(layers, 4, where=lambda path, shape: lro.Axes(batch=1, inputs=1))["w"].U.shape
      (12, 64, 4)
    """

    batch: int = 0
    inputs: int = 1


Rank = int | float | Callable[[str, tuple[int, ...]], int | float]
Where = Callable[[str, tuple[int, ...]], "bool | Axes | None"]

# Kernel axes of nn.MultiHeadDotProductAttention: (features, heads, head_dim) for the projections,
# (heads, head_dim, features) on the way out.
_ATTENTION = {"query": Axes(0, 1), "key": Axes(0, 1), "value": Axes(0, 1), "out": Axes(0, 2)}


def _default_axes(name: str, shape: tuple[int, ...]) -> Axes:
    """The split of a kernel that no `where` describes, where the shape and the name leave no doubt."""
    *_, parent, _leaf = ("", "", *name.split("/"))
    if len(shape) == 2:
        return Axes(0, 1)
    if len(shape) == 3 and parent in _ATTENTION:
        return _ATTENTION[parent]
    if len(shape) in (4, 5) and parent not in _ATTENTION:
        return Axes(0, len(shape) - 1)  # Convolution: (spatial..., channels in, channels out).
    raise ValueError(
        f"cannot tell batch, input and output axes of the kernel {name!r} of shape {shape}: pass "
        "where=lowrank_optax.linen.kernels(model, *inputs), which reads them off a Flax model, or "
        "where=lambda path, shape: Axes(batch, inputs), or return False there to leave it dense"
    )


def matrix_shape(shape: tuple[int, ...], axes: Axes) -> tuple[int, int]:
    """The shape (m, n) of a kernel as a matrix."""
    inputs = shape[axes.batch : axes.batch + axes.inputs]
    return math.prod(inputs), math.prod(shape[axes.batch + axes.inputs :])


def factor_entries(dense: Sequence[Any], ndim: int, split: Axes) -> tuple[tuple[Any, ...], ...]:
    """For U, S and V the entries of their axes without the rank, from entries of the `ndim` axes of the kernel.

    Entries are mesh axes or names. Those that are missing at the end are None.
    """
    axes = (*dense, *(None,) * (ndim - len(dense)))
    b, i = split.batch, split.batch + split.inputs
    return axes[:i], axes[:b], axes[:b] + axes[i:]


def in_stack(axes: Axes, own: tuple[int, ...], shape: tuple[int, ...]) -> Axes | str:
    """The split of a whole kernel that stacks kernels of shape `own`, split by `axes`, or why there is none."""
    stacked = len(shape) - len(own)
    if stacked < 0 or tuple(shape[stacked:]) != own:
        return f"its layers, of shape {own}, are stacked along another axis than the first"
    return Axes(stacked + axes.batch, axes.inputs)


def least_rank(limit: int) -> int:
    """The least rank that a fraction or a budget gives a kernel with `min(m, n) = limit`.

    Rank 1 of an output layer with ten classes would save few parameters and lose most of what it can learn.
    """
    return min(4, limit)


def rank_number(rank: Rank, name: str, shape: tuple[int, ...], limit: int, least: int | None = None) -> int:
    """Evaluates a rank argument for one kernel whose matrices allow at most `limit`.

    A fraction gives at least `least`, by default `least_rank`.
    """
    value = rank(name, shape) if callable(rank) else rank
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        hint = if_injected("rank", value)
        raise TypeError(f"the rank of {name!r} must be an int or a fraction in (0, 1], got {value!r}{hint}")
    if isinstance(value, float | np.floating):
        if not 0.0 < value <= 1.0:
            raise ValueError(f"a fractional rank lies in (0, 1], got {value} for {name!r}; an absolute rank is an int")
        value = max(least_rank(limit) if least is None else least, round(float(value) * limit))
    if value < 1:
        raise ValueError(f"the rank must be at least 1, got {value} for {name!r} of shape {shape}")
    return int(value)


def check_where(where: Any) -> None:
    """Raises TypeError for anything but a callable."""
    if where is not None and not callable(where):
        raise TypeError(
            "where is a callable of path and dense shape that returns True, False or Axes, e.g. "
            f"lambda path, shape: path.endswith('kernel'); got {where!r}"
        )


def split_axes(name: str, shape: tuple[int, ...], where: Where | None, rank: Rank) -> Axes | None:
    """The axes of a leaf that is to be factored, None for one that stays dense."""
    if where is None:
        is_kernel = name.rsplit("/", 1)[-1] in ("kernel", "")
        if not is_kernel or len(shape) < 2:
            return None
        axes = _default_axes(name, shape)
        return axes if fits(rank, name, shape, axes) else None
    chosen = where(name, shape)
    if chosen is None or chosen is False:
        return None
    if len(shape) < 2:
        raise ValueError(
            f"{name!r} has shape {shape}: a kernel has at least one input and one output axis; "
            "let `where` return False for it"
        )
    axes = _default_axes(name, shape) if chosen is True else Axes(*chosen)
    if axes.batch < 0 or axes.inputs < 1 or axes.batch + axes.inputs >= len(shape):
        raise ValueError(f"{axes} leaves no input or no output axis in {name!r} of shape {shape}")
    if getattr(chosen, "optional", False):  # from `linen.kernels`: dense, as by default, where the rank does not fit
        return axes if fits(rank, name, shape, axes) else None
    return axes


def fits(rank: Rank, name: str, shape: tuple[int, ...], axes: Axes) -> bool:
    """Whether the kernel has as many singular values as the rank asks for."""
    limit = min(matrix_shape(shape, axes))
    return rank_number(rank, name, shape, limit) <= limit
