"""Ready-made low-rank optimizers: `fixed_rank` around what Optax has."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax.explicit import Placement
from lowrank_optax.lowrank import LowRank, flatten, is_lowrank, unflatten
from lowrank_optax.rank import RankPolicy
from lowrank_optax.transforms import fixed_rank

Momentum = Literal["balanced", "tangent", "coefficient"]
Gradient = Literal["projected", "galerkin"]
Retraction = Literal["svd", "bug"]
ScalarOrSchedule = float | jax.Array | Callable[[Any], Any]
Mask = Any | Callable[[optax.Params], Any] | None


def lowrank_heavy_ball(
    learning_rate: ScalarOrSchedule,
    momentum: float | jax.Array | None = 0.9,
    nesterov: bool = False,
    *,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    accumulator_dtype: Any = None,
    momentum_space: Momentum | None = None,
    gradient: Gradient = "projected",
    local_steps: int = 1,
    retraction: Retraction = "svd",
    rank: RankPolicy | None = None,
    move_ordinary: bool = False,
    ordinary: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-rank heavy ball: stochastic gradient descent with momentum on the fixed-rank manifold.

    .. math:: \hat N \leftarrow \beta \hat N + \hat G, \quad \hat S \leftarrow \hat S - h \hat N

    `fixed_rank(optax.sgd(learning_rate, momentum, nesterov))`, whose docstring gives the whole step.

    Args:
      learning_rate: step size h, a number or a schedule; without momentum W moves by -h P(W)G.
      momentum: decay beta; None for gradient descent without state.
      nesterov: whether to use Nesterov's momentum.
      weight_decay: decoupled decay of W (and of ordinary leaves), as in `optax.adamw`; times the step size.
      mask: leaves to decay, as in `optax.add_decayed_weights`; it sees one matrix at the place of a kernel.
      accumulator_dtype: dtype of the momentum; default float32 or that of the parameters, whichever is wider.
      momentum_space: the argument `momentum` of `fixed_rank`. Default: "tangent", whose progress does not depend on
        the condition of W, or "coefficient" with a galerkin gradient.
      gradient: "projected" or "galerkin", see `fixed_rank`.
      local_steps: coefficient steps of a galerkin loop.
      retraction: "svd" or "bug".
      rank: rank policy; None keeps ranks.
      move_ordinary: whether ordinary leaves move on the augmenting call of a galerkin loop.
      ordinary: transformation for ordinary leaves; default the same.

    Returns:
      An Optax transformation. State of a kernel: r^2 numbers (coefficient) or r (m + n) + r^2 (tangent).

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2)
      >>> state = lro.lowrank_heavy_ball(0.1, 0.9).init(params)

    References:
      arXiv:2506.17475, low-rank heavy ball.
    """
    inner = optax.chain(
        optax.identity() if momentum is None else optax.trace(momentum, nesterov, accumulator_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return fixed_rank(
        inner,
        momentum=momentum_space,
        gradient=gradient,
        local_steps=local_steps,
        retraction=retraction,
        rank=rank,
        move_ordinary=move_ordinary,
        ordinary=ordinary,
        stack=_stack(mask, ordinary),
    )


def lowrank_adam(
    learning_rate: ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    eps_root: float | jax.Array = 0.0,
    mu_dtype: Any = None,
    *,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    nesterov: bool = False,
    momentum: Momentum | None = None,
    gradient: Gradient = "projected",
    local_steps: int = 1,
    retraction: Retraction = "svd",
    rank: RankPolicy | None = None,
    move_ordinary: bool = False,
    ordinary: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-rank Adam.

    .. math::
      N \leftarrow b_1 N + (1 - b_1) G, \quad
      v \leftarrow b_2 v + (1 - b_2) G^{\circ 2}, \quad
      X \leftarrow X - h\, \frac{N / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t)} + \epsilon}

    on the coordinates X of W that `momentum` names and the gradient G with respect to them.
    `fixed_rank(optax.adamw(...))`, whose docstring gives the whole step. With `momentum="coefficient"` it is the method
    of the paper.

    Args:
      learning_rate: step size h, a number or a schedule. With balanced momentum entries of the factors move by about h:
        begin at twice the step size of dense AdamW. With tangent momentum begin at two to four times it. With
        coefficient momentum W moves by about h sqrt(3) r in norm, where a dense step moves it by h sqrt(m n): a good h
        is larger than the dense one, by up to sqrt(m n) / (sqrt(3) r). There a direction that is new in a step has
        no second moment yet and moves by about (1 - b1) / sqrt(1 - b2) = 3.2 h, whatever its gradient: b2 = 0.99
        makes that h.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      eps_root: added inside the root.
      mu_dtype: dtype of the first moment; default float32 or that of the parameters, whichever is wider.
      weight_decay: decoupled decay of W (and of ordinary leaves), as in `optax.adamw`; times the step size.
      mask: leaves to decay, as in `optax.adamw`; it sees one matrix at the place of a kernel.
      nesterov: whether to use Nesterov's momentum.
      momentum: "balanced", "tangent" or "coefficient", see `fixed_rank`. Default: "balanced" where the other options
        allow it, with a projected gradient, the svd retraction and ranks that stay; else that of `fixed_rank`.
      gradient: "projected" or "galerkin", see `fixed_rank`.
      local_steps: coefficient steps of a galerkin loop.
      retraction: "svd" or "bug".
      rank: rank policy; None keeps ranks.
      move_ordinary: whether ordinary leaves move on the augmenting call of a galerkin loop.
      ordinary: transformation for ordinary leaves; default the same.

    Returns:
      An Optax transformation. State of a kernel: twice r (m + n) + r^2 numbers, or 2 r^2 with
      `momentum="coefficient"`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2)
      >>> state = lro.lowrank_adam(1e-3, weight_decay=0.1, momentum="tangent").init(params)

    References:
      arXiv:2506.17475, low-rank Adam.
    """
    inner = optax.adamw(learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov)
    return fixed_rank(
        inner,
        momentum=balanced_where_allowed(momentum, gradient, retraction, rank),
        gradient=gradient,
        local_steps=local_steps,
        retraction=retraction,
        rank=rank,
        move_ordinary=move_ordinary,
        ordinary=ordinary,
        stack=_stack(mask, ordinary),
    )


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
    momentum: Momentum | None = None,
    gradient: Gradient = "projected",
    local_steps: int = 1,
    retraction: Retraction = "svd",
    rank: RankPolicy | None = None,
    move_ordinary: bool = False,
    ordinary: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`lowrank_adam` with the signature and the default weight decay of `optax.adamw`.

    Args:
      learning_rate: step size, see `lowrank_adam` for its unit.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      eps_root: added inside the root.
      mu_dtype: dtype of the first moment.
      weight_decay: decoupled decay of W and of ordinary leaves.
      mask: leaves to decay.
      nesterov: whether to use Nesterov's momentum.
      momentum: "balanced", "tangent" or "coefficient", see `fixed_rank`. Default: "balanced" where the other options
        allow it, with a projected gradient, the svd retraction and ranks that stay; else that of `fixed_rank`.
      gradient: "projected" or "galerkin", see `fixed_rank`.
      local_steps: coefficient steps of a galerkin loop.
      retraction: "svd" or "bug".
      rank: rank policy; None keeps ranks.
      move_ordinary: whether ordinary leaves move on the augmenting call of a galerkin loop.
      ordinary: transformation for ordinary leaves; default the same.

    Returns:
      An Optax transformation.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2)
      >>> state = lro.lowrank_adamw(1e-3).init(params)
    """
    return lowrank_adam(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        weight_decay=weight_decay,
        mask=mask,
        nesterov=nesterov,
        momentum=momentum,
        gradient=gradient,
        local_steps=local_steps,
        retraction=retraction,
        rank=rank,
        move_ordinary=move_ordinary,
        ordinary=ordinary,
    )


