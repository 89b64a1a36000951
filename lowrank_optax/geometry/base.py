"""The protocol of a geometry: the coordinates of one weight, how a step in them moves it, how moments go along.

A geometry is a subclass of `Geometry` in a file of its own. Its methods are mathematics on one weight: matrices
without batch axes, in float32 or better. `optimize` calls them in the order in which they stand here, and `layout`
maps them over stacked layers and over kernels of equal shape. The base class has the methods of ordinary leaves, whose
coordinates are their entries, so a subclass writes only the methods that differ.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax

from lowrank_optax.lowrank import LowRank
from lowrank_optax.rank import RankPolicy, Spectrum


class Frame(NamedTuple):
    """Everything that the gradient fixes for one step. The frame of a geometry may have more fields.

    Attributes:
      grad: the gradient in coordinates, given to the inner transformation as update.
      weight: the weight in coordinates, given to it as parameter: weight decay acts on it.
    """

    grad: Any
    weight: Any


class Settled(NamedTuple):
    """The end of a step.

    Attributes:
      weight: the new weight.
      aux: numbers for the next step beside the moments, see `Geometry.init`.
      info: numbers for `diagnostics`; no step reads them.
      change: the change of basis, an argument of `Geometry.carry`.
    """

    weight: Any
    aux: Any
    info: Any
    change: Any


class Info(NamedTuple):
    """The numbers that `diagnostics` shows for a kernel, all of shape `(batch...)`.

    Attributes:
      rank: the rank after the last step, int32.
      gradient_norm: `|P(W)G|_F` of the last step.
      truncation: relative Frobenius norm that the last step discarded; None with a geometry that never truncates.
    """

    rank: jax.Array
    gradient_norm: jax.Array
    truncation: jax.Array | None


class Geometry:
    """Base class of geometries. Its methods suit ordinary leaves; see `docs/design.md` for an example of a subclass.

    Coordinates are an array or a NamedTuple of arrays. Moments are kept in coordinates too, see `template`. The
    `degree` of a moment is 1 if it is linear in gradients and 2 if it is a mean of squares.

    Attributes:
      rank: policy that chooses the rank of every kernel after a step; None keeps ranks.
    """

    rank: RankPolicy | None = None

    # --- leaves of the parameter tree and weights ---

    def owns(self, leaf: Any) -> bool:
        """Whether a node of the parameter tree is a weight of this geometry; other leaves are ordinary."""
        raise NotImplementedError

    def check(self, name: str, leaf: Any) -> None:
        """Raises ValueError for a weight that `init` cannot accept. Shapes only: values may be unknown."""

    def of(self, leaf: Any) -> Geometry:
        """The geometry that moves a weight of its own: this one, or one made of it for another form of weights."""
        return self

    def batch_axes(self, leaf: Any) -> int:
        """The number of leading axes that index independent weights."""
        return 0

    def weight(self, x: Any, like: Any) -> Any:
        """A leaf, or the gradient of one, as the weight that methods see: in the working dtype, axes flattened."""
        return x

    def difference(self, new: Any, old: Any, like: Any) -> Any:
        """The update from one weight to another in the dtypes of the leaf `like`; may have batch axes."""
        return jax.tree.map(lambda x, y, z: x.astype(z.dtype) - y.astype(z.dtype), new, old, like)

    def leaf(self, x: Any, like: Any) -> Any:
        """A difference with the axes of the leaf, the inverse of `weight`."""
        return x

    # --- one step on one weight ---

    def init(self, weight: Any) -> tuple[Any, Any]:
        """The numbers carried beside the moments, a rank say, and the ones that `diagnostics` shows at first."""
        return (), ()

    def template(self, weight: Any) -> Any:
        """Zeros of the form in which moments are kept."""
        return jax.tree.map(jax.numpy.zeros_like, weight)

    def frame(self, weight: Any, grad: Any, aux: Any) -> Any:
        """Everything that the gradient fixes, at least the coordinates of gradient and weight."""
        return Frame(grad, weight)

    def lift(self, frame: Any, moment: Any, degree: int) -> Any:
        """A moment as it is kept, in the coordinates of the frame."""
        return moment

    def propose(self, frame: Any, step: Any) -> Any:
        """The moved point, before its rank is chosen."""
        return jax.tree.map(lambda x, d: x + d, frame.weight, step)

    def spectrum(self, frame: Any, proposal: Any) -> Spectrum | None:
        """The singular values of the proposal for the rank policy; None for weights without a rank."""
        return None

    def settle(self, frame: Any, proposal: Any, rank: Any) -> Settled:
        """The new weight, given the rank that the policy chose, or None without a policy."""
        return Settled(proposal, (), (), ())

    def carry(self, change: Any, moment: Any, degree: int) -> Any:
        """A moment, given in the coordinates of the frame, in the form in which it is kept at the new weight."""
        return moment

    def rebase(self, old: Any, new: Any) -> Any:
        """The change of basis from one weight to another, for `carry`, when moments are kept at the old one.

        `galerkin` needs it when it augments the bases, `resize` when the number of columns changes. Padded columns of
        the new weight are zero.
        """
        return ()


class Coordinates(NamedTuple):
    """The entry of a class of coordinates, see `register_coordinates`."""

    geometry: Geometry
    mirrors: dict[str, str]
    axes: int


_COORDINATES: dict[type, Coordinates] = {}


def register_coordinates(kind: type, geometry: Geometry, mirrors: dict[str, str], axes: int = 2) -> None:
    """Makes a class known as coordinates of a kernel: to inner transformations, `resize`, specs and checkpoints.

    A state of nnx keeps the names of fields and not their class, so a name means one factor in all classes.

    Args:
      kind: the class, with one array in each field.
      geometry: `resize` carries moments in these coordinates by its `rebase` and `carry`.
      mirrors: for each field in order, the factor "U", "S" or "V" whose shape and sharding it has.
      axes: the number of axes of each array that belong to one kernel: 2 for matrices. Axes in front stack kernels.

    Raises:
      ValueError: for another factor than these three, or for a name that another class gives to another factor.
    """
    known: dict[type, dict[str, str]] = {LowRank: {"U": "U", "S": "S", "V": "V"}}
    known |= {other: entry.mirrors for other, entry in _COORDINATES.items() if other is not kind}
    for field, factor in mirrors.items():
        if factor not in ("U", "S", "V"):
            raise ValueError(f"{kind.__name__}.{field} mirrors a factor of a kernel, U, S or V, got {factor!r}")
        for other, taken in known.items():
            if taken.get(field, factor) != factor:
                raise ValueError(
                    f"{kind.__name__}.{field} mirrors {factor}, but {other.__name__}.{field} mirrors {taken[field]}: "
                    "choose another name for the field"
                )
    _COORDINATES[kind] = Coordinates(geometry, mirrors, axes)


def is_coordinates(x: Any) -> bool:
    """True for the coordinates of a kernel: the `is_leaf` of maps over trees that an inner transformation sees.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> lro.geometry.is_coordinates(lro.geometry.Pair(jnp.ones((4, 2)), jnp.ones((3, 2))))
      True
    """
    return type(x) in _COORDINATES


def geometry_of(x: Any) -> Geometry:
    """The geometry that was registered for the class of coordinates."""
    return _COORDINATES[type(x)].geometry


def registered_coordinates() -> dict[type, Coordinates]:
    """Every registered class, with its geometry and `mirrors`."""
    return dict(_COORDINATES)


@functools.singledispatch
def polar_factor(coordinates: Any, steps: int) -> Any:
    """The orthogonal polar factor of coordinates of one kernel, by Newton-Schulz. A geometry registers its own."""
    raise TypeError(
        f"there is no polar factor of {type(coordinates).__name__} coordinates: register one with "
        "lowrank_optax.geometry.polar_factor.register"
    )


@functools.singledispatch
def matrix_shape(coordinates: Any) -> tuple[int, int]:
    """(m, n) of the kernel that coordinates belong to."""
    raise TypeError(f"{type(coordinates).__name__} coordinates do not tell the shape of their kernel")
