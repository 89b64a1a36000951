r"""`hra`: :math:`W = R\,W_0` with R a product of Householder reflections of the inputs."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Flattened, dense_base, node
from lowrank_optax.adapters.request import Request
from lowrank_optax.layout import map_matrices
from lowrank_optax.linalg import highest_precision, working_dtype
from lowrank_optax.lowrank import LowRank


@node
class Householder(Flattened):
    r"""Reflections :math:`W = H_r \cdots H_1 W_0` with :math:`H_i = I - 2 u_i u_i^\top`, which keep singular values.

    The product is :math:`I - U T^\top U^\top` with :math:`T^{-1} = I/2 + \mathrm{striu}(U^\top U)`, so the change is
    :math:`-U T^\top (W_0^\top U)^\top`, of rank r: neither W nor a rotation is formed.

    Attributes:
      U: `(batch..., m, r)` with m inputs; its columns need not have unit length. At the start they are equal in pairs,
        whose reflections cancel.
      inputs: the number of input axes of the kernel, 1 by default; static.

    References:
      arXiv:2405.17484, equation 4, without its Gram-Schmidt variant.
    """

    kind: ClassVar[str] = "hra"
    frozen: ClassVar[frozenset[str]] = frozenset()

    U: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        if request.rank % 2:
            raise request.refuse(cls.kind, f"its rank is even, since reflections cancel in pairs, got {request.rank}")
        half = request.normal(0, request.m, request.rank // 2)
        return cls(jnp.repeat(half, 2, axis=-1), inputs=request.split.inputs), None

    @property
    def batch(self) -> int:
        return self.U.ndim - 2

    @property
    def sides(self) -> tuple[int, None]:
        return self.U.shape[-2], None

    def part(self, base: Any) -> LowRank:
        return self._part(dense_base(base), map_matrices(_reflections, self._working()))

    def undo(self, merged: jax.Array) -> jax.Array:
        U, T = map_matrices(_reflections, self._working())
        return merged.astype(working_dtype(merged)) + self._part(merged, (U, jnp.swapaxes(T, -1, -2))).to_dense()

    def _working(self) -> jax.Array:
        return self.U.astype(working_dtype(self.U))

    @highest_precision
    def _part(self, base: jax.Array, factors: tuple[jax.Array, jax.Array]) -> LowRank:
        U, T = factors
        axes = self.axes(tuple(base.shape))
        inner = axes.batch + axes.inputs
        batch, inputs, outputs = base.shape[: axes.batch], base.shape[axes.batch : inner], base.shape[inner:]
        W = base.astype(U.dtype).reshape(*batch, U.shape[-2], -1)
        V = jnp.swapaxes(W, -1, -2) @ U
        return LowRank(U.reshape(*batch, *inputs, -1), -jnp.swapaxes(T, -1, -2), V.reshape(*batch, *outputs, -1))


def _reflections(U: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit columns U and upper triangular T of `H_1 ... H_r = I - U T U^T`."""
    U = U / jnp.sqrt(jnp.sum(U * U, axis=0))[None]
    eye = jnp.eye(U.shape[1], dtype=U.dtype)
    return U, jax.scipy.linalg.solve_triangular(0.5 * eye + jnp.triu(U.T @ U, 1), eye)
