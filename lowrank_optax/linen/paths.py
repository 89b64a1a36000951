"""Masks by path that end at kernels and not at their factors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax

from lowrank_optax.geometry import is_coordinates
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import path_name


def path_mask(chosen: str | Callable[[str], bool]) -> Callable[[Any], Any]:
    """A mask for Optax that says yes or no once for every kernel, factored or not.

    Leaves of a factored kernel are called `kernel/U`, which patterns such as `.*/kernel$` miss. Here a `LowRank` node
    has the path of the kernel and gets one bool. The mask is a prefix tree, which `optax.masked`,
    `optax.adamw(mask=...)` and the labels of `optax.partition` accept. Inside `fixed_rank` the inner optimizer sees
    coordinates of the kernel at this path, so choose by path, not by shape.

    Args:
      chosen: regular expression searched in the path (`"block/dense/kernel"`), or predicate of the path.

    Returns:
      Callable `params -> tree of bools`. It warns where a regular expression finds no leaf of a tree; leaves that
      another mask has hidden count.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"dense": {"kernel": lro.factorize(jnp.eye(4), 2), "bias": jnp.zeros(4)}}
      >>> lro.linen.path_mask(r"kernel$")(params)
      {'dense': {'bias': False, 'kernel': True}}
    """
    pattern = re.compile(chosen) if isinstance(chosen, str) else None

    def decide(path: str) -> bool:
        return bool(pattern.search(path) if pattern else chosen(path))  # type: ignore[operator]

    def mask(params: Any) -> Any:
        is_kernel = lambda x: is_lowrank(x) or is_coordinates(x)  # noqa: E731
        if pattern is not None:
            is_leaf = lambda x: is_kernel(x) or isinstance(x, optax.MaskedNode)  # noqa: E731
            _warn_unless_found(pattern, [path_name(p) for p, _ in jax.tree.leaves_with_path(params, is_leaf=is_leaf)])
        return jax.tree_util.tree_map_with_path(lambda path, _: decide(path_name(path)), params, is_leaf=is_kernel)

    return mask


def _warn_unless_found(pattern: re.Pattern[str], paths: list[str]) -> None:
    if paths and not any(map(pattern.search, paths)):
        shown = ", ".join(map(repr, paths[:5])) + (", ..." if len(paths) > 5 else "")
        warnings.warn(
            f"path_mask({pattern.pattern!r}) finds none of {len(paths)} leaves, so the mask is False everywhere. A "
            f"factored kernel has one path, which ends in its own name and not in U, S or V. Paths: {shown}",
            stacklevel=3,
        )
