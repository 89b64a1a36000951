"""What is checked of every client.

A client is a module with a model, the training loop of its code base, and these names:

  start(rank)            a new training state; dense for None, at full rank for 1.0
  step(state, batch)     the client's own jitted step: the new state and the loss
  forward(state, batch)  the function that the model computes, without dropout
  params(state)          the parameters
  reasons()              why parameters stay dense
  decode(state, batch)   where it has a cache: what `forward` computes, token by token
  BATCH, RANK, FACTORED  a batch, the rank of the tests, the paths of the kernels that are factored there
  DENSE                  for the path of every other parameter with two axes or more, the reason

Widths have a prime factor each (13, 11, 17, 19) that neither batches, lengths nor ranks have: an array with the number
of entries of a kernel is a kernel, or an embedding.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import pathlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
from flax import nnx

import lowrank_optax as lro
from lowrank_optax.boxes import unwrapped
from lowrank_optax.paths import path_name
from tests.jaxprs import traced

STEPS = 20


class Run(NamedTuple):
    state: Any
    losses: list[float]
    compiled_late: list[str]  # what was compiled after the first step


@functools.cache
def start(client: ModuleType, rank: float | None) -> Any:
    """A state that no step has seen, for those who only read it: steps may donate what they get, and nnx changes it."""
    return client.start(rank)


@functools.cache
def run(client: ModuleType) -> Run:
    """Twenty steps on one batch at low rank, once for all tests."""
    state, loss = client.step(client.start(client.RANK), client.BATCH)
    losses = [float(loss)]
    with compilations() as late:
        for _ in range(STEPS - 1):
            state, loss = client.step(state, client.BATCH)
            losses.append(float(loss))
    return Run(state, losses, late)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that are compiled within the context."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Compiling"):
                found.append(record.getMessage().split(" with ")[0])

    handler, logger = Handler(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)


def parameters(client: ModuleType, state: Any) -> dict[str, Any]:
    """Kernels and arrays by path."""
    tree, _ = unwrapped(client.params(state))
    return {path_name(path): x for path, x in jax.tree.leaves_with_path(tree, is_leaf=lro.is_lowrank)}


def kernel_sizes(client: ModuleType, state: Any) -> set[int]:
    """The numbers of entries of the kernels that are factored, of stacked ones alone and together."""
    kernels = [x for x in parameters(client, state).values() if lro.is_lowrank(x)]
    return {size for W in kernels for size in (math.prod(W.in_shape + W.out_shape), math.prod(W.shape))}


def kernels_inside(client: ModuleType, rank: float | None, sizes: set[int]) -> set[tuple[int, ...]]:
    """The shapes of arrays within a step that have as many entries as a kernel and are no ordinary parameter."""
    state = start(client, rank) if rank is None else run(client).state
    ordinary = {x.shape for x in parameters(client, run(client).state).values() if not lro.is_lowrank(x)}
    graph, arrays = nnx.split(state) if is_nnx(state) else (None, state)

    def step(arrays: Any, batch: Any) -> Any:
        """Variables of nnx may change only where they were made, within the trace."""
        after, loss = client.step(arrays if graph is None else nnx.merge(graph, arrays), batch)
        return (after if graph is None else nnx.state(after)), loss

    shapes = {x.aval.shape for e in traced(step, arrays, client.BATCH) for x in e.outvars if hasattr(x.aval, "shape")}
    return {shape for shape in shapes - ordinary if math.prod(shape) in sizes}


def is_nnx(state: Any) -> bool:
    return isinstance(state, tuple) and isinstance(state[0], nnx.Module)


def lines_added(client: ModuleType) -> int:
    """The number of lines that a client has for lowrank_optax."""
    assert client.__file__ is not None
    return pathlib.Path(client.__file__).read_text().count("# lowrank_optax")
