"""Rank policies: they choose how many singular values stay after a step, by a tolerance or by a global budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax import linalg


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The view that a policy has of one kernel, or of several of equal shape, after a step.

    Attributes:
      sigma: `(batch..., w)` singular values before truncation, descending.
      rank: `(batch...)` rank before the step.
      width: most singular values the factors can hold, static.
      shape: (m, n), static.
    """

    sigma: jax.Array
    rank: jax.Array
    width: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})


class RankPolicy:
    """Base class of rank policies: implement `choose`. Not callable, so that it is never taken for a schedule."""

    def choose(self, spectra: Sequence[Spectrum]) -> list[jax.Array]:
        """The ranks `(batch...)`, int32, at most `width`, of all kernels at once."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Tolerance(RankPolicy):
    theta: float | jax.Array
    min_rank: int
    max_rank: int | None

    def choose(self, spectra: Sequence[Spectrum]) -> list[jax.Array]:
        return [self._one(s) for s in spectra]

    def _one(self, s: Spectrum) -> jax.Array:
        # Relative to the largest value, so that squares neither overflow nor vanish.
        top = s.sigma[..., :1]
        scaled = s.sigma / jnp.where(top > 0, top, 1.0)
        tail = jnp.sqrt(jnp.cumsum(jnp.square(scaled)[..., ::-1], axis=-1)[..., ::-1])
        rank = jnp.sum(tail > self.theta * tail[..., :1], axis=-1, dtype=jnp.int32)
        rank = jnp.where(top[..., 0] > 0, rank, s.rank)
        most = s.width if self.max_rank is None else min(self.max_rank, s.width)
        return jnp.clip(rank, min(self.min_rank, most), most)


@dataclasses.dataclass(frozen=True)
class _Budget(RankPolicy):
    parameters: int
    min_rank: int

    def choose(self, spectra: Sequence[Spectrum]) -> list[jax.Array]:
        if not spectra:
            return []
        # Energies are relative to the largest, so that squares neither overflow nor vanish. Costs are integers, in
        # units that keep their sum below 2^31: exact for budgets up to 2^30.
        top = functools.reduce(jnp.maximum, [jnp.max(s.sigma) for s in spectra])
        unit = -(-self.parameters // 2**30)
        gains, costs = [], []
        for s in spectra:
            sigma = s.sigma[..., : s.width] / jnp.where(top > 0, top, 1.0)
            index = jax.lax.broadcasted_iota(jnp.int32, sigma.shape, sigma.ndim - 1)
            cost = sum(s.shape) + 2 * index + 1  # r (m + n) + r^2, the growth from r = index to index + 1
            gain = jnp.square(sigma) / cost
            # Energies are at most 1: columns of kernels that are zero come first.
            zero = (s.sigma[..., :1] == 0) & (index < s.rank[..., None])
            gain = jnp.where(zero, 2.0 / cost + 1, gain)
            gain = jnp.where(index < self.min_rank, jnp.inf, gain)
            gains.append(gain.reshape(-1))
            costs.append(-(-cost // unit).reshape(-1))
        gain, cost = jnp.concatenate(gains), jnp.concatenate(costs)
        # Within a kernel the gain falls and the cost rises, so a stable sort keeps every kernel's order.
        order = jnp.argsort(-gain, stable=True)
        most = self.parameters // unit + 1
        total = jax.lax.associative_scan(lambda a, b: jnp.minimum(a + b, most), cost[order])
        fits = total < most
        keep = jnp.zeros(gain.shape, bool).at[order].set(fits & (gain[order] > 0))
        keep = keep | jnp.isinf(gain)
        ranks, start = [], 0
        for s in spectra:
            shape = (*s.sigma.shape[:-1], min(s.width, s.sigma.shape[-1]))
            stop = start + jnp.zeros(shape).size
            ranks.append(jnp.sum(keep[start:stop].reshape(shape), axis=-1, dtype=jnp.int32))
            start = stop
        return ranks


def tolerance(theta: float | jax.Array, *, min_rank: int = 1, max_rank: int | None = None) -> RankPolicy:
    r"""Keeps the smallest rank whose discarded tail is at most `theta`, relative in the Frobenius norm.

    .. math:: r' = \min\{r : |\sigma_{r+1:}|_2 \le \theta\,|\sigma|_2\}

    clamped to [min_rank, max_rank]. A step adds at most as many directions as a kernel has, so a rank can double in a
    step; it grows only if the factors are wider than the rank (`max_rank` of `factorize`). A kernel that is zero, an
    adapter before its first step say, keeps its rank, because its singular values tell nothing.

    Args:
      theta: relative tail, usually 0.001 to 0.1. The errors of all steps add up to theta / h over a trajectory of step
        size h, so smaller steps want a smaller theta. A step lies in the tangent space, and new directions enter at
        second order, with singular values of about h^2 / sigma_r for a step of norm h: ranks grow only if theta is
        below `h^2 / (sigma_r |W|)`.
      min_rank: lower bound.
      max_rank: upper bound; default the width of the factors.

    Returns:
      A policy for the option `rank` of `Tangent`, `Coefficient` and `galerkin`.

    Raises:
      TypeError: for arguments of another type.
      ValueError: for a negative theta or bounds that exclude each other.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lowrank_adam(1e-3, geometry=lro.Tangent(rank=lro.tolerance(0.02, min_rank=2)))

    References:
      arXiv:2506.17475, rank truncation.
    """
    check_number("theta", theta)
    check_int("min_rank", min_rank)
    if max_rank is not None:
        check_int("max_rank", max_rank)
    if isinstance(theta, int | float) and theta < 0:
        raise ValueError(f"theta is a relative tail and must not be negative, got {theta}")
    if min_rank < 1 or (max_rank is not None and max_rank < min_rank):
        raise ValueError(f"ranks need 1 <= min_rank <= max_rank, got {min_rank} and {max_rank}")
    return _Tolerance(theta, min_rank, max_rank)


def budget(parameters: int, *, min_rank: int = 1) -> RankPolicy:
    r"""Chooses the ranks of all kernels at once so that they hold at most `parameters` values together.

    A kernel of rank r costs :math:`r (m + n) + r^2`. Singular values of all kernels are taken in the order of energy
    for cost, :math:`\sigma_j^2 / (m + n + 2j - 1)`, until the budget is spent. This is the greedy solution of "least
    discarded energy for a total number of parameters", within one singular value of the best. A kernel that is zero,
    an adapter before its first step say, keeps its rank as far as the budget allows: its singular values tell nothing,
    so its columns come first.

    Args:
      parameters: total number of values in the active factors of all kernels that the optimizer sees.
      min_rank: the least rank of every kernel, even if it breaks the budget.

    Returns:
      A policy for the option `rank` of `Tangent`, `Coefficient` and `galerkin`. Rank moves only where the factors are
      wider than the rank (`max_rank` of `factorize`).

    Raises:
      TypeError: for arguments that are no ints.
      ValueError: for a budget or a minimum below 1.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.lowrank_adam(1e-3, geometry=lro.Tangent(rank=lro.budget(200_000)))
    """
    check_int("parameters", parameters)
    check_int("min_rank", min_rank)
    if parameters < 1 or min_rank < 1:
        raise ValueError(f"budget needs parameters >= 1 and min_rank >= 1, got {parameters}, {min_rank}")
    return _Budget(parameters, min_rank)


def check_number(name: str, value: Any) -> None:
    """Raises TypeError for anything but a number or an array; `inject_hyperparams` makes arrays of numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | jax.Array | np.ndarray):
        raise TypeError(f"{name} is a number, got {value!r}")


