"""Meshes with explicit axes: the step runs in auto mode, and its results are sharded like the types of its inputs say.

On an explicit mesh (the default of `jax.make_mesh`) the type of an array holds its sharding, and decompositions
reject a matrix with a sharded axis. The step therefore runs with all axes in auto mode, where XLA's partitioner
places the sums over sharded rows. The user's part, the inner transformation, runs in explicit mode again: it may
close over arrays, an injected learning rate say, whose types name the mesh.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax.sharding import state_specs


def spec(x: Any) -> PartitionSpec:
    """The sharding of x over explicit axes, which its type holds; `P()` if it has none."""
    if not isinstance(x, jax.Array) or not jax.typeof(x).sharding.mesh.explicit_axes:
        return PartitionSpec()
    return jax.typeof(x).sharding.spec


class Mesh:
    """The explicit axes that shard parameters. Without such axes it is false, and its methods just call."""

    def __init__(self, params: Any):
        meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(params) if isinstance(x, jax.Array))
        self._mesh: Any = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        self._params = params

    def __bool__(self) -> bool:
        return self._mesh is not None

    def auto(
        self, f: Callable[..., Any], *args: Any, like: Any = None, specs: Callable[[Any], PartitionSpec] | None = None
    ) -> Any:
        """`f(*args)` in auto mode. The result is sharded like `like`, by default like the parameters it mirrors.

        Or `specs` gives the spec of each of its arrays, from their shapes.
        """
        if self._mesh is None:
            return f(*args)
        axes = self._mesh.explicit_axes
        if like is None:
            replicated = NamedSharding(self._mesh, PartitionSpec())
            shapes = jax.eval_shape(jax.sharding.auto_axes(f, axes=axes, out_sharding=replicated), *args)
            results = jax.tree.map(specs, shapes) if specs else self._mirrors(shapes)
        else:
            results = jax.tree.map(spec, like)
        return jax.sharding.auto_axes(f, axes=axes, out_sharding=self._shardings(results))(*args)

    def explicit(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f` in explicit mode inside `auto`; its arguments are sharded like the parameters that they mirror."""
        if self._mesh is None:
            return f
        axes = self._mesh.explicit_axes

        def call(*args: Any, **extra: Any) -> Any:
            shardings = self._shardings(self._mirrors(args))
            g = functools.partial(f, **extra)  # Extra arguments come from outside `auto` and are in explicit mode.
            return jax.sharding.explicit_axes(lambda *args: g(*args), axes=axes, in_sharding=shardings)(*args)

        return call

    def _mirrors(self, tree: Any) -> Any:
        specs = state_specs(tree, self._params, jax.tree.map(spec, self._params))
        return jax.tree.map(lambda x, s: _dividing(s, jnp.shape(x), self._mesh), tree, specs)

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(lambda s: NamedSharding(self._mesh, s), specs)


def _dividing(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The spec without entries of more devices than divide their axis, as blocks of a grid may be too few."""

    def fits(entry: Any, size: int) -> bool:
        names = entry if isinstance(entry, tuple) else (entry,)
        return size % math.prod(mesh.shape[name] for name in names) == 0

    return PartitionSpec(*(e if e is None or fits(e, n) else None for e, n in zip(spec, shape, strict=False)))
