"""The protocol of a change of a kernel, and a frozen kernel with its change, `Adapted`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes, matrix_shape
from lowrank_optax.boxes import is_box
from lowrank_optax.linalg import highest_precision, working_dtype
from lowrank_optax.linen.serialization import register
from lowrank_optax.lowrank import LowRank, is_lowrank
from lowrank_optax.product import Product, is_composed, is_kernel, trailing_columns

Class = TypeVar("Class")

STATIC = {"static": True}  # of a field that is no array and belongs to the structure of the tree


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
def node(cls: type[Class]) -> type[Class]:
    """Makes a class of fields a pytree, compared by identity like other nodes of arrays, that Flax can serialise."""
    made: Any = dataclasses.dataclass(frozen=True, eq=False)(cls)
    register(made, array_fields)
    return jax.tree_util.register_dataclass(made)


def array_fields(x: Any) -> tuple[str, ...]:
    """The names of the fields of a node, or of its class, that are not static."""
    return tuple(field.name for field in dataclasses.fields(x) if not field.metadata.get("static"))


def is_parameter(x: Any) -> bool:
    """Whether x is one parameter of the base, however many arrays it has: as `is_leaf` of its tree."""
    return is_box(x) or is_kernel(x)


class Change:
    """A trained change of a frozen kernel W0, a pytree of floating arrays: the base class of every kind.

    Four functions make a kind: `make` draws it, `part` (or `apply`) says how a layer computes with it, `dense` says
    which kernel it stands for, and `labels` which of its arrays are trained.

    Attributes:
      frozen: the names of fields that are not trained.
      kind: its name in `init`.
      bounded: whether its rank is at most `min(m, n)`.
      own_alpha: the scale by default of a kind whose scale is `alpha` itself, None for others.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"scale"})
    kind: ClassVar[str]
    bounded: ClassVar[bool] = True
    own_alpha: ClassVar[float | None] = None

    scale: Any  # of kinds that have one

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register(cls, array_fields)  # a kind of one's own is made without `node`

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        """The change at the start, and what is taken from W0 in exchange, a `LowRank` of matrices, or None.

        Raises:
          ValueError: for a kernel, a rank or a start that this kind does not have.
        """
        raise NotImplementedError

    @property
    def batch(self) -> int:
        """The number of axes that stack independent kernels; a kind without `scale` tells it by another array."""
        return int(self.scale.ndim)

    def axes(self, shape: tuple[int, ...]) -> Axes:
        """The split of the kernel of this shape."""
        raise NotImplementedError

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a kernel of this shape can have this change."""
        raise NotImplementedError

    def part(self, base: Any) -> LowRank | jax.Array:
        """D of `W = W0 + D`, in the axes of the kernel."""
        raise NotImplementedError

    def apply(self, base: Any, product: Product) -> jax.Array:
        """The output of a layer, `x W0 + x D`, in the dtype that it has without a change."""
        y = times_base(base, product)
        return y + product.times(self.part(base).astype(y.dtype))

    def dense(self, base: jax.Array) -> jax.Array:
        """The kernel W for the dense W0, in float32 or better."""
        return base.astype(working_dtype(base)) + to_dense(self.part(base))

    def undo(self, merged: jax.Array) -> jax.Array:
        """W0 for the dense kernel W, in float32 or better."""
        return merged.astype(working_dtype(merged)) - to_dense(self.part(merged))

    def labels(self) -> Any:
        """`"trained"` or `"frozen"` in the place of every array; one label stands for a `LowRank`."""

        def label(name: str) -> Any:
            value = getattr(self, name)
            if isinstance(value, Change):
                return value.labels()
            return None if value is None else "frozen" if name in self.frozen else "trained"

        return dataclasses.replace(self, **{name: label(name) for name in array_fields(self)})  # type: ignore[type-var]


@node
class Flattened(Change):
    """A change whose arrays do not show the axes of the kernel: the base class of such kinds.

    Where a kernel has axes of size 1, several splits of its axes have equal numbers of inputs and outputs, so the
    change remembers its own.

    Attributes:
      inputs: the number of input axes of the kernel; static.
    """

    inputs: int = dataclasses.field(default=1, kw_only=True, metadata=STATIC)

    @property
    def sides(self) -> tuple[int, int | None]:
        """The numbers of inputs and outputs of the kernel; None for outputs that may be of any number."""
        raise NotImplementedError

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.inputs)

    def fits(self, shape: tuple[int, ...]) -> bool:
        axes = self.axes(shape)
        if len(shape) <= sum(axes) or shape[: axes.batch] != jax.tree.leaves(self)[0].shape[: axes.batch]:
            return False
        (m, n), (rows, columns) = matrix_shape(shape, axes), self.sides
        return m == rows and columns in (n, None)


@node
class Sized(Change):
    """A change whose arrays do not show the size of the kernel, which it remembers: the base class of such kinds.

    Attributes:
      sides: the numbers of inputs and outputs of the kernel; static. None, in a change made by hand, leaves them open.
    """

    sides: tuple[int, int] | None = dataclasses.field(default=None, kw_only=True, metadata=STATIC)

    def has_sides_of(self, shape: tuple[int, ...]) -> bool:
        """Whether a kernel of this shape has the numbers of inputs and outputs that the change remembers."""
        return self.sides in (None, matrix_shape(shape, self.axes(shape)))


class Parts:
    """A kernel that is no array and says how a layer multiplies with it: the base class of such kernels."""

    __array_ufunc__ = None  # NumPy arrays leave `x @ W` to W

    shape: Any
    axes: Any

    @property
    def ndim(self) -> int:
        """The number of axes of the kernel."""
        return len(self.shape)

    def through(self, product: Product) -> jax.Array:
        """The output of a layer with this kernel."""
        raise NotImplementedError

    def __rmatmul__(self, x: Any) -> jax.Array:
        """`x @ W`: the batch axes of the kernel come first in x, its input axes last."""
        x, (batch, inputs) = jnp.asarray(x), self.axes
        first = x.ndim - inputs
        numbers = (
            (tuple(range(first, x.ndim)), tuple(range(batch, batch + inputs))),
            (tuple(range(batch)), tuple(range(batch))),
        )

        def times(K: Any) -> jax.Array:
            return x @ K if is_lowrank(K) else jax.lax.dot_general(*_promoted(x, K), numbers)

        return self.through(Product(times, trailing_columns(batch)))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        name = type(self).__name__
        raise TypeError(f"the {name!r} object is a kernel in parts and no array: use x @ W, or to_dense()")

    def __getitem__(self, index: Any) -> Any:
        """`W[...]` is W, as for a Flax variable."""
        if index is Ellipsis:
            return self
        raise TypeError(f"the {type(self).__name__!r} kernel has no entries to index; use to_dense()")


@node
class Adapted(Parts):
    """A kernel `W = f(W0, change)` that a layer multiplies with part by part: W is never formed.

    Attributes:
      base: W0, an array or a kernel in another form; it gets no gradient.
      change: a `Change`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2)
      >>> W = lro.adapters.attach(params, delta)["kernel"]
      >>> (jnp.ones((3, 6)) @ W).shape
      (3, 6)
    """

    base: Any
    change: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the base."""
        return self.base.dtype

    @property
    def axes(self) -> Axes:
        """How the axes of the kernel split."""
        return self.change.axes(self.shape)

    def through(self, product: Product) -> jax.Array:
        """The output of a layer with this kernel."""
        return self.change.apply(self.base, product)

    def to_dense(self) -> jax.Array:
        """The kernel W, formed."""
        return self.change.dense(dense_base(self.base))


