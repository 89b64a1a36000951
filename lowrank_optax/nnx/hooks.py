"""The hooks through which stock nnx layers run on a factored kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from flax.nnx.nn import dtypes

from lowrank_optax.lowrank import absorb, is_lowrank


@dataclasses.dataclass(frozen=True)
class PromoteLeaves:
    """A `promote_dtype` hook that reaches the factors of a kernel.

    A value type: equal layers keep equal static attributes, so `nnx.jit` does not compile twice.
    """

    promote: Callable[..., Any] = dtypes.promote_dtype

    def __call__(self, args: Any, /, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        return jax.tree.unflatten(treedef, self.promote(tuple(leaves), **kwargs))


def conv_general_dilated(
    lhs: jax.Array,
    rhs: Any,
    *args: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, channels last, whose kernel may be a `LowRank`."""
    conv: Any = jax.lax.conv_general_dilated
    options: dict[str, Any] = dict(precision=precision, preferred_element_type=preferred_element_type)
    if not is_lowrank(rhs):
        return conv(lhs, rhs, *args, out_sharding=out_sharding, **options, **kwargs)
    U, S, V = absorb(rhs, math.prod(lhs.shape[:-1]), **options)
    z = conv(lhs, U, *args, **options, **kwargs)
    if S is not None:
        z = jax.lax.dot_general(z, S, (((z.ndim - 1,), (0,)), ((), ())), **options)
    contract = (((z.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(z, V, contract, out_sharding=out_sharding, **options)
