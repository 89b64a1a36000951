"""Pairs of factors in trees of changes, and in states of nnx."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.boxes import unwrapped
from lowrank_optax.linalg import working_dtype


def is_pair(x: Any) -> bool:
    """Whether x is a pair of factors."""
    return isinstance(x, LoRA)


def on_pairs(f: Callable[[LoRA, LoRA], Any], updates: Any, delta: Any) -> Any:
    """`f(update, pair)` for every pair, other updates as they are."""
    return jax.tree.map(lambda u, x: f(u, x) if is_pair(x) else u, updates, delta, is_leaf=is_pair)


def flatten_pair(gradient: LoRA, pair: LoRA) -> tuple[list[jax.Array], Callable[[Any, Any], LoRA]]:
    """Gradients and factors of a pair as matrices in the working dtype, and the way back for new gradients."""
    b, r = pair.batch, pair.A.shape[-1]
    dtype = working_dtype(pair.A, pair.B)
    rows = [x.astype(dtype).reshape(*x.shape[:b], -1, r) for x in (gradient.A, pair.A)]
    columns = [x.astype(dtype).reshape(*x.shape[:b], r, -1) for x in (gradient.B, pair.B)]

    def back(A: jax.Array, B: jax.Array) -> LoRA:
        A, B = A.reshape(pair.A.shape).astype(gradient.A.dtype), B.reshape(pair.B.shape).astype(gradient.B.dtype)
        return dataclasses.replace(gradient, A=A, B=B)

    return [rows[0], columns[0], rows[1], columns[1]], back


def with_nodes(tree: Any) -> Any:
    """A state of nnx as nested dicts of values with pairs as nodes; other trees as they are."""
    return _nodes(unwrapped(tree)[0]) if _is_state(tree) else tree


def _nodes(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    values = {key: _nodes(value) for key, value in tree.items()}
    return LoRA(**values) if set(values) == set(_FIELDS) else values


def without_nodes(tree: Any, like: Any) -> Any:
    """The inverse of `with_nodes`, as a state like another one."""
    if not _is_state(like):
        return tree
    cls: Any = type(like)
    return cls(_fields(tree))


def _fields(tree: Any) -> Any:
    if is_pair(tree):
        return {name: getattr(tree, name) for name in _FIELDS}
    return {key: _fields(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _is_state(tree: Any) -> bool:
    """Whether a tree is a state of nnx, which Flax flattens by the names of attributes."""
    return isinstance(tree, Mapping) and hasattr(tree, "flat_state")


_FIELDS = ("A", "B", "scale")
