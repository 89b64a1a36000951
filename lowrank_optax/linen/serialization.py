"""Flax's own serialisation (`to_state_dict`, `to_bytes`) of kernels, changes, and coefficients in optimizer states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import serialization

from lowrank_optax.blocks import BlockLowRank
from lowrank_optax.geometry import Coefficients
from lowrank_optax.lowrank import LowRank


def register(kind: Any, names: Callable[[Any], tuple[str, ...]]) -> None:
    """Teaches Flax a class of nodes.

    Args:
      kind: the class.
      names: the names of the fields of a node that are stored; all others come from the target.
    """

    def to_state_dict(node: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(getattr(node, name)) for name in names(node)}

    def from_state_dict(node: Any, state: dict[str, Any]) -> Any:
        wanted = names(node)
        if set(state) != set(wanted):
            raise ValueError(
                f"a {kind.__name__} node is restored from {wanted}, got {sorted(state)} at "
                f"{serialization.current_path()}"
            )
        restored = {k: serialization.from_state_dict(getattr(node, k), state[k], name=k) for k in wanted}
        return dataclasses.replace(node, **restored)

    serialization.register_serialization_state(kind, to_state_dict, from_state_dict, override=True)


for _kernel in (LowRank, BlockLowRank):
    register(_kernel, lambda node: ("U", "S", "V"))
register(Coefficients, lambda node: ("N",))
