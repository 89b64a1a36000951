"""Functions of one matrix or one kernel, mapped over stacked layers, in highest precision, on any mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax.geometry.base import registered_coordinates
from lowrank_optax.layout.mesh import Mesh
from lowrank_optax.linalg import highest_precision, working_dtype
from lowrank_optax.lowrank import LowRank, cast_like, is_lowrank


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@highest_precision
def mapped(f: Callable[..., Any], axes: int, static: tuple[tuple[str, Any], ...], args: tuple[Any, ...]) -> Any:
    """`f(*args, **static)` for every index of the first `axes` axes. Compiled once, also when called eagerly."""
    f = functools.partial(f, **dict(static))
    for _ in range(axes):
        f = jax.vmap(f)
    return f(*args)


def map_matrices(f: Callable[..., Any], *args: Any, **static: Any) -> Any:
    """`f` of matrices, mapped over the batch axes in front of them."""
    return mapped(f, jax.tree.leaves(args)[0].ndim - 2, tuple(static.items()), args)


def map_numbers(f: Callable[..., Any], S: jax.Array) -> Any:
    """A number for every matrix of a stack, replicated whatever the sharding of the stack."""
    return Mesh(S).auto(functools.partial(map_matrices, f), S)


def map_replicated(f: Callable[..., Any], x: jax.Array, **static: Any) -> Any:
    """`f` of every matrix of a stack, with results that are replicated whatever the sharding of the stack."""
    return Mesh(x).auto(functools.partial(map_matrices, f, **static), x)


def map_kernel(f: Callable[..., Any], W: LowRank, *args: Any, **static: Any) -> Any:
    """`f(W, *args)` for every kernel of a stack, flattened and in the working dtype.

    Args:
      f: function of one kernel. A `LowRank` among its results gets the axes and dtypes of W.
      W: the kernel.
      *args: `LowRank` nodes are flattened likewise; arrays have the batch axes of W in front.
      **static: numbers and functions, which are not mapped.
    """
    dtype = working_dtype(W.U, W.S, W.V)

    def working(x: Any) -> Any:
        return jax.tree.map(lambda y: y.astype(dtype).flatten() if is_lowrank(y) else y, x, is_leaf=is_lowrank)

    def run(W: LowRank, *args: Any) -> Any:
        out = mapped(f, len(W.stack_shape), tuple(static.items()), working((W, *args)))
        back = lambda y: cast_like(W.unflatten(y), W) if is_lowrank(y) else y  # noqa: E731
        return jax.tree.map(back, out, is_leaf=is_lowrank)

    return Mesh(W).auto(run, W, *args)


def map_coordinates(f: Callable[..., Any], x: Any, **static: Any) -> Any:
    """`f` of the coordinates of every kernel of a stack, which are behind the same batch axes."""
    axes = jax.tree.leaves(x)[0].ndim - registered_coordinates()[type(x)].axes
    return Mesh(x).auto(lambda x: mapped(f, axes, tuple(static.items()), (x,)), x, like=x)
