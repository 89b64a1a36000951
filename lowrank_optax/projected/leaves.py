"""Which leaves are projected, and how each of them is a stack of matrices whose rows are projected."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax.axes import Axes, Rank, Where, matrix_shape, rank_number, split_axes
from lowrank_optax.layout.mesh import spec
from lowrank_optax.linalg import check_floating, working_dtype
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import path_name
from lowrank_optax.sharding import joined

SIDES = ("short", "long", "left", "right", "both", "entries")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A kernel that is projected: a stack of matrices (p, q) with bases of r columns.

    Attributes:
      path: keys of the leaf.
      shape: its shape.
      axes: how its axes split.
      side: "left" if its inputs are the p rows, "right" if its outputs are, or "both" or "entries".
      rank: r, the number of columns of a basis.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    axes: Axes
    side: str
    rank: int

    @property
    def batch(self) -> tuple[int, ...]:
        """The shape of the stack."""
        return self.shape[: self.axes.batch]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(p, q)."""
        m, n = matrix_shape(self.shape, self.axes)
        return {"right": (n, m), "entries": (m * n, 1)}.get(self.side, (m, n))

    @property
    def projected_shape(self) -> tuple[int, int]:
        """The shape of the coordinates of one matrix."""
        return self.rank, self.rank if self.side == "both" else self.matrix_shape[1]

    def matrices(self, x: jax.Array) -> jax.Array:
        """The leaf, or its gradient, as matrices (p, q) in float32 or better."""
        x = x.astype(working_dtype(x)).reshape(*self.batch, *matrix_shape(self.shape, self.axes))
        if self.side == "right":
            return jnp.swapaxes(x, -1, -2)
        return x.reshape(*self.batch, -1, 1) if self.side == "entries" else x

    def leaf(self, x: jax.Array, dtype: Any) -> jax.Array:
        """The inverse of `matrices`."""
        x = jnp.swapaxes(x, -1, -2) if self.side == "right" else x
        return x.reshape(self.shape).astype(dtype)

    def nameless(self) -> Leaf:
        """The same for all kernels of equal shape."""
        return dataclasses.replace(self, path=())

    def of_width(self, stored: Any) -> Leaf:
        """With the rank that stored bases have, which `resize` may have changed."""
        basis = getattr(stored, "matrix", stored)  # beside the state of its optimizer
        known = isinstance(basis, jax.Array) and self._is_matrix(basis)
        return dataclasses.replace(self, rank=basis.shape[-1]) if known else self

    def _is_matrix(self, x: Any) -> bool:
        rows = (*self.batch, self.matrix_shape[0])
        return jnp.ndim(x) == len(rows) + 1 and jnp.shape(x)[:-1] == rows and jnp.issubdtype(x.dtype, jnp.floating)

    def holds_basis(self, x: Any) -> bool:
        """Whether a stored array is a basis (p, r) for every matrix."""
        return self._is_matrix(x) and jnp.shape(x)[-1] == self.rank

    # --- where the arrays of the state lie on a mesh ---

    def specs(self, x: Any) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
        """The specs of bases, of coordinates and of matrices of the leaf x on its mesh."""
        entries = (*_spec(x), *(None,) * len(self.shape))
        batch, ins, outs = (
            entries[: self.axes.batch],
            joined(entries[self.axes.batch : self.axes.batch + self.axes.inputs]),
            joined(entries[self.axes.batch + self.axes.inputs : len(self.shape)]),
        )
        p, q = {"right": (outs, ins), "entries": (None, None)}.get(self.side, (ins, outs))
        of_coordinates = (None, None) if self.side == "both" else (None, q)
        return tuple(_short((*batch, *pair)) for pair in ((p, None), of_coordinates, (p, q)))  # type: ignore[return-value]

    def mirror(self, x: Any) -> Callable[[Any], PartitionSpec]:
        """The spec of an array that belongs to the leaf x, by its shape."""
        of_basis, of_coordinates, of_matrix = self.specs(x)
        batch, (p, q) = len(self.batch), self.matrix_shape

        def one(y: Any) -> PartitionSpec:
            shape = jnp.shape(y)
            if shape == self.shape and shape != (*self.batch, p, q):
                return _short(tuple(_spec(x)))
            if shape[:batch] != self.batch:
                return PartitionSpec()
            known: dict[tuple[int, ...], PartitionSpec] = {
                (p, q): of_matrix,
                self.projected_shape: of_coordinates,
                (p, self.rank): of_basis,
            }
            return known.get(shape[batch:], _short(tuple(of_matrix)[:batch]))

        return one


