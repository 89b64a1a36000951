"""Times of a step of several methods in turns, so that whatever else the machine does slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

ROUNDS = 5
STEPS = 4  # a round has so many of every method


def in_turns(steps: Mapping[str, Callable[[Any, int], Any]], states: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds a step of every method: the median of the rounds.

    Args:
      steps: by method, `(state, number of the step) -> state`.
      states: by method, the first state.
    """
    now, times = dict(states), {name: [] for name in steps}
    for turn in range(ROUNDS + 1):
        for name, step in steps.items():
            state = jax.block_until_ready(now[name])
            start = time.perf_counter()
            for i in range(STEPS):
                state = step(state, 1 + i)
            now[name] = jax.block_until_ready(state)
            if turn:  # The first one may compile.
                times[name].append(1e3 * (time.perf_counter() - start) / STEPS)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}
