r"""`nola`: both factors are combinations of random matrices, and only the coefficients are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Sized, node, scaled_identity
from lowrank_optax.adapters.request import Request
from lowrank_optax.adapters.shared import Shared, SharedBank, equal_ranks
from lowrank_optax.axes import Axes
from lowrank_optax.linalg import highest_precision
from lowrank_optax.lowrank import LowRank


@node
class RandomBases(SharedBank):
    """Random matrices of kind `nola`, not trained. A layer uses the first rows and columns.

    Attributes:
      A: `(k, most inputs, r)`.
      B: `(k, most outputs, r)`.
    """

    A: jax.Array
    B: jax.Array


@node
class NOLA(Sized, Shared):
    r"""The change :math:`s\,A B` with :math:`A = \sum_i \alpha_i A_i` and :math:`B = \sum_i \beta_i B_i^\top`.

    A kernel trains `2 k` numbers, whatever its size and rank. The matrices come from one bank, kept and not drawn
    again in every step; `variant("nola", bases=k)` chooses k.

    Attributes:
      alpha: `(batch..., k)`, Gaussian of variance `1 / k` at the start.
      beta: `(batch..., k)`, zero at the start.
      scale: s, `(batch...)`, not trained.
      bank: the `RandomBases`, None in the tree of changes, which holds it once.

    References:
      arXiv:2310.02556.
    """

    kind: ClassVar[str] = "nola"
    bank_name: ClassVar[str] = "nola_bank"

    alpha: jax.Array
    beta: jax.Array
    scale: jax.Array
    bank: RandomBases | None = None

    @classmethod
    def make(cls, request: Request, bases: int = 64) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        if len(request.shape) != request.split.batch + 2:
            raise request.refuse(cls.kind, "it needs one input and one output axis; leave it out with `where`")
        alpha = request.normal(0, bases, std=bases**-0.5)
        sides = (request.m, request.n)
        return cls(alpha, jnp.zeros_like(alpha), request.number(request.scale), sides=sides), None

    @classmethod
    def draw_bank(cls, key: jax.Array, requests: Sequence[Request], changes: Sequence[Any]) -> RandomBases:
        """Matrices whose combinations have about the size of LoRA's A, and of its B after some steps."""
        r, k, dtype = equal_ranks(requests, cls.kind), changes[0].alpha.shape[-1], requests[0].W.dtype
        m, n = max(request.m for request in requests), max(request.n for request in requests)
        of_A, of_B = jax.random.split(key)
        A = jax.random.uniform(of_A, (k, m, r), dtype, -1, 1) * m**-0.5
        return RandomBases(A, jax.random.uniform(of_B, (k, n, r), dtype, -1, 1) * n**-0.5)

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, 1)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape[:-2] == self.scale.shape and self.has_sides_of(shape)

    @highest_precision
    def part(self, base: Any) -> LowRank:
        bank, scale = jax.lax.stop_gradient((self.needed(), self.scale))
        m, n = base.shape[-2:]
        A = jnp.einsum("...k,...kmr->...mr", self.alpha, bank.A[..., :m, :])
        B = jnp.einsum("...k,...knr->...nr", self.beta, bank.B[..., :n, :])
        return LowRank(A, scaled_identity(scale, A.shape[-1]), B)
