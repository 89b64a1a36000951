"""`summary`: which parameters are factored, at which rank, and why the others are dense."""

from __future__ import annotations

import dataclasses
import io
import math
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.boxes import unboxed
from lowrank_optax.diagnostics import ranks
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import path_name


class Row(NamedTuple):
    """One parameter in a `Summary`, or all parameters with fewer than two axes.

    Attributes:
      path: `"block/dense/kernel"`.
      shape: the shape of the dense parameter, None for several parameters in one row.
      rank: the active rank; its least and largest value in a stack of kernels; None for a dense parameter, or where the
        tree has shapes without values.
      width: the number of columns of the factors, None for a dense parameter.
      grid: the numbers of rows and columns of blocks, None for a parameter without blocks.
      before: the number of entries of the dense parameter.
      after: the number of entries of the factors, or of the dense parameter.
      reason: why it is dense, empty for a kernel that is factored.
    """

    path: str
    shape: tuple[int, ...] | None
    rank: tuple[int, int] | None
    width: int | None
    before: int
    after: int
    reason: str
    grid: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """The result of `summary`; `print` shows it as a table.

    Attributes:
      rows: one for each parameter with two axes or more, and one for all others.
      before: the number of parameters of the dense model.
      after: the number of parameters of the model as it is.
    """

    rows: tuple[Row, ...]
    before: int
    after: int

    @property
    def share(self) -> float:
        """`after / before`, which `factorize(params, budget=)` keeps below its budget."""
        return self.after / max(self.before, 1)

    def __str__(self) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(show_footer=True, box=SIMPLE_HEAD)
        columns = ("parameter", "shape", "rank", "width", "before", "after", "share", "why dense")
        kernels = sum(row.width is not None for row in self.rows)
        total = (f"{kernels} factored", "", "", "", f"{self.before:,}", f"{self.after:,}", f"{self.share:.1%}", "")
        for name, end in zip(columns, total, strict=True):
            is_text = name in ("parameter", "why dense")
            table.add_column(name, end, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
        for row in self.rows:
            shape = "" if row.shape is None else " x ".join(map(str, row.shape))
            rank = "" if row.rank is None else "-".join(str(r) for r in sorted(set(row.rank)))
            share = f"{row.after / max(self.before, 1):.1%}"
            width = "" if row.width is None else str(row.width)
            if row.grid is not None:
                width = f"{row.grid[0]} x {row.grid[1]} of {width}"
            table.add_row(row.path, shape, rank, width, f"{row.before:,}", f"{row.after:,}", share, row.reason)
        out = io.StringIO()
        Console(file=out, width=max(100, shutil.get_terminal_size((120, 0)).columns), color_system=None).print(table)
        return out.getvalue().rstrip()

    __repr__ = __str__


def summary(params: Any, where: Any = None) -> Summary:
    """Which parameters of a model are factored, at which rank and at what size, and why the others are dense.

    Args:
      params: a tree of parameters, of arrays or `jax.ShapeDtypeStruct`, or an nnx module, of which `nnx.Param` and the
        kernels of stock layers count.
      where: the `where` that `factorize` got. If it comes from `linen.kernels` its reasons are shown. An nnx module
        knows its reasons by itself.

    Returns:
      The summary. `print` shows it as a table, in which `share` is the part of the dense model's parameters.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"embedding": jnp.ones((100, 8)), "dense": {"kernel": jnp.ones((8, 32)), "bias": jnp.zeros(32)}}
      >>> table = lro.summary(lro.factorize(params, rank=2))
      >>> table.before, table.after, round(table.share, 3)
      (1088, 916, 0.842)
      >>> for row in table.rows:
      ...     print(row.path, row.rank, row.after, row.reason or "factored")
      dense/kernel (2, 2) 84 factored
      embedding None 800 `factorize` takes leaves named kernel by default
      1 parameter with fewer than two axes None 32 `factorize` takes matrices
    """
    leaves, reason = _parameters(params, where)
    rows, small = [], []
    for name, x in leaves:
        shape = tuple(x.shape if is_lowrank(x) else jnp.shape(x))
        if is_lowrank(x):
            rows.append(Row(name, shape, _rank(x), x.width, math.prod(shape), x.size, "", getattr(x, "grid", None)))
        elif len(shape) < 2:
            small.append(math.prod(shape))
        else:
            rows.append(Row(name, shape, None, None, math.prod(shape), math.prod(shape), reason(name)))
    if small:
        name = f"{len(small)} parameter{'s' * (len(small) > 1)} with fewer than two axes"
        rows.append(Row(name, None, None, None, sum(small), sum(small), "`factorize` takes matrices"))
    return Summary(tuple(rows), sum(row.before for row in rows), sum(row.after for row in rows))


def _rank(W: Any) -> tuple[int, int] | None:
    if not all(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(W)):
        return None
    found = np.asarray(ranks(W)[""])
    return int(found.min(initial=W.width)), int(found.max(initial=0))


def _parameters(params: Any, where: Any) -> tuple[list[tuple[str, Any]], Callable[[str], str]]:
    """The parameters by name, and a function from the name of a dense one to the reason why it is dense."""
    if any(kind.__module__.startswith("flax.nnx") for kind in type(params).__mro__):
        from lowrank_optax.nnx.where import counted, kernels

        found = kernels(params)
        return counted(params), lambda name: found.reasons.get(name, "not chosen by its rank or by `where`")
    params = unboxed(params)[0]
    leaves = [(path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_lowrank)]
    reasons: Mapping[str, str] = getattr(where, "reasons", {})

    def reason(name: str) -> str:
        known = reasons.get(name) or reasons.get(name.removeprefix("params/"))
        if known or where is not None or name.rsplit("/", 1)[-1] in ("kernel", ""):
            return known or "not chosen by its rank or by `where`"
        return "`factorize` takes leaves named kernel by default"

    return leaves, reason
