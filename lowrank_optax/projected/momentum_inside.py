"""Momentum in a subspace, or of which a subspace is orthonormalised."""

from __future__ import annotations

import math
from typing import Any

import optax

from lowrank_optax.axes import Rank
from lowrank_optax.projected import pieces, projectors, residuals
from lowrank_optax.projected import refresh as refreshes
from lowrank_optax.projected.common import Mask, Number, Schedule, optimizer, with_defaults
from lowrank_optax.projected.transformation import subspace


def flora(
    learning_rate: Schedule,
    rank: Rank = 4,
    *,
    refresh: Any = 1000,
    b1: float = 0.9,
    decay_rate: float = 0.8,
    clip: float = 1.0,
    with_present: bool = False,
    min_dim_size_to_factor: int = 128,
    multiply_by_parameter_scale: bool = True,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Flora: Adafactor whose momentum is kept in a random subspace.

    .. math:: U = (1 - b_1)\, u + b_1\, P C, \quad C \leftarrow b_1 C + (1 - b_1) P^\top u

    with u the gradient over its factored second moment. When P changes, C goes up by the old P and down by the new one
    after U was made, as in the authors' PyTorch code; their JAX code goes down by the old one too.

    Args:
      learning_rate: a number or a schedule, relative to the root mean square of each parameter.
      rank: r.
      refresh: steps with one P.
      b1: decay of the momentum.
      decay_rate: exponent of the decay of the second moment; 0.99 in the authors' JAX code.
      clip: largest root mean square of an update.
      with_present: whether U has the new C, and so the present gradient once more, as in the authors' JAX code.
      min_dim_size_to_factor: kernels with a shorter side have a second moment for every entry. The authors' PyTorch
        code factors all, as with 1.
      multiply_by_parameter_scale: whether the learning rate is relative.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: r n + m + n numbers and a key, or m n in place of
      m + n for kernels with a side below 128.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.flora(1e-2, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Hao, Cao, Mou, `arXiv:2402.03293 <https://arxiv.org/abs/2402.03293>`_, 2024, algorithm 2.
    """
    options = with_defaults(options, projector=projectors.gaussian(), carry="lift", scale=b1)
    # Without the present gradient U has P C of the old P, whole, so the residual adds the part that a new P drops.
    leak = 0.0 if with_present else b1
    residual = residuals.sgd(1 - b1, of="gradient", leak=leak)
    options = with_defaults(options, residual=residual, ordinary=optax.ema(b1, debias=False))
    inner = optax.ema(b1, debias=False) if with_present else pieces.delayed_ema(b1)
    momentum = subspace(inner, rank=rank, refresh=refresh, **options)
    rms = optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor)
    relative = optax.scale_by_param_block_rms() if multiply_by_parameter_scale else optax.identity()
    return optimizer(learning_rate, weight_decay, mask, rms, momentum, optax.clip_by_block_rms(clip), relative)


def sumo(
    learning_rate: Schedule,
    rank: Rank = 128,
    *,
    refresh: Any = 200,
    b1: Number = 0.95,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SUMO: the momentum in a subspace is replaced by its exact polar factor.

    .. math:: M \leftarrow b_1 C M + (1 - b_1) P^\top G, \quad
       W \leftarrow W - 0.2\, h \sqrt{\max(m, n)}\; P\, \mathrm{polar}(M)

    Args:
      learning_rate: h, a number or a schedule.
      rank: r.
      refresh: see `galore`.
      b1: decay of the momentum.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`; `ordinary`, the transformation of other leaves, is
        `optax.scale_by_adam()`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: r (m + n) numbers.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.sumo(1e-3, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Refael et al., SUMO, `arXiv:2505.24749 <https://arxiv.org/abs/2505.24749>`_, 2025, algorithm 1. Their limit on the
      growth of the norm never acts on an exact polar factor and is left out.
    """
    options = with_defaults(options, projector=projectors.randomized(), carry="rotate", ordinary=optax.scale_by_adam())
    options = with_defaults(options, scale=lambda m, n: 0.2 * math.sqrt(max(m, n)))
    inner = optax.chain(optax.ema(b1, debias=False), pieces.polar())
    return optimizer(learning_rate, weight_decay, mask, subspace(inner, rank=rank, refresh=refresh, **options))


def dion(
    learning_rate: Schedule = 0.01,
    rank: Rank = 1.0,
    *,
    momentum: Number = 0.95,
    weight_decay: Number = 0.01,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Dion: a momentum whose leading part is orthonormalised by one power iteration and then decays.

    .. math::

      M \leftarrow M + G, \quad P = \mathrm{qf}(M Q), \quad R = P^\top M, \quad M \leftarrow M - (1 - \mu) P R, \quad
      W \leftarrow W - h \sqrt{n / m}\; P \bar R

    with the rows of R divided by their norms, and :math:`Q = \bar R^\top` in the next step. P is on the longer side.

    Args:
      learning_rate: h, a number or a schedule.
      rank: r, by default the shorter side. A fraction is rounded to the nearest; the authors round it up.
      momentum: mu.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`; `ordinary`, the transformation of other leaves, is
        `optax.scale_by_adam(0.9, 0.95)`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: m n + r m numbers.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.dion(0.01, rank=0.5).init({"kernel": jnp.ones((6, 8))})

    References:
      Ahn et al., `arXiv:2504.05295 <https://arxiv.org/abs/2504.05295>`_, 2025, algorithm 1.
    """
    options = with_defaults(options, projector=projectors.dion(), refresh=refreshes.once(), side="long")
    options = with_defaults(options, residual=residuals.feedback(momentum), ordinary=optax.scale_by_adam(0.9, 0.95))
    options = with_defaults(options, scale=lambda m, n: math.sqrt(n / m))
    return optimizer(learning_rate, weight_decay, mask, subspace(pieces.normalize_rows(), rank=rank, **options))


def trion(
    learning_rate: Schedule = 0.02,
    rank: Rank = 128,
    *,
    momentum: Number = 0.95,
    ns_steps: int = 5,
    weight_decay: Number = 0.01,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Trion: Dion with cosine coefficients in the place of a power iteration, and Newton-Schulz iterations.

    .. math::

      M \leftarrow M + G, \quad R = P^\top M, \quad M \leftarrow M - (1 - \mu) P R, \quad
      W \leftarrow W - h \sqrt{\max(1, n / m)}\; P\, \mathrm{polar}(R)

    Args:
      learning_rate: h, a number or a schedule.
      rank: r, the number of coefficients.
      momentum: mu.
      ns_steps: Newton-Schulz iterations, an int: list it in `static_args` of `inject_hyperparams`.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`; `ordinary`, the transformation of other leaves, is
        `optax.scale_by_adam()`.

    Returns:
      An Optax transformation. State of an m x n kernel: m n numbers and r indices.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.trion(0.02, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Modoranu et al., `arXiv:2505.17967 <https://arxiv.org/abs/2505.17967>`_, 2025, algorithm 2.
    """
    options = with_defaults(options, projector=projectors.dct(), refresh=refreshes.always())
    options = with_defaults(options, residual=residuals.feedback(momentum), ordinary=optax.scale_by_adam())
    options = with_defaults(options, scale=lambda m, n: math.sqrt(max(1, n / m)))
    inner = subspace(pieces.newton_schulz(ns_steps), rank=rank, **options)
    return optimizer(learning_rate, weight_decay, mask, inner)
