"""Adam in a subspace; the rest of the gradient is dropped."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lowrank_optax.axes import Rank
from lowrank_optax.projected import carry as carries
from lowrank_optax.projected import projectors
from lowrank_optax.projected import refresh as refreshes
from lowrank_optax.projected.common import Mask, Number, Schedule, adam, optimizer, with_defaults
from lowrank_optax.projected.ranks import energy
from lowrank_optax.projected.storage import int4
from lowrank_optax.projected.transformation import subspace


def galore(
    learning_rate: Schedule,
    rank: Rank = 128,
    *,
    refresh: Any = 200,
    scale: Number = 0.25,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: Adam on the gradient in the span of its leading singular vectors.

    .. math:: R = P^\top G, \quad W \leftarrow W - h\, \alpha\, P\, \mathrm{Adam}(R)

    Every `refresh` steps P becomes the leading singular vectors of G on the shorter side; moments stay. Unlike the
    authors' code, whose result depends on signs that LAPACK chooses, new vectors point along the old ones.

    Args:
      learning_rate: h, a number or a schedule.
      rank: r.
      refresh: steps between two bases, or a schedule of `lowrank_optax.refresh`.
      scale: alpha.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment before its bias is corrected.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: r (m + 2 n) numbers.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.galore(1e-2, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Zhao et al., `arXiv:2403.03507 <https://arxiv.org/abs/2403.03507>`_, 2024, algorithm 2.
    """
    options = with_defaults(options, projector=projectors.svd())
    inner = subspace(adam(b1, b2, eps), rank=rank, refresh=refresh, scale=scale, **options)
    return optimizer(learning_rate, weight_decay, mask, inner)


