r"""`loretta`: a pair of factors that are tensor trains, with cores of the sizes of divisors of m and n."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Flattened, node, scaled_identity
from lowrank_optax.adapters.request import Request
from lowrank_optax.adapters.structured import divisor
from lowrank_optax.linalg import highest_precision
from lowrank_optax.lowrank import LowRank


@node
class TensorTrain(Flattened):
    r"""The change :math:`s\,A B` with :math:`m = m_1 m_2`, :math:`n = n_1 n_2` and

    .. math:: A_{(ik)\,p} = \sum_a (A_1)_{ia} (A_2)_{akp}, \quad B_{p\,(jl)} = \sum_b (B_1)_{pjb} (B_2)_{bl},

    where m1 and n1 are the largest divisors up to the square root: `r (m1 + r m2 + r n1 + n2)` trained numbers. All
    bonds of the train have the same rank r.

    Attributes:
      A1: `(batch..., m1, r)`.
      A2: `(batch..., r, m2, r)`.
      B1: `(batch..., r, n1, r)`.
      B2: `(batch..., r, n2)`, zero at the start.
      scale: s, `(batch...)`, not trained.
      inputs: the number of input axes of the kernel, 1 by default; static.

    References:
      arXiv:2402.11417, with two cores for each factor.
    """

    kind: ClassVar[str] = "loretta"

    A1: jax.Array
    A2: jax.Array
    B1: jax.Array
    B2: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        m1, n1, r = divisor(request.m), divisor(request.n), request.rank
        m2, n2 = request.m // m1, request.n // n1
        A1, A2 = request.normal(0, m1, r, std=m1**-0.5), request.normal(1, r, m2, r, std=(r * m2) ** -0.5)
        B1 = request.normal(2, r, n1, r, std=r**-0.5)
        B2 = jnp.zeros((*request.batch, r, n2), A1.dtype)
        return cls(A1, A2, B1, B2, request.number(request.scale), inputs=request.split.inputs), None

    @property
    def sides(self) -> tuple[int, int]:
        return self.A1.shape[-2] * self.A2.shape[-2], self.B1.shape[-2] * self.B2.shape[-1]

    @highest_precision
    def part(self, base: Any) -> LowRank:
        b, r = self.batch, self.A1.shape[-1]
        A = jnp.einsum("...ia,...akp->...ikp", self.A1, self.A2)
        V = jnp.einsum("...pjb,...bl->...jlp", self.B1, self.B2)
        S = scaled_identity(jax.lax.stop_gradient(self.scale), r)
        shape = tuple(base.shape)
        inner = sum(self.axes(shape))
        return LowRank(A.reshape(*shape[:inner], r), S, V.reshape(*shape[:b], *shape[inner:], r))
