"""`nnx.Optimizer` for transformations that keep copies of factored kernels."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import is_wrapper


class Optimizer(nnx.Optimizer):  # type: ignore[type-arg]
    """`nnx.Optimizer` whose state may hold gradients or copies of factored kernels, as with `optax.MultiSteps`.

    `nnx.Optimizer` runs every optimizer of this package. It fails at its second update with a wrapper that keeps a copy
    of the parameters, because Flax then stores a kernel as a dict of U, S and V. This class keeps each factor in a
    variable of its own. Everything else is as in `nnx.Optimizer`.

    Args:
      model: an nnx module.
      tx: a transformation of Optax.
      wrt: filter of the variables to train, `nnx.Param` for most models.
      **kwargs: as in `nnx.Optimizer`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> model = lro.nnx.LowRankLinear(8, 6, rank=2, rngs=nnx.Rngs(0))
      >>> tx = optax.MultiSteps(lro.lowrank_adam(1e-3), every_k_schedule=2)
      >>> optimizer = lro.nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> for _ in range(4):
      ...     grads = nnx.grad(lambda model: jnp.mean(model(jnp.ones((3, 8))) ** 2))(model)
      ...     _ = optimizer.update(model, grads)
      >>> int(optimizer.opt_state.gradient_step[...])
      2
    """

    def __init__(self, model: Any, tx: optax.GradientTransformation, *, wrt: Any, **kwargs: Any) -> None:
        def init(params: Any) -> Any:
            return tx.init(jax.tree.map(_bare, params, is_leaf=is_wrapper))

        super().__init__(model, optax.GradientTransformation(init, tx.update), wrt=wrt, **kwargs)
        self.tx = tx


def _bare(x: Any) -> Any:
    return x.get_value() if is_wrapper(x) and is_lowrank(x.get_raw_value()) else x
