"""Flax linen: factored kernels in unmodified models, low-rank layers, and masks by path."""

from lowrank_optax.linen import serialization as serialization
from lowrank_optax.linen.layers import LowRankConv, LowRankDense, LowRankDenseGeneral
from lowrank_optax.linen.paths import path_mask
from lowrank_optax.linen.registry import register
from lowrank_optax.linen.route import apply, factored
from lowrank_optax.linen.where import kernels

__all__ = [
    "LowRankConv",
    "LowRankDense",
    "LowRankDenseGeneral",
    "apply",
    "factored",
    "kernels",
    "path_mask",
    "register",
]
