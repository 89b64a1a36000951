"""The guard: a step that meets or makes a number that is not finite is skipped and counted, but not for ever."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.linalg import all_finite

# A loss scale that halves at each overflow needs as many steps to fall from 2^15 to 1.
MOST_SKIPS = 15


class SkipNotFiniteState(NamedTuple):
    """State of `skip_not_finite`.

    Attributes:
      inner_state: state of the transformation inside.
      notfinite_count: number of steps so far that met or made a number that is not finite, int32.
      consecutive_notfinite: number of such steps since the last finite one, int32.
    """

    inner_state: optax.OptState
    notfinite_count: jax.Array
    consecutive_notfinite: jax.Array


class Guarded(optax.GradientTransformationExtraArgs):
    """A transformation with the guard around it, which knows what is inside."""

    inside: optax.GradientTransformationExtraArgs
    max_consecutive_skips: Any


def guarded(init: Any, update: Any, inside: Any, max_consecutive_skips: Any) -> Guarded:
    """`init` and `update` of the guard around `inside`."""
    tx = Guarded(init, update)
    tx.inside, tx.max_consecutive_skips = inside, max_consecutive_skips
    return tx


def chain_in_one_guard(*pieces: optax.GradientTransformation) -> Guarded:
    """`optax.chain` whose pieces skip a step together, so that none counts or moves where others do not."""
    return skip_not_finite(optax.chain(*map(without_guard, pieces)), limit_of(*pieces))


def limit_of(*pieces: optax.GradientTransformation) -> Any:
    """The most skips in a row of the first piece that has a guard, the default where none has."""
    limits = [x.max_consecutive_skips for x in pieces if isinstance(x, Guarded)]
    return limits[0] if limits else MOST_SKIPS


def without_guard(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """What is inside of a guard."""
    return tx.inside if isinstance(tx, Guarded) else tx


def skip_not_finite(
    inner: optax.GradientTransformation, max_consecutive_skips: int | jax.Array = MOST_SKIPS
) -> Guarded:
    """Skips a step that is not finite: updates are zero, and the state of `inner` stays.

    A step is not finite if NaN or an infinity occurs in a gradient, in an update, or in a number of the state that was
    finite before. `optax.apply_if_finite` looks at gradients only, so a division by zero in the state would stay. After
    `max_consecutive_skips` such steps in a row both let the next ones through. A lasting fault then shows as NaN in the
    loss, and not as a run that stands still.

    Args:
      inner: the transformation.
        It has to be all of an optimizer: a piece of a chain outside of the guard would still count a skipped step.
      max_consecutive_skips: the most steps in a row that are skipped. Default 15: a loss scale that halves at each
        overflow falls from 2^15 to 1 in as many steps.

    Returns:
      An Optax transformation with a `SkipNotFiniteState`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> tx = lro.skip_not_finite(optax.adam(0.1))
      >>> updates, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.zeros(1)))
      >>> updates.tolist(), int(state.notfinite_count)
      ([0.0], 1)
    """
    inner = optax.with_extra_args_support(without_guard(inner))

    def init(params: Any) -> SkipNotFiniteState:
        return unskipped(inner.init(params))

    def update(grads: Any, state: SkipNotFiniteState, params: Any = None, **extra_args: Any) -> Any:
        check_guarded(state)
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        finite = is_finite(grads, updates, state.inner_state, inner_state)
        return let_through(finite, updates, inner_state, state, max_consecutive_skips)

    return guarded(init, update, inner, max_consecutive_skips)


def unskipped(inner_state: Any) -> SkipNotFiniteState:
    """The first state of the guard."""
    return SkipNotFiniteState(inner_state, *(jnp.zeros((), jnp.int32) for _ in range(2)))


def check_guarded(state: Any) -> None:
    """Raises ValueError for a state of an optimizer without the guard."""
    if not isinstance(state, SkipNotFiniteState):
        raise ValueError(
            f"the optimizer state is a {type(state).__name__} and belongs to another optimizer: "
            "make it with tx.init(params)"
        )


def let_through(
    finite: jax.Array, updates: Any, inner_state: Any, state: SkipNotFiniteState, max_consecutive_skips: Any
) -> tuple[Any, SkipNotFiniteState]:
    """The updates and the new state of a step, or zeros and the state before it if the step is to be skipped."""
    through = finite | (state.consecutive_notfinite >= max_consecutive_skips)

    def select(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: a if a is b else jnp.where(through, a, b), new, old)

    count, row = (optax.safe_increment(x) for x in state[1:])
    state = SkipNotFiniteState(
        select(inner_state, state.inner_state),
        jnp.where(finite, state.notfinite_count, count),
        jnp.where(finite, 0, row),
    )
    return select(updates, jax.tree.map(jnp.zeros_like, updates)), state


@jax.jit
def is_finite(grads: Any, updates: Any, old: Any, new: Any) -> jax.Array:
    """Whether gradients and updates are finite and no leaf of the state has become infinite or NaN.

    A state may hold infinities on purpose, as the start of a best value so far.
    """

    def results() -> jax.Array:
        finite = all_finite(updates)
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            if jnp.issubdtype(jnp.result_type(b), jnp.inexact):
                finite &= all_finite(b) | ~all_finite(a)
        return finite

    # In a branch, because XLA on CPU would otherwise compute every leaf a second time inside its check.
    return jax.lax.cond(all_finite(grads), results, lambda: jnp.zeros((), bool))
