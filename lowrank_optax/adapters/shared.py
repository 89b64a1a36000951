r"""Changes of all layers from one bank: the base classes, and `vera`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Change, Sized, diagonals, node
from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes
from lowrank_optax.lowrank import LowRank


class SharedBank:
    """Arrays that all layers share, which a tree of changes holds once: the base class of banks.

    Attributes:
      label: `"trained"` or `"frozen"`, for all of its arrays.
    """

    label: ClassVar[str] = "frozen"

    def labels(self) -> Any:
        """The label in the place of every array."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return dataclasses.replace(self, **{field.name: self.label for field in fields})  # type: ignore[type-var]


class Shared(Change):
    """A change with a `bank` that it shares with other layers: the base class of such kinds.

    Its field `bank` is None in a tree of changes, which holds the bank once under `bank_name`.

    Attributes:
      bank_name: the name of the bank in the tree of changes.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"bank", "scale"})
    bounded: ClassVar[bool] = False
    bank_name: ClassVar[str]

    bank: Any

    @classmethod
    def draw_bank(cls, key: jax.Array, requests: Sequence[Request], changes: Sequence[Any]) -> SharedBank:
        """The bank for these layers.

        Raises:
          ValueError: for layers that cannot share one.
        """
        raise NotImplementedError

    def with_bank(self, bank: Any) -> Any:
        """The change with a bank for each kernel of the stack, so that `nn.scan` slices it like other arrays."""
        batch = jax.tree.leaves(self)[0].shape[: self.batch]
        each = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), bank)
        return dataclasses.replace(self, bank=each)  # type: ignore[type-var]

    def needed(self) -> Any:
        """The bank.

        Raises:
          ValueError: for a change out of its tree.
        """
        if self.bank is None:
            raise ValueError(
                f"a change of kind {self.kind!r} needs the bank of its tree: lro.adapters.attach(params, delta)"
            )
        return self.bank


def is_shared(x: Any) -> bool:
    """Whether x is a change that shares a bank."""
    return isinstance(x, Shared)


def shared_in(tree: Any) -> list[Any]:
    """The changes of a tree that share a bank, also inside of others."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_shared) if is_shared(x)]


def equal_ranks(requests: Sequence[Request], kind: str) -> int:
    """The rank of all layers.

    Raises:
      ValueError: if they differ.
    """
    ranks = {request.rank for request in requests}
    if len(ranks) > 1:
        raise ValueError(f"layers of kind {kind!r} share one bank and have one rank, got {sorted(ranks)}")
    return ranks.pop()


@node
class Bank(SharedBank):
    """Random factors of kind `vera`, not trained; a layer of m inputs and n outputs uses the first rows.

    Attributes:
      A: `(most inputs, r)`.
      B: `(most outputs, r)`.
    """

    A: jax.Array
    B: jax.Array


@node
class VeRA(Sized, Shared):
    r"""The change :math:`A\,\mathrm{diag}(d)\,B^\top\,\mathrm{diag}(b)` of a kernel, `n + r` trained numbers.

    Attributes:
      b: `(batch..., out...)`, zero at the start.
      d: `(batch..., r)`, 0.1 at the start.
      bank: the `Bank`, None in the tree of changes, which holds it once.

    References:
      arXiv:2310.11454, equation 2.
    """

    kind: ClassVar[str] = "vera"
    bank_name: ClassVar[str] = "vera_bank"

    b: jax.Array
    d: jax.Array
    bank: Bank | None = None

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        b = request.columns(jnp.zeros((*request.batch, request.n), request.W.dtype))
        d = jnp.full((*request.batch, request.rank), 0.1, request.W.dtype)
        return cls(b, d, sides=(request.m, request.n)), None

    @classmethod
    def draw_bank(cls, key: jax.Array, requests: Sequence[Request], changes: Sequence[Any]) -> Bank:
        """Kaiming uniform, as in the paper."""
        rank, dtype = equal_ranks(requests, cls.kind), requests[0].W.dtype
        m, n = max(request.m for request in requests), max(request.n for request in requests)
        of_A, of_B = jax.random.split(key)
        A = jax.random.uniform(of_A, (m, rank), dtype, -1, 1) * (6 / m) ** 0.5
        B = jax.random.uniform(of_B, (n, rank), dtype, -1, 1) * (6 / rank) ** 0.5
        return Bank(A, B)

    @property
    def batch(self) -> int:
        return self.d.ndim - 1

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, len(shape) - self.b.ndim)

    def fits(self, shape: tuple[int, ...]) -> bool:
        b, outputs = self.batch, self.b.shape[self.batch :]
        same = shape[:b] == self.b.shape[:b] and shape[len(shape) - len(outputs) :] == outputs
        return same and b < len(shape) - 1 and self.has_sides_of(shape)

    def part(self, base: Any) -> LowRank:
        bank = self.needed()
        shape, batch, inner = tuple(base.shape), self.d.shape[:-1], sum(self.axes(tuple(base.shape)))
        m, n = math.prod(shape[self.batch : inner]), math.prod(shape[inner:])
        A, B = jax.lax.stop_gradient((bank.A[..., :m, :], bank.B[..., :n, :]))
        V = self.b.reshape(*batch, n, 1) * B
        return LowRank(A.reshape(*shape[:inner], -1), diagonals(self.d), V.reshape(*batch, *shape[inner:], -1))
