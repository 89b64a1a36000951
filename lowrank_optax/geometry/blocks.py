"""The geometry of a grid of blocks: each block moves in the geometry of its matrix, and Muon sees rows of blocks.

`Factored.of` gives it to every `BlockLowRank`, so `Balanced()` and `Tangent()` mean the same for both forms of kernels.
Coordinates of a grid have classes of their own, because `scale_by_polar_factor` has to know a grid from a stack of
independent kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.geometry.balanced import Balanced, Pair
from lowrank_optax.geometry.base import Geometry, Settled, matrix_shape, polar_factor, register_coordinates
from lowrank_optax.geometry.factored import Factored
from lowrank_optax.geometry.tangent import Tangent
from lowrank_optax.lowrank import LowRank
from lowrank_optax.rank import Spectrum


class BlockPair(Pair):
    """Coordinates of a grid of b x c blocks: A `(b, c, m_i, s)` and B `(b, c, n_j, s)` of W_ij = A_ij B_ij^T."""

    __slots__ = ()


class BlockTangent(mf.Tangent):
    """Tangent vectors at the blocks of a grid: Up `(b, c, m_i, s)`, M `(b, c, s, s)`, Vp `(b, c, n_j, s)`."""

    __slots__ = ()


_OF_BLOCKS: dict[type, Any] = {Pair: BlockPair, mf.Tangent: BlockTangent}
_OF_MATRIX: dict[type, Any] = {BlockPair: Pair, BlockTangent: mf.Tangent}


@dataclasses.dataclass(frozen=True)
class Blocks(Factored):
    """The geometry `base` of each block. Methods get one block; the loop maps them over the grid."""

    base: Factored = dataclasses.field(default_factory=Balanced)

    def check(self, name: str, leaf: Any) -> None:
        """ValueError for shapes of no grid, or a geometry that has no coordinates of grids."""
        if not isinstance(self.base, Balanced | Tangent):
            raise ValueError(
                f"{name!r} is a grid of blocks, which {type(self.base).__name__} does not move: take "
                "geometry=lro.Balanced() or lro.Tangent(), or factorize without blocks"
            )
        check_grid(name, leaf)
        self.base.check(name, jax.eval_shape(lambda W: W.flatten(), leaf))

    def init(self, weight: LowRank) -> tuple[Any, Any]:
        """The rank of the block."""
        return self.base.init(weight)

    def template(self, weight: LowRank) -> Any:
        """Coordinates of a block, in the class of grids."""
        return _of_blocks(self.base.template(weight))

    def frame(self, weight: LowRank, grad: LowRank, aux: Any) -> Any:
        """The frame of the block."""
        frame: Any = self.base.frame(weight, grad, aux)
        return frame._replace(grad=_of_blocks(frame.grad), weight=_of_blocks(frame.weight))

    def lift(self, frame: Any, moment: Any, degree: int) -> Any:
        """Moments turn with the bases of their block."""
        return _of_blocks(self.base.lift(frame, _of_matrix(moment), degree))

    def propose(self, frame: Any, step: Any) -> Any:
        """The moved block."""
        return self.base.propose(frame, _without_padding(frame, _of_matrix(step)))

    def spectrum(self, frame: Any, proposal: Any) -> Spectrum | None:
        """The singular values of the block."""
        return self.base.spectrum(frame, proposal)

    def settle(self, frame: Any, proposal: Any, rank: Any) -> Settled:
        """The new block."""
        return self.base.settle(frame, proposal, rank)

    def carry(self, change: Any, moment: Any, degree: int) -> Any:
        """Moments go along with the bases of their block."""
        return _of_blocks(self.base.carry(change, _of_matrix(moment), degree))

    def rebase(self, old: LowRank, new: LowRank) -> Any:
        """The change of basis of the block."""
        return self.base.rebase(old, new)


@functools.cache
def blocks_in(base: Factored) -> Geometry:
    """`Blocks(base)`, the same object for the same base: compiled methods are found by it."""
    return Blocks(base=base)


def check_grid(name: str, W: Any) -> None:
    """Raises ValueError for a node whose shapes are no grid of blocks."""
    k, (b, c), s = len(W.batch_shape), W.grid, W.width
    fits = W.U.shape[-2:] == (c, s) and W.V.shape[-2:] == (b, s) and W.S.shape[-2] == s
    if not (fits and W.U.shape[:k] == W.batch_shape == W.V.shape[:k] and W.in_shape and W.out_shape):
        raise ValueError(
            f"{name!r} is no grid of blocks: shapes {W.U.shape}, {W.S.shape}, {W.V.shape} should be "
            "(batch..., in..., c, s), (batch..., b, c, s, s), (batch..., out..., b, s)"
        )


def _without_padding(frame: Any, step: Any) -> Any:
    """The step without the rows that fill up the last block of an axis, where kernel and gradient are zero.

    New bases have entries of rounding size there, and moments get them from the bases. An elementwise optimizer would
    make steps of full size of them.
    """

    def inside(x: jax.Array, basis: jax.Array, gradient: jax.Array) -> jax.Array:
        return jnp.where(jnp.any((basis != 0) | (gradient != 0), axis=-1, keepdims=True), x, 0.0)

    left, *middle, right = step
    return type(step)(
        inside(left, frame.kernel.U, frame.grad[0]), *middle, inside(right, frame.kernel.V, frame.grad[-1])
    )


def _of_blocks(x: Any) -> Any:
    return _OF_BLOCKS[type(x)](*x)


def _of_matrix(x: Any) -> Any:
    return _OF_MATRIX[type(x)](*x)


register_coordinates(BlockPair, Blocks(base=Balanced()), {"A": "U", "B": "V"}, axes=4)
register_coordinates(BlockTangent, Blocks(base=Tangent()), {"Up": "U", "M": "S", "Vp": "V"}, axes=4)


@polar_factor.register
def _(moment: BlockPair, steps: int) -> BlockPair:
    """The polar factor of every row of blocks `[A_i1, ..., A_ic]`, and of every column `[B_1j, ..., B_bj]`.

    These are the matrices that the two stages of a product multiply with. With a polar factor for each block instead,
    the gain of blocks over one matrix of equal size is lost (RESULTS.md, blocks).
    """

    def joint(x: jax.Array) -> jax.Array:
        rows, others, size, s = x.shape
        stages = x.transpose(0, 2, 1, 3).reshape(rows, size, others * s)
        polar = jax.vmap(functools.partial(linalg.newton_schulz, steps=steps))(stages)
        return polar.reshape(rows, size, others, s).transpose(0, 2, 1, 3)

    return BlockPair(joint(moment.A), joint(moment.B.swapaxes(0, 1)).swapaxes(0, 1))


@polar_factor.register
def _(moment: BlockTangent, steps: int) -> BlockTangent:
    raise ValueError(
        "a polar factor of tangent vectors of a grid of blocks is not defined: use lowrank_muon with its default "
        "geometry, lro.Balanced()"
    )


@matrix_shape.register
def _(moment: BlockPair) -> tuple[int, int]:
    return _whole(moment.A, moment.B)


@matrix_shape.register
def _(moment: BlockTangent) -> tuple[int, int]:
    return _whole(moment.Up, moment.Vp)


def _whole(left: jax.Array, right: jax.Array) -> tuple[int, int]:
    return left.shape[-4] * left.shape[-2], right.shape[-3] * right.shape[-2]
