"""`LowRank`, the factored kernel `W = U S V^T`, and its products with arrays."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from lowrank_optax.contractions import contract as contract
from lowrank_optax.factors import FactoredKernel as FactoredKernel
from lowrank_optax.factors import arithmetic_refused as arithmetic_refused
from lowrank_optax.factors import cast_like as cast_like
from lowrank_optax.factors import dot_general as dot_general
from lowrank_optax.factors import has_arrays as has_arrays
from lowrank_optax.factors import is_lowrank as is_lowrank
from lowrank_optax.factors import matmul as matmul
from lowrank_optax.linalg import highest_precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity, like other nodes of arrays
class LowRank(FactoredKernel):
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

    Nodes add and scale like gradients, leaf by leaf: see `FactoredKernel`.

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
    def stack_shape(self) -> tuple[int, ...]:
        """The batch axes."""
        return self.batch_shape

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

    def flatten(self) -> LowRank:
        """The same kernel with one input and one output axis: U `(batch..., m, r)`, V `(batch..., n, r)`."""
        m, n = math.prod(self.in_shape), math.prod(self.out_shape)
        u, v = (*self.batch_shape, m, self.U.shape[-1]), (*self.batch_shape, n, self.V.shape[-1])
        return LowRank(self.U.reshape(u), self.S, self.V.reshape(v))

    def unflatten(self, matrices: LowRank) -> LowRank:
        """The factors of a flattened kernel with the axes of this one."""
        W, batch = matrices, self.batch_shape
        u, v = (*batch, *self.in_shape, W.U.shape[-1]), (*batch, *self.out_shape, W.V.shape[-1])
        return LowRank(W.U.reshape(u), W.S, W.V.reshape(v))

    def product(self, x: jax.Array, inputs: tuple[int, ...], batch: tuple[int, ...], **options: Any) -> jax.Array:
        """`dot_general` over these axes of x: S is multiplied with the activation or a basis, see `absorb`."""
        last = {name: options.pop(name) for name in tuple(options) if name not in _OF_EVERY_PRODUCT}
        axes = tuple(range(len(batch)))
        free = set(range(x.ndim)) - {*inputs, *batch}
        U, S, V = absorb(self, math.prod(x.shape[i] for i in free), **options)
        z = contract(x, U, ((inputs, tuple(range(len(batch), U.ndim - 1))), (batch, axes)), **options)
        if S is not None:
            z = contract(z, S, (((z.ndim - 1,), (len(batch),)), (axes, axes)), **options)
        return contract(z, V, (((z.ndim - 1,), (V.ndim - 1,)), (axes, axes)), **options, **last)


# Options of a product of three arrays that each of its products gets; the last one gets all others too.
_OF_EVERY_PRODUCT = ("precision", "preferred_element_type")


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
