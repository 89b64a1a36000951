"""Low-rank training for JAX: kernels kept as U S V^T, and Optax transformations that move them on their manifold."""

from lowrank_optax import checkpoint as checkpoint
from lowrank_optax import linen as linen
from lowrank_optax import manifold as manifold
from lowrank_optax import nnx as nnx
from lowrank_optax.export import export_lora
from lowrank_optax.factorize import Axes, densify, factorize, lowrank_init, orthonormalize
from lowrank_optax.lowrank import LowRank, dot_general, is_lowrank, matmul
from lowrank_optax.monitor import Diagnostics, diagnostics, ranks
from lowrank_optax.optimizers import (
    lowrank_adam,
    lowrank_adamw,
    lowrank_heavy_ball,
    lowrank_muon,
    orthogonalize,
)
from lowrank_optax.rank import RankPolicy, Spectrum, budget, tolerance
from lowrank_optax.resize import buckets, incremental_update, resize
from lowrank_optax.sharding import partition_specs, state_specs
from lowrank_optax.transforms import (
    FixedRankState,
    KernelState,
    fixed_rank,
    project_to_tangent,
    retract,
    tangent_norm,
)

__version__ = "0.1.0"

__all__ = [
    "Axes",
    "Diagnostics",
    "FixedRankState",
    "KernelState",
    "LowRank",
    "RankPolicy",
    "Spectrum",
    "buckets",
    "budget",
    "checkpoint",
    "densify",
    "diagnostics",
    "dot_general",
    "export_lora",
    "factorize",
    "fixed_rank",
    "incremental_update",
    "is_lowrank",
    "linen",
    "lowrank_adam",
    "lowrank_adamw",
    "lowrank_heavy_ball",
    "lowrank_init",
    "lowrank_muon",
    "manifold",
    "matmul",
    "nnx",
    "orthogonalize",
    "orthonormalize",
    "partition_specs",
    "project_to_tangent",
    "ranks",
    "resize",
    "retract",
    "state_specs",
    "tangent_norm",
    "tolerance",
]