def chosen_leaves(tree: Any, method: Any, warn: bool = False) -> tuple[list[Any], Any, dict[int, Leaf]]:
    """The leaves of a tree, its structure, and by position those leaves that are projected.

    Args:
      tree: of parameters or of their gradients.
      method: the options of `subspace`, of which `rank`, `side`, `where` and the kind of projector count.
      warn: whether to warn if nothing is projected.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_lowrank)
    chosen: dict[int, Leaf] = {}
    options = method.rank, method.side, method.where, method.projector.coordinates
    for i, (path, x) in enumerate(paths):
        name = path_name(path)
        if is_lowrank(x):
            raise TypeError(
                f"{name!r} is a LowRank kernel, and subspace projects gradients of dense ones: leave it to a low-rank "
                "optimizer with optax.partition, or keep it dense with lowrank_optax.densify(params)"
            )
        leaf = _chosen(tuple(path), name, tuple(jnp.shape(x)), *options)
        if leaf is None:
            continue
        check_floating(name, x, "projected")
        chosen[i] = leaf
    if warn and not chosen:
        _warn_of_nothing(paths, tree, method.rank)
    return [x for _, x in paths], treedef, chosen


def _chosen(
    path: Any, name: str, shape: tuple[int, ...], rank: Rank, side: str, where: Where | None, coordinates: bool
) -> Leaf | None:
    axes = split_axes(name, shape, where, rank=1)
    if axes is None:
        return None
    m, n = matrix_shape(shape, axes)
    if side == "short":
        side = "left" if m <= n else "right"
    elif side == "long":
        side = "left" if m > n else "right"
    p = {"left": m, "right": n, "entries": m * n}.get(side, min(m, n))
    limit = p if coordinates and side != "both" else min(m, n)
    r = rank_number(rank, name, shape, limit, least=1)
    if r > limit:
        if where is None or hasattr(where, "reasons"):
            return None
        raise ValueError(
            f"rank {r} is larger than {limit}, the most that {name!r} of shape {shape} allows: choose a smaller rank, "
            "a fraction, or let `where` return False for it"
        )
    return Leaf(path, shape, axes, side, r)


def _warn_of_nothing(paths: list[Any], tree: Any, rank: Rank) -> None:
    """Warns if no matrix is projected, unless a mask has hidden some leaves."""
    is_hidden = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    if any(map(is_hidden, jax.tree.leaves(tree, is_leaf=is_hidden))):
        return
    least = rank if isinstance(rank, int) else 1
    matrices = [(path_name(path), min(jnp.shape(x)[-2:])) for path, x in paths if jnp.ndim(x) >= 2]
    fitting = sum(size >= least for _, size in matrices)
    kernels = sum(name.endswith("kernel") for name, _ in matrices)
    if fitting:
        reason = f"none of the {fitting} matrices that the rank fits: by default it takes those named 'kernel'"
        warnings.warn(f"subspace projects {reason}; choose others with where=lambda path, shape: ...", stacklevel=5)
    elif kernels:
        reason = f"none of the {kernels} kernels, because the rank {rank} fits none: choose a smaller one or a fraction"
        warnings.warn(f"subspace projects {reason}", stacklevel=5)


def zeros(shape: tuple[int, ...], dtype: Any, like: Any, where: PartitionSpec | None) -> jax.Array:
    """Zeros that lie on the mesh of a parameter as a spec says, replicated if there is none."""
    sharding = _sharding(like)
    if sharding is None:
        return jnp.zeros(shape, dtype)
    return jnp.zeros(shape, dtype, device=NamedSharding(sharding.mesh, where or PartitionSpec()))


def placed(x: jax.Array, like: Any, where: PartitionSpec) -> jax.Array:
    """The array on the mesh of a parameter."""
    sharding = _sharding(like)
    if sharding is None:
        return x
    return jax.device_put(x, NamedSharding(sharding.mesh, where))


def _sharding(x: Any) -> Any:
    """The sharding over several devices that is known of an array, None if there is none."""
    if not isinstance(x, jax.Array):
        return None
    if isinstance(x, jax.core.Tracer) or not isinstance(x.sharding, NamedSharding):
        return None
    return x.sharding if np.prod(list(x.sharding.mesh.shape.values())) > 1 else None


def _spec(x: Any) -> Any:
    sharding = _sharding(x)
    return spec(x) if sharding is None else sharding.spec


def _short(entries: tuple[Any, ...]) -> PartitionSpec:
    while entries and entries[-1] is None:
        entries = entries[:-1]
    return PartitionSpec(*entries)
