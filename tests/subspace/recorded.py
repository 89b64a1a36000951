"""The recorded trajectories of other people's code, and the run that is compared with one."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro

STEPS, PERIOD, LR = 16, 5, 0.02
RECORDED_AT = [1, 6, 11, 16]  # numbers of steps after which weights are recorded


@functools.cache
def data() -> dict[str, Any]:
    with np.load(pathlib.Path(__file__).parents[1] / "data" / "subspace.npz") as file:
        return {name: file[name] for name in file.files}


@functools.cache
def settings(prefix: str, case: str) -> dict[str, Any]:
    return json.loads(str(data()["meta"]))[prefix]["cases"][case]


def array(prefix: str, case: str, shape: str, name: str) -> np.ndarray:
    return data()[f"{prefix}.{case}.{shape}.{name}"]


def run(tx: Any, shape: str, *, flax: bool = False, decay_after: float = 0.0) -> tuple[np.ndarray, Any]:
    """The weights at the recorded steps, and the last state.

    Args:
      tx: the optimizer.
      shape: "wide" or "tall".
      flax: whether the kernel is kept as (inputs, outputs), the transpose.
      decay_after: share of the weights that is taken off after every step.
    """
    X, Y, W, batch = (data()[f"problem.{shape}.{name}"] for name in ("X", "Y", "W0", "batch"))

    def step(carry: Any, rows: Any) -> Any:
        W, state = carry
        x, y = jnp.asarray(X)[rows], jnp.asarray(Y)[rows]
        kernel = W["kernel"].T if flax else W["kernel"]
        grad = (x @ kernel.T - y).T @ x / 24
        updates, state = tx.update({"kernel": grad.T if flax else grad}, state, W)
        W = jax.tree.map(lambda w, u: (w + u) * (1 - decay_after), W, updates)
        return (W, state), W["kernel"]

    W = {"kernel": jnp.asarray(W.T if flax else W)}
    (_, state), Ws = jax.jit(lambda W, state: jax.lax.scan(step, (W, state), jnp.asarray(batch[:STEPS])))(W, tx.init(W))
    Ws = np.asarray(Ws)[np.array(RECORDED_AT) - 1]
    return np.swapaxes(Ws, 1, 2) if flax else Ws, state


def error(Ws: np.ndarray, prefix: str, case: str, shape: str) -> float:
    """The largest difference to the recorded weights, relative to the way that they went."""
    expected = array(prefix, case, shape, "W")
    way = np.max(np.abs(expected - data()[f"problem.{shape}.W0"]))
    return float(np.max(np.abs(Ws - expected)) / way)


def replayed(bases: Any) -> lro.projectors.Projector:
    """The projector whose bases are the recorded ones, one for each period."""
    bases = jnp.asarray(bases)
    return lro.projectors.Projector(lambda stored, at: bases[at.count // PERIOD].astype(stored.dtype))


def aligned(projector: lro.projectors.Projector, bases: Any) -> lro.projectors.Projector:
    """A projector whose vectors have the signs of recorded ones."""
    bases = jnp.asarray(bases)

    def refresh(stored: jax.Array, at: Any) -> jax.Array:
        new = projector.refresh(stored, at)
        return jnp.where(jnp.sum(new * bases[at.count // PERIOD], axis=0, keepdims=True) < 0, -new, new)

    return projector._replace(refresh=refresh)
