r"""LoRA-RITE: moments of a pair in bases that do not depend on how the product is shared between the factors.

With :math:`B^\top = U R`, U orthonormal and :math:`R = (B B^\top + \lambda I)^{1/2}`, the gradient of A is
:math:`G_A = s\,G B^\top = \bar G R` with :math:`\bar G = s\,G U`. Moments are kept for :math:`\bar G`, a first one and
a full r x r second one. When U turns to U', both go along with :math:`P = U'^\top U`,

.. math::
  V \leftarrow b_2 P V P^\top + (1 - b_2) \bar G^\top \bar G / m, \quad
  M \leftarrow b_1 M P^\top + (1 - b_1)\,\bar G (V + \rho I)^{-1/2}, \quad dA = M R^{-1}

where :math:`\rho` collects what the second moment loses when U turns, so that steps do not grow by it. B goes the same
way with A in the place of B. The direction :math:`dA\,B + A\,dB` is the same for all factors of one product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.pairs import flatten_pair, power_of_gram, stateful
from lowrank_optax.layout import map_matrices


class Side(NamedTuple):
    """The moments of one factor of k rows, beside another of l rows.

    Attributes:
      basis: U, `(batch..., l, r)`.
      mu: M, `(batch..., k, r)`.
      nu: V, `(batch..., r, r)`.
      lost: rho, `(batch..., 1, 1)`.
    """

    basis: jax.Array
    mu: jax.Array
    nu: jax.Array
    lost: jax.Array


class Sides(NamedTuple):
    """The moments of both factors."""

    A: Side
    B: Side


def scale_by_rite(b1: Any = 0.9, b2: Any = 0.999, damping: Any = 1e-8) -> optax.GradientTransformation:
    """The direction of LoRA-RITE for pairs; other gradients pass.

    Args:
      b1: the decay of the first moment.
      b2: the decay of the second moment. Both are corrected for the start at zero, as in Adafactor.
      damping: lambda. A small one makes the first steps from B = 0 large.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> tx = optax.chain(lro.adapters.scale_by_rite(), optax.scale_by_learning_rate(1e-3))

    References:
      arXiv:2410.20625, without the clipping of its code.
    """

    def start(pair: LoRA) -> Sides:
        _, _, A, B = flatten_pair(pair, pair)[0]
        return Sides(_zero(A, jnp.swapaxes(B, -1, -2)), _zero(jnp.swapaxes(B, -1, -2), A))

    def step(gradient: LoRA, pair: LoRA, old: Sides, count: jax.Array) -> tuple[LoRA, Sides]:
        (gA, gB, A, B), back = flatten_pair(gradient, pair)
        gB, V = jnp.swapaxes(gB, -1, -2), jnp.swapaxes(B, -1, -2)
        # b (1 - b^{t-1}) / (1 - b^t): moments are means of the gradients so far.
        decays = [b * (1 - b ** (count - 1)) / (1 - b**count) for b in (jnp.asarray(x, A.dtype) for x in (b1, b2))]
        numbers = [jnp.broadcast_to(x, pair.scale.shape) for x in (*decays, jnp.asarray(damping, A.dtype))]
        dA, side_A = map_matrices(_one, gA, V, old.A, *numbers)
        dB, side_B = map_matrices(_one, gB, A, old.B, *numbers)
        return back(dA, jnp.swapaxes(dB, -1, -2)), Sides(side_A, side_B)

    return stateful(start, step)


def _zero(own: jax.Array, other: jax.Array) -> Side:
    r = own.shape[-1]
    nu = jnp.zeros((*own.shape[:-2], r, r), own.dtype)
    return Side(jnp.zeros_like(other), jnp.zeros_like(own), nu, nu[..., :1, :1])


def _one(g: jax.Array, other: jax.Array, old: Side, b1: jax.Array, b2: jax.Array, damping: jax.Array) -> Any:
    """The direction of one factor, and its moments."""
    inverse = power_of_gram(other.T @ other + damping * jnp.eye(other.shape[1], dtype=other.dtype), -0.5)
    basis = other @ inverse
    P, bar = basis.T @ old.basis, g @ inverse
    moved = P @ old.nu @ P.T
    # Differences of eigenvalues: the two matrices are in two bases.
    most = jnp.max(jnp.linalg.eigvalsh(old.nu) - jnp.linalg.eigvalsh(moved))
    lost = b2 * (old.lost + jnp.clip(most, 0.0, jnp.trace(old.nu) - jnp.trace(moved)))
    nu = b2 * moved + (1 - b2) * (bar.T @ bar) / g.shape[0]
    step = bar @ power_of_gram(nu + lost * jnp.eye(nu.shape[0], dtype=nu.dtype), -0.5)
    mu = b1 * old.mu @ P.T + (1 - b1) * step
    return mu @ inverse, Side(basis, mu, nu, lost)
