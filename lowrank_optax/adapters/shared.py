r"""`vera`: :math:`W = W_0 + A\,\mathrm{diag}(d)\,B^\top \mathrm{diag}(b)` with one random bank for all layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Change, node
from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes
from lowrank_optax.lowrank import LowRank

BANK = "vera_bank"  # the name of the bank in the tree of changes


@node
class Bank:
    """Random factors that all layers share, not trained; a layer of m inputs and n outputs uses the first rows.

    Attributes:
      A: `(most inputs, r)`.
      B: `(most outputs, r)`.
    """

    A: jax.Array
    B: jax.Array

    def labels(self) -> Any:
        """Nothing of it is trained."""
        label: Any = "frozen"
        return Bank(label, label)


@node
class VeRA(Change):
    r"""The change :math:`A\,\mathrm{diag}(d)\,B^\top\,\mathrm{diag}(b)` of a kernel, `n + r` trained numbers.

    Attributes:
      b: `(batch..., out...)`, zero at the start.
      d: `(batch..., r)`, 0.1 at the start.
      bank: the `Bank`, None in the tree of changes, which holds it once.

    References:
      arXiv:2310.11454, equation 2.
    """

    kind: ClassVar[str] = "vera"
    bounded: ClassVar[bool] = False
    frozen: ClassVar[frozenset[str]] = frozenset({"bank"})

    b: jax.Array
    d: jax.Array
    bank: Bank | None = None

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        b = request.columns(jnp.zeros((*request.batch, request.n), request.W.dtype))
        return cls(b, jnp.full((*request.batch, request.rank), 0.1, request.W.dtype)), None

    @property
    def batch(self) -> int:
        return self.d.ndim - 1

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, len(shape) - self.b.ndim)

    def fits(self, shape: tuple[int, ...]) -> bool:
        b, outputs = self.batch, self.b.shape[self.batch :]
        return shape[:b] == self.b.shape[:b] and shape[len(shape) - len(outputs) :] == outputs and b < len(shape) - 1

    def with_bank(self, bank: Bank) -> VeRA:
        """The change with a bank for each kernel of the stack, so that `nn.scan` slices it like other arrays."""
        batch = self.d.shape[:-1]
        A, B = (jnp.broadcast_to(x, (*batch, *x.shape)) for x in (bank.A, bank.B))
        return dataclasses.replace(self, bank=Bank(A, B))

    def part(self, base: Any) -> LowRank:
        if self.bank is None:
            raise ValueError("a change of kind 'vera' needs the bank of its tree: lro.adapters.attach(params, delta)")
        shape, batch, inner = tuple(base.shape), self.d.shape[:-1], sum(self.axes(tuple(base.shape)))
        m, n = math.prod(shape[self.batch : inner]), math.prod(shape[inner:])
        A, B = jax.lax.stop_gradient((self.bank.A[..., :m, :], self.bank.B[..., :n, :]))
        V = self.b.reshape(*batch, n, 1) * B
        eye = jnp.eye(self.d.shape[-1], dtype=self.d.dtype)
        S = self.d[..., None, :] * eye.reshape((1,) * self.batch + eye.shape)
        return LowRank(A.reshape(*shape[:inner], -1), S, V.reshape(*batch, *shape[inner:], -1))


def draw_bank(key: jax.Array, sizes: list[tuple[int, int]], rank: int, dtype: Any) -> Bank:
    """A bank for kernels of these sizes (m, n), Kaiming uniform as in the paper."""
    m, n = (max(size) for size in zip(*sizes, strict=True))
    of_A, of_B = jax.random.split(key)
    A = jax.random.uniform(of_A, (m, rank), dtype, -1, 1) * (6 / m) ** 0.5
    B = jax.random.uniform(of_B, (n, rank), dtype, -1, 1) * (6 / rank) ** 0.5
    return Bank(A, B)
