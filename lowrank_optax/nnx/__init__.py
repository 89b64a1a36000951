"""Flax nnx: factored kernels in stock modules, and low-rank layers."""

from lowrank_optax.nnx.inplace import factorize
from lowrank_optax.nnx.layers import LowRankLinear
from lowrank_optax.nnx.resize import resize

__all__ = ["LowRankLinear", "factorize", "resize"]
