r"""`dora`: the direction of each output column changes by another change, its length is trained by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.adapters.change import Change, dense_base, node, to_dense
from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.lowrank import as_change
from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes
from lowrank_optax.layout import map_matrices
from lowrank_optax.linalg import highest_precision, working_dtype
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.product import Product


@node
class Magnitude(Change):
    r"""A change of directions and a length for each output column,

    .. math:: W_j = m_j\, V_j / |V_j|, \quad V = W_0 + D.

    As in DoRA the norms :math:`|V_j|` are constants of the gradient. They are computed from W0 and the factors of D
    without forming V.

    Attributes:
      change: the change D, `LoRA` in DoRA.
      magnitude: m, `(batch..., out...)`; at the start the norms of the columns of V.

    References:
      arXiv:2402.09353, equation 5 and section 4.3.
    """

    change: Any
    magnitude: jax.Array

    @property
    def batch(self) -> int:
        return as_change(self.change).batch

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return as_change(self.change).axes(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        change, inputs = as_change(self.change), self.axes(shape).inputs
        return change.fits(shape) and self.magnitude.shape == (*shape[: self.batch], *shape[self.batch + inputs :])

    def apply(self, base: Any, product: Product) -> jax.Array:
        change = as_change(self.change)
        y = change.apply(base, product)  # a kind may have gradients of its own
        constants = jax.lax.stop_gradient((dense_base(base), change.part(base)))
        norms = column_norms(*constants, self.axes(tuple(base.shape)))
        return y * product.columns(self._factors(norms).astype(y.dtype), y.ndim)

    def dense(self, base: jax.Array) -> jax.Array:
        W = as_change(self.change).dense(base)
        axes = self.axes(W.shape)
        factors = self._factors(_dense_norms(W, axes))
        inputs = tuple(range(axes.batch, axes.batch + axes.inputs))
        return W * jnp.expand_dims(factors, inputs)

    def undo(self, merged: jax.Array) -> jax.Array:
        raise ValueError("the lengths of the columns of W0 are lost in a merged kernel of kind 'dora': keep the base")

    def labels(self) -> Any:
        inner = self.change.labels() if isinstance(self.change, Change) else "trained"
        label: Any = "trained"
        return Magnitude(inner, label)

    def _factors(self, norms: jax.Array) -> jax.Array:
        """m / |V|; a zero column stays zero."""
        return jnp.where(norms > 0, self.magnitude / jnp.where(norms > 0, norms, 1.0), 0.0)


@highest_precision
def column_norms(base: jax.Array, part: Any, axes: Axes) -> jax.Array:
    r"""The norms `(batch..., out...)` of the columns of W0 + D, for D = U S V^T from

    .. math:: |W_j + D_j|^2 = |W_j|^2 + 2\,(W_0^\top U)_j \cdot c_j + c_j^\top (U^\top U)\, c_j, \quad c = V S^\top.
    """
    base = base.astype(working_dtype(base))
    if not is_lowrank(part):
        return _dense_norms(base + to_dense(part), axes)
    flat = part.astype(base.dtype).flatten()
    m, n = flat.U.shape[-2], flat.V.shape[-2]
    squares = map_matrices(_squares, base.reshape(*base.shape[: axes.batch], m, n), *jax.tree.leaves(flat))
    norms = jnp.sqrt(jnp.maximum(squares, 0.0))
    return norms.reshape(*base.shape[: axes.batch], *base.shape[axes.batch + axes.inputs :])


def _squares(W: jax.Array, U: jax.Array, S: jax.Array, V: jax.Array) -> jax.Array:
    c = V @ S.T
    return jnp.sum(W * W, axis=0) + jnp.sum((2.0 * (W.T @ U) + c @ (U.T @ U)) * c, axis=1)


def _dense_norms(W: jax.Array, axes: Axes) -> jax.Array:
    inputs = tuple(range(axes.batch, axes.batch + axes.inputs))
    return jnp.sqrt(jnp.sum(W * W, axis=inputs))


@dataclasses.dataclass(frozen=True)
class Over:
    """The kind that trains lengths beside a change of directions of another kind."""

    over: type[Change]

    @property
    def kind(self) -> str:
        """Its name in messages."""
        return "dora" if self.over is LoRA else f"magnitude over {self.over.kind}"

    @property
    def bounded(self) -> bool:
        """Whether its rank is at most `min(m, n)`."""
        return self.over.bounded

    @property
    def own_alpha(self) -> float | None:
        """The scale by default of a kind whose scale is `alpha` itself."""
        return self.over.own_alpha

    def make(self, request: Request) -> tuple[Any, Any]:
        """The change and lengths at the start: what the change takes from W0 it gives V, so norms are W0's."""
        change, taken = self.over.make(request)
        return Magnitude(change, request.columns(map_matrices(linalg.column_norms, request.W))), taken
