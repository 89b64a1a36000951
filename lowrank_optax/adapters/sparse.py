r"""`shira`: the trained entries of a fixed sparse mask; `rosa`: such entries beside a pair of factors."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Change, Sized, indices, node, times_base, to_dense
from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.request import Request
from lowrank_optax.adapters.starts import Gradient, Zero
from lowrank_optax.axes import Axes
from lowrank_optax.layout import map_replicated
from lowrank_optax.product import Product


@node
class Entries(Sized):
    r"""The change S with k entries at fixed positions, spread to an array of the size of the kernel in each layer.

    By kind `shira` :math:`k = r (m + n)`, as many as LoRA trains. With `start=gradient(grads)` the positions are those
    of the k largest entries of the gradient in absolute value, with `start="zero"` they are random.

    Attributes:
      values: `(batch..., k)`, zero at the start.
      positions: `(batch..., k, 2)`, row and column of each entry of the kernel as a matrix, not trained; floating,
        like all leaves that have gradients, and in four bytes or more.

    References:
      arXiv:2406.13175.
    """

    kind: ClassVar[str] = "shira"
    frozen: ClassVar[frozenset[str]] = frozenset({"positions"})

    values: jax.Array
    positions: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        k = request.rank * (request.m + request.n)
        if len(request.shape) != request.split.batch + 2:
            raise request.refuse(cls.kind, "it needs one input and one output axis; leave it out with `where`")
        if k > request.m * request.n:
            raise request.refuse(cls.kind, f"it has {request.m * request.n} entries, and r (m + n) is {k}")
        return cls.largest(request, k), None

    @classmethod
    def largest(cls, request: Request, k: int) -> Entries:
        """Zeros at the k positions that the start asks for."""
        start, m, n = request.start, request.m, request.n
        if not isinstance(start, Zero) and type(start) is not Gradient:
            raise ValueError(f"a sparse change of {request.name!r} has start='zero' or gradient(grads)")
        size = start.of(request) if type(start) is Gradient else request.normal(3, m, n)
        at = map_replicated(_largest, size, k=k)
        positions = jnp.stack([at // n, at % n], -1).astype(request.W.dtype)
        return cls(jnp.zeros((*request.batch, k), request.W.dtype), positions, sides=(m, n))

    @property
    def batch(self) -> int:
        return self.values.ndim - 1

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, 1)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.values.shape[:-1] == shape[:-2] and self.has_sides_of(shape)

    def part(self, base: Any) -> jax.Array:
        return self.spread(tuple(base.shape), base.shape[-2])

    def spread(self, shape: tuple[int, ...], m: int) -> jax.Array:
        """S in the shape of a kernel with m rows as a matrix."""
        n = math.prod(shape[self.batch :]) // m

        def one(values: jax.Array, at: jax.Array) -> jax.Array:
            return jnp.zeros((m, n), values.dtype).at[at[:, 0], at[:, 1]].add(values)

        for _ in range(self.batch):
            one = jax.vmap(one)
        return one(self.values, indices(self.positions, self.kind)).reshape(shape)


@node
class Sparse(Change):
    r"""The change :math:`s\,A B + S`, a pair that starts as LoRA's beside the entries S.

    `variant("rosa", density=...)` chooses the share of the entries of the kernel, 0.01 by default. Positions are those
    of `Entries`.

    Attributes:
      pair: the `LoRA`.
      entries: the `Entries`.

    References:
      arXiv:2401.04679.
    """

    kind: ClassVar[str] = "rosa"
    frozen: ClassVar[frozenset[str]] = frozenset()

    pair: Any
    entries: Any

    @classmethod
    def make(cls, request: Request, density: float = 0.01) -> tuple[Any, Any]:
        if not 0 < density <= 1:
            raise request.refuse(cls.kind, f"its density is in (0, 1], got {density}")
        entries = Entries.largest(request, max(1, round(density * request.m * request.n)))
        A, B, _ = Zero().pair(request)
        return cls(LoRA(request.rows(A), request.columns(B), request.number(request.scale)), entries), None

    @property
    def batch(self) -> int:
        return int(self.entries.batch)

    def axes(self, shape: tuple[int, ...]) -> Axes:
        axes: Axes = self.pair.axes(shape)
        return axes

    def fits(self, shape: tuple[int, ...]) -> bool:
        return bool(self.pair.fits(shape)) and self.entries.values.shape[:-1] == shape[: self.batch]

    def apply(self, base: Any, product: Product) -> jax.Array:
        y, parts = times_base(base, product), self._parts(tuple(base.shape))
        return y + product.times(parts[0].astype(y.dtype)) + product.times(parts[1].astype(y.dtype))

    def part(self, base: Any) -> jax.Array:
        low, sparse = self._parts(tuple(base.shape))
        return to_dense(low) + sparse

    def _parts(self, shape: tuple[int, ...]) -> tuple[Any, jax.Array]:
        m = math.prod(shape[self.batch : sum(self.axes(shape))])
        return self.pair.part(None), self.entries.spread(shape, m)


def _largest(x: jax.Array, k: int) -> jax.Array:
    return jax.lax.top_k(jnp.abs(x).reshape(-1), k)[1]
