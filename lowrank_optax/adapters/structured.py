r"""Changes of high rank from few numbers: `loha` and `hira` (Hadamard), `lokr` (Kronecker products), `fourier`."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Change, Flattened, Sized, dense_base, indices, node, scaled_identity
from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes
from lowrank_optax.layout import map_matrices
from lowrank_optax.linalg import highest_precision, working_dtype
from lowrank_optax.lowrank import LowRank


@node
class LoHa(Change):
    r"""The change :math:`s\,(A_1 B_1) \circ (A_2 B_2)`, of rank up to `r^2`.

    A layer multiplies with its `r^2` components, :math:`(x\,(A_1 * A_2))\,(B_1 * B_2)` with products of all pairs of
    columns and rows, or with the formed product where that takes fewer operations.

    Attributes:
      A1, A2: `(batch..., in..., r)`.
      B1, B2: `(batch..., r, out...)`. B2 is zero at the start.
      scale: s, `(batch...)`, not trained.

    References:
      arXiv:2108.06098, proposition 1.
    """

    kind: ClassVar[str] = "loha"
    bounded: ClassVar[bool] = False

    A1: jax.Array
    B1: jax.Array
    A2: jax.Array
    B2: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        m, n, r = request.m, request.n, request.rank
        A1, A2 = (request.rows(request.normal(tag, m, r)) for tag in (0, 1))
        B1 = request.columns(request.normal(2, r, n, std=0.1))
        return cls(A1, B1, A2, jnp.zeros_like(B1), request.number(request.scale)), None

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.A1.ndim - 1 - self.batch)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (*self.A1.shape[:-1], *self.B1.shape[self.batch + 1 :])

    def part(self, base: Any) -> LowRank | jax.Array:
        b, r = self.batch, self.A1.shape[-1]
        shape = tuple(base.shape)
        inner = sum(self.axes(shape))
        m, n = math.prod(shape[b:inner]), math.prod(shape[inner:])
        V1, V2 = (jnp.moveaxis(B, b, -1) for B in (self.B1, self.B2))
        U, V = (_pairs(*xy) for xy in ((self.A1, self.A2), (V1, V2)))
        scale = jax.lax.stop_gradient(self.scale)[..., None, None]
        D = LowRank(U, scaled_identity(scale[..., 0, 0], r * r), V)
        if r * r * (m + n) <= m * n:
            return D
        flat = [x.reshape(*x.shape[:b], -1, r) for x in (self.A1, self.A2, V1, V2)]
        return map_matrices(_hadamard, *flat, scale).reshape(shape)


def _pairs(x: jax.Array, y: jax.Array) -> jax.Array:
    """The products of all pairs of columns: `(..., r)` and `(..., r)` give `(..., r^2)`."""
    return (x[..., :, None] * y[..., None, :]).reshape(*x.shape[:-1], -1)


def _hadamard(A1: jax.Array, A2: jax.Array, V1: jax.Array, V2: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * (A1 @ V1.T) * (A2 @ V2.T)


@node
class HiRA(Change):
    r"""The change :math:`s\,W_0 \circ (A B)`, which scales every entry of W0 and has a high rank where W0 has.

    Attributes:
      A: `(batch..., in..., r)`.
      B: `(batch..., r, out...)`, zero at the start.
      scale: s, `(batch...)`, not trained.

    References:
      Huang et al., HiRA: parameter-efficient Hadamard high-rank adaptation, ICLR 2025, equation 3.
    """

    kind: ClassVar[str] = "hira"

    A: jax.Array
    B: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        A, B, _ = request.start.pair(request)
        return cls(request.rows(A), request.columns(B), request.number(request.scale)), None

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.A.ndim - 1 - self.batch)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (*self.A.shape[:-1], *self.B.shape[self.batch + 1 :])

    @highest_precision
    def part(self, base: Any) -> jax.Array:
        dense, b, r = dense_base(base), self.batch, self.A.shape[-1]
        A, B = self.A.reshape(*self.A.shape[:b], -1, r), self.B.reshape(*self.B.shape[: b + 1], -1)
        scale = jax.lax.stop_gradient(self.scale)[..., None, None]
        return dense.astype(working_dtype(dense)) * (scale * (A @ B)).reshape(dense.shape)

    def undo(self, merged: jax.Array) -> jax.Array:
        raise ValueError("W0 is not told from a merged kernel of kind 'hira', whose entries may vanish: keep the base")


@node
class LoKr(Flattened):
    r"""The change :math:`s\, C \otimes (A B)`, a Kronecker product.

    With :math:`m = m_1 m_2`, :math:`n = n_1 n_2` and m1, n1 the largest divisors up to the square root, C is
    m1 x n1. Where the rank is below `max(m2, n2) / 2`, as in PEFT, the other factor is A B, else a full B of m2 x n2
    and A None.

    Attributes:
      C: `(batch..., m1, n1)`, zero at the start.
      A: `(batch..., m2, r)` or None.
      B: `(batch..., r, n2)`, or `(batch..., m2, n2)` without A.
      scale: s, `(batch...)`, not trained.
      inputs: the number of input axes of the kernel, 1 by default; static.

    References:
      arXiv:2212.10650, section 3.2, and the LoKr of LyCORIS (arXiv:2309.14859, equation 4).
    """

    kind: ClassVar[str] = "lokr"
    bounded: ClassVar[bool] = False

    C: jax.Array
    A: jax.Array | None
    B: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        m1, n1 = divisor(request.m), divisor(request.n)
        m2, n2, r = request.m // m1, request.n // n1, request.rank
        C = jnp.zeros((*request.batch, m1, n1), request.W.dtype)
        pair = 2 * r < max(m2, n2)
        A = request.normal(0, m2, r, std=m2**-0.5) if pair else None
        B = request.normal(1, r, n2) if pair else request.normal(1, m2, n2, std=m2**-0.5)
        return cls(C, A, B, request.number(request.scale), inputs=request.split.inputs), None

    @property
    def sides(self) -> tuple[int, int]:
        rows = (self.B if self.A is None else self.A).shape[-2]
        return self.C.shape[-2] * rows, self.C.shape[-1] * self.B.shape[-1]

    @highest_precision
    def part(self, base: Any) -> jax.Array:
        second = self.B if self.A is None else self.A @ self.B
        scale = jax.lax.stop_gradient(self.scale)[..., None, None]
        return map_matrices(jnp.kron, scale * self.C, second).reshape(tuple(base.shape))


def divisor(size: int) -> int:
    """The largest divisor up to the square root."""
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)


@node
class Fourier(Sized):
    r"""The change :math:`s\,\mathrm{Re}\,\mathcal{F}^{-1}(F)`: k trained entries F of a two-dimensional spectrum.

    The rank is k, the number of entries, at random positions that all start at zero. alpha is s itself, 150 by default.

    Attributes:
      F: `(batch..., k)`.
      positions: `(batch..., k, 2)`, row and column of each entry, not trained; floating, like all leaves that have
        gradients, and in four bytes or more.
      scale: s, `(batch...)`, not trained.

    References:
      arXiv:2405.03003, equations 2 to 4.
    """

    kind: ClassVar[str] = "fourier"
    own_alpha: ClassVar[float | None] = 150.0
    bounded: ClassVar[bool] = False
    frozen: ClassVar[frozenset[str]] = frozenset({"positions", "scale"})

    F: jax.Array
    positions: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        m, n, k = request.m, request.n, request.rank
        if len(request.shape) != request.split.batch + 2:
            raise request.refuse(cls.kind, "it needs one input and one output axis; leave it out with `where`")
        if k > m * n:
            raise request.refuse(cls.kind, f"its spectrum has {m * n} entries, and the rank {k} is their number")
        keys = jax.random.split(jax.random.fold_in(request.key, 0), (math.prod(request.batch),))
        flat = jnp.stack([jax.random.choice(one, m * n, (k,), replace=False) for one in keys])
        dtype = request.W.dtype
        positions = jnp.stack([flat // n, flat % n], -1).astype(dtype).reshape(*request.batch, k, 2)
        scale = request.number(request.scale)
        return cls(jnp.zeros((*request.batch, k), dtype), positions, scale, sides=(m, n)), None

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, 1)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape[:-2] == self.scale.shape and self.has_sides_of(shape)

    def part(self, base: Any) -> jax.Array:
        positions, scale = indices(self.positions, self.kind), jax.lax.stop_gradient(self.scale)
        m, n = base.shape[-2:]

        def one(F: jax.Array, at: jax.Array, scale: jax.Array) -> jax.Array:
            spectrum = jnp.zeros((m, n), F.dtype).at[at[:, 0], at[:, 1]].add(F)
            return scale * jnp.fft.ifft2(spectrum).real

        for _ in range(self.batch):
            one = jax.vmap(one)
        return one(self.F, positions, scale)
