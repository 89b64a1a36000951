r"""Muon for a pair of factors: polar factors of their momenta."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.pairs import flatten_pair, power_of_gram, stateful
from lowrank_optax.layout import map_matrices


class Momenta(NamedTuple):
    """The momenta of a pair.

    Attributes:
      A: `(batch..., m, r)`.
      B: `(batch..., r, n)`.
    """

    A: jax.Array
    B: jax.Array


def scale_by_muon(b1: Any = 0.95, damping: Any = None) -> optax.GradientTransformation:
    r"""Replaces the gradients of a pair by polar factors of their momenta, :math:`\mathrm{polar}(M_A)` and
    :math:`\mathrm{polar}(M_B)`. With a damping :math:`\lambda` it is LoRA-Muon,

    .. math:: \tfrac12\,\mathrm{polar}(M_A R_B) R_B, \quad \tfrac12\,R_A\,\mathrm{polar}(R_A M_B), \quad
      R_A = (A^\top A + \lambda I)^{-1/2},\ R_B = (B B^\top + \lambda I)^{-1/2},

    so that each factor moves A B by a matrix of spectral norm at most 1/2.

    Args:
      b1: the decay of the momenta, :math:`M \leftarrow b_1 M + (1 - b_1) G`.
      damping: lambda, or None.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> tx = optax.chain(lro.adapters.scale_by_muon(), optax.scale_by_learning_rate(0.02))

    References:
      arXiv:2606.12921, whose lambda is zero. Polar factors are exact, from r x r eigenvalues.
    """

    def start(pair: LoRA) -> Momenta:
        _, _, A, B = flatten_pair(pair, pair)[0]
        return Momenta(jnp.zeros_like(A), jnp.zeros_like(B))

    def step(gradient: LoRA, pair: LoRA, old: Momenta, count: jax.Array) -> tuple[LoRA, Momenta]:
        (gA, gB, A, B), back = flatten_pair(gradient, pair)
        new = Momenta(b1 * old.A + (1 - b1) * gA, b1 * old.B + (1 - b1) * gB)
        if damping is None:
            left, right = map_matrices(_polar, new.A), map_matrices(_polar_of_rows, new.B)
        else:
            each = jnp.broadcast_to(jnp.asarray(damping, A.dtype), pair.scale.shape)
            left, right = map_matrices(_whitened, new.A, new.B, A, B, each)
        return back(left, right), Momenta(new.A.astype(old.A.dtype), new.B.astype(old.B.dtype))

    return stateful(start, step)


def _polar(x: jax.Array) -> jax.Array:
    """x (x^T x)^{-1/2} of a tall matrix; zero stays zero."""
    return x @ power_of_gram(x.T @ x, -0.5)


def _polar_of_rows(x: jax.Array) -> jax.Array:
    """The same of a wide matrix."""
    return _polar(x.T).T


def _whitened(mA: jax.Array, mB: jax.Array, A: jax.Array, B: jax.Array, damping: jax.Array) -> Any:
    eye = damping * jnp.eye(A.shape[1], dtype=A.dtype)
    root_A, root_B = power_of_gram(A.T @ A + eye, -0.5), power_of_gram(B @ B.T + eye, -0.5)
    return 0.5 * _polar(mA @ root_B) @ root_B, 0.5 * (_polar(mB.T @ root_A) @ root_A).T
