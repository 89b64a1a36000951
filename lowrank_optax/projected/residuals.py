"""What becomes of the part of a gradient outside the subspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.projected import common


class Projection(NamedTuple):
    """The numbers of one step of one matrix.

    Attributes:
      gradient: A, `(p, q)`, with the error that was fed back.
      inside: `inside()` returns `up(down(A))`, the part of A in the subspace.
      outside: `outside()` returns the rest of A.
      projected: R, `(r, q)`, the coordinates of A.
      step: N, `(r, q)`, the direction that the inner transformation made of R.
      dropped: `(p, q)`, the part of the first moment that a change of basis lost, if the residual asks for it.
    """

    gradient: jax.Array
    inside: Callable[[], jax.Array]
    outside: Callable[[], jax.Array]
    projected: jax.Array
    step: jax.Array
    dropped: Any


class Residual(NamedTuple):
    """A rule for the residual.

    Attributes:
      apply: `apply(state, projection)` returns a direction `(p, q)`, or None, and a new state.
      init: `init((p, q), dtype)` returns the state before the first step.
      replaces: whether the direction stands in the place of the lifted step, and is not added to it.
      feeds: whether the state is an error `(p, q)` that is added to the next gradient.
      looks: whether `apply` looks at the gradient.
      drops: whether `apply` looks at `dropped`.
    """

    apply: Callable[[Any, Projection], tuple[Any, Any]]
    init: Callable[..., Any] = lambda shape, dtype: ()
    replaces: bool = False
    feeds: bool = False
    looks: bool = True
    drops: bool = False


def drop() -> Residual:
    """The residual is left out: the weight moves in the subspace only."""
    return Residual(lambda state, at: (None, state), looks=False)


def sgd(scale: float | jax.Array = 1.0, of: str = "residual", leak: float | jax.Array = 0.0) -> Residual:
    """The residual is a direction itself, as of gradient descent.

    Args:
      scale: its factor.
      of: "residual", or "gradient" for the whole gradient.
      leak: weight of the part of the first moment that a change of basis dropped, see `feedback`.
    """
    _check_of(of)
    drops = not common.is_zero(leak)

    def apply(state: Any, at: Projection) -> tuple[Any, Any]:
        direction = scale * (at.gradient if of == "gradient" else at.outside())
        return direction + leak * at.dropped if drops else direction, state

    return Residual(apply, drops=drops)


def sign(scale: float | jax.Array = 1.0) -> Residual:
    """The signs of the residual are the direction.

    References:
      Zmushko et al., FRUGAL, `arXiv:2411.07837 <https://arxiv.org/abs/2411.07837>`_, 2024, algorithm 1.
    """
    return Residual(lambda state, at: (scale * jnp.sign(at.outside()), state))


def scaled(
    limit: float | jax.Array | None = 1.01,
    of: str = "residual",
    per: str = "column",
    scale: float | jax.Array = 1.0,
    in_span: float | jax.Array = 0.0,
) -> Residual:
    r"""The residual with the step sizes that the inner transformation has in the subspace.

    .. math:: D_j = \frac{|N_j|}{|R_j|}\, (A - P P^\top A)_j, \qquad
       D \leftarrow D\, \min\big(1, \text{limit} \cdot |D_{before}| / |D|\big)

    Args:
      limit: most growth of the norm from one step to the next; None for any.
      of: "residual" (Fira), or "gradient" (APOLLO): then A itself is scaled, and no step is lifted.
      per: "column" of coordinates, or "tensor" for one factor for all.
      scale: factor of the direction, after the limit.
      in_span: share of the part inside the subspace that stays in the residual.

    References:
      Chen et al., Fira, `arXiv:2410.01623 <https://arxiv.org/abs/2410.01623>`_, 2024, equations 8 and 9; Zhu et al.,
      APOLLO, `arXiv:2412.05270 <https://arxiv.org/abs/2412.05270>`_, 2024, equation 5.
    """
    _check_of(of)
    if per not in ("column", "tensor"):
        raise ValueError(f"one factor for each 'column' or one for the 'tensor', got per={per!r}")
    norms = linalg.norm if per == "tensor" else lambda x: linalg.column_norms(x)[None]

    def apply(state: jax.Array, at: Projection) -> tuple[jax.Array, jax.Array]:
        x = at.gradient if of == "gradient" else _rest(at, in_span)
        x = x * (norms(at.step) / (norms(at.projected) + 1e-8))
        if limit is None:
            return scale * x, state
        # A norm of zero stands for a first step, which nothing limits.
        size = linalg.norm(x)
        growth = jnp.maximum(size / (state + 1e-8), limit) / limit
        growth = jnp.where(state > 0, growth, 1)
        return scale * (x / growth), (size / growth).astype(state.dtype)

    def init(shape: tuple[int, int], dtype: Any) -> Any:
        return () if limit is None else jnp.zeros((), dtype)

    return Residual(apply, init, replaces=of == "gradient")


def feedback(keep: float | jax.Array = 0.0, leak: float | jax.Array = 0.0, dtype: Any = None) -> Residual:
    r"""The residual is added to the next gradient.

    .. math:: E \leftarrow A - (1 - \text{keep})\, P P^\top A + \text{leak} \cdot (P_{old} \mu - P_{new} \mu')

    The last term is the part of the first moment that the change of basis dropped, before the moment saw A.

    Args:
      keep: share of the part inside the subspace that stays: the decay of a momentum that E is then.
      leak: weight of the dropped part of the first moment; :math:`b_1 / (1 - b_1)` in LDAdam.
      dtype: of E; default the dtype of the computation, float32 for a bfloat16 kernel.

    References:
      Robert et al., LDAdam, `arXiv:2410.16103 <https://arxiv.org/abs/2410.16103>`_, 2024, algorithm 1.
    """
    drops = not common.is_zero(leak)

    def apply(state: jax.Array, at: Projection) -> tuple[None, jax.Array]:
        error = _rest(at, keep)
        if drops:
            error = error + leak * at.dropped
        return None, error.astype(state.dtype)

    def init(shape: tuple[int, int], working: Any) -> jax.Array:
        return jnp.zeros(shape, dtype or working)

    return Residual(apply, init, feeds=True, drops=drops)


def _rest(at: Projection, share: float | jax.Array) -> jax.Array:
    """The part outside and a share of the part inside."""
    if common.is_zero(share):
        return at.outside()
    return at.outside() + share * at.inside()


def _check_of(of: str) -> None:
    if of not in ("residual", "gradient"):
        raise ValueError(f"a direction is made of the 'residual' or of the 'gradient', got of={of!r}")
