"""`factorize` for nnx modules, in place."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import jax
from flax import nnx

from lowrank_optax import factorize as core
from lowrank_optax.factorize import Axes, Rank, Where
from lowrank_optax.lowrank import dot_general, is_lowrank
from lowrank_optax.nnx.hooks import PromoteLeaves, conv_general_dilated

M = TypeVar("M", bound=nnx.Module)
