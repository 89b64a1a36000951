"""From dense parameters to factored ones and back: `factorize`, `densify`, `orthonormalize`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.axes import Axes as Axes
from lowrank_optax.axes import Rank, Where, check_where, matrix_shape, rank_number, split_axes
from lowrank_optax.boxes import boxed_dense, boxed_factors, is_box, opened, unboxed
from lowrank_optax.grids import Blocks, grid_of
from lowrank_optax.layout import map_kernel
from lowrank_optax.lowrank import LowRank, is_lowrank
from lowrank_optax.paths import path_name, refuse_nnx, refuse_shape
from lowrank_optax.rank import check_number
from lowrank_optax.share import at_budget, check_rank_or_budget
from lowrank_optax.truncate import truncated_kernel


def factorize(
    params: Any,
    rank: Rank | None = None,
    *,
    budget: float | None = None,
    max_rank: Rank | None = None,
    where: Where | None = None,
    scale: float = 1.0,
    blocks: Blocks | None = None,
) -> Any:
    r"""Replaces the chosen kernels of a parameter tree by their truncated SVD.

    .. math:: W \approx U S V^\top, \quad S = \mathrm{diag}(\sigma_1, \dots, \sigma_r)

    This is the best approximation of rank r in the Frobenius norm. With `blocks` every kernel becomes a grid of blocks,
    each the best approximation of its block, see `BlockLowRank`. Leaves that are not chosen, and
    kernels that are factored already, are returned as they are.

    Args:
      params: a tree of arrays, e.g. `model.init(...)["params"]`.
      rank: rank of the start: an int, a fraction of `min(m, n)` in (0, 1], or a callable of the path
        and the dense shape that returns either. A fraction gives rank 4 at least, or `min(m, n)` where it is smaller.
      budget: in place of `rank`, the share in (0, 1) of the model's parameters that is left, e.g. 0.3. All leaves of
        `params` count, embeddings too, and a kernel counts `r (m + n + r)` numbers. All kernels get about the same
        fraction of `min(m, n)` as rank, 4 at least; one whose factors would not be smaller stays dense. The result
        has the largest ranks that do not exceed the budget; `summary` shows it. With `blocks` of a fixed number it
        may stay well below, because the ranks of blocks are whole numbers; with "rank" or "auto" it comes close.
      max_rank: width of the factors, of the same forms, for ranks that may grow. `galerkin` needs at least `2 rank`
        for its augmented bases. Cut to `min(m, n)`. Default: `rank`.
      where: callable of the path (`"block/dense/kernel"`) and the dense shape that returns False to leave a
        leaf dense, True to factor it, or `Axes` to factor it with a given split of its axes. The default
        takes every leaf named `kernel` with at least two axes and `min(m, n) >= rank`.
      scale: factor on the singular values. 1 keeps the function of a trained model. Training from scratch reaches a
        lower loss from about 0.2: a step h turns a pair of singular vectors by about h / sigma, so small singular
        values leave random initial directions sooner (RESULTS.md, pre-training).
      blocks: cuts every kernel into a grid: b for b x b blocks; (b, c) for b rows and c columns of blocks; "auto" for
        b = min(m, n) / `rank`, the least b at which W can have full rank; "rank" for b = `rank`, so that every block
        has rank 1; or a callable of path and dense shape that returns one of them or None. `rank` keeps its meaning
        for the number of parameters: a block gets rank `rank / b`, rounded, at least 1. An axis shorter than b gets as
        many blocks as it has entries; of an axis that b does not divide the last block is smaller. Default: one block.

    Returns:
      The tree with `LowRank` nodes, in the dtype of the parameters. A kernel in a box of Flax (`nn.with_partitioning`,
      `nn.with_logical_partitioning`) gets a box around each factor, with the names of its axes.

    Raises:
      TypeError: for arguments of another type, for shapes in place of arrays, or unless either `rank` or `budget` is
        given.
      ValueError: for a kernel that is not of floats of 16 bits or more; if the rank exceeds `min(m, n)` of a kernel
        chosen by `where`, if none of the leaves with two axes or more is chosen, if the axes of a kernel are
        ambiguous, or if the least ranks exceed the budget; the message says the least share.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}}
      >>> params = lro.factorize(params, rank=2, max_rank=4)
      >>> params["dense"]["kernel"].U.shape, lro.ranks(params)["dense/kernel"].tolist()
      ((8, 4), 2)
    """
    refuse_nnx(params, "factorize", "lowrank_optax.nnx.factorize(model, rank)")
    check_where(where)
    check_number("scale", scale)
    check_rank_or_budget(rank, budget, max_rank)
    if rank is None:
        leaves = jax.tree_util.tree_leaves_with_path(unboxed(params)[0], is_leaf=is_lowrank)
        parameters = {path_name(path): x for path, x in leaves}
        kernels = _kernel_axes(parameters, where)
        if not kernels and not any(map(is_lowrank, parameters.values())):
            _refuse_nothing([(name, tuple(jnp.shape(x))) for name, x in parameters.items()], where, "")
        rank, where = at_budget(float(budget or 0.0), parameters, kernels, blocks)
    seen: list[tuple[str, tuple[int, ...]]] = []
    chosen = 0

    def one(path: Any, box: Any) -> Any:
        nonlocal chosen
        leaf = opened(box)
        if is_lowrank(leaf):
            chosen += 1
            return boxed_factors(box, leaf)
        name, shape = path_name(path), tuple(jnp.shape(leaf))
        seen.append((name, shape))
        axes = split_axes(name, shape, where, rank)
        if axes is None:
            return box
        linalg.check_floating(name, leaf, "factored")
        refuse_shape(name, leaf, "lro.factorize(params, rank)")
        chosen += 1
        limit = min(matrix_shape(shape, axes))
        r = rank_number(rank, name, shape, limit)
        if r > limit:
            raise ValueError(
                f"rank {r} is larger than min(m, n) = {limit} of the kernel {name!r} of shape {shape}: choose a "
                "smaller rank, a fraction, or let `where` return False to leave it dense"
            )
        width = r if max_rank is None else rank_number(max_rank, name, shape, limit)
        if width < r:
            raise ValueError(f"max_rank {width} is below rank {r} for the kernel {name!r}")
        grid = grid_of(blocks, r, name, shape, axes)
        if not grid.is_one:
            r, width = (grid.width(x, shape, axes) for x in (r, width))
        W = truncated_kernel(jnp.asarray(leaf), axes, r, min(width, limit), grid)
        return boxed_factors(box, dataclasses.replace(W, S=(scale * W.S).astype(W.S.dtype)))

    out = jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda x: is_lowrank(x) or is_box(x))
    if not chosen:
        _refuse_nothing(seen, where, f" at rank {rank}")
    return out


def _refuse_nothing(leaves: list[tuple[str, tuple[int, ...]]], where: Where | None, at_rank: str) -> None:
    """Raises if leaves, of which none was factored, have two axes or more; a tree without such leaves may stay."""
    seen = [(name, shape) for name, shape in leaves if len(shape) >= 2]
    if not seen:
        return
    if where is None or hasattr(where, "reasons"):
        raise ValueError(
            f"no kernel to factor{at_rank}: factorize takes leaves named 'kernel' with min(m, n) >= rank, "
            f"and found {seen[:5]}; choose a smaller rank, or other leaves with where=lambda path, shape: ..."
        )
    fault = "the rank fits no kernel that `where` chose" if any(where(*leaf) for leaf in seen) else "`where` chose none"
    raise ValueError(f"no kernel to factor{at_rank}: {fault}. It was asked about {seen[:5]}, path and dense shape")


def _kernel_axes(parameters: dict[str, Any], where: Where | None) -> dict[str, Axes]:
    """The split of every dense kernel that `factorize` takes at rank 1."""
    dense = {name: tuple(jnp.shape(x)) for name, x in parameters.items() if not is_lowrank(x)}
    found = {name: split_axes(name, shape, where, rank=1) for name, shape in dense.items()}
    return {name: axes for name, axes in found.items() if axes is not None}


def densify(params: Any) -> Any:
    """Replaces every `LowRank` node by its dense kernel; the inverse of `factorize` up to truncation.

    Args:
      params: a tree with `LowRank` nodes.

    Returns:
      The tree with arrays of shape `batch + in + out` in their place.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> lro.densify({"kernel": lro.factorize(jnp.eye(3), 3)})["kernel"].shape
      (3, 3)
    """

    def one(x: Any) -> Any:
        W = unboxed(x)[0]
        return boxed_dense(x, W.to_dense()) if is_lowrank(W) else x

    return jax.tree.map(one, params, is_leaf=lambda x: is_lowrank(x) or is_box(x))


def orthonormalize(params: Any) -> Any:
    """Brings factors that are not orthonormal into the canonical gauge without changing W.

    Use it for kernels built by hand, averaged leaf by leaf, or loaded from elsewhere. Singular values of the size of
    rounding become exact zeros, so that `ranks` does not count them.

    Args:
      params: a tree with `LowRank` nodes.

    Returns:
      The tree with orthonormal U and V and diagonal, non-negative, descending S.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> W = lro.LowRank(2 * jnp.eye(4, 2), jnp.eye(2), jnp.eye(3, 2))
      >>> lro.orthonormalize(W).S.diagonal().tolist()
      [2.0, 2.0]
    """
    params, rebox = unboxed(params)
    one = lambda W: map_kernel(_orthonormalized, W) if is_lowrank(W) else W  # noqa: E731
    return rebox(jax.tree.map(one, params, is_leaf=is_lowrank))


def _orthonormalized(W: LowRank) -> LowRank:
    (u, ru), (v, rv) = linalg.orthonormalize(W.U), linalg.orthonormalize(W.V)
    p, sigma, q = mf.gauge(ru @ W.S @ rv.T)
    return LowRank(u @ p, linalg.diagonal(sigma), v @ q)
