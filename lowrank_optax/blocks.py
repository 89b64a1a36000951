r"""`BlockLowRank`: a kernel as a grid of blocks, each of low rank.

A grid of b x c blocks :math:`W_{ij} = U_{ij} S_{ij} V_{ij}^\top` of rank s has as many parameters, and takes as many
operations, as one matrix of rank b s, if b = c. Its rank as a matrix can be full once b s reaches min(m, n) / b.

References:
  Dao et al., `Monarch <https://arxiv.org/abs/2204.00595>`_, 2022, section 3: blocks of rank 1, square grids.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from lowrank_optax.contractions import contract
from lowrank_optax.factors import FactoredKernel
from lowrank_optax.linalg import highest_precision
from lowrank_optax.lowrank import LowRank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity, like other nodes of arrays
class BlockLowRank(FactoredKernel):
    r"""A kernel as a grid of blocks of low rank, :math:`W_{ij} = U_{ij} S_{ij} V_{ij}^\top`.

    The b rows of the grid split the last input axis (the channels of a convolution), the c columns the last output
    axis. With p = ceil(in / b) the first b - 1 rows have p inputs each, and the last row has the rest; likewise for
    outputs. A pytree of three floating arrays without static fields, like `LowRank`: their axes carry all metadata.

    A product takes s (c m + b n) operations a row, in two batched matrix products, and keeps b c s numbers a row for
    the backward pass. Of many small blocks it is formed through the dense kernel if that is cheaper in time and memory.
    Nodes add and scale like gradients, leaf by leaf: see `FactoredKernel`.

    Attributes:
      U: `(batch..., in..., c, s)`. The rows of block row i are :math:`U_{i1}, \dots, U_{ic}`, side by side.
      S: `(batch..., b, c, s, s)`.
      V: `(batch..., out..., b, s)`. The rows of block column j are :math:`V_{1j}, \dots, V_{bj}`, side by side.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> W = lro.factorize(jnp.eye(8), rank=4, blocks=4)  # blocks of rank 1; an identity has full rank
      >>> W.shape, W.grid, W.width, W.size
      ((8, 8), (4, 4), 1, 80)
      >>> (jnp.ones((3, 8)) @ W).shape
      (3, 8)
    """

    U: jax.Array
    S: jax.Array
    V: jax.Array

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that index independent kernels (stacked layers)."""
        return tuple(self.S.shape[:-4])

    @property
    def grid(self) -> tuple[int, int]:
        """(b, c), the numbers of rows and columns of blocks."""
        return self.S.shape[-4], self.S.shape[-3]

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The input axes of the kernel."""
        return tuple(self.U.shape[self.S.ndim - 4 : -2])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The output axes of the kernel."""
        return tuple(self.V.shape[self.S.ndim - 4 : -2])

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The batch axes and the grid."""
        return tuple(self.S.shape[:-2])

    @property
    def T(self) -> BlockLowRank:
        """The adjoint: input and output axes change places, batch axes stay."""
        return BlockLowRank(self.V, jnp.swapaxes(jnp.swapaxes(self.S, -1, -2), -3, -4), self.U)

    @highest_precision
    def to_dense(self) -> jax.Array:
        """The dense kernel, an array of shape `batch + in + out`, from products of highest precision."""
        W, k = self.flatten(), len(self.stack_shape)
        batch = (tuple(range(k)),) * 2
        dense = contract(contract(W.U, W.S, (((k + 1,), (k,)), batch)), W.V, (((k + 1,), (k + 1,)), batch))
        return join_blocks(dense, self.batch_shape, self.in_shape, self.out_shape)

    def flatten(self) -> LowRank:
        """The blocks, a stack of matrices: U `(batch..., b, c, m_i, s)`, S, V `(batch..., b, c, n_j, s)`."""
        return LowRank(self._rows(self.U, 0), self.S, self._rows(self.V, 1))

    def unflatten(self, matrices: LowRank) -> BlockLowRank:
        """The inverse of `flatten`, with the axes of this kernel; the width of the blocks may differ."""
        return BlockLowRank(
            self._factor(matrices.U, self.in_shape, 0), matrices.S, self._factor(matrices.V, self.out_shape, 1)
        )

    def _rows(self, x: jax.Array, side: int) -> jax.Array:
        """`(batch..., rest..., size, others, s)` as `(batch..., b, c, rest * part, s)`, padded with zeros."""
        k = len(self.batch_shape)
        x = split_axis(x, x.ndim - 3, self.grid[side])  # (batch..., rest..., blocks, part, others, s)
        blocks, others = x.ndim - 4, x.ndim - 2
        first, second = (blocks, others) if side == 0 else (others, blocks)
        x = x.transpose(*range(k), first, second, *range(k, blocks), blocks + 1, x.ndim - 1)
        return x.reshape(*x.shape[: k + 2], -1, x.shape[-1])

    def _factor(self, x: jax.Array, axes: tuple[int, ...], side: int) -> jax.Array:
        """The inverse of `_rows`, for a factor with these input or output axes."""
        k = len(self.batch_shape)
        x = x.reshape(*x.shape[: k + 2], *axes[:-1], -1, x.shape[-1])
        blocks, others = (k, k + 1) if side == 0 else (k + 1, k)
        x = x.transpose(*range(k), *range(k + 2, x.ndim - 2), blocks, x.ndim - 2, others, x.ndim - 1)
        return join_axis(x, x.ndim - 4, axes[-1])

    def product(self, x: jax.Array, inputs: tuple[int, ...], batch: tuple[int, ...], **options: Any) -> jax.Array:
        """`dot_general` over these axes of x: every row of blocks, then every column; or with the dense kernel."""
        k, last = len(batch), inputs[-1]
        rows = math.prod(n for i, n in enumerate(x.shape) if i not in (*inputs, *batch))
        if self.is_cheaper_dense(rows):
            own = tuple(range(k)), tuple(range(k, k + len(inputs)))
            return contract(x, self.to_dense(), ((inputs, own[1]), (batch, own[0])), **options)
        sharding = options.pop("out_sharding", None)
        x = split_axis(x, last, self.grid[0])
        moved = lambda i: i + (i > last)  # noqa: E731
        U, S, V = self.absorb(rows, **options)
        U = split_axis(U, U.ndim - 3, self.grid[0])  # (batch..., rest..., b, p, c, s)
        summed = ((*map(moved, inputs[:-1]), last + 1), (*range(k, U.ndim - 4), U.ndim - 3))
        together = ((*map(moved, batch), last), (*range(k), U.ndim - 4))
        z = contract(x, U, (summed, together), **options)  # (batch..., b, free..., c, s)
        return self.second_stage(z, S, V, sharding, **options)

    def is_cheaper_dense(self, rows: Any) -> bool:
        """Whether a product with so many rows is cheaper through the dense kernel, in time, and not dearer in memory.

        The activation between the stages has b c s entries a row. An entry costs about as much as 400 multiplications:
        it is written, transposed and read for memory's speed and not for arithmetic (measured on a CPU with forward and
        backward pass; an H100 has about the same ratio).
        """
        if jax.export.is_symbolic_dim(rows):
            return False
        (b, c), m, n = self.grid, math.prod(self.in_shape), math.prod(self.out_shape)
        between, products = b * c * self.width, self.width * (c * m + b * n)
        return m * n <= rows * between and m * n < products + 400 * between

    def second_stage(
        self, z: jax.Array, S: jax.Array | None, V: jax.Array, sharding: Any = None, **options: Any
    ) -> jax.Array:
        """From `(batch..., b, free..., c, s)` to the output, `(batch..., free..., out...)`."""
        k, n = len(self.batch_shape), z.ndim
        if S is not None:
            axes = (*range(k + 1), n - 2)
            z = contract(z, S, (((n - 1,), (k + 2,)), (axes, tuple(range(k + 2)))), **options)
            z = z.transpose(*range(k + 1), *range(k + 2, n - 1), k + 1, n - 1)
        V = split_axis(V, V.ndim - 3, self.grid[1])  # (batch..., rest..., c, q, b, s)
        summed, together = ((k, n - 1), (V.ndim - 2, V.ndim - 1)), ((*range(k), n - 2), (*range(k), V.ndim - 4))
        y = contract(z, V, (summed, together), **options)  # (batch..., c, free..., rest..., q)
        y = join_axis(jnp.moveaxis(y, k, -2), y.ndim - 2, self.out_shape[-1])
        return y if sharding is None else jax.sharding.reshard(y, sharding)

    def absorb(self, rows: Any, **options: Any) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """S in U or V, `(U S, None, V)` or `(U, None, V S^T)`, or (U, S, V) where the activation has fewer entries.

        Args:
          rows: rows of the activation; a symbolic dimension counts as few.
          **options: passed to the product.
        """
        (b, c), m, n = self.grid, math.prod(self.in_shape), math.prod(self.out_shape)
        if jax.export.is_symbolic_dim(rows) or rows * b * c <= min(m * c, n * b):
            return self.U, self.S, self.V
        if m * c < n * b:
            return self._times(self.U, self.S, 0, self.in_shape, **options), None, self.V
        return self.U, None, self._times(self.V, jnp.swapaxes(self.S, -1, -2), 1, self.out_shape, **options)

    def _times(self, x: jax.Array, S: jax.Array, side: int, axes: tuple[int, ...], **options: Any) -> jax.Array:
        """The columns of every block of a factor times a matrix of the block."""
        k = len(self.stack_shape)
        batch = tuple(range(k))
        product = contract(self._rows(x, side), S, (((k + 1,), (k,)), (batch, batch)), **options)
        return self._factor(product, axes, side)


# --- axes of blocks -------------------------------------------------------------------


def split_axis(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """Axis of size n as two, `(parts, ceil(n / parts))`, padded with zeros."""
    size = x.shape[axis]
    part = -(-size // parts)
    if parts * part > size:
        x = jnp.pad(x, [(0, parts * part - size if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], parts, part, *x.shape[axis + 1 :])


def join_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """The inverse of `split_axis`: the axis and the next one as one axis of a size, without padding."""
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, size, axis=axis)


def split_blocks(dense: jax.Array, batch: int, inputs: int, grid: tuple[int, int]) -> jax.Array:
    """The blocks `(batch..., b, c, m_i, n_j)` of dense kernels with some batch and input axes, padded with zeros."""
    x = split_axis(split_axis(dense, dense.ndim - 1, grid[1]), batch + inputs - 1, grid[0])
    b, c = batch + inputs - 1, x.ndim - 2
    order = (*range(batch), b, c, *range(batch, b), b + 1, *range(b + 2, c), c + 1)
    x = x.transpose(order)
    m = math.prod(x.shape[batch + 2 : batch + 2 + inputs])
    return x.reshape(*x.shape[: batch + 2], m, -1)


def join_blocks(
    blocks: jax.Array, batch_shape: tuple[int, ...], in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> jax.Array:
    """The dense kernels of blocks, the inverse of `split_blocks`."""
    k, i, o = len(batch_shape), len(in_shape), len(out_shape)
    parts = [-(-shape[-1] // n) for shape, n in zip((in_shape, out_shape), blocks.shape[k : k + 2], strict=True)]
    x = blocks.reshape(*blocks.shape[: k + 2], *in_shape[:-1], parts[0], *out_shape[:-1], parts[1])
    ins, outs = range(k + 2, k + 1 + i), range(k + 2 + i, k + 1 + i + o)
    x = x.transpose(*range(k), *ins, k, k + 1 + i, *outs, k + 1, k + 1 + i + o)
    x = join_axis(x, k + i - 1, in_shape[-1])
    return join_axis(x, x.ndim - 2, out_shape[-1])


# --- convolutions -----------------------------------------------------------------------


def grouped_kernel(U: jax.Array, W: BlockLowRank) -> jax.Array:
    """U of a convolution, `(window..., channels, c, s)`, as a kernel of b groups, `(window..., p, b c s)`."""
    x = split_axis(U, U.ndim - 3, W.grid[0])  # (window..., b, p, c, s)
    x = jnp.moveaxis(x, -4, -3)
    return x.reshape(*x.shape[:-3], -1)


def padded_channels(x: jax.Array, W: BlockLowRank) -> jax.Array:
    """The activation with channels of zeros that fill up the last row of blocks."""
    rows, channels = W.grid[0], W.in_shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows * -(-channels // rows) - channels)])
