"""Optax transformations over trees with factored kernels."""

from lowrank_optax.transforms.chainable import project_to_tangent as project_to_tangent
from lowrank_optax.transforms.chainable import retract as retract
from lowrank_optax.transforms.chainable import tangent_norm as tangent_norm
from lowrank_optax.transforms.combinator import FixedRankState as FixedRankState
from lowrank_optax.transforms.combinator import fixed_rank as fixed_rank
from lowrank_optax.transforms.steps import KernelState as KernelState
