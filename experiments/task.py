"""The task of an experiment: its model, data and loss, everything that the trainer needs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Params = Any
Batch = Any  # a tree of NumPy arrays that share their first axis


def _nothing(path: str) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data and its loss.

    Attributes:
      data: the name of the data, for the record.
      model: a linen module.
      init: dense parameters, random or pretrained, from a key.
      is_kernel: which parameters, by path and shape, are kept in low rank.
      loss: `(apply_fn, params, batch) -> (loss, metrics)`, means over the batch; metrics is a dict of scalars.
      batch: the training batch of a seed and a step, and of nothing else.
      validation: batches to average loss and metrics over.
      unit: of the loss.
      work: the unit in which a batch is counted, and how many units it holds.
      is_frozen: which other parameters, by path, keep their first values.
      export: `(folder, start, trained)` writes what a method trained for other tools to load; the parameters that it
        trained come as they were at the start and as they are. None writes nothing.
    """

    data: str
    model: nn.Module
    init: Callable[[jax.Array], Params]
    is_kernel: Callable[[str, tuple[int, ...]], bool]
    loss: Callable[[Callable[..., Any], Params, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    batch: Callable[[int, int], Batch]
    validation: Sequence[Batch]
    unit: str
    work: tuple[str, int]
    is_frozen: Callable[[str], bool] = _nothing
    export: Callable[[Path, Params, Params], None] | None = None


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_params(model: nn.Module, example: jax.ShapeDtypeStruct, key: jax.Array) -> Params:
    """Weights of a model for inputs of the shape and dtype of `example`."""
    return model.init(key, jnp.zeros(example.shape, example.dtype))["params"]


class DataError(Exception):
    """Data are missing or cannot be used; the message is one line that names the path."""
