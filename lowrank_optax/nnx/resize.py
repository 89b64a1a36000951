"""`resize` for nnx models and optimizers, in place."""

from __future__ import annotations

from typing import Any

from flax import nnx

from lowrank_optax.axes import Rank
from lowrank_optax.resize import resize as resize_trees


def resize(model: Any, optimizer: Any = None, rank: Rank | None = None, *, grow: bool = False) -> None:
    """Changes the width of the factors of a model and of its optimizer state together, in place.

    `lowrank_optax.resize` documents when W stays the same, and which states it refuses. Call it outside `nnx.jit`.

    Args:
      model: an nnx module with factored kernels.
      optimizer: the optimizer of these parameters, or None before there is one.
      rank: new width, see `lowrank_optax.resize`; default the active rank of each kernel.
      grow: whether ranks grow to the new width at once, see `lowrank_optax.resize`.

    Raises:
      ValueError: see `lowrank_optax.resize`.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
      >>> lro.nnx.factorize(model, rank=2, max_rank=5)
      >>> optimizer = nnx.Optimizer(model, lro.lowrank_adam(1e-3), wrt=nnx.Param)
      >>> lro.nnx.resize(model, optimizer)
      >>> model.kernel[...].width
      2
    """
    wrt: Any = nnx.Param if optimizer is None else optimizer.wrt
    state = None if optimizer is None else optimizer.opt_state
    params, state = resize_trees(nnx.state(model, wrt), state, rank, grow=grow)
    nnx.update(model, params)
    if optimizer is not None:
        nnx.update(optimizer.opt_state, nnx.state(state))
