"""nnx layers whose kernel is a `LowRank` from the start."""

from __future__ import annotations

from typing import Any

from flax import nnx

from lowrank_optax.factorize import Rank, lowrank_init
from lowrank_optax.lowrank import dot_general
from lowrank_optax.nnx.hooks import PromoteLeaves


class LowRankLinear(nnx.Linear):
    """`nnx.Linear` with a `LowRank` kernel of shape `(in_features, out_features)`.

    Args:
      in_features: number of input features.
      out_features: number of output features.
      rank: int, fraction of `min(in_features, out_features)`, or callable of path and shape.
      max_rank: width of the factors, default `rank`.
      kernel_init: dense initialiser that sets the scale of the kernel, default LeCun normal.
      rngs: random streams.
      **kwargs: as in `nnx.Linear`, e.g. `use_bias`, `dtype`, `param_dtype`, `precision`, `bias_init`.

    Raises:
      ValueError: if the rank exceeds `min(in_features, out_features)`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layer = lro.nnx.LowRankLinear(8, 6, rank=2, rngs=nnx.Rngs(0))
      >>> layer.kernel[...].width, layer(jnp.ones((3, 8))).shape
      (2, (3, 6))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Rank,
        *,
        max_rank: Rank | None = None,
        kernel_init: Any = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            kernel_init=lowrank_init(rank, kernel_init, max_rank=max_rank),
            dot_general=dot_general,
            promote_dtype=PromoteLeaves(),
            rngs=rngs,
            **kwargs,
        )
