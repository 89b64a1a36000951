"""The loop: an Optax transformation works in coordinates of weights, and a geometry moves them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from lowrank_optax.checks import check_geometry
from lowrank_optax.door import Door, FixedRankState
from lowrank_optax.geometry import Balanced, Geometry
from lowrank_optax.guard import MOST_SKIPS
from lowrank_optax.layout import Layout
from lowrank_optax.moments import Moments
from lowrank_optax.rank import RankPolicy

BALANCED = Balanced()  # the default of all optimizers with normalised steps, by the evidence of RESULTS.md


def in_coordinates(
    inner: optax.GradientTransformation,
    geometry: Geometry,
    *,
    first_moments: Sequence[str] = (),
    second_moments: Sequence[str] = (),
    max_consecutive_skips: int | jax.Array = MOST_SKIPS,
) -> optax.GradientTransformationExtraArgs:
    """`fixed_rank` for any geometry: `inner` in coordinates of the weights that `geometry` owns.

    Args:
      inner: transformation whose state mirrors the parameters or is scalar.
      geometry: see `lowrank_optax.geometry.Geometry` for how one is written.
      first_moments: see `fixed_rank`.
      second_moments: see `fixed_rank`.
      max_consecutive_skips: see `fixed_rank`.

    Returns:
      An Optax transformation, see `fixed_rank`.
    """
    check_geometry(geometry)
    inner = optax.with_extra_args_support(inner)
    moments, policy = Moments(inner, first_moments, second_moments), geometry.rank
    if policy is not None:  # The methods of a geometry are compiled once for all policies.
        geometry = dataclasses.replace(geometry, rank=None)  # type: ignore[type-var]

    def make(inner: Any, layout: Layout) -> Any:
        def update(grads: Any, state: Any, weights: Any, **extra_args: Any) -> Any:
            new, state = step(inner, moments, layout, policy, grads, state, weights, **extra_args)
            return layout.differences(new, weights), state

        return update

    return Door(inner, moments, geometry).transformation(make, max_consecutive_skips)


def step(
    inner: optax.GradientTransformationExtraArgs,
    moments: Moments,
    layout: Layout,
    policy: RankPolicy | None,
    grads: list[Any],
    state: FixedRankState,
    weights: list[Any],
    **extra_args: Any,
) -> tuple[list[Any], FixedRankState]:
    """One step on groups of leaves: coordinates, `inner`, moved points, ranks of all, new weights, moments there."""
    frames = layout.map("frame", weights, grads, state.aux)
    lifted = moments.map(lambda m: layout.map_moments("lift", frames, m.tree, m.degree), state.inner_state)
    steps, inner_state = inner.update([f.grad for f in frames], lifted, [f.weight for f in frames], **extra_args)
    proposals = layout.map("propose", frames, steps)
    ranks = choose_ranks(policy, layout.map("spectrum", frames, proposals)) if policy else [None] * len(frames)
    ends = layout.map("settle", frames, proposals, ranks)
    changes = [end.change for end in ends]
    inner_state = moments.map(lambda m: layout.map_moments("carry", changes, m.tree, m.degree), inner_state)
    state = state._replace(inner_state=inner_state, aux=[end.aux for end in ends], info=[end.info for end in ends])
    return [end.weight for end in ends], state


def choose_ranks(policy: RankPolicy, spectra: Sequence[Any]) -> list[Any]:
    """The rank of every group, None where weights have none."""
    ranks = iter(policy.choose([s for s in spectra if s is not None]))
    return [None if s is None else next(ranks) for s in spectra]


def fixed_rank(
    inner: optax.GradientTransformation,
    *,
    geometry: Geometry = BALANCED,
    first_moments: Sequence[str] = (),
    second_moments: Sequence[str] = (),
    max_consecutive_skips: int | jax.Array = MOST_SKIPS,
) -> optax.GradientTransformationExtraArgs:
    r"""The low-rank counterpart of an Optax transformation.

    Every `LowRank` node of the parameters moves along the manifold of matrices of its rank: the gradient is brought to
    the coordinates of the geometry, `inner` works on them, the result is retracted, and the state of `inner` is carried
    into the new bases.

    .. math:: W \leftarrow R_W\big(\mathrm{inner}(P(W)\, G)\big), \quad W = U S V^\top

    Ordinary leaves get `inner` unchanged. `update` takes the gradients with respect to the factors, as `jax.grad` gives
    them, and forms no array of the size of W.

    In coordinates weight decay decays W and never the bases. `optax.clip_by_global_norm` inside clips the norm of the
    coordinates: with `Tangent` and `Coefficient` the Riemannian norm, with `Balanced` the norm of the gradients of both
    factors. In front of `fixed_rank` in a chain, `clip_by_tangent_norm` clips the Riemannian norm with all of them. The
    step size has the unit of `inner`: with `Tangent` or `Coefficient` sgd's h moves W by -h P(W)G, with `Balanced` it
    moves the two factors.

    Args:
      inner: transformation with state that mirrors the parameters or is scalar: sgd, adam, adamw, rmsprop, lion,
        chains of them with schedules, clipping, decay, masks. `init` refuses others by name.
      geometry: `Balanced()`, the default, `Tangent()` or `Coefficient()`. A geometry holds the options that only it
        has: a rank policy, a retraction.
      first_moments: names of fields that hold first moments, for an `inner` whose state no transformation of Optax has.
      second_moments: names of fields that hold second moments, likewise.
      max_consecutive_skips: a step that meets or makes a number that is not finite changes nothing and is counted;
        after this many in a row steps are let through, see `skip_not_finite`.

    Returns:
      A transformation whose updates are `new - old` for every factor, so that `optax.apply_updates` lands on the
      manifold. Chain nothing after it that rescales updates. Its `update` needs `params`, and hands extra arguments to
      `inner` unchanged.

    Raises:
      TypeError: if `geometry` is no geometry.
      ValueError: from `init` for kernels that are no valid factorisation or an `inner` that does not work in
        coordinates; from `update` for missing params or gradients of another structure.
      NotImplementedError: for derivatives through `update`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> target = jnp.outer(jnp.arange(6.0), jnp.ones(5))
      >>> params = {"kernel": lro.lowrank_init(1)(jax.random.key(0), (6, 5))}
      >>> loss = lambda p: jnp.sum((jnp.eye(6) @ p["kernel"] - target) ** 2)
      >>> tx = lro.fixed_rank(optax.adamw(optax.cosine_decay_schedule(0.3, 100)))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 1e-2)
      True

    References:
      Schotthöfer, Klein, Kusch, arXiv:2506.17475, low-rank heavy ball and low-rank Adam, in the geometry `Coefficient`.
      The other geometries and inner transformations are ours.
    """
    return in_coordinates(
        inner,
        geometry,
        first_moments=first_moments,
        second_moments=second_moments,
        max_consecutive_skips=max_consecutive_skips,
    )
