r"""`lowrank`: :math:`W = W_0 + s\,U S V^\top`, a change that the optimizers of this package keep on its manifold."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.adapters.change import Change, node
from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes
from lowrank_optax.layout import map_matrices
from lowrank_optax.lowrank import LowRank
from lowrank_optax.manifold import gauge


@node
class LowRankChange(Change):
    r"""The change :math:`s\,U S V^\top` of a kernel. With s = 1 `init` leaves the bare `LowRank` in its place.

    Attributes:
      kernel: U, S and V.
      scale: s, `(batch...)`, not trained; None for 1.
    """

    kind: ClassVar[str] = "lowrank"

    kernel: LowRank
    scale: jax.Array | None = None

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        bases = request.start.bases(request)
        if bases is None:
            left, right, _ = request.start.pair(request)
            flat = map_matrices(_canonical, left, right)
        else:  # S = 0 between bases: the first gradient of S is not zero, so the first step counts.
            flat = map_matrices(_zero_between, *bases)
        kernel = LowRank(request.rows(flat.U), flat.S, request.outputs(flat.V))
        taken = LowRank(flat.U, request.scale * flat.S, flat.V) if bases is None else None
        return (kernel if request.scale == 1 else cls(kernel, request.number(request.scale))), taken

    @property
    def batch(self) -> int:
        return len(self.kernel.batch_shape)

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, len(self.kernel.in_shape))

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == self.kernel.shape

    def part(self, base: Any) -> LowRank:
        if self.scale is None:
            return self.kernel
        scale = jax.lax.stop_gradient(self.scale)[..., None, None].astype(self.kernel.S.dtype)
        return LowRank(self.kernel.U, scale * self.kernel.S, self.kernel.V)


def as_change(x: Any) -> Change:
    """A change, also for a bare `LowRank`."""
    return LowRankChange(x) if isinstance(x, LowRank) else x


def _canonical(left: jax.Array, right: jax.Array) -> LowRank:
    """The product of two factors in the canonical gauge."""
    (u, ru), (v, rv) = linalg.orthonormalize(left), linalg.orthonormalize(right.T)
    p, sigma, q = gauge(ru @ rv.T)
    return LowRank(u @ p, linalg.diagonal(sigma), v @ q)


def _zero_between(left: jax.Array, right: jax.Array) -> LowRank:
    """The zero matrix between orthonormal bases."""
    (u, _), (v, _) = linalg.orthonormalize(left), linalg.orthonormalize(right)
    return LowRank(u, jnp.zeros((u.shape[1],) * 2, u.dtype), v)
