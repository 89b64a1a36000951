"""`contract`: products of an activation and a factor, on explicit meshes too."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def contract(x: jax.Array, factor: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` of an activation and a factor, with a sharding of the result on an explicit mesh.

    JAX asks for `out_sharding` where a product sums over a sharded axis: here the result is replicated along it. If a
    mesh axis shards both the activation and the rows of the factor (fully sharded data parallelism), the activation
    keeps it and the factor is gathered.
    """
    if jax.typeof(factor).sharding.mesh.explicit_axes and options.get("out_sharding") is None:
        options["out_sharding"] = _result_sharding(x, factor, dimension_numbers)
    return jax.lax.dot_general(x, factor, dimension_numbers, **options)


def _result_sharding(x: Any, factor: Any, dimension_numbers: Any) -> NamedSharding:
    (x_axes, factor_axes), (x_batch, factor_batch) = dimension_numbers
    of_x, of_factor = jax.typeof(x).sharding.spec, jax.typeof(factor).sharding.spec
    entries = [of_x[i] for i in x_batch]
    entries += [of_x[i] for i in range(x.ndim) if i not in (*x_axes, *x_batch)]
    entries += [of_factor[i] for i in range(factor.ndim) if i not in (*factor_axes, *factor_batch)]
    used: set[str] = set()
    for i, entry in enumerate(entries):
        names = set(entry) if isinstance(entry, tuple) else {entry} - {None}
        entries[i] = None if names & used else entry
        used |= names
    # With the mesh of an array: eager products need not run under `jax.set_mesh`.
    holder = jax.typeof(factor) if isinstance(factor, jax.core.Tracer) else factor
    return NamedSharding(holder.sharding.mesh, PartitionSpec(*entries))
