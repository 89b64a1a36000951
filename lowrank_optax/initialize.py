"""The initialiser of kernels that are factored from the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.axes import Axes, Rank, matrix_shape, rank_number
from lowrank_optax.blocks import BlockLowRank, split_blocks
from lowrank_optax.boxes import boxed_factors, opened
from lowrank_optax.grids import Blocks, grid_of
from lowrank_optax.layout import map_matrices
from lowrank_optax.lowrank import LowRank
from lowrank_optax.truncate import blocks_with_axes, factors, with_axes


def lowrank_init(
    rank: Rank,
    base_init: Callable[..., jax.Array] | None = None,
    *,
    max_rank: Rank | None = None,
    axes: Axes | None = None,
    blocks: Blocks | None = None,
) -> Callable[..., LowRank | BlockLowRank]:
    r"""A Flax-style initialiser that draws a `LowRank` kernel of the scale of a dense initialiser.

    The draw is :math:`W = c\,A B^\top` with Gaussian A (m x r) and B (n x r), orthonormalised, and c such
    that :math:`|W|_F` equals the norm of a draw of `base_init`. Activations and gradients then start at the
    variance of the dense layer; a truncated SVD of the dense draw would shrink it.

    Args:
      rank: int, fraction of `min(m, n)`, or callable of path (here `""`) and shape.
      base_init: dense initialiser that sets the scale; default LeCun normal, the default of `nn.Dense`. Only the
        norm of its draw is used; under `jit` XLA fuses draw and norm, so the dense kernel is not stored. If it puts the
        draw in a box, `nn.with_partitioning(init, names)`, each factor gets a box with the names of its axes.
      max_rank: width of the factors, default `rank`.
      axes: split of the axes of the kernel; default: two axes are (in, out), more are a convolution's
        (everything but the last axis is input).
      blocks: a grid of blocks, see `factorize`; every block is drawn so.

    Returns:
      Callable `(key, shape, dtype)` that returns a `LowRank`, or with `blocks` a `BlockLowRank`.

    Raises:
      ValueError: on call, if the rank exceeds `min(m, n)`.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> W = lro.lowrank_init(4)(jax.random.key(0), (32, 16))
      >>> W.shape, W.width
      ((32, 16), 4)
    """
    base = jax.nn.initializers.lecun_normal() if base_init is None else base_init

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> LowRank | BlockLowRank:
        shape = tuple(shape)
        split = Axes(0, len(shape) - 1) if axes is None else axes
        m, n = matrix_shape(shape, split)
        r = rank_number(rank, "", shape, min(m, n))
        width = r if max_rank is None else min(rank_number(max_rank, "", shape, min(m, n)), m, n)
        if r > min(m, n) or width < r:
            raise ValueError(
                f"rank {r} (width {width}) does not fit a kernel of shape {shape} with min(m, n) = {min(m, n)}"
            )
        linalg.check_floating("kernel", dtype, "drawn")
        work, batch = linalg.working_dtype(jnp.empty((), dtype)), shape[: split.batch]
        base_key, u_key, v_key = jax.random.split(key, 3)
        drawn: Any = base(base_key, shape, work)
        dense = opened(drawn)
        grid = grid_of(blocks, r, "", shape, split)
        with_own_axes: Callable[..., Any]
        if grid.is_one:
            dense, with_own_axes = dense.reshape(*batch, m, n), with_axes
        else:
            dense, with_own_axes = split_blocks(dense, split.batch, split.inputs, grid), blocks_with_axes
            r, width = (grid.width(x, shape, split) for x in (r, width))
        *stack, m, n = dense.shape
        a, b = (jax.random.normal(k, (*stack, size, width), work) for k, size in ((u_key, m), (v_key, n)))
        if not grid.is_one:  # Rows that fill up the last blocks stay zero.
            one, k = (1,) * len(shape), split.batch + split.inputs
            ins, outs = one[: split.batch] + shape[split.batch : k] + one[k:], one[:k] + shape[k:]
            rows = split_blocks(jnp.ones(ins, work), split.batch, split.inputs, (grid.rows, 1))
            columns = split_blocks(jnp.ones(outs, work), split.batch, split.inputs, (1, grid.columns))
            a, b = a * rows, b * jnp.swapaxes(columns, -1, -2)
        W = map_matrices(_product_of_norm, a, b, map_matrices(linalg.norm, dense), rank=r)
        return boxed_factors(drawn, with_own_axes(W, shape, split).astype(dtype))

    return init


def _product_of_norm(a: jax.Array, b: jax.Array, norm: jax.Array, rank: int) -> LowRank:
    """A B^T, cut to `rank` and scaled to a norm."""
    (u, ru), (v, rv) = linalg.orthonormalize(a), linalg.orthonormalize(b)
    p, sigma, q = linalg.svd(ru @ rv.T)
    sigma = jnp.where(linalg.rank_mask(rank, sigma.shape[0]), sigma, 0.0)
    return factors(u @ p, sigma * norm / jnp.sqrt(jnp.sum(sigma**2)), v @ q, rank)
