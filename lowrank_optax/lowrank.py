"""The factored kernel `W = U S V^T` and its products with arrays."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import numbers
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax.linalg import highest_precision
from lowrank_optax.paths import is_wrapper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity, like other nodes of arrays
class LowRank:
    r"""A kernel kept in factors, :math:`W = U S V^\top`; W itself is never formed.

    A pytree of three floating arrays without static fields, so it passes through `jit`, `grad`,
    `vmap`, `scan`, Optax and Orbax like any other node. The axes of the factors carry all metadata:
    the number of batch axes is `S.ndim - 2`, the axes of U and V between the batch axes and the last
    one are the input and output axes of the kernel.

    The optimizers of this package keep U and V orthonormal and S diagonal, non-negative and
    descending (the canonical gauge). The width r is the number of columns, the rank the number of singular values
    that are not zero. Where the rank is below the width, the last singular values are exact zeros, and their columns of
    U and V are arbitrary orthonormal ones.

    With batch axes a kernel can be indexed and iterated over along them. Its one operation as a matrix is `x @ W`; for
    others, take `to_dense()`.

    **Arithmetic is that of gradients.** `g + h` and `g - h` of two nodes with factors of equal shapes, and `c * g` and
    `g / c` by a scalar, act on U, S and V one by one, as `jax.tree.map` does. Gradients of the factors are added up and
    averaged so. For kernels themselves these signs have another meaning: `W + W2` is not the sum of the matrices, and
    `c * W` is `c^3` times the matrix. They raise TypeError within a linen module, where every node is a kernel. Nothing
    tells when a module of nnx runs, so avoid them there. `incremental_update` averages kernels. Other arithmetic raises
    TypeError everywhere.

    Attributes:
      U: `(batch..., in..., r)`, orthonormal columns once the input axes are flattened.
      S: `(batch..., r, r)`.
      V: `(batch..., out..., r)`, orthonormal columns once the output axes are flattened.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> W = lro.factorize(jnp.diag(jnp.arange(4.0)), rank=2)
      >>> W.shape, W.width
      ((4, 4), 2)
      >>> bool(jnp.allclose(jnp.ones((3, 4)) @ W, jnp.ones((3, 4)) @ W.to_dense(), atol=1e-5))
      True
    """

    U: jax.Array
    S: jax.Array
    V: jax.Array

    # NumPy would otherwise turn `x @ W` into an object array instead of calling __rmatmul__.
    __array_ufunc__ = None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that index independent kernels (stacked layers)."""
        return tuple(self.S.shape[:-2])

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The input axes of the kernel."""
        return tuple(self.U.shape[self.S.ndim - 2 : -1])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The output axes of the kernel."""
        return tuple(self.V.shape[self.S.ndim - 2 : -1])

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
        """The number of values stored, `r (m + n) + r^2` for each kernel."""
        return math.prod(self.U.shape) + math.prod(self.S.shape) + math.prod(self.V.shape)

    @property
    def width(self) -> int:
        """The number of columns r of U and V, an upper bound of the rank (see `ranks` for the rank)."""
        return int(self.S.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of a product with the kernel."""
        return jnp.result_type(self.U, self.S, self.V)

    @property
    def T(self) -> LowRank:
        """The adjoint: input and output axes change places, batch axes stay."""
        return LowRank(self.V, jnp.swapaxes(self.S, -1, -2), self.U)

    @highest_precision
    def to_dense(self) -> jax.Array:
        """The dense kernel, an array of shape `batch + in + out`, from products of highest precision."""
        # Axis by axis: a reshape of several axes, of which a later one is sharded, is no operation of explicit meshes.
        b = len(self.batch_shape)
        batch = (tuple(range(b)),) * 2
        US = contract(self.U, self.S, (((self.U.ndim - 1,), (b,)), batch))
        return contract(US, self.V, (((US.ndim - 1,), (self.V.ndim - 1,)), batch))

    def astype(self, dtype: Any) -> LowRank:
        """The same factors in another dtype."""
        return jax.tree.map(lambda x: x.astype(dtype), self)

    def __rmatmul__(self, x: Any) -> jax.Array:
        """`x @ W`, see `matmul`."""
        return matmul(x, self)

    def __getitem__(self, index: Any) -> LowRank:
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
        return LowRank(self.U[items], self.S[items], self.V[items])

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("a LowRank kernel without batch axes has no length; see its shape, or use to_dense()")
        return self.batch_shape[0]

    def __iter__(self) -> Iterator[LowRank]:
        return (self[i] for i in range(len(self)))

    # --- gradients of factors, leaf by leaf ---

    def __add__(self, other: Any) -> LowRank:
        """The sum of two gradients, leaf by leaf; not the sum of two kernels."""
        return self._leaf_by_leaf(operator.add, other)

    def __radd__(self, other: Any) -> LowRank:
        """`sum` of gradients starts with the int 0."""
        return self if type(other) is int and other == 0 else self._refuse()

    def __sub__(self, other: Any) -> LowRank:
        """The difference of two gradients, leaf by leaf; not the difference of two kernels."""
        return self._leaf_by_leaf(operator.sub, other)

    def __mul__(self, scalar: Any) -> LowRank:
        """A multiple of a gradient, leaf by leaf; not a multiple of a kernel."""
        return self._scaled(operator.mul, scalar)

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> LowRank:
        """A fraction of a gradient, leaf by leaf; not a fraction of a kernel."""
        return self._scaled(operator.truediv, scalar)

    def _leaf_by_leaf(self, operation: Any, other: Any) -> LowRank:
        self._refuse_in_modules()
        other = other.get_raw_value() if is_wrapper(other) else other
        if not isinstance(other, LowRank):
            self._refuse()
        if not (has_arrays(self) and has_arrays(other)) or _shapes(self) != _shapes(other):
            self._refuse(f"factors of shapes {_shapes(self)} and {_shapes(other)} do not add up leaf by leaf")
        return jax.tree.map(operation, self, other)

    def _scaled(self, operation: Any, scalar: Any) -> LowRank:
        self._refuse_in_modules()
        is_array = hasattr(scalar, "dtype") and not isinstance(scalar, LowRank)
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
    """True for a `LowRank` node: the `is_leaf` of every map over kernels.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": lro.factorize(jnp.eye(4), 2), "bias": jnp.zeros(4)}
      >>> jax.tree.map(lambda x: x.ndim, params, is_leaf=lro.is_lowrank)
      {'bias': 1, 'kernel': 2}
    """
    return isinstance(x, LowRank)


def has_arrays(W: LowRank) -> bool:
    """False for a node of specs, labels or `optax.MaskedNode` in the place of factors."""
    return all(hasattr(x, "shape") and hasattr(x, "dtype") for x in (W.U, W.S, W.V))


def _shapes(W: LowRank) -> tuple[Any, ...]:
    return tuple(getattr(x, "shape", x) for x in (W.U, W.S, W.V))


def flatten(W: LowRank) -> LowRank:
    """The same kernel with one input and one output axis: U `(batch..., m, r)`, V `(batch..., n, r)`."""
    m, n = math.prod(W.in_shape), math.prod(W.out_shape)
    u, v = (*W.batch_shape, m, W.U.shape[-1]), (*W.batch_shape, n, W.V.shape[-1])
    return LowRank(W.U.reshape(u), W.S, W.V.reshape(v))


def unflatten(W: LowRank, like: LowRank) -> LowRank:
    """Gives the factors of a flattened kernel the axes of `like` (their width may differ)."""
    batch = like.batch_shape
    u, v = (*batch, *like.in_shape, W.U.shape[-1]), (*batch, *like.out_shape, W.V.shape[-1])
    return LowRank(W.U.reshape(u), W.S, W.V.reshape(v))


def cast_like(W: LowRank, like: LowRank) -> LowRank:
    """The factors of W in the dtypes of the factors of `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), W, like)


def matmul(x: Any, W: LowRank, *, precision: Any = None) -> jax.Array:
    r"""The product :math:`x W = x U S V^\top`, at `r (m + n) + r^2` operations a row or less, see `dot_general`.

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
    contract = (tuple(range(split, x.ndim)), tuple(range(len(batch), W.U.ndim - 1)))
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
    """`jax.lax.dot_general` whose right operand may be a `LowRank` kernel.

    It serves as the `dot_general` hook of Flax layers. The contracted axes of the kernel must be its input axes and
    the batch axes its batch axes. No intermediate is larger than one activation of width r or a basis: S is
    multiplied with the activation, or with the smaller basis if that has fewer rows.

    Args:
      lhs: array.
      rhs: a `LowRank` kernel; anything else goes to `jax.lax.dot_general` unchanged.
      dimension_numbers: as in `jax.lax.dot_general`.
      precision: passed to each product.
      preferred_element_type: passed to each product.
      **kwargs: passed to the last product, e.g. `out_sharding`.

    Returns:
      Array whose axes are the batch axes, the free axes of `lhs`, and the output axes of the kernel.

    Raises:
      TypeError: if other axes of the kernel than its input axes are contracted.
    """
    last: dict[str, Any] = dict(precision=precision, preferred_element_type=preferred_element_type)
    if not isinstance(rhs, LowRank):
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **last, **kwargs)
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = dimension_numbers
    nbatch = len(rhs.batch_shape)
    expected = tuple(range(nbatch, rhs.U.ndim - 1))
    if tuple(rhs_axes) != expected or tuple(rhs_batch) != tuple(range(nbatch)):
        raise TypeError(
            f"a LowRank kernel of shape {rhs.shape} is contracted over its input axes {expected} with "
            f"batch axes {tuple(range(nbatch))}, got axes {tuple(rhs_axes)} and {tuple(rhs_batch)}"
        )
    free = set(range(lhs.ndim)) - {*lhs_axes, *lhs_batch}
    U, S, V = absorb(rhs, math.prod(lhs.shape[i] for i in free), **last)
    batch = (tuple(range(nbatch)), tuple(range(nbatch)))
    z = contract(lhs, U, ((lhs_axes, expected), (lhs_batch, rhs_batch)), **last)
    if S is not None:
        z = contract(z, S, (((z.ndim - 1,), (nbatch,)), batch), **last)
    return contract(z, V, (((z.ndim - 1,), (V.ndim - 1,)), batch), **last, **kwargs)


def absorb(W: LowRank, rows: Any, **options: Any) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    r"""The factors through which an activation passes: `(U S, None, V)`, `(U, None, V S^T)` or `(U, S, V)`.

    A product with S takes :math:`r^2` operations for each row of the other array. If the activation has more rows than
    the smaller basis, S goes to the basis. Then the backward pass does not multiply activations with S either, and one
    activation of width r less is kept for it.

    Args:
      W: the kernel.
      rows: rows of the activation that one kernel multiplies; a symbolic dimension counts as few.
      **options: passed to the product.
    """
    m, n = math.prod(W.in_shape), math.prod(W.out_shape)
    if jax.export.is_symbolic_dim(rows) or rows <= min(m, n):
        return W.U, W.S, W.V
    nbatch = len(W.batch_shape)
    batch = (tuple(range(nbatch)), tuple(range(nbatch)))
    if m < n:
        return contract(W.U, W.S, (((W.U.ndim - 1,), (nbatch,)), batch), **options), None, W.V
    return W.U, None, contract(W.V, W.S, (((W.V.ndim - 1,), (nbatch + 1,)), batch), **options)


def contract(x: jax.Array, factor: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` of an activation and a factor, with a sharding of the result on an explicit mesh.

    JAX asks for `out_sharding` where a product sums over a sharded axis: here the result is replicated along it. If a
    mesh axis shards both the activation and the rows of the factor (fully sharded data parallelism), the activation
    keeps it and the factor is gathered.
    """
    if jax.typeof(factor).sharding.mesh.explicit_axes and options.get("out_sharding") is None:
        options["out_sharding"] = _result_sharding(x, factor, dimension_numbers)
    return jax.lax.dot_general(x, factor, dimension_numbers, **options)


def _result_sharding(x: Any, factor: Any, dimension_numbers: Any) -> NamedSharding:
    (x_axes, factor_axes), (x_batch, factor_batch) = dimension_numbers
    of_x, of_factor = jax.typeof(x).sharding.spec, jax.typeof(factor).sharding.spec
    entries = [of_x[i] for i in x_batch]
    entries += [of_x[i] for i in range(x.ndim) if i not in (*x_axes, *x_batch)]
    entries += [of_factor[i] for i in range(factor.ndim) if i not in (*factor_axes, *factor_batch)]
    used: set[str] = set()
    for i, entry in enumerate(entries):
        names = set(entry) if isinstance(entry, tuple) else {entry} - {None}
        entries[i] = None if names & used else entry
        used |= names
    # With the mesh of an array: eager products need not run under `jax.set_mesh`.
    holder = jax.typeof(factor) if isinstance(factor, jax.core.Tracer) else factor
    return NamedSharding(holder.sharding.mesh, PartitionSpec(*entries))
