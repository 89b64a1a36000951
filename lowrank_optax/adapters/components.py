r"""`adalora` and `delora`: sums of r components, each of a trained size.

.. math:: D = A\, \mathrm{diag}(e)\, B = \sum_i e_i\, a_i b_i^\top
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Change, diagonals, node
from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes
from lowrank_optax.layout import map_matrices
from lowrank_optax.lowrank import LowRank


@node
class Components(Change):
    r"""The change :math:`s\,A\,\mathrm{diag}(E) B`, whose components `allocate` takes away from kernels by a score.

    AdaLoRA adds a penalty on :math:`|A^\top A - I|_F^2 + |B B^\top - I|_F^2` to the loss, see `orthogonality`. Its
    scale in PEFT is :math:`\alpha / (r + 10^{-5})`.

    Attributes:
      A: `(batch..., in..., r)`, Gaussian of standard deviation 0.02 at the start.
      E: `(batch..., r)`, zero at the start.
      B: `(batch..., r, out...)`, like A.
      scale: s, `(batch...)`, not trained.

    References:
      arXiv:2303.10512, equation 3.
    """

    kind: ClassVar[str] = "adalora"

    A: jax.Array
    E: jax.Array
    B: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        m, n, r = request.m, request.n, request.rank
        A, B = request.normal(0, m, r, std=0.02), request.normal(1, r, n, std=0.02)
        E = jnp.zeros((*request.batch, r), A.dtype)
        return cls(request.rows(A), E, request.columns(B), request.number(request.scale)), None

    @property
    def batch(self) -> int:
        return self.scale.ndim

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.A.ndim - 1 - self.batch)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (*self.A.shape[:-1], *self.B.shape[self.batch + 1 :])

    def part(self, base: Any) -> LowRank:
        scale = jax.lax.stop_gradient(self.scale)[..., None]
        return LowRank(self.A, diagonals(scale * self.E), jnp.moveaxis(self.B, self.batch, -1))


@node
class DeLoRA(Change):
    r"""The change of bounded size with trained length :math:`\lambda`,

    .. math:: D = \frac{\lambda}{r}\, \mathrm{diag}(w) \sum_i \frac{a_i b_i^\top}{|a_i| |b_i|}, \quad w_i = |(W_0)_i|,

    with norms from 1e-4, and w the lengths of the rows of W0. `alpha` is :math:`\lambda` at the start, 15 by default.

    Attributes:
      A: `(batch..., in..., r)`.
      B: `(batch..., r, out...)`, zero at the start.
      lam: :math:`\lambda`, `(batch...)`.
      lengths: w, `(batch..., in..., 1)`, not trained.

    References:
      arXiv:2503.18225, equation 5.
    """

    kind: ClassVar[str] = "delora"
    frozen: ClassVar[frozenset[str]] = frozenset({"lengths"})
    own_alpha: ClassVar[float | None] = 15.0

    A: jax.Array
    B: jax.Array
    lam: jax.Array
    lengths: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        A, B, _ = request.start.pair(request)
        lengths = jnp.sqrt(jnp.sum(request.W**2, -1, keepdims=True))
        return cls(request.rows(A), request.columns(B), request.number(request.scale), request.rows(lengths)), None

    @property
    def batch(self) -> int:
        return self.lam.ndim

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.A.ndim - 1 - self.batch)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (*self.A.shape[:-1], *self.B.shape[self.batch + 1 :])

    def part(self, base: Any) -> LowRank:
        b, r = self.batch, self.A.shape[-1]
        V = jnp.moveaxis(self.B, b, -1)
        norms = [map_matrices(_norms, x.reshape(*x.shape[:b], -1, r)) for x in (self.A, V)]
        sizes = self.lam[..., None] / (r * norms[0] * norms[1])
        return LowRank(jax.lax.stop_gradient(self.lengths) * self.A, diagonals(sizes), V)


def _norms(x: jax.Array) -> jax.Array:
    """The norms of the columns, from 1e-4. A zero column has no gradient of its own norm."""
    squares = jnp.sum(x * x, axis=0)
    return jnp.where(squares > 1e-8, jnp.sqrt(jnp.where(squares > 1e-8, squares, 1.0)), 1e-4)
