"""The hooks through which stock nnx layers run on a factored kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes
from jax.sharding import PartitionSpec

from lowrank_optax.blocks import BlockLowRank, grouped_kernel, padded_channels
from lowrank_optax.lowrank import absorb, contract, is_lowrank


@dataclasses.dataclass(frozen=True)
class PromoteLeaves:
    """A `promote_dtype` hook of `(inputs, kernel, bias)` that reaches the factors of a kernel.

    A value type: equal layers keep equal static attributes, so `nnx.jit` does not compile twice.
    """

    promote: Callable[..., Any] = dtypes.promote_dtype

    def __call__(self, args: Any, /, **kwargs: Any) -> Any:
        inputs, kernel, bias = args
        if not is_lowrank(kernel):
            return self.promote(args, **kwargs)
        # One factor at a time: functions of the user take three arrays.
        promoted = [self.promote((inputs, factor, bias), **kwargs) for factor in (kernel.U, kernel.S, kernel.V)]
        inputs, _, bias = promoted[0]
        return inputs, type(kernel)(*(factor for _, factor, _ in promoted)), bias


def conv_general_dilated(
    lhs: jax.Array,
    rhs: Any,
    *args: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, channels last, whose kernel may be a factored one."""
    conv: Any = jax.lax.conv_general_dilated
    options: dict[str, Any] = dict(precision=precision, preferred_element_type=preferred_element_type)
    if not is_lowrank(rhs):
        return conv(lhs, rhs, *args, out_sharding=out_sharding, **options, **kwargs)
    if isinstance(rhs, BlockLowRank):
        return _grouped(lhs, rhs, *args, out_sharding=out_sharding, **options, **kwargs)
    U, S, V = absorb(rhs, math.prod(lhs.shape[:-1]), **options)
    if jax.typeof(U).sharding.mesh.explicit_axes:  # JAX asks for a sharding where it sums over a sharded axis.
        kwargs["out_sharding"] = PartitionSpec(*jax.typeof(lhs).sharding.spec[:-1], None)
    z = conv(lhs, U, *args, **options, **kwargs)
    if S is not None:
        z = contract(z, S, (((z.ndim - 1,), (0,)), ((), ())), **options)
    return contract(z, V, (((z.ndim - 1,), (1,)), ((), ())), out_sharding=out_sharding, **options)


def _grouped(lhs: jax.Array, W: BlockLowRank, *args: Any, out_sharding: Any, **options: Any) -> jax.Array:
    """The rows of blocks are the groups of a convolution; the columns act on its channels."""
    conv: Any = jax.lax.conv_general_dilated
    if W.is_cheaper_dense(math.prod(lhs.shape[:-1])):
        return conv(lhs, W.to_dense(), *args, out_sharding=out_sharding, **options)
    products = {name: options[name] for name in ("precision", "preferred_element_type")}
    U, S, V = W.absorb(math.prod(lhs.shape[:-1]), **products)
    b, c = W.grid
    options["feature_group_count"] = b
    z = conv(padded_channels(lhs, W), grouped_kernel(U, W), *args, **options)
    z = jnp.moveaxis(z.reshape(*z.shape[:-1], b, c, W.width), -3, 0)
    return W.second_stage(z, S, V, out_sharding, **products)
