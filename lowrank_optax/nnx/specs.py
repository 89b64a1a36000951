"""Partition specs of nnx states with factored kernels."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import is_wrapper
from lowrank_optax.sharding import partition_specs

# The name under which the variable of a factored kernel keeps `out_sharding` of the dense kernel. Flax would apply
# `out_sharding` itself to each factor.
DENSE_SHARDING = "dense_sharding"


def get_partition_spec(tree: Any) -> Any:
    r"""`nnx.get_partition_spec` for states with factored kernels.

    A variable of nnx has one `out_sharding`, and the three factors of a kernel lie in three ways. `factorize` and the
    low-rank layers therefore keep the sharding of the dense kernel as the metadata `dense_sharding`, and this function
    derives the specs of the factors as `lowrank_optax.partition_specs` does: U takes the input axes, V the output
    axes, all of them the stacked axes. The rules of Flax turn logical axis names into mesh axes. Variables
    without factors get the spec that Flax gives them.

    Where `nnx.vmap` or `nnx.scan` add an axis to low-rank layers, name it for them too:
    `transform_metadata={nnx.PARTITION_NAME: "layers", "dense_sharding": "layers"}`.

    Args:
      tree: `nnx.state(model)`, or another tree with nnx variables.

    Returns:
      The tree with a `PartitionSpec` in the place of each array.

    Raises:
      ValueError: for a `dense_sharding` with more axes than the kernel.

    Example:
      >>> from flax import nnx
      >>> import jax, lowrank_optax as lro
      >>> init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
      >>> with jax.set_mesh(jax.make_mesh((1, 1), ("fsdp", "tensor"))):
      ...     layer = lro.nnx.LowRankLinear(8, 6, rank=2, kernel_init=init, rngs=nnx.Rngs(0))
      >>> lro.nnx.get_partition_spec(nnx.state(layer))["kernel"].get_value()
      LowRank(U=P('fsdp',), S=P(), V=P('tensor',))
    """

    def one(x: Any) -> Any:
        if not is_wrapper(x) or not is_lowrank(x.get_raw_value()):
            return nnx.get_partition_spec(x)
        W, metadata = x.get_raw_value(), x.get_metadata()
        options = {
            "out_sharding": metadata.get(DENSE_SHARDING, ()),
            "sharding_rules": metadata.get("sharding_rules", ()),
        }
        dense: Any = nnx.Param(jax.ShapeDtypeStruct(W.shape, W.dtype), eager_sharding=False, **options)
        return x.copy(value=factor_specs(W, nnx.get_partition_spec(dense).get_raw_value()))

    return jax.tree.map(one, tree, is_leaf=is_wrapper)


def factor_specs(W: Any, dense: Any) -> Any:
    """The specs of the factors. `dense` has an entry for each axis, except axes that nnx.vmap has added since."""
    dense = PartitionSpec(*(None,) * (W.ndim - len(dense) if dense else 0), *dense)
    return partition_specs({"kernel": W}, {"kernel": dense})["kernel"]


def dense_spec(out_sharding: Any, ndim: int) -> tuple[Any, ...]:
    """The metadata `out_sharding` of a dense kernel, names or a sharding, as one entry for every axis."""
    sharding = getattr(out_sharding, "sharding", out_sharding)  # a layout holds a sharding
    axes = tuple(getattr(sharding, "spec", sharding) or ())
    return (*axes, *(None,) * (ndim - len(axes)))


def keep_dense_spec(variable: Any) -> None:
    """Renames the sharding of a dense kernel in the metadata of a variable that now holds its factors."""
    if variable.has_metadata("out_sharding"):
        axes = dense_spec(variable.get_metadata("out_sharding"), variable.get_raw_value().ndim)
        variable.set_metadata(DENSE_SHARDING, axes)
        variable.del_metadata("out_sharding")
    if variable.has_metadata("optimizer_sharding"):
        variable.del_metadata("optimizer_sharding")
