r"""`allora`: a pair of factors whose gradients shrink for outputs that the change has moved already."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import STATIC, node, scaled_identity, times_base
from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.request import Request
from lowrank_optax.layout import map_matrices
from lowrank_optax.lowrank import LowRank
from lowrank_optax.product import Product


@node
class ALLoRA(LoRA):
    r"""LoRA whose gradient of the product is multiplied by a number for each output j,

    .. math:: d_j = (|(A B)_j| + 1 / \eta^2)^{-1/2}, \quad G_A = (G D) B^\top, \quad G_B = A^\top G D,

    with :math:`D = \mathrm{diag}(d)`. d is :math:`\eta` while B is zero and falls as the column grows. No optimizer can
    do this to :math:`G_A`, which has G summed over outputs, so it is a kind and not a rule. Inputs of the layer get
    the gradient of the plain product.

    The scale is 1, as in the paper, if `alpha` is not given.

    Attributes:
      A: `(batch..., in..., r)`.
      B: `(batch..., r, out...)`.
      scale: s, `(batch...)`, not trained.
      eta: :math:`\eta`, the square root of 2 by default; static. `variant("allora", eta=...)` sets it.

    References:
      arXiv:2410.09692.
    """

    kind: ClassVar[str] = "allora"

    A: jax.Array
    B: jax.Array
    scale: jax.Array
    eta: float = dataclasses.field(default=2.0**0.5, kw_only=True, metadata=STATIC)

    @classmethod
    def make(cls, request: Request, eta: float | None = None) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        eta = cls.eta if eta is None else eta
        if not 0 < eta < math.inf:
            raise request.refuse(cls.kind, f"its eta is a positive number, got {eta!r}")
        change, taken = super().make(request)
        return dataclasses.replace(change, eta=float(eta)), taken

    def apply(self, base: Any, product: Product) -> jax.Array:
        """A layer is linear in its kernel, so terms of value zero give the factors other gradients than the inputs."""
        y, D = times_base(base, product), self.part(base)
        D = D.astype(y.dtype)
        A, S, V = jax.lax.stop_gradient((D.U, D.S, D.V))
        d = self._scales().astype(y.dtype)
        U = jnp.concatenate([D.U, A], -1)
        twice = scaled_identity(jax.lax.stop_gradient(self.scale).astype(y.dtype), U.shape[-1])
        both = LowRank(U, twice, jnp.concatenate([V * d, D.V * d], -1))
        return y + product.times(LowRank(A, S, V)) + product.times(both) - product.times(jax.lax.stop_gradient(both))

    def _scales(self) -> jax.Array:
        """d, `(batch..., out..., 1)`."""
        b, r = self.batch, self.A.shape[-1]
        A, B = jax.lax.stop_gradient((self.A.reshape(*self.A.shape[:b], -1, r), self.B))
        lengths = map_matrices(_lengths, A, B.reshape(*B.shape[: b + 1], -1), jax.lax.stop_gradient(self.scale))
        d = (lengths + self.eta**-2) ** -0.5
        return d.reshape(*B.shape[:b], *B.shape[b + 1 :], 1)


def _lengths(A: jax.Array, B: jax.Array, s: jax.Array) -> jax.Array:
    """The norms of the columns of s A B."""
    return jnp.abs(s) * jnp.sqrt(jnp.maximum(jnp.sum(B * ((A.T @ A) @ B), axis=0), 0.0))
