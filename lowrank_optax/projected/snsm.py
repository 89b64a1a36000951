"""Subset-norm step sizes with a momentum in a subspace: the denominator comes from the whole gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax.axes import Rank, Where
from lowrank_optax.guard import chain_in_one_guard, limit_of, skip_not_finite, without_guard
from lowrank_optax.projected import pieces, projectors, residuals
from lowrank_optax.projected.apart import kernels_and_others, numbers, over_kernels, start_kernels
from lowrank_optax.projected.common import Mask, Number, Schedule, optimizer, with_defaults
from lowrank_optax.projected.leaves import Leaf
from lowrank_optax.projected.transformation import subspace


class SubsetNormState(NamedTuple):
    """State of `scale_by_subset_norm`.

    Attributes:
      inner_state: of the transformation of the numerator.
      nu: for every kernel a mean of sums of squares, one for each index of its longer side.
    """

    inner_state: optax.OptState
    nu: Any


def scale_by_subset_norm(
    inner: optax.GradientTransformation,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    *,
    rank: Rank = 1,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides updates of kernels by a second moment that all entries of a row or column share.

    .. math:: \nu_j \leftarrow b_2 \nu_j + (1 - b_2) \sum_i G_{ij}^2, \quad
       U_{ij} = \mathrm{inner}(G)_{ij} / (\sqrt{\nu_j} + \epsilon)

    with j along the longer side. It has the sum and not the mean: learning rates are about ten times Adam's.

    Args:
      inner: transformation that makes the numerator from G.
      b2: decay of the second moment.
      eps: added to its root.
      rank: see `subspace`; which leaves are kernels.
      where: see `subspace`.

    Returns:
      An Optax transformation of trees of kernels.

    References:
      Nguyen, Nguyen, `arXiv:2411.07120 <https://arxiv.org/abs/2411.07120>`_, 2024, algorithm 1.
    """
    limit, inner = limit_of(inner), optax.with_extra_args_support(without_guard(inner))

    def init(params: Any) -> SubsetNormState:
        def start(leaf: Leaf, x: Any) -> jax.Array:
            return numbers(leaf, leaf.matrix_shape[1:], linalg.working_dtype(x))

        return SubsetNormState(inner.init(params), start_kernels(start, params, rank, where))

    def update(grads: Any, state: SubsetNormState, params: Any = None, **extra_args: Any) -> Any:
        def moment(leaf: Leaf, g: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array]:
            nu = b2 * nu + (1 - b2) * jnp.sum(jnp.square(g), axis=-2)
            return jnp.broadcast_to(jnp.expand_dims(jnp.sqrt(nu) + eps, -2), g.shape), nu

        roots, nu = over_kernels(moment, grads, state.nu, rank, where)
        numerators, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        updates = jax.tree.map(lambda x, root: (x / root).astype(x.dtype), numerators, roots)
        return updates, SubsetNormState(inner_state, nu)

    return skip_not_finite(optax.GradientTransformationExtraArgs(init, update), limit)


def snsm(
    learning_rate: Schedule,
    rank: Rank = 128,
    *,
    refresh: Any = 200,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    mask: Mask = None,
    where: Where | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SNSM: momentum in a subspace, gradient descent outside, and one second moment for each row or column.

    .. math:: M \leftarrow b_1 M + (1 - b_1) P^\top G, \quad
       U_j = \frac{(P M + G - P P^\top G)_j}{\sqrt{\nu_j} + \epsilon}

    The momentum is zero after a refresh. In the authors' code the step of the refresh still uses the old one.

    Args:
      learning_rate: a number or a schedule, about ten times the learning rate of Adam.
      rank: r.
      refresh: see `galore`.
      b1: decay of the momentum.
      b2: decay of the second moment.
      eps: added to its root before its bias is corrected.
      weight_decay: decoupled decay, times the learning rate.
      mask: leaves to decay.
      where: see `lowrank_optax.subspace`.
      **options: of `lowrank_optax.subspace`; other leaves get `ordinary`, by default `optax.scale_by_adam(b1, b2)`.

    Returns:
      An Optax transformation. State of an m x n kernel with m <= n: r (m + n) + n numbers.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.snsm(1e-2, rank=2).init({"kernel": jnp.ones((6, 8))})

    References:
      Nguyen, Nguyen, `arXiv:2411.07120 <https://arxiv.org/abs/2411.07120>`_, 2024, algorithm 2.
    """
    options = with_defaults(options, projector=projectors.svd(), carry="reset", residual=residuals.sgd(), where=where)
    where, ordinary = options["where"], options.pop("ordinary", optax.scale_by_adam(b1, b2))
    momentum = subspace(optax.ema(b1, debias=False), rank=rank, refresh=refresh, **options)
    direction = scale_by_subset_norm(momentum, b2, eps, rank=rank, where=where)
    kernels = chain_in_one_guard(direction, pieces.correct_bias(b1, b2))
    return optimizer(learning_rate, weight_decay, mask, kernels_and_others(kernels, ordinary, rank, where))
