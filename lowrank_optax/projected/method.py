"""The options of `subspace`, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lowrank_optax.axes import Rank, Where, check_where, matrix_shape
from lowrank_optax.projected.base import Projector, both_sides
from lowrank_optax.projected.carry import CARRIES, Carry
from lowrank_optax.projected.leaves import SIDES, Leaf
from lowrank_optax.projected.ranks import RankRule
from lowrank_optax.projected.refresh import Refresh, every
from lowrank_optax.projected.residuals import Residual
from lowrank_optax.projected.storage import stored_as


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A method: the arguments of `subspace` by their names, see there. `ready` makes one for the loop."""

    projector: Projector
    rank: Rank
    refresh: Any
    carry: Any
    residual: Residual
    adapt_rank: RankRule | None
    side: str
    scale: float | jax.Array | Callable[[int, int], float]
    basis_dtype: Any
    where: Where | None
    ordinary: Any
    seed: int
    first_moments: Sequence[str]
    second_moments: Sequence[str]

    @property
    def moves_moments(self) -> bool:
        """Whether moments are looked at outside of the inner transformation."""
        return self.carry.moment is not None or self.projector.momentum or self.residual.drops

    def scale_of(self, leaf: Leaf) -> Any:
        """The factor of the lifted part of one kernel."""
        return self.scale(*matrix_shape(leaf.shape, leaf.axes)) if callable(self.scale) else self.scale

    def ready(self) -> Method:
        """With objects in the place of names and numbers, and with storage and sides in the projector."""
        named = isinstance(self.carry, str) and self.carry in CARRIES
        method = dataclasses.replace(
            self,
            carry=CARRIES[self.carry]() if named else self.carry,
            refresh=self.refresh if isinstance(self.refresh, Refresh) else every(self.refresh),
        )
        method.check()
        projector = method.projector
        if self.basis_dtype is not None:
            projector = stored_as(projector, self.basis_dtype)
        return dataclasses.replace(method, projector=both_sides(projector) if self.side == "both" else projector)

    def check(self) -> None:
        """Raises for options of another kind, and for those that do not go together."""
        kinds = (
            ("projector", self.projector, Projector, "lro.projectors.svd()"),
            ("residual", self.residual, Residual, "lro.residuals.drop()"),
            ("carry", self.carry, Carry, f"lro.carry.keep() or one of {', '.join(map(repr, CARRIES))}"),
        )
        for name, value, kind, example in kinds:
            if not isinstance(value, kind):
                raise TypeError(f"{name} takes an object such as {example}, got {value!r}")
        check_where(self.where)
        if self.side not in SIDES:
            raise ValueError(f"side is one of {', '.join(map(repr, SIDES))}, got {self.side!r}")
        if self.side == "entries" and not self.projector.coordinates:
            raise ValueError("side='entries' chooses single entries: use lro.projectors.rows() with it")
        if self.side == "both" and (self.carry.turns or self.projector.coordinates or self.adapt_rank is not None):
            raise ValueError("side='both' goes with bases of columns, a fixed rank and carry='keep', 'reset' or 'lift'")
        if self.carry.restarts and not self.refresh.together:
            raise ValueError(
                "carry='reset_count' restarts the one count that all kernels share: refresh all kernels together, with "
                "lro.refresh.every(period), or use carry='reset'"
            )
        if self.adapt_rank is not None and (self.basis_dtype is not None or self.projector.coordinates):
            raise ValueError(
                "adapt_rank sets columns of stored bases to zero: use a projector of matrices and basis_dtype=None"
            )
