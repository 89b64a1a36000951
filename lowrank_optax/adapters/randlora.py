r"""`randlora`: a sum of random pairs of factors, weighed by trained diagonals, of full rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Flattened, Sized, diagonals, node
from lowrank_optax.adapters.request import Request
from lowrank_optax.adapters.shared import Shared, SharedBank, equal_ranks
from lowrank_optax.axes import matrix_shape
from lowrank_optax.lowrank import LowRank


@node
class RandomPairs(SharedBank):
    """Random factors of kind `randlora`, not trained. A layer uses the first entries.

    Attributes:
      A: `(r, most of min(m, n))`.
      B: `(most of max(m, n), most pairs, r)`.
    """

    A: jax.Array
    B: jax.Array


@node
class RandLoRA(Sized, Flattened, Shared):
    r"""The change of a kernel whose smaller side has s entries and whose larger side has l,

    .. math:: D = s_0\, \sum_{k = 1}^{N r} b_k\, \lambda_k\, (a_k \circ \gamma_k)^\top, \quad N = \lceil s / r \rceil,

    transposed where the kernel has more outputs than inputs. The :math:`b_k` of l entries are the columns of N random
    factors one after the other. The k-th factor on the other side has the row `k div N` of A and of :math:`\lambda`,
    and the row `k mod N` of :math:`\gamma`: PEFT pairs columns and rows in these two orders, which for random factors
    is one of many equal choices. D has full rank with `N (r + s)` trained numbers.

    Attributes:
      lam: :math:`\lambda`, `(batch..., r, N)`, zero at the start.
      gamma: :math:`\gamma`, `(batch..., N, s)`, `1 / max(N, s)` at the start.
      scale: s0, `(batch...)`, not trained.
      bank: the `RandomPairs`, None in the tree of changes, which holds it once.
      inputs: the number of input axes of the kernel, 1 by default; static.

    References:
      arXiv:2502.00987.
    """

    kind: ClassVar[str] = "randlora"
    bank_name: ClassVar[str] = "randlora_bank"

    lam: jax.Array
    gamma: jax.Array
    scale: jax.Array
    bank: RandomPairs | None = None

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        small, pairs = min(request.m, request.n), -(-min(request.m, request.n) // request.rank)
        lam = jnp.zeros((*request.batch, request.rank, pairs), request.W.dtype)
        gamma = jnp.full((*request.batch, pairs, small), 1 / max(pairs, small), request.W.dtype)
        inputs, sides = request.split.inputs, (request.m, request.n)
        return cls(lam, gamma, request.number(request.scale), inputs=inputs, sides=sides), None

    @classmethod
    def draw_bank(cls, key: jax.Array, requests: Sequence[Request], changes: Sequence[Any]) -> RandomPairs:
        """Uniform draws divided by their standard deviation, as in the code of the paper."""
        r, dtype = equal_ranks(requests, cls.kind), requests[0].W.dtype
        small = max(min(request.m, request.n) for request in requests)
        large = max(max(request.m, request.n) for request in requests)
        of_A, of_B = jax.random.split(key)
        A = jax.random.uniform(of_A, (r, small), dtype, -1, 1)
        B = jax.random.uniform(of_B, (large, -(-small // r), r), dtype, -1, 1)
        return RandomPairs(A / jnp.std(A), B / jnp.std(B))

    def fits(self, shape: tuple[int, ...]) -> bool:
        axes = self.axes(shape)
        same = len(shape) > sum(axes) and shape[: axes.batch] == self.scale.shape
        return same and min(matrix_shape(shape, axes)) == self.gamma.shape[-1] and self.has_sides_of(shape)

    def part(self, base: Any) -> LowRank:
        bank, shape, b = jax.lax.stop_gradient(self.needed()), tuple(base.shape), self.batch
        inner, (m, n) = b + self.inputs, matrix_shape(shape, self.axes(shape))
        batch, (pairs, small), r = shape[:b], self.gamma.shape[-2:], self.lam.shape[-2]
        large = bank.B[..., : max(m, n), :pairs, :].reshape(*batch, max(m, n), pairs * r)
        products = bank.A[..., :, None, :small] * self.gamma[..., None, :, :]
        other = jnp.swapaxes(products.reshape(*batch, r * pairs, small), -1, -2)
        U, V = (other, large) if m <= n else (large, other)
        weights = jax.lax.stop_gradient(self.scale)[..., None] * self.lam.reshape(*batch, r * pairs)
        return LowRank(U.reshape(*shape[:inner], -1), diagonals(weights), V.reshape(*batch, *shape[inner:], -1))
