"""Ready-made low-rank optimizers: `fixed_rank` around transformations of Optax.

All take options of `fixed_rank`, which documents them, and `ordinary`, a transformation for leaves that are not
`LowRank`. By default these leaves get the same transformation as kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from lowrank_optax.geometry import Geometry, Tangent, is_coordinates, matrix_shape, polar_factor
from lowrank_optax.guard import MOST_SKIPS
from lowrank_optax.inner import kernel_labels
from lowrank_optax.layout import map_coordinates
from lowrank_optax.optimize import BALANCED, fixed_rank
from lowrank_optax.rank import check_int

ScalarOrSchedule = float | jax.Array | Callable[[Any], Any]
Mask = Any | Callable[[Any], Any] | None
Ordinary = Any | None  # an optax.GradientTransformation


def _fixed_rank(
    inner: Any, ordinary: Ordinary, geometry: Geometry, max_consecutive_skips: Any
) -> optax.GradientTransformationExtraArgs:
    """`inner` for kernels and `ordinary` for other leaves."""
    if ordinary is not None:
        inner = optax.partition({"kernel": inner, "ordinary": ordinary}, kernel_labels)
    return fixed_rank(inner, geometry=geometry, max_consecutive_skips=max_consecutive_skips)


def lowrank_heavy_ball(
    learning_rate: ScalarOrSchedule,
    momentum: float | jax.Array | None = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    geometry: Geometry = Tangent(),  # noqa: B008
    ordinary: Ordinary = None,
    max_consecutive_skips: int | jax.Array = MOST_SKIPS,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-rank heavy ball: stochastic gradient descent with momentum on the fixed-rank manifold.

    .. math:: N \leftarrow \beta N + G, \quad X \leftarrow X - h N

    on the coordinates X of W that the geometry chooses and the gradient G with respect to them. Begin at the step size
    of dense heavy ball, whatever the rank.

    Args:
      learning_rate: step size h, a number or a schedule; without momentum W moves by -h P(W)G.
      momentum: decay beta; None for gradient descent without state.
      nesterov: whether to use Nesterov's momentum.
      accumulator_dtype: dtype of the momentum; default the wider one of float32 and the dtype of the parameters.
      weight_decay: decoupled decay of W (and of ordinary leaves), as in `optax.adamw`; times the step size.
      mask: leaves to decay, as in `optax.adamw`; it sees coordinates in the place of a kernel.
      geometry: see `fixed_rank`. The default is `Tangent()`, whose progress does not depend on the condition of W.
      ordinary: transformation for ordinary leaves; default the same.
      max_consecutive_skips: see `fixed_rank`.

    Returns:
      An Optax transformation, see `fixed_rank`. State: one moment, whose size the geometry tells.

    Raises:
      TypeError: for a momentum that is a string or a geometry.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2)
      >>> state = lro.lowrank_heavy_ball(0.1, 0.9).init(params)

    References:
      arXiv:2506.17475, low-rank heavy ball.
    """
    if isinstance(momentum, str | Geometry):
        raise TypeError(
            f"momentum is the decay beta, a number, and geometry=... chooses the coordinates, got momentum={momentum!r}"
        )
    inner = optax.chain(
        optax.identity() if momentum is None else optax.trace(momentum, nesterov, accumulator_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _fixed_rank(inner, ordinary, geometry, max_consecutive_skips)


def lowrank_adam(
    learning_rate: ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    eps_root: float | jax.Array = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    geometry: Geometry = BALANCED,
    ordinary: Ordinary = None,
    max_consecutive_skips: int | jax.Array = MOST_SKIPS,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-rank Adam.

    .. math::
      N \leftarrow b_1 N + (1 - b_1) G, \quad
      v \leftarrow b_2 v + (1 - b_2) G^{\circ 2}, \quad
      X \leftarrow X - h\, \frac{N / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t)} + \epsilon}

    on the coordinates X of W that the geometry chooses and the gradient G with respect to them. With
    `geometry=lro.Coefficient()` it is the method of the paper.

    Args:
      learning_rate: step size h, a number or a schedule. With `Balanced` entries of the factors move by about h: begin
        at twice the step size of dense AdamW. With `Tangent` begin at two to four times it. With `Coefficient` W moves
        by about h sqrt(3) r in norm, where a dense step moves it by h sqrt(m n): a good h is larger than the dense one,
        by up to sqrt(m n) / (sqrt(3) r). With `Coefficient` a direction that is new in a step has no second moment yet
        and moves by about (1 - b1) / sqrt(1 - b2) = 3.2 h, whatever its gradient, and by h if b2 = 0.99.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      eps_root: added inside the root.
      mu_dtype: dtype of the first moment; default the wider one of float32 and the dtype of the parameters.
      nesterov: whether to use Nesterov's momentum.
      geometry: see `fixed_rank`; default `Balanced()`.
      ordinary: transformation for ordinary leaves; default the same.
      max_consecutive_skips: see `fixed_rank`.

    Returns:
      An Optax transformation, see `fixed_rank`. State: two moments, whose size the geometry tells.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2)
      >>> state = lro.lowrank_adam(1e-3, geometry=lro.Tangent()).init(params)

    References:
      arXiv:2506.17475, low-rank Adam.
    """
    inner = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return _fixed_rank(inner, ordinary, geometry, max_consecutive_skips)


def lowrank_adamw(
    learning_rate: ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    eps_root: float | jax.Array = 0.0,
    mu_dtype: Any = None,
    weight_decay: float | jax.Array = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    geometry: Geometry = BALANCED,
    ordinary: Ordinary = None,
    max_consecutive_skips: int | jax.Array = MOST_SKIPS,
) -> optax.GradientTransformationExtraArgs:
    """`lowrank_adam` with decoupled weight decay of W, as `optax.adamw` is `optax.adam` with it.

    Args:
      learning_rate: step size h, a number or a schedule; see `lowrank_adam` for where to begin.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      eps_root: added inside the root.
      mu_dtype: dtype of the first moment; see `lowrank_adam`.
      weight_decay: decay of W and of ordinary leaves, times the step size.
      mask: leaves to decay, a tree or a function of the tree; it sees coordinates in the place of a kernel, for which
        `lowrank_optax.linen.path_mask` makes masks by path.
      nesterov: whether to use Nesterov's momentum.
      geometry: see `fixed_rank`; default `Balanced()`.
      ordinary: transformation for ordinary leaves; default the same.
      max_consecutive_skips: see `fixed_rank`.

    Returns:
      An Optax transformation, see `fixed_rank`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2)
      >>> state = lro.lowrank_adamw(1e-3).init(params)
    """
    inner = optax.adamw(learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov)
    return _fixed_rank(inner, ordinary, geometry, max_consecutive_skips)


def lowrank_muon(
    learning_rate: ScalarOrSchedule,
    beta: float | jax.Array = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    mu_dtype: Any = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: float | jax.Array = 0.9,
    adam_b2: float | jax.Array = 0.999,
    adam_weight_decay: float | jax.Array = 0.0,
    geometry: Geometry = BALANCED,
    ordinary: Ordinary = None,
    max_consecutive_skips: int | jax.Array = MOST_SKIPS,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-rank Muon: the momentum of a kernel is orthogonalised before it is applied.

    .. math:: N \leftarrow \beta N + G, \quad
       X \leftarrow X - h \sqrt{\max(1, n / m)}\; \mathrm{polar}(G + \beta N)

    With `Balanced` X is each of the two factors of W. With `Coefficient` X is the 2r x 2r coefficient matrix. It has
    the singular values of the tangent vector, so its polar factor gives the polar factor of the tangent vector, at the
    cost of r x r products. With `Tangent` the part of the same polar factor outside the tangent space is dropped.
    Newton-Schulz iterations approximate polar factors.

    Ordinary leaves (embeddings, head, norms, biases) are trained by AdamW, or by `ordinary`.

    Args:
      learning_rate: step size h, the spectral norm of a step of X for kernels with m >= n. Begin at the step size of
        `optax.contrib.muon` for dense kernels, whatever the rank; with `Coefficient` at twice that step size.
      beta: decay of the momentum.
      nesterov: whether to use Nesterov's momentum.
      ns_steps: Newton-Schulz iterations, an int: list it in `static_args` of `inject_hyperparams`.
      mu_dtype: dtype of the momentum; default the wider one of float32 and the dtype of the parameters.
      weight_decay: decoupled decay of the kernels, times the step size.
      mask: leaves to decay.
      adam_learning_rate: step size of AdamW for ordinary leaves; default `learning_rate`.
      adam_b1: decay of its first moment.
      adam_b2: decay of its second moment.
      adam_weight_decay: its decay.
      geometry: see `fixed_rank`; default `Balanced()`.
      ordinary: transformation for ordinary leaves; default AdamW with the options `adam_*`.
      max_consecutive_skips: see `fixed_rank`.

    Returns:
      An Optax transformation, see `fixed_rank`. State: one moment, whose size the geometry tells.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6), "bias": jnp.zeros(6)}, rank=2)
      >>> state = lro.lowrank_muon(0.02, adam_learning_rate=1e-3).init(params)

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024. The form on the tangent space is ours;
      compare Riemannion, `arXiv:2507.12142 <https://arxiv.org/abs/2507.12142>`_.
    """
    inner = optax.chain(
        optax.trace(beta, nesterov, mu_dtype),
        scale_by_polar_factor(ns_steps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    if ordinary is None:
        adam_learning_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
        ordinary = optax.adamw(adam_learning_rate, adam_b1, adam_b2, weight_decay=adam_weight_decay)
    return _fixed_rank(inner, ordinary, geometry, max_consecutive_skips)


def scale_by_polar_factor(ns_steps: int = 5) -> optax.GradientTransformation:
    r"""Replaces a direction by its polar factor times :math:`\sqrt{\max(1, n / m)}`; for use inside `fixed_rank`.

    Args:
      ns_steps: Newton-Schulz iterations, an int.

    Returns:
      A stateless transformation.

    Raises:
      TypeError: for `ns_steps` that is no int, as from `inject_hyperparams` without `static_args=("ns_steps",)`.
      ValueError: from `update`, at leaves that are no coordinates of kernels.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> muon = optax.chain(lro.scale_by_polar_factor(), optax.scale(-0.02))
      >>> tx = lro.fixed_rank(optax.partition({"kernel": muon, "ordinary": optax.sgd(0.1)}, lro.kernel_labels))
    """

    check_int("ns_steps", ns_steps)

    def one(x: Any) -> Any:
        if isinstance(x, optax.MaskedNode):
            return x
        if not is_coordinates(x):
            raise ValueError(
                "scale_by_polar_factor works on the coordinates of kernels, inside fixed_rank: give other leaves "
                'another optimizer, optax.partition({"kernel": ..., "ordinary": ...}, lro.kernel_labels)'
            )
        m, n = matrix_shape(x)
        polar = map_coordinates(polar_factor, x, steps=ns_steps)
        return jax.tree.map(lambda y: math.sqrt(max(1.0, n / m)) * y, polar)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(one, updates, is_leaf=lambda x: is_coordinates(x) or isinstance(x, optax.MaskedNode)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
