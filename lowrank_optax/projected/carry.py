"""How moments go along when a basis changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Change(NamedTuple):
    """A change of basis of one matrix.

    Attributes:
      overlap: `overlap()` returns C, `(r, r)`, the old basis in the new one.
      lift: `lift(x)` returns the coordinates x in the new basis: up by the old one, down by the new one.
      momentum: the first moment in the old basis, zeros if there is none.
      count: number of steps before this one.
    """

    overlap: Callable[[], jax.Array]
    lift: Callable[[jax.Array], jax.Array]
    momentum: jax.Array
    count: jax.Array  # type: ignore[assignment]


class Carry(NamedTuple):
    """A rule for moments.

    Attributes:
      moment: `moment(change, x, degree)` returns a moment in the new basis; the degree is 1 for first and 2 for second
        moments. None leaves moments as they are.
      restarts: whether the count of the inner transformation starts anew, and its bias correction with it.
      turns: whether the rule needs the overlap, which bases on both sides do not have.
    """

    moment: Callable[[Change, jax.Array, int], jax.Array] | None = None
    restarts: bool = False
    turns: bool = False


def keep() -> Carry:
    """Moments stay: coordinates of the old basis are read as coordinates of the new one."""
    return Carry()


def reset(count: bool = False) -> Carry:
    """Moments start at zero.

    Args:
      count: whether the step count of the inner transformation does too.
    """
    return Carry(lambda change, x, degree: jnp.zeros_like(x), restarts=count)


def rotate(b1: float | jax.Array | None = None, b2: float | jax.Array | None = None) -> Carry:
    r"""The moments of the gradient in the new basis, given its mean and variances in the old one.

    .. math::

      \mu \leftarrow C \mu, \quad \nu \leftarrow k_2 \left| C^{\circ 2}
      \Big(\frac{\nu}{k_2} - \big(\tfrac{\mu}{k_1}\big)^{\circ 2}\Big) + \big(\tfrac{C \mu}{k_1}\big)^{\circ 2} \right|

    with :math:`C = P_{new}^\top P_{old}` and the bias corrections :math:`k_i = 1 - b_i^t` after t steps. The rule for
    second moments is exact where coordinates of the gradient are uncorrelated.

    Args:
      b1: decay of the first moment; None for moments without bias correction.
      b2: decay of the second moment, likewise.

    References:
      Robert et al., LDAdam, `arXiv:2410.16103 <https://arxiv.org/abs/2410.16103>`_, 2024, equation 5.
    """

    def correction(decay: float | jax.Array | None, change: Change, x: jax.Array) -> Any:
        if decay is None:
            return 1.0
        return 1 - jnp.power(jnp.asarray(decay, x.dtype), jnp.maximum(change.count, 1))

    def moment(change: Change, x: jax.Array, degree: int) -> jax.Array:
        turn = change.overlap().astype(x.dtype)
        if degree == 1:
            return turn @ x
        k1, k2 = correction(b1, change, x), correction(b2, change, x)
        mean = change.momentum / k1
        return k2 * jnp.abs(jnp.square(turn) @ (x / k2 - jnp.square(mean)) + jnp.square(turn @ mean))

    return Carry(moment, turns=True)


def lift() -> Carry:
    """First moments go up by the old basis and down by the new one; second moments likewise, by their roots.

    Roots have no sign, so that second moments depend on the signs of the vectors of a basis; with `rotate` they do not.
    """

    def moment(change: Change, x: jax.Array, degree: int) -> jax.Array:
        return change.lift(x) if degree == 1 else jnp.square(change.lift(jnp.sqrt(x)))

    return Carry(moment)


CARRIES: dict[str, Callable[[], Carry]] = {
    "keep": keep,
    "reset": reset,
    "reset_count": lambda: reset(count=True),
    "rotate": rotate,
    "lift": lift,
}
