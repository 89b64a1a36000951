"""Adam in a subspace; the rest of the gradient moves the weight too, or is fed back."""

from __future__ import annotations

from typing import Any

import optax

from lowrank_optax.axes import Rank
from lowrank_optax.projected import carry as carries
from lowrank_optax.projected import pieces, projectors, residuals
from lowrank_optax.projected import refresh as refreshes
from lowrank_optax.projected.common import Mask, Number, Schedule, optimizer, with_defaults
from lowrank_optax.projected.transformation import subspace


def fira(
    learning_rate: Schedule,
    rank: Rank = 128,
    *,
    refresh: Any = 200,
    scale: Number = 0.25,
    limit: Number = 1.01,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    as_released: bool = False,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Fira: GaLore, and the rest of the gradient with the step sizes that Adam has inside the subspace.

    .. math:: U = \alpha P N + \phi\, (G - P P^\top G), \quad \phi_j = |N_j| / |R_j|

    The norm of the second term grows by at most `limit` from one step to the next.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      refresh: see `galore`.
      scale: alpha.
      limit: most growth of the norm of the residual.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: see `galore`.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      as_released: whether the residual keeps the share `1 - scale` of the part inside the subspace, as in the authors'
        code, in place of none, as in the paper.
      **options: of `lowrank_optax.subspace`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: r (m + 2 n) + 1 numbers.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.fira(1e-2, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Chen et al., `arXiv:2410.01623 <https://arxiv.org/abs/2410.01623>`_, 2024, equations 8 and 9.
    """
    residual = residuals.scaled(limit, in_span=1 - scale if as_released else 0.0)
    options = with_defaults(options, projector=projectors.svd(), residual=residual)
    inner = subspace(pieces.scale_by_plain_adam(b1, b2, eps), rank=rank, refresh=refresh, scale=scale, **options)
    return optimizer(learning_rate, weight_decay, mask, inner, pieces.correct_bias(b1, b2))


def subtrack(
    learning_rate: Schedule,
    rank: Rank = 256,
    *,
    basis_learning_rate: Number = 10.0,
    refresh: Any = 200,
    scale: Number = 0.25,
    limit: Number | None = 1.01,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """SubTrack++: Fira on bases that move along geodesics of the Grassmann manifold, with moments that turn with them.

    It follows the paper. In the authors' code the basis of a tall matrix never moves, and second moments shrink.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      basis_learning_rate: see `lowrank_optax.projectors.grassmann`; it has the unit of one over a squared gradient.
      refresh: see `galore`.
      scale: alpha, see `galore`.
      limit: see `fira`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: see `galore`.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`.

    Returns:
      An Optax transformation with the state of `fira`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.subtrack(1e-3, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Rajabi, Nonta, Rambhatla, `arXiv:2502.01586 <https://arxiv.org/abs/2502.01586>`_, 2025, algorithm 1.
    """
    options = with_defaults(options, projector=projectors.grassmann(basis_learning_rate), carry=carries.rotate(b1, b2))
    options = with_defaults(options, residual=residuals.scaled(limit))
    inner = subspace(pieces.scale_by_plain_adam(b1, b2, eps), rank=rank, refresh=refresh, scale=scale, **options)
    return optimizer(learning_rate, weight_decay, mask, inner, pieces.correct_bias(b1, b2))


def apollo(
    learning_rate: Schedule,
    rank: Rank = 256,
    *,
    refresh: Any = 200,
    scale: float = 1.0,
    per: str = "column",
    limit: Number | None = 1.01,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO: gradient descent with the step sizes that Adam has in a random subspace.

    .. math:: U = \sqrt{\text{scale}}\; \phi\, G, \quad \phi_j = |N_j| / |R_j|, \quad R = P^\top G

    P is Gaussian and drawn from a key whenever it is used.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      refresh: steps with one P.
      scale: square of the factor of the update.
      per: "column" for one factor for each index of the longer side, "tensor" for one in all.
      limit: see `fira`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: see `galore`.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: 2 r n + 1 numbers and a key.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.apollo(1e-2, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Zhu et al., `arXiv:2412.05270 <https://arxiv.org/abs/2412.05270>`_, 2024, algorithm 1.
    """
    residual = residuals.scaled(limit, of="gradient", per=per, scale=scale**0.5)
    options = with_defaults(options, projector=projectors.gaussian(), residual=residual)
    inner = subspace(pieces.scale_by_plain_adam(b1, b2, eps), rank=rank, refresh=refresh, **options)
    return optimizer(learning_rate, weight_decay, mask, inner, pieces.correct_bias(b1, b2))


def apollo_mini(
    learning_rate: Schedule, rank: Rank = 1, *, scale: float = 128.0, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: one step size for each kernel, from a subspace of one dimension.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      scale: square of the factor of the update.
      **options: see `apollo`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: 2 n + 1 numbers and a key.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.apollo_mini(1e-2).init({"kernel": jnp.ones((6, 8))})

    References:
      Zhu et al., `arXiv:2412.05270 <https://arxiv.org/abs/2412.05270>`_, 2024, section 4.3.
    """
    return apollo(learning_rate, rank, scale=scale, **with_defaults(options, per="tensor"))


def frugal(
    learning_rate: Schedule,
    rank: Rank = 0.25,
    *,
    refresh: Any = 200,
    residual_scale: Number = 1.0,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""FRUGAL: Adam in a subspace, and signs of the gradient outside.

    .. math:: U = P\, \mathrm{Adam}(R) + \text{scale} \cdot \mathrm{sign}(G - P R)

    Moments of kernels, and their bias correction, start anew with every basis.

    Args:
      learning_rate: a number or a schedule.
      rank: r, by default a quarter of the shorter side.
      refresh: see `galore`.
      residual_scale: factor of the signs.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: of Adam.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`; `projector` may be `lowrank_optax.projectors.rows()` or `blocks()`, which
        need no products, or `orthogonal()`.

    Returns:
      An Optax transformation with the state of `galore`; with `rows()` and `blocks()` 2 r n numbers and r indices.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.frugal(1e-3, projector=lro.projectors.rows()).init({"kernel": jnp.ones((6, 8))})

    References:
      Zmushko et al., `arXiv:2411.07837 <https://arxiv.org/abs/2411.07837>`_, 2024, algorithm 1.
    """
    options = with_defaults(options, projector=projectors.svd(), carry=carries.reset(count=True))
    options = with_defaults(options, residual=residuals.sign(residual_scale))
    inner = subspace(optax.scale_by_adam(b1, b2, eps), rank=rank, refresh=refresh, **options)
    return optimizer(learning_rate, weight_decay, mask, inner)


def ldadam(
    learning_rate: Schedule,
    rank: Rank = 16,
    *,
    rho: Number = 0.908,
    b1: Number = 0.908,
    b2: Number = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""LDAdam: a power iteration in every step, moments that turn with the basis, and error feedback.

    .. math::

      A = G + E, \quad P = \mathrm{qf}(B B^\top P_{old}), \quad B = \rho P_{old} \hat m + (1 - \rho) A, \quad
      E \leftarrow A - P P^\top A + \tfrac{b_1}{1 - b_1} (P_{old} m - P m')

    The error is an array of the size of the kernel: the state is smaller than Adam's and is not of low rank.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      rho: weight of the momentum in the power iteration.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: of Adam.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: r (m + 2 n) + m n numbers.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.ldadam(1e-3, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Robert et al., `arXiv:2410.16103 <https://arxiv.org/abs/2410.16103>`_, 2024, algorithm 1.
    """
    options = with_defaults(options, projector=projectors.power(rho, b1), refresh=refreshes.always())
    options = with_defaults(options, carry=carries.rotate(b1, b2), residual=residuals.feedback(leak=b1 / (1 - b1)))
    inner = subspace(optax.scale_by_adam(b1, b2, eps), rank=rank, **options)
    return optimizer(learning_rate, weight_decay, mask, inner)


def dct_adam(
    learning_rate: Schedule,
    rank: Rank = 128,
    *,
    refresh: Any = 1,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """DCT-AdamW: Adam on those cosine coefficients of the gradient that are largest, and error feedback.

    Args:
      learning_rate: a number or a schedule.
      rank: r, the number of coefficients.
      refresh: steps with one choice of coefficients.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: of Adam.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`; without error feedback `residual=lowrank_optax.residuals.drop()`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: 2 r n + m n numbers and r indices.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.dct_adam(1e-3, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Modoranu et al., `arXiv:2505.17967 <https://arxiv.org/abs/2505.17967>`_, 2025, algorithm 1.
    """
    options = with_defaults(options, projector=projectors.dct(), carry=carries.rotate(b1, b2))
    options = with_defaults(options, residual=residuals.feedback())
    inner = subspace(optax.scale_by_adam(b1, b2, eps), rank=rank, refresh=refresh, **options)
    return optimizer(learning_rate, weight_decay, mask, inner)