def check_range(name: str, value: Any, below: float = float("inf")) -> None:
    """Refuses anything but None and numbers from 0 on; arrays may be traced, so they pass."""
    if value is None:
        return
    check_number(name, value)
    if isinstance(value, int | float) and not 0 <= value < below:
        raise ValueError(f"{name} is at least 0 and below {below}, got {value}")


def check_int(name: str, value: Any) -> None:
    """Raises TypeError for anything but an int; `inject_hyperparams` makes arrays of ints."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is an int, got {value!r}{if_injected(name, value)}")


def if_injected(name: str, value: Any) -> str:
    """The end of a message about an array in the place of an int, which `inject_hyperparams` makes of defaults too."""
    return f'; in inject_hyperparams list it, static_args=("{name}",)' if isinstance(value, jax.Array) else ""


def relative_tail(sigma: jax.Array, rank: jax.Array) -> jax.Array:
    """`|sigma_{rank+1:}| / |sigma|`, zero for a zero matrix."""
    top = sigma[..., :1]
    scaled = jnp.square(sigma / jnp.where(top > 0, top, 1.0))
    total = jnp.sum(scaled, axis=-1)
    tail = jnp.sum(jnp.where(linalg.rank_mask(rank, sigma.shape[-1]), 0.0, scaled), axis=-1)
    return jnp.sqrt(tail / jnp.where(total > 0, total, 1.0))
