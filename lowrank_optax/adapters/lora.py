r"""`lora`: :math:`W = W_0 + s\,A B`, a pair of factors."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Change, node, scaled_identity
from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes
from lowrank_optax.lowrank import LowRank


@node
class LoRA(Change):
    r"""The change :math:`s\,A B` of a kernel, with `lora_A` and `lora_B` of PEFT transposed.

    Attributes:
      A: `(batch..., in..., r)`.
      B: `(batch..., r, out...)`.
      scale: s, `(batch...)`, not trained.

    References:
      arXiv:2106.09685, section 4.1.
    """

    kind: ClassVar[str] = "lora"

    A: jax.Array
    B: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        left, right, corrects = request.start.pair(request)
        change = cls(request.rows(left), request.columns(right), request.number(request.scale))
        if not corrects:
            return change, None
        return change, LowRank(left, scaled_identity(change.scale, request.rank), jnp.swapaxes(right, -1, -2))

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.A.ndim - 1 - self.batch)

    def fits(self, shape: tuple[int, ...]) -> bool:
        b = self.batch
        return shape == (*self.A.shape[:-1], *self.B.shape[b + 1 :]) and self.B.shape[:b] == self.scale.shape

    def part(self, base: Any) -> LowRank:
        scale = jax.lax.stop_gradient(self.scale)
        return LowRank(self.A, scaled_identity(scale, self.A.shape[-1]), jnp.moveaxis(self.B, self.batch, -1))
