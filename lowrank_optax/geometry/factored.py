"""The common part of all geometries of `LowRank` kernels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.geometry.base import Geometry, Info
from lowrank_optax.lowrank import LowRank, has_arrays, is_lowrank


class Factored(Geometry):
    """Weights are kernels U S V^T, and the rank of each is carried beside the moments.

    Here the rank counts columns in use. It is the number of non-zero singular values, except that a kernel of zeros, an
    adapter before its first step say, may use all its columns.

    Attributes:
      truncates: whether steps may discard something.
    """

    def owns(self, leaf: Any) -> bool:
        """A kernel of arrays; a mask leaves behind a kernel of `optax.MaskedNode`, which is no weight."""
        return is_lowrank(leaf) and has_arrays(leaf)

    def check(self, name: str, leaf: LowRank) -> None:
        """Raises ValueError for shapes or dtypes that no factorisation has."""
        check_factors(name, leaf)

    def of(self, leaf: Any) -> Geometry:
        """For a grid of blocks, this geometry of every block."""
        if isinstance(leaf, LowRank):
            return self
        from lowrank_optax.geometry.blocks import blocks_in  # made of geometries like this one

        return blocks_in(self)

    def batch_axes(self, leaf: LowRank) -> int:
        """Batch axes, and the axes of a grid of blocks."""
        return len(leaf.stack_shape)

    def weight(self, x: LowRank, like: LowRank) -> LowRank:
        """One input and one output axis, float32 or better."""
        return x.astype(linalg.working_dtype(like.U, like.S, like.V)).flatten()

    def difference(self, new: LowRank, old: LowRank, like: Any) -> LowRank:
        """Factor by factor; `like` may be a grid, whose weights are stacks of matrices."""
        factors = zip(jax.tree.leaves(new), jax.tree.leaves(old), (like.U, like.S, like.V), strict=True)
        return LowRank(*(x.astype(z.dtype) - y.astype(z.dtype) for x, y, z in factors))

    def leaf(self, x: LowRank, like: LowRank) -> LowRank:
        """The input and output axes of the kernel."""
        return like.unflatten(x)

    truncates: ClassVar[bool] = True

    def init(self, weight: LowRank) -> tuple[jax.Array, Info]:
        """The rank; no gradient has been seen."""
        count, zero = mf.rank(weight.S), jnp.zeros((), weight.S.dtype)
        rank = jnp.where(count == 0, self.columns_of_zero(weight.width), count).astype(jnp.int32)
        return rank, Info(rank, zero, zero if self.truncates else None)

    def columns_of_zero(self, width: int) -> int:
        """The columns that a kernel of zeros may use."""
        return width

    def lift(self, frame: Any, moment: Any, degree: int) -> Any:
        """Moments belong to the canonical gauge of the last step. If the kernel came in another, they turn with it."""
        return linalg.cond_without_copy(frame.turned, lambda x: self.carry(frame.turn, x, degree), moment)

    def rebase(self, old: LowRank, new: LowRank) -> Any:
        """The overlaps of the bases."""
        return mf.turn_between(old, new)


def check_factors(name: str, W: LowRank) -> None:
    """Raises ValueError for a node whose shapes or dtypes are no factorisation."""
    batch, r = W.batch_shape, W.width
    fits = W.U.shape[-1] == W.V.shape[-1] == r and W.S.shape[-2] == r
    batched = W.U.shape[: len(batch)] == batch == W.V.shape[: len(batch)]
    if not (fits and batched and W.in_shape and W.out_shape):
        raise ValueError(
            f"{name!r} is no factorisation U S V^T: shapes {W.U.shape}, {W.S.shape}, {W.V.shape} should be "
            "(batch..., in..., r), (batch..., r, r), (batch..., out..., r)"
        )
    for x in (W.U, W.S, W.V):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"the factors of {name!r} must be floating, got {x.dtype}")
    limit = min(math.prod(W.in_shape), math.prod(W.out_shape))
    if r > limit:
        raise ValueError(
            f"{name!r} has factors of width {r}, more than min(m, n) = {limit}: no such basis is "
            "orthonormal; choose a smaller rank in factorize"
        )
