r"""`budget`: which components of changes of kind `adalora` stay, by a score over all kernels at once."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.adapters.components import Components, changes_of, is_components
from lowrank_optax.layout import map_matrices
from lowrank_optax.rank import check_int


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What `budget` returns."""

    components: int
    begin: int
    end: int
    score: str
    every: int
    b1: float | jax.Array
    b2: float | jax.Array


SCORES = ("adalora", "sensitivity")


def budget(
    components: int,
    *,
    begin: int,
    end: int,
    score: str = "adalora",
    every: int = 1,
    b1: float | jax.Array = 0.85,
    b2: float | jax.Array = 0.85,
) -> Allocation:
    r"""A policy for `optimizer(..., rank=budget(...))`: it sets the sizes E of the least important components to zero.

    Before step `begin`, counted from 0, all k components of all kernels are there. Until step `end`

    .. math:: k_t = k_e + (k - k_e)\,(1 - \tfrac{t - t_b}{t_e - t_b})^3

    stay at every `every`-th step, and one that was taken away may come back, because its factors go on. From step `end`
    on the choice is fixed. The sensitivity of a number w with gradient g is :math:`I = |w g|`, the change of the loss
    to first order if it were zero, with w after the step. The scores of a component i:

    ================= =========================================================================================
    `"adalora"`       :math:`\hat I\,\hat U` of :math:`E_i`, plus the means of the same over the i-th column of A and
                      row of B, where :math:`\hat I` is the running mean of I with decay `b1` and :math:`\hat U` the
                      one of :math:`|I - \hat I|` with decay `b2`. State: two numbers for each number of the change.
    `"sensitivity"`   :math:`\hat I` of :math:`E_i` alone. State: one number for each component.
    ================= =========================================================================================

    A singular value says nothing of a kernel whose change is still zero, which is why this asks gradients; `lro.budget`
    is the policy of kernels on the manifold.

    Args:
      components: :math:`k_e`, the number of components of all kernels together at the end.
      begin: the last step with all components.
      end: the step from which the choice is fixed.
      score: a score of the table.
      every: the steps between two choices.
      b1: the decay of the sensitivity.
      b2: the decay of its uncertainty.

    Returns:
      A policy for `optimizer`.

    Raises:
      ValueError: for an unknown score, or steps out of order.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=4, kind="adalora")
      >>> tx = lro.adapters.optimizer(optax.adam(1e-2), rank=lro.adapters.budget(2, begin=10, end=100))
      >>> state = tx.init(delta)

    References:
      arXiv:2303.10512. Equal scores at the threshold go together, as in PEFT.
    """
    for name, value in {"components": components, "begin": begin, "end": end, "every": every}.items():
        check_int(name, value)
    if score not in SCORES:
        raise ValueError(f"score is one of {list(SCORES)}, got {score!r}")
    if components < 0 or not 0 <= begin < end or every < 1:
        raise ValueError(
            f"budget needs components >= 0, 0 <= begin < end and every >= 1, got {components}, {begin}, {end}, {every}"
        )
    return Allocation(components, begin, end, score, every, b1, b2)


class AllocationState(NamedTuple):
    """The state of `allocating`.

    Attributes:
      inner: the state of the transformation inside.
      count: steps taken.
      sensitivity: running means of |w g|, a `Components` for each change, or its E alone.
      uncertainty: those of the deviation, or nothing.
      kept: 1 for components that stay, 0 for others, `(batch..., r)`.
    """

    inner: Any
    count: jax.Array  # type: ignore[assignment]
    sensitivity: list[Any]
    uncertainty: list[Any]
    kept: list[jax.Array]


def allocating(inner: optax.GradientTransformationExtraArgs, policy: Allocation) -> Any:
    """`inner`, after whose steps the policy chooses the components."""

    def numbers(x: Components) -> Any:
        nothing: Any = None
        return dataclasses.replace(x, scale=nothing) if policy.score == "adalora" else x.E

    def init(delta: Any) -> AllocationState:
        found = changes_of(delta)
        zeros = [jax.tree.map(jnp.zeros_like, numbers(x)) for x in found]
        uncertainty = zeros if policy.score == "adalora" else []
        kept = [jnp.ones_like(x.E) for x in found]
        return AllocationState(inner.init(delta), jnp.zeros((), jnp.int32), zeros, uncertainty, kept)

    def update(grads: Any, state: AllocationState, delta: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if delta is None:
            raise ValueError("rank=budget(...) needs the changes: update(grads, state, params)")
        updates, of_inner = inner.update(grads, state.inner, delta, **extra_args)
        old = changes_of(delta)
        new = [jax.tree.map(jnp.add, x, u) for x, u in zip(old, changes_of(updates), strict=True)]
        t = state.count
        mean = lambda b: lambda x, y: jnp.where(t < policy.end, b * x + (1 - b) * y, x)  # noqa: E731
        pairs = zip(map(numbers, new), map(numbers, changes_of(grads)), strict=True)
        now = [jax.tree.map(lambda w, g: jnp.abs(w * g), w, g) for w, g in pairs]
        sensitivity = jax.tree.map(mean(policy.b1), state.sensitivity, now)
        uncertainty = state.uncertainty
        if policy.score == "adalora":
            deviation = jax.tree.map(lambda x, y: jnp.abs(x - y), now, sensitivity)
            uncertainty = jax.tree.map(mean(policy.b2), state.uncertainty, deviation)
            product = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
            scores = [_triplets(x) for x in product]
        else:
            scores = list(sensitivity)
        kept = _choose(policy, t, scores, state.kept)
        sizes = iter([k * x.E - o.E for k, x, o in zip(kept, new, old, strict=True)])

        def one(u: Any) -> Any:
            return dataclasses.replace(u, E=next(sizes).astype(u.E.dtype)) if is_components(u) else u

        updates = jax.tree.map(one, updates, is_leaf=is_components)
        return updates, AllocationState(of_inner, optax.safe_increment(t), sensitivity, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _triplets(x: Components) -> jax.Array:
    """The score of each component from those of its numbers."""
    b, r = x.E.ndim - 1, x.E.shape[-1]
    A, B = x.A.reshape(*x.A.shape[:b], -1, r), x.B.reshape(*x.B.shape[: b + 1], -1)
    return x.E + map_matrices(_means, A, B)


def _means(A: jax.Array, B: jax.Array) -> jax.Array:
    return jnp.mean(A, axis=0) + jnp.mean(B, axis=1)


def _choose(policy: Allocation, t: jax.Array, scores: list[jax.Array], kept: list[jax.Array]) -> list[jax.Array]:
    """1 for the components above the k-th smallest score, where this step chooses; those of the last choice else."""
    flat = jnp.sort(jnp.concatenate([x.reshape(-1) for x in scores]))
    k = flat.size
    if policy.components > k:
        raise ValueError(f"budget({policy.components}) is more than the {k} components of the changes")
    share = 1.0 - (t - policy.begin) / (policy.end - policy.begin)
    staying = jnp.floor((k - policy.components) * share**3 + policy.components).astype(jnp.int32)
    away = k - jnp.where(t >= policy.end, policy.components, staying)
    least = jnp.where(away > 0, flat[jnp.maximum(away - 1, 0)], -1.0)
    chooses = (t > policy.begin) & (t < policy.end) & (t % policy.every == 0) | (t == policy.end)
    stays = [jnp.where(t > policy.end, old, jnp.ones_like(old)) for old in kept]
    return [jnp.where(chooses, (x > least).astype(s.dtype), s) for x, s in zip(scores, stays, strict=True)]
