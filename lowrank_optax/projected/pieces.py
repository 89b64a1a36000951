"""Inner transformations of published methods that Optax does not have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax.projected.moving import normalized_rows
from lowrank_optax.rank import check_int


def scale_by_plain_adam(
    b1: float | jax.Array = 0.9, b2: float | jax.Array = 0.999, eps: float | jax.Array = 1e-6
) -> optax.GradientTransformation:
    r"""Adam's direction without bias correction, :math:`\mu / (\sqrt \nu + \epsilon)`.

    With `correct_bias` after it this is the Adam of early versions of Hugging Face's Transformers, which GaLore and its
    relatives use: epsilon stands beside the root that is not corrected.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.

    Returns:
      A transformation with an `optax.ScaleByAdamState`.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: optax.ScaleByAdamState, params: Any = None) -> Any:
        del params
        mu = jax.tree.map(lambda m, g: (b1 * m + (1 - b1) * g).astype(m.dtype), state.mu, updates)
        nu = jax.tree.map(lambda v, g: (b2 * v + (1 - b2) * g * g).astype(v.dtype), state.nu, updates)
        new = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return new, optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformation(init, update)


def correct_bias(b1: float | jax.Array = 0.9, b2: float | jax.Array = 0.999) -> optax.GradientTransformation:
    r"""Adam's bias correction as a factor of the step, :math:`\sqrt{1 - b_2^t} / (1 - b_1^t)` at step t = 1, 2, ...

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
    """

    for b in (b1, b2):
        if isinstance(b, float | int) and not 0 <= b < 1:
            raise ValueError(f"the decay of a moment whose bias is corrected is at least 0 and below 1, got {b}")

    def factor(count: jax.Array) -> jax.Array:
        t = count + 1
        working = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32  # type: ignore[attr-defined]
        k1, k2 = (1 - jnp.power(jnp.asarray(b, working), t) for b in (b1, b2))
        return jnp.sqrt(k2) / k1

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: optax.ScaleByScheduleState, params: Any = None) -> Any:
        del params
        scale = factor(state.count)
        new = jax.tree.map(lambda u: (scale * u).astype(u.dtype), updates)
        return new, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def delayed_ema(decay: float | jax.Array = 0.9) -> optax.GradientTransformation:
    """The mean of earlier updates, without the present one: Flora adds that one uncompressed.

    Args:
      decay: of the mean.
    """

    def init(params: Any) -> optax.EmaState:
        return optax.EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: optax.EmaState, params: Any = None) -> Any:
        del params
        ema = jax.tree.map(lambda m, g: (decay * m + (1 - decay) * g).astype(m.dtype), state.ema, updates)
        return state.ema, optax.EmaState(optax.safe_increment(state.count), ema)

    return optax.GradientTransformation(init, update)


def of_matrices(f: Any) -> optax.GradientTransformation:
    """The stateless transformation that applies a function to every matrix of coordinates."""

    def one(x: jax.Array) -> jax.Array:
        g = f
        for _ in range(x.ndim - 2):
            g = jax.vmap(g)
        out: jax.Array = g(x)
        return out

    return optax.stateless(lambda updates, params: jax.tree.map(one, updates))


def normalize_rows() -> optax.GradientTransformation:
    """Every row of coordinates, one for each column of the basis, gets norm 1."""
    return of_matrices(normalized_rows)


def polar() -> optax.GradientTransformation:
    """Coordinates are replaced by their orthogonal polar factor, computed from an SVD.

    Directions without a singular value are arbitrary, and left out.
    """

    def factor(x: jax.Array) -> jax.Array:
        p, s, q = linalg.svd(x)
        return (p * linalg.held(s, max(x.shape))[None]) @ q.T

    return of_matrices(factor)


def newton_schulz(steps: int = 5) -> optax.GradientTransformation:
    """Coordinates are replaced by an approximate polar factor, see `lowrank_optax.linalg.newton_schulz`."""
    check_int("ns_steps", steps)
    return of_matrices(lambda x: linalg.newton_schulz(x, steps))
