"""Types and ends that the published methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from lowrank_optax.guard import Guarded, chain_in_one_guard
from lowrank_optax.projected import pieces

Number = float | jax.Array
Schedule = float | jax.Array | Callable[[Any], Any]
Mask = Any | Callable[[Any], Any] | None


def is_zero(x: Number) -> bool:
    """Whether x is known to be zero, so that no array need be made for it."""
    return isinstance(x, float | int) and x == 0


def optimizer(learning_rate: Schedule, weight_decay: Number, mask: Mask, *pieces: Any) -> Guarded:
    """The pieces with decoupled weight decay and the learning rate; a step that is not finite is skipped by all."""
    # A decay of zero would still read the weights.
    decay = optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay, mask)
    return chain_in_one_guard(*pieces, decay, optax.scale_by_learning_rate(learning_rate))


def with_defaults(options: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Options of `subspace` that a user gives, over the defaults of a method.

    `optax.inject_hyperparams` hands them on as one argument, with the name of the dictionary.
    """
    given = dict(options)
    injected = given.pop("options", {})
    return {**defaults, **given, **injected}


def adam(b1: Number, b2: Number, eps: Number) -> Any:
    """Adam with epsilon beside the root that is not corrected."""
    return optax.chain(pieces.scale_by_plain_adam(b1, b2, eps), pieces.correct_bias(b1, b2))
