r"""`vblora`: factors of short vectors that are mixtures of the vectors of one trained bank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import axes_with_rows, node
from lowrank_optax.adapters.request import Request
from lowrank_optax.adapters.shared import Shared, SharedBank
from lowrank_optax.axes import Axes
from lowrank_optax.lowrank import LowRank


@node
class VectorBank(SharedBank):
    """The vectors of kind `vblora`, which are trained.

    Attributes:
      vectors: `(h, b)`, uniform in `(-0.02, 0.02)` at the start.
    """

    label: ClassVar[str] = "trained"

    vectors: jax.Array


@node
class VBLoRA(Shared):
    r"""The change :math:`A B` with the columns of A and the rows of B cut into pieces of length b. A piece is

    .. math:: \sum_{i \in T} \mathrm{softmax}(\ell_T)_i\, v_i

    with T the `top` largest of its logits :math:`\ell` over the h vectors v of a bank that all layers share and train.
    Vectors outside of T get no gradient. The change is small and not zero at the start.

    Attributes:
      logits_A: `(batch..., r, m / b, h)`, Gaussian of standard deviation 0.01 at the start.
      logits_B: `(batch..., n / b, r, h)`, likewise.
      bank: the `VectorBank`, None in the tree of changes, which holds it once.
      top: the number of vectors in a mixture; a subclass may have another.

    References:
      arXiv:2405.15179.
    """

    kind: ClassVar[str] = "vblora"
    bank_name: ClassVar[str] = "vblora_bank"
    top: ClassVar[int] = 2

    logits_A: jax.Array
    logits_B: jax.Array
    bank: VectorBank | None = None

    @classmethod
    def make(cls, request: Request, vectors: int = 256, length: int = 256) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        if request.m % length or request.n % length or vectors < cls.top:
            raise request.refuse(
                cls.kind,
                f"m, n are {request.m}, {request.n} and vectors of length {length} cut both; there are at least "
                f"{cls.top} vectors: kind=lro.adapters.variant('vblora', vectors={vectors}, length=...)",
            )
        r, h = request.rank, vectors
        logits_A = request.normal(0, r, request.m // length, h, std=0.01)
        return cls(logits_A, request.normal(1, request.n // length, r, h, std=0.01)), None

    @classmethod
    def draw_bank(cls, key: jax.Array, requests: Sequence[Request], changes: Sequence[Any]) -> VectorBank:
        """The vectors of the paper's code."""
        length, vectors = requests[0].m // changes[0].logits_A.shape[-2], changes[0].logits_A.shape[-1]
        return VectorBank(jax.random.uniform(key, (vectors, length), requests[0].W.dtype, -0.02, 0.02))

    @property
    def batch(self) -> int:
        return self.logits_A.ndim - 3

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return axes_with_rows(shape, self.batch, self.logits_A.shape[-2] * self.needed().vectors.shape[-1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        b, length = self.batch, self.needed().vectors.shape[-1]
        rows = self.logits_A.shape[-2] * length
        ends = {math.prod(shape[b:i]) for i in range(b + 1, len(shape))}
        size = rows * self.logits_B.shape[-3] * length
        return shape[:b] == self.logits_A.shape[:b] and rows in ends and math.prod(shape[b:]) == size

    def part(self, base: Any) -> LowRank:
        shape, b, vectors = tuple(base.shape), self.batch, self.needed().vectors
        inner, r = sum(self.axes(shape)), self.logits_A.shape[-3]
        A = jnp.moveaxis(_mixtures(self.logits_A, vectors, self.top), b, -1)  # (batch..., m / b, b, r)
        B = jnp.moveaxis(_mixtures(self.logits_B, vectors, self.top), b + 1, -1)
        eye = jnp.broadcast_to(jnp.eye(r, dtype=A.dtype), (*shape[:b], r, r))
        return LowRank(A.reshape(*shape[:inner], r), eye, B.reshape(*shape[:b], *shape[inner:], r))


def _mixtures(logits: jax.Array, vectors: jax.Array, top: int) -> jax.Array:
    """The pieces `(..., b)` for logits `(..., h)`, with a bank for each kernel of a stack."""
    largest, at = jax.lax.top_k(logits, top)
    pick = lambda bank, at: bank[at]  # noqa: E731
    for _ in range(vectors.ndim - 2):
        pick = jax.vmap(pick)
    return jnp.sum(jax.nn.softmax(largest, -1)[..., None] * pick(vectors, at), -2)
