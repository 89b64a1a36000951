r"""Changes of equal blocks: `miss` (one block of rows repeated), `gralora` (a grid of pairs), `c3a` (circulants)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.change import Flattened, Sized, node, scaled_identity
from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes
from lowrank_optax.lowrank import LowRank


@node
class MiSS(Sized):
    r"""The change :math:`D_{ij} = s\,E_{(i \bmod r)\,j}`: the rows of E one after the other, until there are m.

    Attributes:
      E: `(batch..., r, out...)`, zero at the start.
      scale: s, `(batch...)`, not trained.

    References:
      arXiv:2409.15371.
    """

    kind: ClassVar[str] = "miss"

    E: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        E = jnp.zeros((*request.batch, request.rank, request.n), request.W.dtype)
        return cls(request.columns(E), request.number(request.scale), sides=(request.m, request.n)), None

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, len(shape) - self.E.ndim + 1)

    def fits(self, shape: tuple[int, ...]) -> bool:
        b, outputs = self.batch, self.E.shape[self.batch + 1 :]
        inputs = len(shape) - b - len(outputs)
        same = shape[:b] == self.E.shape[:b] and shape[len(shape) - len(outputs) :] == outputs
        return same and inputs > 0 and self.has_sides_of(shape)

    def part(self, base: Any) -> LowRank:
        shape, b, r = tuple(base.shape), self.batch, self.E.shape[self.batch]
        inner = sum(self.axes(shape))
        m = math.prod(shape[b:inner])
        repeated = jnp.asarray(np.resize(np.eye(r), (m, r)), self.E.dtype)
        U = jnp.broadcast_to(repeated, (*shape[:b], m, r)).reshape(*shape[:inner], r)
        return LowRank(U, scaled_identity(jax.lax.stop_gradient(self.scale), r), jnp.moveaxis(self.E, b, -1))


@node
class GraLoRA(Flattened):
    r"""A grid of k x k blocks, each with a pair of rank :math:`r / k`,

    .. math:: D_{(i)(j)} = s\, A_i^{(j)} B_j^{(i)}

    where :math:`A_i^{(j)}` are the columns of the j-th of k equal parts of A_i, and :math:`B_j^{(i)}` the rows of the
    i-th part of B_j. A layer multiplies with a product of rank `k r`, most of whose entries are zero.

    Attributes:
      A: `(batch..., k, m / k, r)`.
      B: `(batch..., k, r, n / k)`, zero at the start.
      scale: s, `(batch...)`, not trained.
      inputs: the number of input axes of the kernel, 1 by default; static.

    References:
      arXiv:2505.20355.
    """

    kind: ClassVar[str] = "gralora"

    A: jax.Array
    B: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request, k: int = 2) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        m, n, r = request.m, request.n, request.rank
        if m % k or n % k or r % k:
            raise request.refuse(cls.kind, f"k = {k} divides m, n and the rank, got {m}, {n} and {r}")
        A = request.uniform(0, k, m // k, r, bound=(k / m) ** 0.5)
        B = jnp.zeros((*request.batch, k, r, n // k), A.dtype)
        return cls(A, B, request.number(request.scale), inputs=request.split.inputs), None

    @property
    def sides(self) -> tuple[int, int]:
        k = self.A.shape[-3]
        return k * self.A.shape[-2], k * self.B.shape[-1]

    def part(self, base: Any) -> LowRank:
        shape, b = tuple(base.shape), self.batch
        inner, batch = sum(self.axes(shape)), shape[:b]
        k, rows, r = self.A.shape[-3:]
        columns, each = self.B.shape[-1], r // k
        # Column (i, j, p) of U has A_i^{(j)} in the i-th block of rows; of V it has B_j^{(i)} in the j-th.
        eye = jnp.eye(k, dtype=self.A.dtype)
        A = self.A.reshape(*batch, k, rows, k, each)
        B = self.B.reshape(*batch, k, k, each, columns)  # [j, i, p, column]
        U = jnp.einsum("...icjp,iI->...Icijp", A, eye).reshape(*shape[:inner], k * r)
        V = jnp.einsum("...jipc,jJ->...Jcijp", B, eye).reshape(*batch, *shape[inner:], k * r)
        return LowRank(U, scaled_identity(jax.lax.stop_gradient(self.scale), k * r), V)


@node
class C3A(Flattened):
    r"""The change whose blocks of b x b are circulant, :math:`D_{(ip)(jq)} = w_{ji\,((p - q) \bmod b)} / m`.

    The rank is b, a divisor of m and n; a kernel trains `m n / b` numbers. A layer forms D.

    Attributes:
      w: `(batch..., n / b, m / b, b)`, zero at the start.
      inputs: the number of input axes of the kernel, 1 by default; static.

    References:
      arXiv:2407.19342; its code and PEFT divide by m too.
    """

    kind: ClassVar[str] = "c3a"
    frozen: ClassVar[frozenset[str]] = frozenset()
    bounded: ClassVar[bool] = False

    w: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        m, n, b = request.m, request.n, request.rank
        if m % b or n % b:
            raise request.refuse(cls.kind, f"the rank is the size of its blocks, which divides m and n, {m} and {n}")
        w = jnp.zeros((*request.batch, n // b, m // b, b), request.W.dtype)
        return cls(w, inputs=request.split.inputs), None

    @property
    def batch(self) -> int:
        return self.w.ndim - 3

    @property
    def sides(self) -> tuple[int, int]:
        columns, rows, b = self.w.shape[-3:]
        return rows * b, columns * b

    def part(self, base: Any) -> jax.Array:
        b = self.w.shape[-1]
        turned = self.w[..., (np.arange(b)[:, None] - np.arange(b)[None]) % b]  # [j, i, p, q]
        D = jnp.einsum("...jipq->...ipjq", turned) / (self.w.shape[-2] * b)
        return D.reshape(tuple(base.shape))
