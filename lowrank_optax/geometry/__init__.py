"""Geometries: each says what the coordinates of a weight are, how a step in them moves it, how moments go along."""

from lowrank_optax.geometry.balanced import Balanced, Pair
from lowrank_optax.geometry.base import Frame, Geometry, Info, Settled, matrix_shape, polar_factor
from lowrank_optax.geometry.coefficient import Coefficient, Coefficients, Frozen
from lowrank_optax.geometry.euclidean import Euclidean
from lowrank_optax.geometry.factored import Factored
from lowrank_optax.geometry.tangent import Tangent
from lowrank_optax.manifold import Tangent as TangentVector

__all__ = [
    "Balanced",
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
    "is_coordinates",
    "matrix_shape",
    "polar_factor",
]


def is_coordinates(x: object) -> bool:
    """True for the coordinates of a kernel: the `is_leaf` of maps over trees that an inner transformation sees.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> lro.geometry.is_coordinates(lro.geometry.Pair(jnp.ones((4, 2)), jnp.ones((3, 2))))
      True
    """
    return isinstance(x, Pair | TangentVector | Coefficients)
