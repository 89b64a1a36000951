"""Flax nnx: factored and adapted kernels in stock modules, and low-rank layers."""

from lowrank_optax.nnx.adapt import AdapterBuffer, AdapterParam, adapt, adapters, merge_adapters
from lowrank_optax.nnx.inplace import factorize
from lowrank_optax.nnx.layers import LowRankConv, LowRankEinsum, LowRankLinear, LowRankLinearGeneral
from lowrank_optax.nnx.optimizer import Optimizer
from lowrank_optax.nnx.resize import resize
from lowrank_optax.nnx.specs import get_partition_spec
from lowrank_optax.nnx.where import kernels

__all__ = [
    "AdapterBuffer",
    "AdapterParam",
    "LowRankConv",
    "LowRankEinsum",
    "LowRankLinear",
    "LowRankLinearGeneral",
    "Optimizer",
    "adapt",
    "adapters",
    "factorize",
    "get_partition_spec",
    "kernels",
    "merge_adapters",
    "resize",
]
