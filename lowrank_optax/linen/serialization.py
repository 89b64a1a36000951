"""Flax's own serialisation (`to_state_dict`, `to_bytes`) of `LowRank` nodes."""

from __future__ import annotations

from typing import Any

from flax import serialization

from lowrank_optax.lowrank import LowRank

_FACTORS = ("U", "S", "V")


def _to_state_dict(W: LowRank) -> dict[str, Any]:
    return {name: serialization.to_state_dict(getattr(W, name)) for name in _FACTORS}


def _from_state_dict(W: LowRank, state: dict[str, Any]) -> LowRank:
    if set(state) != set(_FACTORS):
        raise ValueError(
            f"a LowRank kernel is restored from {_FACTORS}, got {sorted(state)} at {serialization.current_path()}"
        )
    return LowRank(*(serialization.from_state_dict(getattr(W, k), state[k], name=k) for k in _FACTORS))


serialization.register_serialization_state(LowRank, _to_state_dict, _from_state_dict, override=True)
