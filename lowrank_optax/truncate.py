"""The best factors of one dense kernel, stacked or not, on any mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax import linalg
from lowrank_optax.axes import Axes, matrix_shape
from lowrank_optax.blocks import BlockLowRank, split_blocks
from lowrank_optax.grids import Grid
from lowrank_optax.layout import map_matrices
from lowrank_optax.lowrank import LowRank
from lowrank_optax.sharding import factor_specs


def truncated_kernel(W: jax.Array, axes: Axes, rank: int, width: int, grid: Grid) -> LowRank | BlockLowRank:
    """Truncated SVD of a kernel in factors of `width` columns, sharded as `partition_specs` says of the kernel's spec.

    A kernel whose matrices are split over devices is never gathered, see `_truncated_by_gram`.

    Args:
      W: the dense kernel.
      axes: its axes.
      rank: singular values that are kept, of every block.
      width: columns of the factors of every block.
      grid: the blocks; for more than one the result is a `BlockLowRank`.
    """
    if not grid.is_one:
        return _truncated_blocks(W, axes, rank, width, grid)
    sharding = _sharding(W)
    if sharding is None:
        return _truncated(W, axes, rank, width)
    spec = sharding.spec
    specs = factor_specs(spec, W.ndim, axes)
    shardings = jax.tree.map(lambda s: NamedSharding(sharding.mesh, s), specs)
    split = sharding.mesh.size > 1 and any(entry is not None for entry in tuple(spec)[axes.batch :])
    explicit = jax.typeof(W).sharding.mesh.explicit_axes
    static = axes, rank, width, NamedSharding(sharding.mesh, spec) if split else None
    if explicit:
        f = functools.partial(_truncated, axes=axes, rank=rank, width=width, sharding=static[-1])
        return jax.sharding.auto_axes(f, axes=explicit, out_sharding=shardings)(W)
    return _placed(*static, *shardings_of(shardings))(W)


def _truncated_blocks(W: jax.Array, axes: Axes, rank: int, width: int, grid: Grid) -> BlockLowRank:
    """The truncated SVD of every block."""

    def truncated(W: jax.Array) -> BlockLowRank:
        blocks = split_blocks(W.astype(linalg.working_dtype(W)), axes.batch, axes.inputs, grid)
        found = map_matrices(_truncated_svd, blocks, rank=rank, width=width)
        return blocks_with_axes(found, W.shape, axes).astype(W.dtype)

    sharding = _sharding(W)
    if sharding is None:
        return jax.jit(truncated)(W)
    specs = factor_specs(sharding.spec, W.ndim, axes, BlockLowRank)
    shardings = jax.tree.map(lambda s: NamedSharding(sharding.mesh, s), specs)
    if explicit := jax.typeof(W).sharding.mesh.explicit_axes:
        return jax.sharding.auto_axes(truncated, axes=explicit, out_sharding=shardings)(W)
    return jax.jit(truncated, out_shardings=shardings)(W)


def shardings_of(shardings: LowRank) -> tuple[Any, Any, Any]:
    """The three shardings, which a cache can compare."""
    return shardings.U, shardings.S, shardings.V


def _sharding(W: Any) -> NamedSharding | None:
    """The sharding that the type of an array states, or the one over several devices that it has; else XLA decides."""
    of_type = jax.typeof(W).sharding
    if of_type.mesh.explicit_axes:  # On one device too, where types name axes of size 1.
        return of_type
    sharding = None if isinstance(W, jax.core.Tracer) else getattr(W, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


@functools.cache
def _placed(axes: Axes, rank: int, width: int, sharding: Any, U: Any, S: Any, V: Any) -> Any:
    """Compiled once for all kernels of a shape and a sharding."""
    f = functools.partial(_truncated, axes=axes, rank=rank, width=width, sharding=sharding)
    return jax.jit(f, out_shardings=LowRank(U, S, V))


def _truncated(W: jax.Array, axes: Axes, rank: int, width: int, sharding: NamedSharding | None = None) -> LowRank:
    m, n = matrix_shape(W.shape, axes)
    dense = W.astype(linalg.working_dtype(W)).reshape(*W.shape[: axes.batch], m, n)
    f = _truncated_svd
    if sharding is not None:
        f, dense = _truncated_by_gram, _along_larger(dense, sharding, axes)
    return with_axes(map_matrices(f, dense, rank=rank, width=width), W.shape, axes).astype(W.dtype)


def _truncated_svd(W: jax.Array, rank: int, width: int) -> LowRank:
    u, sigma, v = linalg.svd(W)
    return factors(u[:, :width], sigma[:width], v[:, :width], rank)


def _along_larger(dense: jax.Array, sharding: NamedSharding, axes: Axes) -> jax.Array:
    """The matrices split along their larger axis by all mesh axes that split them, if it divides.

    Then the Gram matrix over that axis is a sum of local products, and no device needs rows of another.
    """
    spec = tuple(sharding.spec)
    names = [name for entry in spec[axes.batch :] for name in (entry if isinstance(entry, tuple) else (entry,)) if name]
    m, n = dense.shape[-2:]
    parts = 1
    for name in names:
        parts *= sharding.mesh.shape[name]
    if max(m, n) % parts:
        return dense
    batch = spec[: axes.batch]
    batch += (None,) * (axes.batch - len(batch))
    matrix = (tuple(names), None) if m >= n else (None, tuple(names))
    mesh = sharding.mesh
    # Inside `auto_axes` the axes of an explicit mesh are auto.
    mesh = jax.sharding.get_abstract_mesh() if mesh.explicit_axes else mesh
    return jax.lax.with_sharding_constraint(dense, NamedSharding(mesh, PartitionSpec(*batch, *matrix)))


def _truncated_by_gram(W: jax.Array, rank: int, width: int) -> LowRank:
    r"""Truncated SVD by products and decompositions of the size of the smaller axis only.

    .. math:: V_0 = \mathrm{eig}_r(W^\top W), \quad Q = \mathrm{orth}(W V_0), \quad Q^\top W = P\,\Sigma\,V^\top,
       \quad U = Q P

    The eigenvectors of the Gram matrix carry errors of :math:`\epsilon\,\sigma_1^2 / \sigma^2`, which the second
    product reduces again. The error of the truncation exceeds the least one by a few units of rounding of
    :math:`|W|`; singular values below :math:`\sqrt\epsilon\,\sigma_1`, 3e-4 in single precision, are less accurate.
    """
    if W.shape[0] < W.shape[1]:
        return _truncated_by_gram(W.T, rank, width).T
    V0 = linalg.leading_eigenvectors(W.T @ W, width)
    y, mix, _ = linalg.gram_qr(W @ V0)
    Q = y @ mix
    z, mix, upper = linalg.gram_qr(W.T @ Q)
    p, sigma, q = linalg.svd(upper.T)
    return factors(Q @ p, sigma, z @ (mix @ q), rank)


def factors(U: jax.Array, sigma: jax.Array, V: jax.Array, rank: int) -> LowRank:
    """The kernel of the first `rank` singular triples; the other columns are padding beside exact zeros."""
    return LowRank(U, linalg.diagonal(jnp.where(linalg.rank_mask(rank, sigma.shape[0]), sigma, 0.0)), V)


def blocks_with_axes(W: LowRank, shape: tuple[int, ...], axes: Axes) -> BlockLowRank:
    """The grid of the factors `(batch..., b, c, rows, s)` of blocks, with the axes of the dense kernel."""
    batch, inner, s = shape[: axes.batch], axes.batch + axes.inputs, W.S.shape[-1]
    b, c = W.S.shape[axes.batch : axes.batch + 2]
    empty = jax.ShapeDtypeStruct  # only the axes of the form are read
    U, V = (empty((*batch, *own, n, s), W.S.dtype) for own, n in ((shape[axes.batch : inner], c), (shape[inner:], b)))
    form: Any = BlockLowRank(U, empty(W.S.shape, W.S.dtype), V)  # type: ignore[arg-type]
    return form.unflatten(W)


def with_axes(W: LowRank, shape: tuple[int, ...], axes: Axes) -> LowRank:
    """The factors of flattened kernels with the axes of the dense kernel."""
    batch, inner = shape[: axes.batch], axes.batch + axes.inputs
    u, v = (*batch, *shape[axes.batch : inner], W.width), (*batch, *shape[inner:], W.width)
    return LowRank(W.U.reshape(u), W.S, W.V.reshape(v))
