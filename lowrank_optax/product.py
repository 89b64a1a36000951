"""A layer as a function of its kernel, for kernels that are more than one array or one `LowRank`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from lowrank_optax.axes import Axes
from lowrank_optax.lowrank import is_lowrank


class Product(NamedTuple):
    """The product of one layer with one input, as a function of the kernel.

    Attributes:
      times: the output `x K` for an array or a `LowRank` K, linear in K and without bias.
      columns: brings one number for each output, `(batch..., out...)`, to the axes of an output of so many axes.
    """

    times: Callable[[Any], jax.Array]
    columns: Callable[[jax.Array, int], jax.Array]


class Composed(Protocol):
    """A kernel that says by itself how a layer multiplies with it."""

    def through(self, product: Product) -> jax.Array:
        """The output of a layer whose product is given."""
        ...


def is_composed(x: Any) -> bool:
    """Whether x is a kernel that says by itself how a layer multiplies with it."""
    return hasattr(type(x), "through")


def is_kernel(x: Any) -> bool:
    """Whether x is a kernel in another form than an array."""
    return is_lowrank(x) or is_composed(x)


def axes_of(W: Any) -> Axes:
    """How the axes of a kernel split that is a `LowRank`, a grid, or composed."""
    axes: Axes = W.axes if is_composed(W) else Axes(len(W.batch_shape), len(W.in_shape))
    return axes


def trailing_columns(batch: int) -> Callable[[jax.Array, int], jax.Array]:
    """`Product.columns` of a layer whose output has the batch axes of the kernel first and its output axes last."""

    def columns(c: jax.Array, ndim: int) -> jax.Array:
        return c.reshape(c.shape[:batch] + (1,) * (ndim - c.ndim) + c.shape[batch:])

    return columns
