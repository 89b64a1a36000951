r"""`budget`: which components of changes of kind `adalora` stay, by a score over all kernels at once."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.adapters.components import Components, changes_of, is_components
from lowrank_optax.layout import map_matrices
from lowrank_optax.rank import check_int, check_range


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
      TypeError, ValueError: for an unknown score, steps out of order, or a decay that is no number from 0 to below 1.

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
    check_range("b1", b1, below=1.0)
    check_range("b2", b2, below=1.0)
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
      sensitivity: running means of |w g| in a tree like the changes, a `Components` in the place of each change of this
        kind, or its E alone, and nothing in the place of others.
      uncertainty: the moving means of the deviation, or nothing.
      kept: whether a component stays, `(k,)` for the components of all changes one after the other. It is no moment,
        and in this form `optax.tree.map_params` leaves it alone.
    """

    inner: Any
    count: jax.Array  # type: ignore[assignment]
    sensitivity: Any
    uncertainty: Any
    kept: jax.Array


def allocating(inner: optax.GradientTransformationExtraArgs, policy: Allocation) -> Any:
    """`inner`, after whose steps the policy chooses the components."""

    def numbers(x: Components) -> Any:
        nothing: Any = None
        return dataclasses.replace(x, scale=nothing) if policy.score == "adalora" else x.E

    def in_places(f: Any, delta: Any, *rest: Any) -> Any:
        """`f` of each change of this kind, nothing in the place of other arrays."""
        one = lambda x, *y: f(x, *y) if is_components(x) else optax.MaskedNode()  # noqa: E731
        return jax.tree.map(one, delta, *rest, is_leaf=is_components)

    def init(delta: Any) -> AllocationState:
        zeros = in_places(lambda x: jax.tree.map(jnp.zeros_like, numbers(x)), delta)
        uncertainty = zeros if policy.score == "adalora" else optax.MaskedNode()
        kept = jnp.ones(sum(x.E.size for x in changes_of(delta)), bool)
        return AllocationState(inner.init(delta), jnp.zeros((), jnp.int32), zeros, uncertainty, kept)

    def update(grads: Any, state: AllocationState, delta: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if delta is None:
            raise ValueError("rank=budget(...) needs the changes: update(grads, state, params)")
        updates, of_inner = inner.update(grads, state.inner, delta, **extra_args)
        t = state.count
        mean = lambda b: lambda x, y: jnp.where(t < policy.end, b * x + (1 - b) * y, x)  # noqa: E731

        def sensitivity_now(x: Components, u: Components, g: Components) -> Any:
            return jax.tree.map(lambda w, u, g: jnp.abs((w + u) * g), numbers(x), numbers(u), numbers(g))

        now = in_places(sensitivity_now, delta, updates, grads)
        sensitivity, uncertainty = jax.tree.map(mean(policy.b1), state.sensitivity, now), state.uncertainty
        if policy.score == "adalora":
            deviation = jax.tree.map(lambda x, y: jnp.abs(x - y), now, sensitivity)
            uncertainty = jax.tree.map(mean(policy.b2), state.uncertainty, deviation)
            scores = [_triplets(x) for x in changes_of(jax.tree.map(jnp.multiply, sensitivity, uncertainty))]
        else:
            scores = jax.tree.leaves(sensitivity)
        kept = _choose(policy, t, jnp.concatenate([x.reshape(-1) for x in scores]), state.kept)
        ends = list(itertools.accumulate(x.size for x in scores))
        each = iter([k.reshape(x.shape) for k, x in zip(jnp.split(kept, ends[:-1]), scores, strict=True)])

        def one(x: Components, u: Components) -> Components:
            return dataclasses.replace(u, E=(next(each) * (x.E + u.E) - x.E).astype(u.E.dtype))

        updates = jax.tree.map(lambda x, u: one(x, u) if is_components(x) else u, delta, updates, is_leaf=is_components)
        return updates, AllocationState(of_inner, optax.safe_increment(t), sensitivity, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _triplets(x: Components) -> jax.Array:
    """The score of each component from the scores of its numbers."""
    b, r = x.E.ndim - 1, x.E.shape[-1]
    A, B = x.A.reshape(*x.A.shape[:b], -1, r), x.B.reshape(*x.B.shape[: b + 1], -1)
    return x.E + map_matrices(_means, A, B)


def _means(A: jax.Array, B: jax.Array) -> jax.Array:
    return jnp.mean(A, axis=0) + jnp.mean(B, axis=1)


def _choose(policy: Allocation, t: jax.Array, scores: jax.Array, kept: jax.Array) -> jax.Array:
    """The components above the k-th smallest score, where this step chooses; else the last choice."""
    k = scores.size
    if policy.components > k:
        raise ValueError(f"budget({policy.components}) is more than the {k} components of the changes")
    share = 1.0 - (t - policy.begin) / (policy.end - policy.begin)
    staying = jnp.floor((k - policy.components) * share**3 + policy.components).astype(jnp.int32)
    away = k - jnp.where(t >= policy.end, policy.components, staying)
    least = jnp.where(away > 0, jnp.sort(scores)[jnp.maximum(away - 1, 0)], -1.0)
    chooses = (t > policy.begin) & (t < policy.end) & (t % policy.every == 0) | (t == policy.end)
    return jnp.where(chooses, scores > least, kept | (t <= policy.end))
