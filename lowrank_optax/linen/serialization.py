"""Flax's own serialisation (`to_state_dict`, `to_bytes`) of kernels and of the coefficients in optimizer states."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import serialization

from lowrank_optax.blocks import BlockLowRank
from lowrank_optax.geometry import Coefficients
from lowrank_optax.lowrank import LowRank


def _register(kind: Any, names: tuple[str, ...]) -> None:
    """Arrays by name; static fields are those of the target."""

    def to_state_dict(node: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(getattr(node, name)) for name in names}

    def from_state_dict(node: Any, state: dict[str, Any]) -> Any:
        if set(state) != set(names):
            raise ValueError(
                f"a {kind.__name__} node is restored from {names}, got {sorted(state)} at "
                f"{serialization.current_path()}"
            )
        restored = {k: serialization.from_state_dict(getattr(node, k), state[k], name=k) for k in names}
        return dataclasses.replace(node, **restored)

    serialization.register_serialization_state(kind, to_state_dict, from_state_dict, override=True)


for _kernel in (LowRank, BlockLowRank):
    _register(_kernel, ("U", "S", "V"))
_register(Coefficients, ("N",))
