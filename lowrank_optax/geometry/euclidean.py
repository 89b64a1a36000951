"""The geometry of ordinary leaves: coordinates are entries, and the inner transformation alone decides."""

from __future__ import annotations

from typing import Any

from lowrank_optax.geometry.base import Geometry


class Euclidean(Geometry):
    """Biases, norms, embeddings: a step is added as it is."""

    def owns(self, leaf: Any) -> bool:
        """Every leaf that no other geometry owns."""
        return True

    def propose(self, frame: Any, step: Any) -> Any:
        """The step itself: adding it to the leaf here and subtracting the leaf afterwards would round it."""
        return step

    def difference(self, new: Any, old: Any, like: Any) -> Any:
        """The step, in the dtype that the inner transformation gave it."""
        return new