def lowrank_muon(
    learning_rate: ScalarOrSchedule,
    beta: float | jax.Array = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: float | jax.Array = 0.9,
    adam_b2: float | jax.Array = 0.999,
    adam_weight_decay: float | jax.Array = 0.0,
    momentum: Momentum | None = None,
    gradient: Gradient = "projected",
    local_steps: int = 1,
    retraction: Retraction = "svd",
    rank: RankPolicy | None = None,
    move_ordinary: bool = False,
    ordinary: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-rank Muon: the momentum of a kernel is orthogonalised before it is applied.

    .. math:: N \leftarrow \beta N + G, \quad
       X \leftarrow X - h \sqrt{\max(1, n / m)}\; \mathrm{polar}(G + \beta N)

    With balanced momentum X is each of the two factors of W. With coefficient momentum it is the 2r x 2r coefficient
    matrix, which has the singular values of the tangent vector itself, so its polar factor is that of the tangent
    vector, at the cost of r x r products; with tangent momentum the part of it outside the tangent space is dropped.
    The polar factor is approximated by Newton-Schulz.

    Ordinary leaves (embeddings, head, norms, biases) are trained by AdamW, or by `ordinary`.

    Args:
      learning_rate: step size h, the spectral norm of a step of X for kernels with m >= n. Begin at that of
        `optax.contrib.muon` for dense kernels, whatever the rank; at twice that with coefficient momentum.
      beta: decay of the momentum.
      nesterov: whether to use Nesterov's momentum.
      ns_steps: Newton-Schulz iterations.
      weight_decay: decoupled decay of the kernels, times the step size.
      mask: leaves to decay.
      adam_learning_rate: step size of AdamW for ordinary leaves; default `learning_rate`.
      adam_b1: decay of its first moment.
      adam_b2: decay of its second moment.
      adam_weight_decay: its decay.
      momentum: "balanced", "tangent" or "coefficient", see `fixed_rank`. Default: "balanced" where the other options
        allow it, with a projected gradient, the svd retraction and ranks that stay; else that of `fixed_rank`.
      gradient: "projected" or "galerkin", see `fixed_rank`.
      local_steps: coefficient steps of a galerkin loop.
      retraction: "svd" or "bug".
      rank: rank policy; None keeps ranks.
      move_ordinary: whether ordinary leaves move on the augmenting call of a galerkin loop.
      ordinary: transformation for ordinary leaves; default AdamW with the options `adam_*`.

    Returns:
      An Optax transformation. State of a kernel: r (m + n) + r^2 numbers, or r^2 with `momentum="coefficient"`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6), "bias": jnp.zeros(6)}, rank=2)
      >>> state = lro.lowrank_muon(0.02, adam_learning_rate=1e-3).init(params)

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; on the tangent space ours, compare
      Riemannion, `arXiv:2507.12142 <https://arxiv.org/abs/2507.12142>`_.
    """
    inner = optax.chain(
        optax.trace(beta, nesterov),
        orthogonalize(ns_steps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    adam = optax.adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        weight_decay=adam_weight_decay,
    )
    return fixed_rank(
        inner,
        momentum=balanced_where_allowed(momentum, gradient, retraction, rank),
        gradient=gradient,
        local_steps=local_steps,
        retraction=retraction,
        rank=rank,
        move_ordinary=move_ordinary,
        ordinary=adam if ordinary is None else ordinary,
        stack=_stack(mask, ordinary),
    )


def _stack(mask: Mask, ordinary: optax.GradientTransformation | None = None) -> Literal["kernels", "all"] | None:
    """What the optimizers here treat alike. A mask may tell leaves apart, and so may a transformation that is given."""
    if mask is not None:
        return None
    return "all" if ordinary is None else "kernels"


def balanced_where_allowed(
    momentum: Momentum | None, gradient: Gradient, retraction: Retraction, rank: RankPolicy | None
) -> Momentum | None:
    """The default of optimizers with normalised steps, by the evidence of RESULTS.md."""
    allowed = gradient == "projected" and retraction == "svd" and rank is None
    return "balanced" if momentum is None and allowed else momentum


def orthogonalize(ns_steps: int = 5) -> optax.GradientTransformationExtraArgs:
    r"""Replaces a direction by its polar factor times :math:`\sqrt{\max(1, n / m)}`; for use inside `fixed_rank`.

    Args:
      ns_steps: Newton-Schulz iterations.

    Returns:
      A stateless transformation that reads the shapes of the kernels from the extra argument `kernels`, which
      `fixed_rank` supplies.

    Raises:
      ValueError: from `update`, outside `fixed_rank`.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> tx = lro.fixed_rank(optax.chain(lro.orthogonalize(), optax.scale(-0.02)), ordinary=optax.sgd(0.1))
    """

    def one(x: Any, W: Any, momentum: str) -> Any:
        if isinstance(x, optax.MaskedNode):
            return x
        if not is_lowrank(W):
            raise ValueError("orthogonalize is for kernels: give fixed_rank another optimizer, ordinary=...")
        m, n = math.prod(W.in_shape), math.prod(W.out_shape)
        scale = math.sqrt(max(1.0, n / m))
        if not is_lowrank(x):
            return scale * linalg.newton_schulz(x, ns_steps)
        polar = _polar_of_pair if momentum == "balanced" else _polar
        return Placement(x).auto(lambda x: unflatten(polar(flatten(x), ns_steps, scale), x), x)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del params
        if "kernels" not in extra_args:
            raise ValueError("orthogonalize works on the coordinates of kernels: use it inside fixed_rank")
        leaf = lambda x: is_lowrank(x) or isinstance(x, optax.MaskedNode)  # noqa: E731
        turn = functools.partial(one, momentum=extra_args["momentum"])
        return jax.tree.map(turn, updates, extra_args["kernels"], is_leaf=leaf), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _polar(xi: LowRank, steps: int, scale: float) -> LowRank:
    """The tangent part of the polar factor of a horizontal triple, through its 2r x 2r coefficient matrix."""
    r = xi.rank
    ((u, ru),), ((v, rv),) = linalg.gram_qr([xi.U]), linalg.gram_qr([xi.V])  # Batch axes may be sharded.
    zero = jnp.zeros((*xi.batch_shape, ru.shape[-2], rv.shape[-2]), xi.S.dtype)
    top = jnp.concatenate([xi.S, linalg.transpose(rv)], axis=-1)
    y = jnp.concatenate([top, jnp.concatenate([ru, zero], axis=-1)], axis=-2)
    z = scale * linalg.newton_schulz(y, steps)
    return LowRank(u @ z[..., r:, :r], z[..., :r, :r], v @ linalg.transpose(z[..., :r, r:]))


def _polar_of_pair(m: LowRank, steps: int, scale: float) -> LowRank:
    """The polar factors of both moments of balanced factors."""
    return LowRank(scale * linalg.newton_schulz(m.U, steps), m.S, scale * linalg.newton_schulz(m.V, steps))
