"""Geometries: each says what the coordinates of a weight are, how a step in them moves it, how moments go along."""

from lowrank_optax.geometry.balanced import Balanced, Pair
from lowrank_optax.geometry.base import (
    Frame,
    Geometry,
    Info,
    Settled,
    geometry_of,
    is_coordinates,
    matrix_shape,
    polar_factor,
    register_coordinates,
)
from lowrank_optax.geometry.blocks import BlockPair, Blocks, BlockTangent
from lowrank_optax.geometry.coefficient import Coefficient, Coefficients, Frozen
from lowrank_optax.geometry.euclidean import Euclidean
from lowrank_optax.geometry.factored import Factored
from lowrank_optax.geometry.tangent import Tangent
from lowrank_optax.manifold import Tangent as TangentVector

__all__ = [
    "Balanced",
    "BlockPair",
    "BlockTangent",
    "Blocks",
    "Coefficient",
    "Coefficients",
    "Euclidean",
    "Factored",
    "Frame",
    "Frozen",
    "Geometry",
    "Info",
    "Pair",
    "Settled",
    "Tangent",
    "TangentVector",
    "geometry_of",
    "is_coordinates",
    "matrix_shape",
    "polar_factor",
    "register_coordinates",
]
