r"""`adalora` and `delora`: sums of r components, each of a trained size.

.. math:: D = A\, \mathrm{diag}(e)\, B = \sum_i e_i\, a_i b_i^\top
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Change, diagonals, node, scaled_identity
from lowrank_optax.adapters.request import Request
from lowrank_optax.axes import Axes
from lowrank_optax.layout import map_matrices
from lowrank_optax.lowrank import LowRank


@node
class Components(Change):
    r"""The change :math:`s\,A\,\mathrm{diag}(E) B`, whose components `allocate` takes away from kernels by a score.

    AdaLoRA adds a penalty to the loss, see `orthogonality`. Its scale in PEFT is :math:`\alpha / (r + 10^{-5})`.

    Attributes:
      A: `(batch..., in..., r)`, Gaussian of standard deviation 0.02 at the start.
      E: `(batch..., r)`, zero at the start.
      B: `(batch..., r, out...)`, like A.
      scale: s, `(batch...)`, not trained.

    References:
      arXiv:2303.10512.
    """

    kind: ClassVar[str] = "adalora"

    A: jax.Array
    E: jax.Array
    B: jax.Array
    scale: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        m, n, r = request.m, request.n, request.rank
        A, B = request.normal(0, m, r, std=0.02), request.normal(1, r, n, std=0.02)
        E = jnp.zeros((*request.batch, r), A.dtype)
        return cls(request.rows(A), E, request.columns(B), request.number(request.scale)), None

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.A.ndim - 1 - self.batch)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (*self.A.shape[:-1], *self.B.shape[self.batch + 1 :])

    def part(self, base: Any) -> LowRank:
        scale = jax.lax.stop_gradient(self.scale)[..., None]
        return LowRank(self.A, diagonals(scale * self.E), jnp.moveaxis(self.B, self.batch, -1))


def is_components(x: Any) -> bool:
    """Whether x is a change of kind `adalora`."""
    return isinstance(x, Components)


def changes_of(tree: Any) -> list[Components]:
    """The changes of kind `adalora`, in the order of the tree."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_components) if is_components(x)]


def orthogonality(delta: Any) -> jax.Array:
    r"""AdaLoRA's penalty, the mean of :math:`|A^\top A - I|_F` and :math:`|B B^\top - I|_F` over all changes.

    Args:
      delta: a tree of changes of kind `adalora`.

    Returns:
      A number, to be added to the loss with a weight, 0.5 in PEFT.

    Raises:
      ValueError: for a tree without such changes.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=4, kind="adalora")
      >>> penalty = 0.5 * lro.adapters.orthogonality(delta)

    References:
      arXiv:2303.10512; PEFT takes the norms without squares too.
    """
    found = changes_of(delta)
    if not found:
        raise ValueError("orthogonality is a penalty on changes of kind 'adalora', and the tree has none")
    norms = []
    for x in found:
        b, r = x.batch, x.E.shape[-1]
        A, B = x.A.reshape(*x.A.shape[:b], -1, r), x.B.reshape(*x.B.shape[: b + 1], -1)
        norms += [map_matrices(_skewness, A), map_matrices(_skewness, jnp.swapaxes(B, -1, -2))]
    return jnp.mean(jnp.concatenate([x.reshape(-1) for x in norms]))


def _skewness(A: jax.Array) -> jax.Array:
    """|A^T A - I|_F, without a gradient where it is zero."""
    squares = jnp.sum((A.T @ A - jnp.eye(A.shape[1], dtype=A.dtype)) ** 2)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


@node
class DeLoRA(Change):
    r"""The change of bounded size with trained length :math:`\lambda`,

    .. math:: D = \frac{\lambda}{r}\, \mathrm{diag}(w) \sum_i \frac{a_i b_i^\top}{|a_i| |b_i|}, \quad w_i = |(W_0)_i|,

    with norms from 1e-4, and w the lengths of the rows of W0. `alpha` is :math:`\lambda` at the start, 15 by default.

    Attributes:
      A: `(batch..., in..., r)`.
      B: `(batch..., r, out...)`, zero at the start.
      lam: :math:`\lambda`, `(batch...)`.
      lengths: w, `(batch..., in..., 1)`, not trained.

    References:
      arXiv:2503.18225.
    """

    kind: ClassVar[str] = "delora"
    frozen: ClassVar[frozenset[str]] = frozenset({"lengths"})
    own_alpha: ClassVar[float | None] = 15.0

    A: jax.Array
    B: jax.Array
    lam: jax.Array
    lengths: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        request.start.only_zero(cls.kind)
        A, B, _ = request.start.pair(request)
        lengths = jnp.sqrt(jnp.sum(request.W**2, -1, keepdims=True))
        return cls(request.rows(A), request.columns(B), request.number(request.scale), request.rows(lengths)), None

    @property
    def batch(self) -> int:
        return self.lam.ndim

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return Axes(self.batch, self.A.ndim - 1 - self.batch)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (*self.A.shape[:-1], *self.B.shape[self.batch + 1 :])

    def part(self, base: Any) -> LowRank:
        # Each factor is divided by its own norms: lam over the product of both may be inf in half precision.
        b, r = self.batch, self.A.shape[-1]
        U, V = _normalized(self.A, b), _normalized(jnp.moveaxis(self.B, b, -1), b)
        return LowRank(jax.lax.stop_gradient(self.lengths) * U, scaled_identity(self.lam / r, r), V)


def _normalized(x: jax.Array, batch: int) -> jax.Array:
    """Columns divided by their norms, from 1e-4. A zero column has no gradient of its own norm."""
    squares = jnp.sum(x * x, axis=tuple(range(batch, x.ndim - 1)), keepdims=True)
    return x / jnp.where(squares > 1e-8, jnp.sqrt(jnp.where(squares > 1e-8, squares, 1.0)), 1e-4)
