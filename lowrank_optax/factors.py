"""`FactoredKernel`: the part that all forms of a kernel in factors share, and products with arrays."""

from __future__ import annotations

import contextlib
import contextvars
import math
import numbers
import operator
from collections.abc import Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp

from lowrank_optax.paths import is_wrapper


class FactoredKernel:
    """A kernel W in three arrays of factors U, S and V, which no operation multiplies out unasked.

    A subclass is a pytree node of these arrays without static fields. Its batch axes, which stack independent kernels,
    come first in all three.

    **Nodes add and scale like gradients.** `g + h` and `g - h` of two nodes with factors of equal shapes, `c * g` and
    `g / c` by a scalar, act on U, S and V one by one, as `jax.tree.map` does. Gradients of the factors are added up and
    averaged so. For kernels themselves these signs have another meaning: `W + W2` is not the sum of the matrices, and
    `c * W` is `c^3` times the matrix. They raise TypeError within a linen module, where every node is a kernel. Nothing
    tells when a module of nnx runs, so avoid them there. `incremental_update` averages kernels. Other arithmetic raises
    TypeError everywhere.
    """

    U: jax.Array
    S: jax.Array
    V: jax.Array

    __array_ufunc__ = None

    # --- the form: a subclass says it ---

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that index independent kernels (stacked layers)."""
        raise NotImplementedError

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The input axes of the kernel."""
        raise NotImplementedError

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The output axes of the kernel."""
        raise NotImplementedError

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The axes that index the matrices `U S V^T` of the kernel: batch axes, and blocks."""
        raise NotImplementedError

    def to_dense(self) -> jax.Array:
        """The dense kernel, an array of shape `batch + in + out`, from products of highest precision."""
        raise NotImplementedError

    def flatten(self) -> Any:
        """A stack of `LowRank` matrices with one input and one output axis, its batch axes `stack_shape`."""
        raise NotImplementedError

    def unflatten(self, matrices: Any) -> Any:
        """The kernel of the form and the axes of this one, of matrices of `flatten`. Their width may differ."""
        raise NotImplementedError

    def product(self, x: jax.Array, inputs: tuple[int, ...], batch: tuple[int, ...], **options: Any) -> jax.Array:
        """`dot_general` of an array and the kernel over these axes of the array."""
        raise NotImplementedError

    # --- the same for all forms ---

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense kernel, `batch + in + out`."""
        return self.batch_shape + self.in_shape + self.out_shape

    @property
    def ndim(self) -> int:
        """The number of axes of the dense kernel."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values stored."""
        return math.prod(self.U.shape) + math.prod(self.S.shape) + math.prod(self.V.shape)

    @property
    def width(self) -> int:
        """The number of columns of a matrix `U S V^T`, an upper bound of its rank (see `ranks` for the rank)."""
        return int(self.S.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of a product with the kernel."""
        return jnp.result_type(self.U, self.S, self.V)

    def astype(self, dtype: Any) -> Self:
        """The same factors in another dtype."""
        return jax.tree.map(lambda x: x.astype(dtype), self)

    def __rmatmul__(self, x: Any) -> jax.Array:
        """`x @ W`, see `matmul`."""
        return matmul(x, self)

    def __getitem__(self, index: Any) -> Self:
        """Selects kernels along the batch axes; `W[...]` is W, as for a Flax variable."""
        if index is Ellipsis:
            return self
        if not self.batch_shape:
            raise TypeError("a LowRank kernel without batch axes has no entries to index; use to_dense()")
        items = index if isinstance(index, tuple) else (index,)
        masks = [x.ndim for x in items if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, bool)]
        axes = sum(masks) + sum(x is not None and x is not Ellipsis for x in items) - len(masks)
        if axes > len(self.batch_shape):
            raise IndexError(
                f"{axes} indices for a LowRank kernel with batch axes {self.batch_shape}: only those can be indexed; "
                "use to_dense() for entries"
            )
        # An ellipsis stands for batch axes only, not for axes of the factors.
        rest = (slice(None),) * (len(self.batch_shape) - axes)
        at = next((i for i, x in enumerate(items) if x is Ellipsis), len(items))
        items = (*items[:at], *rest, *items[at + 1 :])
        return type(self)(self.U[items], self.S[items], self.V[items])  # type: ignore[call-arg]

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("a LowRank kernel without batch axes has no length; see its shape, or use to_dense()")
        return self.batch_shape[0]

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    # --- gradients of factors, leaf by leaf ---

    def __add__(self, other: Any) -> Self:
        """The sum of two gradients, leaf by leaf; not the sum of two kernels."""
        return self._leaf_by_leaf(operator.add, other)

    def __radd__(self, other: Any) -> Self:
        """`sum` of gradients starts with the int 0."""
        return self if type(other) is int and other == 0 else self._refuse()

    def __sub__(self, other: Any) -> Self:
        """The difference of two gradients, leaf by leaf; not the difference of two kernels."""
        return self._leaf_by_leaf(operator.sub, other)

    def __mul__(self, scalar: Any) -> Self:
        """A multiple of a gradient, leaf by leaf; not a multiple of a kernel."""
        return self._scaled(operator.mul, scalar)

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> Self:
        """A fraction of a gradient, leaf by leaf; not a fraction of a kernel."""
        return self._scaled(operator.truediv, scalar)

    def _leaf_by_leaf(self, operation: Any, other: Any) -> Self:
        self._refuse_in_modules()
        other = other.get_raw_value() if is_wrapper(other) else other
        if type(other) is not type(self):
            self._refuse()
        if not (has_arrays(self) and has_arrays(other)) or _shapes(self) != _shapes(other):
            self._refuse(f"factors of shapes {_shapes(self)} and {_shapes(other)} do not add up leaf by leaf")
        return jax.tree.map(operation, self, other)

    def _scaled(self, operation: Any, scalar: Any) -> Self:
        self._refuse_in_modules()
        is_array = hasattr(scalar, "dtype") and not isinstance(scalar, FactoredKernel)
        if jnp.ndim(scalar) if is_array else isinstance(scalar, bool) or not isinstance(scalar, numbers.Real):
            self._refuse()
        return jax.tree.map(lambda x: operation(x, scalar), self)

    def _refuse_in_modules(self) -> None:
        if _in_module.get():
            self._refuse("within a module a LowRank node is a kernel, and a multiple of its factors no multiple of W")

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        cause = f"{args[0]}: " if args and isinstance(args[0], str) else ""
        raise TypeError(
            f"{cause}a LowRank kernel U S V^T is a node of three arrays and no array. Use x @ W, or to_dense() for "
            "other operations. Gradients of factors of equal shapes are added, subtracted, and scaled by a scalar, "
            "leaf by leaf; lowrank_optax.incremental_update averages kernels"
        )

    # An elementwise operation on factors is no operation on W, and other libraries would fail later and elsewhere.
    __rsub__ = __rtruediv__ = __pow__ = __rpow__ = __neg__ = __abs__ = __array__ = __float__ = __matmul__ = _refuse


_in_module = contextvars.ContextVar("whether LowRank nodes are kernels, and no gradients", default=False)


@contextlib.contextmanager
def arithmetic_refused() -> Iterator[None]:
    """For the time that a module with factored kernels runs: `2.0 * W` there would be a silent `8.0 * W`."""
    token = _in_module.set(True)
    try:
        yield
    finally:
        _in_module.reset(token)


def is_lowrank(x: Any) -> bool:
    """True for a factored kernel, `LowRank` or `BlockLowRank`: the `is_leaf` of every map over kernels.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": lro.factorize(jnp.eye(4), 2), "bias": jnp.zeros(4)}
      >>> jax.tree.map(lambda x: x.ndim, params, is_leaf=lro.is_lowrank)
      {'bias': 1, 'kernel': 2}
    """
    return isinstance(x, FactoredKernel)


def has_arrays(W: FactoredKernel) -> bool:
    """False for a node of specs, labels or `optax.MaskedNode` in the place of factors."""
    return all(hasattr(x, "shape") and hasattr(x, "dtype") for x in (W.U, W.S, W.V))


def _shapes(W: FactoredKernel) -> tuple[Any, ...]:
    return tuple(getattr(x, "shape", x) for x in (W.U, W.S, W.V))


def cast_like(W: Any, like: Any) -> Any:
    """The factors of W in the dtypes of the factors of `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), W, like)


def matmul(x: Any, W: FactoredKernel, *, precision: Any = None) -> jax.Array:
    r"""The product :math:`x W` of an array and a factored kernel, see `dot_general`.

    Args:
      x: array of shape `(batch..., any..., in...)`: the batch axes of the kernel come first, its input
        axes last.
      W: the kernel.
      precision: passed to each product.

    Returns:
      Array of shape `(batch..., any..., out...)`.

    Raises:
      TypeError: if the axes of `x` do not match the kernel.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> W = lro.factorize(jnp.ones((6, 2, 4)), rank=1, where=lambda path, shape: lro.Axes(0, 1))
      >>> (jnp.ones((3, 6)) @ W).shape
      (3, 2, 4)
    """
    x = jnp.asarray(x)
    batch, inputs = W.batch_shape, W.in_shape
    split = x.ndim - len(inputs)
    if split < len(batch) or x.shape[: len(batch)] != batch or x.shape[split:] != inputs:
        raise TypeError(
            f"x @ W needs x of shape {(*batch, '...', *inputs)} for a kernel with batch axes {batch}, "
            f"input axes {inputs} and output axes {W.out_shape}, got {x.shape}"
        )
    contract = (tuple(range(split, x.ndim)), tuple(range(len(batch), len(batch) + len(inputs))))
    axes = tuple(range(len(batch)))
    return dot_general(x, W, (contract, (axes, axes)), precision=precision)


def dot_general(
    lhs: jax.Array,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.dot_general` whose right operand may be a factored kernel.

    It serves as the `dot_general` hook of Flax layers. The contracted axes of the kernel must be its input axes and
    the batch axes its batch axes. A product with a `LowRank` of width r takes `r (m + n) + r^2` operations a row or
    less, and no intermediate is larger than one activation of width r or a basis. `BlockLowRank` says its own cost.

    Args:
      lhs: array.
      rhs: a factored kernel; anything else goes to `jax.lax.dot_general` unchanged.
      dimension_numbers: as in `jax.lax.dot_general`.
      precision: passed to each product.
      preferred_element_type: passed to each product.
      **kwargs: passed to the last product, e.g. `out_sharding`.

    Returns:
      Array whose axes are the batch axes, the free axes of `lhs`, and the output axes of the kernel.

    Raises:
      TypeError: if other axes of the kernel than its input axes are contracted.
    """
    options: dict[str, Any] = dict(precision=precision, preferred_element_type=preferred_element_type, **kwargs)
    if not is_lowrank(rhs):
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **options)
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = dimension_numbers
    batch = tuple(range(len(rhs.batch_shape)))
    expected = tuple(range(len(batch), len(batch) + len(rhs.in_shape)))
    if tuple(rhs_axes) != expected or tuple(rhs_batch) != batch:
        raise TypeError(
            f"a {type(rhs).__name__} kernel of shape {rhs.shape} is contracted over its input axes {expected} with "
            f"batch axes {batch}, got axes {tuple(rhs_axes)} and {tuple(rhs_batch)}"
        )
    return rhs.product(lhs, tuple(lhs_axes), tuple(lhs_batch), **options)
