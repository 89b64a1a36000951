r"""`core` and `svfit`: a small trained matrix, or trained singular values, between frozen singular vectors.

.. math:: W = W_0 + s\,U C V^\top
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.adapters.change import Change, diagonals, node
from lowrank_optax.adapters.request import Request
from lowrank_optax.adapters.starts import SignStep
from lowrank_optax.axes import Axes
from lowrank_optax.layout import map_replicated
from lowrank_optax.lowrank import LowRank


@node
class Core(Change):
    r"""The change :math:`s\,U C V^\top` in a frozen frame, `r^2` trained numbers for each kernel.

    With :math:`W_0 \approx P \Sigma Q^\top` the frame is :math:`U = P \Sigma` and :math:`V = Q`: as in LoRA-XS the
    singular values weigh the inputs. C is zero at the start. With `start=sign_step(grads, step)` the frame are the
    leading singular vectors of a first step of sign descent, and C starts as its singular values: LoRA-SB.

    Attributes:
      U: `(batch..., in..., r)`, not trained.
      C: `(batch..., r, r)`.
      V: `(batch..., out..., r)`, not trained.
      scale: s, `(batch...)`, not trained.

    References:
      arXiv:2405.17604, equation 2. LoRA-SB: arXiv:2411.19557.
    """

    kind: ClassVar[str] = "core"
    frozen: ClassVar[frozenset[str]] = frozenset({"U", "V", "scale"})

    U: jax.Array
    C: jax.Array
    V: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        r = request.rank
        if isinstance(request.start, SignStep):
            U, sigma, V = map_replicated(_triples, request.start.of(request), rank=r)
            C = diagonals(sigma) / request.scale
        else:
            request.start.only_zero(cls.kind)
            U, sigma, V = map_replicated(_triples, request.W, rank=r)
            U, C = U * sigma[..., None, :], jnp.zeros((*request.batch, r, r), request.W.dtype)
        return cls(request.rows(U), C, request.outputs(V), request.number(request.scale)), None

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.U.ndim - 1 - self.batch)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (*self.U.shape[:-1], *self.V.shape[self.batch : -1])

    def part(self, base: Any) -> LowRank:
        U, V, scale = map(jax.lax.stop_gradient, (self.U, self.V, self.scale))
        return LowRank(U, scale[..., None, None] * self.C, V)


@node
class SingularValues(Change):
    r"""The r largest singular values, trained, :math:`W = W_e + U\,\mathrm{diag}(\sigma) V^\top`.

    `init` takes the leading part of W0 out of the base, which keeps the rest W_e, so weight decay acts on the singular
    values themselves. r trained numbers for each kernel.

    Attributes:
      U: `(batch..., in..., r)`, orthonormal, not trained.
      sigma: `(batch..., r)`.
      V: `(batch..., out..., r)`, orthonormal, not trained.

    References:
      arXiv:2409.05926.
    """

    kind: ClassVar[str] = "svfit"
    frozen: ClassVar[frozenset[str]] = frozenset({"U", "V"})

    U: jax.Array
    sigma: jax.Array
    V: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        U, sigma, V = map_replicated(_triples, request.W, rank=request.rank)
        return cls(request.rows(U), sigma, request.outputs(V)), LowRank(U, diagonals(sigma), V)

    @property
    def batch(self) -> int:
        return self.sigma.ndim - 1

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.U.ndim - 1 - self.batch)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (*self.U.shape[:-1], *self.V.shape[self.batch : -1])

    def part(self, base: Any) -> LowRank:
        U, V = map(jax.lax.stop_gradient, (self.U, self.V))
        return LowRank(U, diagonals(self.sigma), V)


def _triples(W: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular triples."""
    p, sigma, q = linalg.svd(W)
    return p[:, :rank], sigma[:rank], q[:, :rank]
