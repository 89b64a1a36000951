"""The grid of blocks, and the rank of each, that the arguments `rank` and `blocks` give a kernel."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

from lowrank_optax.axes import Axes, matrix_shape

Blocks = int | tuple[int, int] | str | Callable[[str, tuple[int, ...]], Any]


class Grid(NamedTuple):
    """A grid of `rows` x `columns` blocks."""

    rows: int
    columns: int

    @property
    def is_one(self) -> bool:
        """Whether the grid is one block, which is the whole kernel."""
        return self == (1, 1)

    def width(self, rank: int, shape: tuple[int, ...], axes: Axes) -> int:
        """The rank of a block with which all blocks together have about as many parameters as one matrix of `rank`.

        .. math:: s\\,(c m + b n) \\approx r\\,(m + n)

        At least 1, and at most what a block allows.
        """
        m, n = matrix_shape(shape, axes)
        rows, columns = self.least_block(shape, axes)
        wanted = round(rank * (m + n) / (self.columns * m + self.rows * n))
        return max(1, min(wanted, rows, columns))

    def parameters(self, width: int, shape: tuple[int, ...], axes: Axes) -> int:
        """The number of entries of U, S and V of one kernel whose blocks have rank `width`."""
        m, n = matrix_shape(shape, axes)
        return width * (self.columns * m + self.rows * n + self.rows * self.columns * width)

    def least_block(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, int]:
        """The numbers of rows and columns of the smallest block, the last one."""
        inputs, outputs = shape[axes.batch : axes.batch + axes.inputs], shape[axes.batch + axes.inputs :]
        return _last(inputs, self.rows), _last(outputs, self.columns)


def grid_of(blocks: Blocks | None, rank: int, name: str, shape: tuple[int, ...], axes: Axes) -> Grid:
    """The grid of a kernel. An axis that is too short for the blocks asked for gets as many as it has entries.

    Raises:
      TypeError: for an argument of another type.
      ValueError: for a grid without blocks.
    """
    value = blocks(name, shape) if callable(blocks) else blocks
    if value is None:
        return Grid(1, 1)
    if value == "auto":
        value = -(-min(matrix_shape(shape, axes)) // rank)
    if value == "rank":
        value = rank
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in pair):
        raise TypeError(
            'blocks takes a number b for a grid of b x b blocks, a pair (b, c), "auto" for the fewest blocks of full '
            'rank, "rank" for blocks of rank 1, or a callable of path and dense shape that returns one of them; '
            f"got {value!r} for {name!r}"
        )
    if min(pair) < 1:
        raise ValueError(f"a grid has at least one row and one column of blocks, got {value} for {name!r}")
    ends = shape[axes.batch + axes.inputs - 1], shape[-1]
    return Grid(*(_filled(size, int(parts)) for size, parts in zip(ends, pair, strict=True)))


def _filled(size: int, parts: int) -> int:
    """The most parts, up to a number, of ceil(size / parts) entries each that leave none empty."""
    part = -(-size // min(parts, size))
    return -(-size // part)


def _last(axes: tuple[int, ...], parts: int) -> int:
    part = -(-axes[-1] // parts)
    return math.prod(axes[:-1]) * (axes[-1] - (parts - 1) * part)
