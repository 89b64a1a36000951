r"""`rosa`: :math:`W = W_0 + s\,A B + S`, a pair of factors and the entries of a fixed sparse mask."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Change, node, times_base, to_dense
from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.request import Request
from lowrank_optax.adapters.starts import Gradient, Zero
from lowrank_optax.axes import Axes
from lowrank_optax.layout import map_replicated
from lowrank_optax.product import Product


@node
class Sparse(Change):
    r"""The change :math:`s\,A B + S` with k entries of S at fixed positions.

    With `start=gradient(grads)` the positions are those of the k largest entries of the gradient in absolute value,
    with `start="zero"` they are random; the pair starts as LoRA's. `variant("rosa", density=...)` chooses k as a share
    of the entries. S is spread to an array of the size of the kernel in each layer in turn.

    Attributes:
      pair: the `LoRA`.
      values: `(batch..., k)`, zero at the start.
      positions: `(batch..., k, 2)`, row and column of each entry of the kernel as a matrix, not trained; floating,
        like all leaves that have gradients.

    References:
      arXiv:2401.04679, section 4 and algorithm 1.
    """

    kind: ClassVar[str] = "rosa"
    frozen: ClassVar[frozenset[str]] = frozenset({"positions"})

    pair: Any
    values: jax.Array
    positions: jax.Array

    @classmethod
    def make(cls, request: Request, density: float = 0.01) -> tuple[Any, Any]:
        start, m, n = request.start, request.m, request.n
        if not isinstance(start, Zero | Gradient) or not 0 < density <= 1:
            raise request.refuse(cls.kind, "it has start='zero' or gradient(grads), and a density in (0, 1]")
        k = max(1, round(density * m * n))
        size = start.of(request) if isinstance(start, Gradient) else request.normal(3, m, n)
        at = map_replicated(_largest, size, k=k)
        positions = jnp.stack([at // n, at % n], -1).astype(request.W.dtype)
        A, B, _ = Zero().pair(request)
        pair = LoRA(request.rows(A), request.columns(B), request.number(request.scale))
        return cls(pair, jnp.zeros((*request.batch, k), request.W.dtype), positions), None

    @property
    def batch(self) -> int:
        return self.values.ndim - 1

    def axes(self, shape: tuple[int, ...]) -> Axes:
        axes: Axes = self.pair.axes(shape)
        return axes

    def fits(self, shape: tuple[int, ...]) -> bool:
        return bool(self.pair.fits(shape)) and self.values.shape[:-1] == shape[: self.batch]

    def apply(self, base: Any, product: Product) -> jax.Array:
        y = times_base(base, product)
        low, sparse = self.pair.part(base), self.entries(tuple(base.shape))
        return y + product.times(low.astype(y.dtype)) + product.times(sparse.astype(y.dtype))

    def part(self, base: Any) -> jax.Array:
        return to_dense(self.pair.part(base)) + self.entries(tuple(base.shape))

    def entries(self, shape: tuple[int, ...]) -> jax.Array:
        """S in the shape of the kernel."""
        inner = sum(self.axes(shape))
        m, n = math.prod(shape[self.batch : inner]), math.prod(shape[inner:])

        def one(values: jax.Array, at: jax.Array) -> jax.Array:
            return jnp.zeros((m, n), values.dtype).at[at[:, 0], at[:, 1]].add(values)

        for _ in range(self.batch):
            one = jax.vmap(one)
        return one(self.values, jax.lax.stop_gradient(self.positions).astype(jnp.int32)).reshape(shape)


def _largest(x: jax.Array, k: int) -> jax.Array:
    return jax.lax.top_k(jnp.abs(x).reshape(-1), k)[1]
