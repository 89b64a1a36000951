"""When a kernel gets a new basis. A schedule keeps a clock for each kernel, of scalars only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Refresh(NamedTuple):
    """A schedule of refreshes. A kernel whose basis is still missing is refreshed whatever the schedule says.

    Attributes:
      due: `due(clock, count, index, number, norm)` tells whether kernel `index` of `number` gets a new basis, True for
        always. `norm()` is the norm of the gradient in the current basis.
      init: `init()` returns the clock before the first step.
      after: `after(clock, refreshed, count, overlap, norm)` returns the clock after a step, given whether the kernel
        got a basis, `|cos|` of the first vectors of the old and the new one, and the norm of the gradient in the basis.
      together: whether all kernels are refreshed in the same steps.
      observes: whether there is an `after`.
    """

    due: Callable[..., Any]
    init: Callable[[], Any] = lambda: ()
    after: Callable[..., Any] = lambda clock, refreshed, count, overlap, norm: clock
    together: bool = True
    observes: bool = False


def every(period: int | jax.Array, stagger: bool = False, offset: int = 0) -> Refresh:
    """A new basis in every `period`-th step.

    Args:
      period: number of steps.
      stagger: whether kernels take turns: kernel i of n at the steps whose number has the remainder
        `i * period // n`. No step then has to compute all bases, and none takes much longer than another.
      offset: the first of these steps, counted from 0; the very first step makes a basis anyway. Code that counts from
        1 and refreshes where `period` divides the count has `offset=period - 1`.

    Example:
      >>> import lowrank_optax as lro
      >>> refresh = lro.refresh.every(200, stagger=True)
    """
    if not isinstance(period, jax.Array | np.ndarray) and not (isinstance(period, int | np.integer) and period >= 1):
        raise ValueError(f"a period is a number of steps, an int of at least 1, got {period!r}")

    def due(clock: Any, count: jax.Array, index: int, number: int, norm: Any) -> jax.Array:
        return count % period == (offset + (index * period // number if stagger else 0)) % period

    return Refresh(due, together=not stagger)


def always() -> Refresh:
    """A new basis in every step."""
    return Refresh(lambda *_: True)


def once() -> Refresh:
    """A basis from the first gradient that is not zero, for projectors that move it after every use."""
    return Refresh(lambda *_: jnp.zeros((), bool))


class Doubling(NamedTuple):
    """The clock of `doubling`: the period now, and the last overlaps."""

    period: jax.Array
    overlaps: jax.Array
    filled: jax.Array


def doubling(period: int = 200, threshold: float = 0.4, factor: int = 2, window: int = 5) -> Refresh:
    """A period that grows where the subspace stays.

    If the mean overlap of the last `window` refreshes is at least the threshold, the period is multiplied, and the
    window starts anew. The overlap is the cosine of the first vectors of the old and the new basis, without sign.

    Args:
      period: the first period.
      threshold: mean overlap from which on the period grows.
      factor: growth of the period.
      window: number of overlaps in the mean.

    References:
      Zhang et al., Q-GaLore, `arXiv:2407.08296 <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.3.
    """

    def init() -> Doubling:
        return Doubling(jnp.asarray(period, jnp.int32), jnp.zeros(window, jnp.float32), jnp.zeros((), jnp.int32))

    def due(clock: Doubling, count: jax.Array, index: int, number: int, norm: Any) -> jax.Array:
        return count % clock.period == 0

    def after(clock: Doubling, refreshed: jax.Array, count: jax.Array, overlap: jax.Array, norm: Any) -> Doubling:
        # The first refresh has no old basis to compare with.
        counts = refreshed & (count > 0)
        overlaps = jnp.roll(clock.overlaps, 1).at[0].set(overlap.astype(jnp.float32))
        filled = jnp.minimum(clock.filled + 1, window)
        grows = (filled == window) & (jnp.mean(overlaps) >= threshold)
        longer = jnp.minimum(clock.period, 2**30 // factor) * factor
        new = Doubling(jnp.where(grows, longer, clock.period), overlaps, jnp.where(grows, 0, filled))
        return jax.tree.map(lambda x, y: jnp.where(counts, x, y).astype(y.dtype), new, clock)

    return Refresh(due, init, after, together=False, observes=True)


class Converged(NamedTuple):
    """The clock of `converged`: the norm at the last refresh, and the steps since then."""

    reference: jax.Array
    steps: jax.Array


def converged(ratio: float | jax.Array = 0.5, at_most: int | jax.Array = 200) -> Refresh:
    r"""A new basis when the gradient inside the old one has become small, or after `at_most` steps.

    .. math:: |P^\top A_t| \le \text{ratio} \cdot |P^\top A_{t_0}|

    with t_0 the step of the last refresh.

    Args:
      ratio: of the norms, between 0 and 1.
      at_most: most steps with one basis.

    References:
      Refael et al., AdaRankGrad, `arXiv:2410.17881 <https://arxiv.org/abs/2410.17881>`_, 2024, algorithm 1.
    """

    def init() -> Converged:
        return Converged(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def due(clock: Converged, count: jax.Array, index: int, number: int, norm: Callable[[], jax.Array]) -> jax.Array:
        return (norm() <= ratio * clock.reference) | (clock.steps >= at_most)

    def after(clock: Converged, refreshed: jax.Array, count: jax.Array, overlap: Any, norm: jax.Array) -> Converged:
        reference = jnp.where(refreshed, norm.astype(jnp.float32), clock.reference)
        return Converged(reference, jnp.where(refreshed, 1, clock.steps + 1).astype(jnp.int32))

    return Refresh(due, init, after, together=False, observes=True)