def q_galore(
    learning_rate: Schedule,
    rank: Rank = 128,
    *,
    refresh: Any = None,
    scale: Number = 0.25,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Q-GaLore without its 8-bit weights and moments: GaLore with 4-bit bases, and periods that double.

    The overlap that decides on a doubling has no sign, and its window starts anew after one; both differ from the
    authors' code.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      refresh: schedule; default `lowrank_optax.refresh.doubling(200, 0.4, 2, 5)`.
      scale: alpha, see `galore`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: of Adam.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: r (m / 8 + 2 n) numbers of four bytes.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.q_galore(1e-2, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Zhang et al., `arXiv:2407.08296 <https://arxiv.org/abs/2407.08296>`_, 2024, sections 3.2 and 3.3.
    """
    options = with_defaults(options, projector=projectors.svd(), basis_dtype=int4())
    refresh = refreshes.doubling() if refresh is None else refresh
    inner = subspace(optax.scale_by_adam(b1, b2, eps), rank=rank, refresh=refresh, scale=scale, **options)
    return optimizer(learning_rate, weight_decay, mask, inner)


def golore(
    learning_rate: Schedule,
    rank: Rank = 128,
    *,
    random_from: int | jax.Array,
    refresh: Any = 200,
    scale: Number = 0.25,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """GoLore: GaLore first, random subspaces in the end, where noise would rule the singular vectors.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      random_from: step from which on bases are random; half of the run, say.
      refresh: see `galore`.
      scale: alpha, see `galore`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: of Adam.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`.

    Returns:
      An Optax transformation with the state of `galore`. Moments turn with the basis.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.golore(1e-2, rank=2, random_from=500).init({"kernel": jnp.ones((6, 8))})

    References:
      He et al., `arXiv:2410.11289 <https://arxiv.org/abs/2410.11289>`_, 2024.
    """
    projector = projectors.switch(projectors.svd(), projectors.orthogonal(), random_from)
    options = with_defaults(options, projector=projector, carry=carries.rotate(b1, b2))
    inner = subspace(optax.scale_by_adam(b1, b2, eps), rank=rank, refresh=refresh, scale=scale, **options)
    return optimizer(learning_rate, weight_decay, mask, inner)


def adarankgrad(
    learning_rate: Schedule,
    rank: Rank = 128,
    *,
    lost: Number = 0.04,
    refresh: Any = None,
    scale: Number = 0.25,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaRankGrad: the rank of each kernel follows the energy of its gradient.

    .. math:: k = \min \{ k \le r : |G - P_k P_k^\top G|_F^2 \le \text{lost} \cdot |G|_F^2 \}

    A basis is computed anew when the gradient inside it has become small. Moments turn with it; second moments by the
    rule of `lowrank_optax.carry.rotate`, because the linear rule of the paper can make them negative.

    Args:
      learning_rate: a number or a schedule.
      rank: r, the largest rank. `lowrank_optax.projected.resize` cuts the arrays to the ranks in use.
      lost: share of the squared norm that a basis may lose.
      refresh: schedule; default `lowrank_optax.refresh.converged(0.5, at_most=200)`.
      scale: alpha, see `galore`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: of Adam.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: r (m + 2 n) numbers, and k (m + 2 n) after a
      `resize`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.adarankgrad(1e-2, rank=4).init({"kernel": jnp.ones((6, 8))})

    References:
      Refael, Svirsky, Shustin, Huleihel, Lindenbaum, `arXiv:2410.17881 <https://arxiv.org/abs/2410.17881>`_, 2024,
      algorithm 1.
    """
    options = with_defaults(options, projector=projectors.randomized(), carry=carries.rotate(b1, b2))
    options = with_defaults(
        options, refresh=refreshes.converged() if refresh is None else refresh, adapt_rank=energy(lost)
    )
    inner = subspace(optax.scale_by_adam(b1, b2, eps), rank=rank, scale=scale, **options)
    return optimizer(learning_rate, weight_decay, mask, inner)


def online_subspace(
    learning_rate: Schedule,
    rank: Rank = 128,
    *,
    basis_optimizer: optax.GradientTransformation | None = None,
    scale: Number = 0.25,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Online subspace descent: a small optimizer moves the basis after every step, and no SVD follows the first.

    Unlike the authors' code no weight decay shrinks the basis.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      basis_optimizer: of the basis, with its learning rate; default `optax.adam(1 / 200)`. The authors multiply that
        rate by the schedule of the learning rate, relative to its start.
      scale: alpha, see `galore`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: see `galore`.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: r (3 m + 2 n) numbers.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.online_subspace(1e-2, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Liang et al., `arXiv:2408.12857 <https://arxiv.org/abs/2408.12857>`_, 2024, algorithm 1.
    """
    projector = projectors.oja(optax.adam(1 / 200) if basis_optimizer is None else basis_optimizer)
    options = with_defaults(options, projector=projector, refresh=refreshes.once())
    inner = subspace(adam(b1, b2, eps), rank=rank, scale=scale, **options)
    return optimizer(learning_rate, weight_decay, mask, inner)


def coap(
    learning_rate: Schedule,
    rank: Rank = 128,
    *,
    refresh: int = 32,
    recalibrate: int = 5,
    basis_learning_rate: Number = 0.1,
    scale: Number = 1.0,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """COAP: bases take gradient steps that keep momentum and gradient correlated, and are recalibrated now and then.

    Args:
      learning_rate: a number or a schedule.
      rank: r.
      refresh: steps between two changes of the basis.
      recalibrate: changes between two recalibrations.
      basis_learning_rate: step size of the basis.
      scale: alpha, see `galore`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: see `galore`.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      **options: of `lowrank_optax.subspace`; `carry="lift"` is the authors' `restore_state`.

    Returns:
      An Optax transformation with the state of `galore`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.coap(1e-2, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Xiao et al., `arXiv:2412.00071 <https://arxiv.org/abs/2412.00071>`_, 2024, algorithm 1.
    """
    if not isinstance(refresh, int):
        raise TypeError(f"refresh of coap is a number of steps, which its projector counts too, got {refresh!r}")
    options = with_defaults(options, projector=projectors.coap(refresh, recalibrate, basis_learning_rate))
    inner = subspace(adam(b1, b2, eps), rank=rank, refresh=refresh, scale=scale, **options)
    return optimizer(learning_rate, weight_decay, mask, inner)
