"""Ranks of kernels for a share of a model's parameters: the argument `budget` of `factorize`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.axes import Axes, Rank, Where, least_rank, matrix_shape
from lowrank_optax.grids import Blocks, grid_of
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.rank import check_number

Kernels = dict[str, tuple[tuple[int, ...], Axes]]  # by path, the dense shape and its split


def check_rank_or_budget(rank: object, budget: object, max_rank: object) -> None:
    """Raises unless exactly one of `rank` and `budget` is given, and a budget lies in (0, 1)."""
    if (rank is None) == (budget is None):
        given = "neither" if rank is None else "both"
        raise TypeError(f"factorize takes either rank or budget, got {given}")
    if budget is None:
        return
    if max_rank is not None:
        raise TypeError("a budget counts the columns of the factors: pass max_rank with rank, not with budget")
    check_number("budget", budget)
    if not 0 < float(budget) < 1:  # type: ignore[arg-type]
        raise ValueError(f"budget is a share of the model's parameters in (0, 1), got {budget}")


def at_budget(
    budget: float, parameters: dict[str, Any], axes: dict[str, Axes], blocks: Blocks | None
) -> tuple[Rank, Where]:
    """The arguments `rank` and `where` of `factorize` that leave a share of the parameters.

    Args:
      budget: the share.
      parameters: by path, all parameters of the model, arrays or `LowRank` nodes.
      axes: by path, the split of every dense kernel that may be factored.
      blocks: the argument of `factorize`.
    """
    shapes = {name: tuple(x.shape if is_lowrank(x) else jnp.shape(x)) for name, x in parameters.items()}
    kernels: Kernels = {name: (shapes[name], split) for name, split in axes.items()}
    dense = sum(map(math.prod, shapes.values()))
    fixed = sum(y.size for name, x in parameters.items() if name not in axes for y in jax.tree.leaves(x))
    ranks = ranks_for_share(budget, kernels, dense, fixed, blocks)
    return lambda name, shape: ranks[name], lambda name, shape: axes[name] if name in ranks else False


def ranks_for_share(
    share: float, kernels: Kernels, dense: int, fixed: int, blocks: Blocks | None = None
) -> dict[str, int]:
    r"""Ranks with which a model has at most a share of its dense parameters, and close to it.

    With :math:`k_i = \min(m_i, n_i)` and one fraction f for all kernels, kernel i has rank :math:`r_i = f k_i`. The
    largest f is found by bisection. If rounding leaves more than a hundredth of the share, ranks grow by one, the
    smallest :math:`r_i / k_i` first: the ranks of all kernels of one shape together, because kernels with equal factors
    are computed as one stack, and one by one only if that is not enough. A kernel whose factors
    :math:`r_i (m_i + n_i + r_i)` would not be smaller than :math:`m_i n_i` stays dense.

    Args:
      share: the wanted number of parameters over `dense`.
      kernels: the kernels that may be factored.
      dense: the number of parameters of the dense model.
      fixed: the number of parameters that are not in `kernels`, as they are.
      blocks: the argument of `factorize`. A grid of b x b blocks has few sizes: one for each rank of its blocks.

    Returns:
      The rank of every kernel that is to be factored.

    Raises:
      ValueError: if all kernels at their least rank leave more than the share.
    """
    sizes = {name: _Kernel(name, shape, axes, blocks) for name, (shape, axes) in kernels.items()}

    def total(ranks: dict[str, int]) -> int:
        return fixed + sum(kernel.size(ranks[name]) for name, kernel in sizes.items())

    def at(fraction: float) -> dict[str, int]:
        return {name: kernel.rank(fraction) for name, kernel in sizes.items()}

    target, least = share * dense, total(at(0.0))
    if least > target:
        raise ValueError(
            f"budget={share} cannot be reached: with every kernel at its least rank, 4 or min(m, n) where that is "
            f"smaller, the model keeps {math.ceil(1000 * least / dense) / 1000} of its parameters. Leaves that are not "
            f"factored are {fixed / dense:.3f} of them"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if total(at(middle)) <= target else (low, middle)
    ranks = at(low)
    alike: dict[tuple[int, int], list[str]] = {}
    for name, kernel in sizes.items():
        alike.setdefault((kernel.m, kernel.n), []).append(name)
    for units in ([*alike.values()], [[name] for name in sizes]):
        while units and total(ranks) < 0.99 * target:
            unit = min(units, key=lambda names: ranks[names[0]] / sizes[names[0]].limit)
            grown = ranks | {name: ranks[name] + 1 for name in unit}
            if total(grown) <= target and all(sizes[name].is_factored(grown[name]) for name in unit):
                ranks = grown
            else:
                units.remove(unit)
    return {name: r for name, r in ranks.items() if sizes[name].is_factored(r)}


class _Kernel:
    """Sizes of a kernel, or of a stack of kernels, at a rank."""

    def __init__(self, name: str, shape: tuple[int, ...], axes: Axes, blocks: Blocks | None) -> None:
        self.split = name, shape, axes
        self.blocks = blocks
        self.batch = math.prod(shape[: axes.batch])
        self.m, self.n = matrix_shape(shape, axes)
        self.limit = min(self.m, self.n)

    def rank(self, fraction: float) -> int:
        return max(least_rank(self.limit), round(fraction * self.limit))

    def is_factored(self, rank: int) -> bool:
        return self._factored(rank) < self.m * self.n

    def size(self, rank: int) -> int:
        return self.batch * min(self._factored(rank), self.m * self.n)

    def _factored(self, rank: int) -> int:
        _, shape, axes = self.split
        grid = grid_of(self.blocks, rank, *self.split)
        return grid.parameters(rank if grid.is_one else grid.width(rank, shape, axes), shape, axes)
