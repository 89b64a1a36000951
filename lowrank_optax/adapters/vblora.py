r"""`vblora`: factors of short vectors that are mixtures of the vectors of one trained bank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import STATIC, Flattened, node
from lowrank_optax.adapters.request import Request
from lowrank_optax.adapters.shared import Shared, SharedBank
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
class VBLoRA(Flattened, Shared):
    r"""The change :math:`A B` with the columns of A and the rows of B cut into pieces of length b. A piece is

    .. math:: \sum_{i \in T} \mathrm{softmax}(\ell_T)_i\, v_i

    with T the `top` largest of its logits :math:`\ell` over the h vectors v of a bank that all layers share and train.
    Vectors outside of T get no gradient. The change is small and not zero at the start.

    Attributes:
      logits_A: `(batch..., r, m / b, h)`, Gaussian of standard deviation 0.01 at the start.
      logits_B: `(batch..., n / b, r, h)`, likewise.
      bank: the `VectorBank`, None in the tree of changes, which holds it once.
      inputs: the number of input axes of the kernel, 1 by default; static.
      top: the number of vectors in a mixture, 2 by default; static. `variant("vblora", top=...)` sets it.

    References:
      arXiv:2405.15179.
    """

    kind: ClassVar[str] = "vblora"
    bank_name: ClassVar[str] = "vblora_bank"

    logits_A: jax.Array
    logits_B: jax.Array
    bank: VectorBank | None = None
    top: int = dataclasses.field(default=2, kw_only=True, metadata=STATIC)

    @classmethod
    def make(cls, request: Request, vectors: int = 256, length: int = 256, top: int | None = None) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        top = cls.top if top is None else top
        if top < 1:
            raise request.refuse(cls.kind, f"top is the number of vectors in a mixture, from 1, got {top!r}")
        if request.m % length or request.n % length or vectors < top:
            raise request.refuse(
                cls.kind,
                f"m, n are {request.m}, {request.n} and vectors of length {length} cut both; there are at least "
                f"{top} vectors: kind=lro.adapters.variant('vblora', vectors={vectors}, length=...)",
            )
        r, h = request.rank, vectors
        logits_A = request.normal(0, r, request.m // length, h, std=0.01)
        logits_B = request.normal(1, request.n // length, r, h, std=0.01)
        return cls(logits_A, logits_B, inputs=request.split.inputs, top=top), None

    @classmethod
    def draw_bank(cls, key: jax.Array, requests: Sequence[Request], changes: Sequence[Any]) -> VectorBank:
        """The vectors of the paper's code."""
        length, vectors = requests[0].m // changes[0].logits_A.shape[-2], changes[0].logits_A.shape[-1]
        return VectorBank(jax.random.uniform(key, (vectors, length), requests[0].W.dtype, -0.02, 0.02))

    @property
    def batch(self) -> int:
        return self.logits_A.ndim - 3

    @property
    def sides(self) -> tuple[int, int]:
        length = self.needed().vectors.shape[-1]
        return self.logits_A.shape[-2] * length, self.logits_B.shape[-3] * length

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
