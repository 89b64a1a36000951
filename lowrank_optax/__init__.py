"""Low-rank training for JAX: kernels kept as U S V^T, and Optax transformations that move them on their manifold."""

import importlib
from typing import TYPE_CHECKING, Any

from lowrank_optax import geometry as geometry
from lowrank_optax import manifold as manifold
from lowrank_optax.average import incremental_update
from lowrank_optax.axes import Axes
from lowrank_optax.blocks import BlockLowRank
from lowrank_optax.chainable import clip_by_tangent_norm, project_to_tangent, retract, tangent_norm
from lowrank_optax.diagnostics import Diagnostics, diagnostics, ranks
from lowrank_optax.door import FixedRankState
from lowrank_optax.einsum import einsum, einsum_axes
from lowrank_optax.factorize import densify, factorize, orthonormalize
from lowrank_optax.galerkin import GalerkinState, galerkin
from lowrank_optax.geometry import Balanced, Coefficient, Tangent
from lowrank_optax.guard import SkipNotFiniteState, skip_not_finite
from lowrank_optax.initialize import lowrank_init
from lowrank_optax.inner import kernel_labels
from lowrank_optax.lowrank import LowRank, dot_general, is_lowrank, matmul
from lowrank_optax.optimize import fixed_rank, in_coordinates
from lowrank_optax.optimizers import (
    lowrank_adam,
    lowrank_adamw,
    lowrank_heavy_ball,
    lowrank_muon,
    scale_by_polar_factor,
)
from lowrank_optax.rank import RankPolicy, Spectrum, budget, tolerance
from lowrank_optax.resize import buckets, resize
from lowrank_optax.sharding import partition_specs, state_specs
from lowrank_optax.summary import Summary, summary

if TYPE_CHECKING:
    from lowrank_optax import projected as projected
    from lowrank_optax.projected import (
        SubspaceState,
        adarankgrad,
        apollo,
        apollo_mini,
        carry,
        coap,
        dct_adam,
        dion,
        fira,
        flora,
        frugal,
        galore,
        golore,
        ldadam,
        online_subspace,
        projectors,
        q_galore,
        refresh,
        residuals,
        subspace,
        subtrack,
        sumo,
        trion,
    )
    from lowrank_optax.projected.mofasgd import mofasgd
    from lowrank_optax.projected.snsm import snsm

__version__ = "0.1.0"

# Imported when they are first used, as they need Flax or Orbax or are large: these modules, and the names of `__all__`
# that are not imported above.
_LAZY_MODULES = ("adapters", "checkpoint", "linen", "nnx", "projected")

__all__ = [
    "Axes",
    "Balanced",
    "BlockLowRank",
    "Coefficient",
    "Diagnostics",
    "FixedRankState",
    "GalerkinState",
    "LowRank",
    "RankPolicy",
    "SkipNotFiniteState",
    "Spectrum",
    "SubspaceState",
    "Summary",
    "Tangent",
    "adapters",
    "adarankgrad",
    "apollo",
    "apollo_mini",
    "buckets",
    "budget",
    "carry",
    "checkpoint",
    "clip_by_tangent_norm",
    "coap",
    "dct_adam",
    "densify",
    "diagnostics",
    "dion",
    "dot_general",
    "einsum",
    "einsum_axes",
    "export_lora",
    "factorize",
    "fira",
    "fixed_rank",
    "flora",
    "frugal",
    "galerkin",
    "galore",
    "geometry",
    "golore",
    "in_coordinates",
    "incremental_update",
    "is_lowrank",
    "kernel_labels",
    "ldadam",
    "linen",
    "lowrank_adam",
    "lowrank_adamw",
    "lowrank_heavy_ball",
    "lowrank_init",
    "lowrank_muon",
    "manifold",
    "matmul",
    "mofasgd",
    "nnx",
    "online_subspace",
    "orthonormalize",
    "partition_specs",
    "project_to_tangent",
    "projected",
    "projectors",
    "q_galore",
    "ranks",
    "refresh",
    "residuals",
    "resize",
    "retract",
    "scale_by_polar_factor",
    "skip_not_finite",
    "snsm",
    "state_specs",
    "subspace",
    "subtrack",
    "summary",
    "sumo",
    "tangent_norm",
    "tolerance",
    "trion",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{'export' if name == 'export_lora' else 'projected'}"), name)


def __dir__() -> list[str]:
    return __all__
