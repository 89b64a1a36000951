r"""`core`: :math:`W = W_0 + s\,U C V^\top` with frozen U and V, the leading singular vectors of W0 (LoRA-XS)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.adapters.change import Change, node
from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes
from lowrank_optax.layout import map_replicated
from lowrank_optax.lowrank import LowRank


@node
class Core(Change):
    r"""The change :math:`s\,U C V^\top` in a frozen frame, `r^2` trained numbers for each kernel.

    With :math:`W_0 \approx P \Sigma Q^\top` the frame is :math:`U = P \Sigma` and :math:`V = Q`: as in LoRA-XS the
    singular values weigh the inputs. C is zero at the start.

    Attributes:
      U: `(batch..., in..., r)`, not trained.
      C: `(batch..., r, r)`.
      V: `(batch..., out..., r)`, not trained.
      scale: s, `(batch...)`, not trained.

    References:
      arXiv:2405.17604, equation 2.
    """

    kind: ClassVar[str] = "core"
    frozen: ClassVar[frozenset[str]] = frozenset({"U", "V", "scale"})

    U: jax.Array
    C: jax.Array
    V: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        U, V = map_replicated(_frame, request.W, rank=request.rank)
        zero = jnp.zeros((*request.batch, request.rank, request.rank), request.W.dtype)
        return cls(request.rows(U), zero, request.outputs(V), request.number(request.scale)), None

    @property
    def batch(self) -> int:
        return self.scale.ndim

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.U.ndim - 1 - self.batch)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (*self.U.shape[:-1], *self.V.shape[self.batch : -1])

    def part(self, base: Any) -> LowRank:
        U, V, scale = map(jax.lax.stop_gradient, (self.U, self.V, self.scale))
        return LowRank(U, scale[..., None, None] * self.C, V)


def _frame(W: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    p, sigma, q = linalg.svd(W)
    return p[:, :rank] * sigma[None, :rank], q[:, :rank]