def _promoted(x: jax.Array, K: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.result_type(x, K)
    return x.astype(dtype), K.astype(dtype)


def is_adapted(x: Any) -> bool:
    """Whether x is a kernel with its change."""
    return isinstance(x, Adapted)


def is_change(x: Any) -> bool:
    """Whether x is the change of one kernel: the `is_leaf` of maps over the tree of adapters."""
    return isinstance(x, Change | LowRank)


def times_base(base: Any, product: Product) -> jax.Array:
    """The output of a layer with the frozen kernel alone."""
    return base.through(product) if is_composed(base) else product.times(base)


def dense_base(base: Any) -> jax.Array:
    """The frozen kernel as an array."""
    return base.to_dense() if hasattr(base, "to_dense") else base


@highest_precision
def to_dense(part: LowRank | jax.Array) -> jax.Array:
    """A part of a kernel as an array."""
    return part.to_dense() if isinstance(part, LowRank) else part


def diagonals(x: jax.Array) -> jax.Array:
    """The diagonal matrices `(..., r, r)` of vectors `(..., r)`."""
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    return x[..., None, :] * eye.reshape((1,) * (x.ndim - 1) + eye.shape)


def scaled_identity(scale: jax.Array, rank: int) -> jax.Array:
    """s I for every kernel of a stack."""
    return diagonals(jnp.broadcast_to(scale[..., None], (*scale.shape, rank)))


def indices(positions: jax.Array, kind: str) -> jax.Array:
    """Positions that a change keeps as floating numbers, as integers.

    Raises:
      ValueError: for positions in fewer than four bytes, where most integers above 256 or 2048 are other ones.
    """
    if positions.dtype.itemsize < 4:
        raise ValueError(
            f"the positions of a change of kind {kind!r} are in {positions.dtype}, which moved them: cast the arrays "
            "that lro.adapters.labels calls 'trained', and leave the frozen ones as they are"
        )
    return jax.lax.stop_gradient(positions).astype(jnp.int32)
