"""Pairs of factors in trees of changes, and in states of nnx."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
    """The inverse of `with_nodes`, as a state like another one, with values in variables where that one has them."""
    if not _is_state(like):
        return tree
    cls: Any = type(like)
    return unwrapped(like)[1](cls(_fields(tree)))


def _fields(tree: Any) -> Any:
    if is_pair(tree):
        return {name: getattr(tree, name) for name in _FIELDS}
    return {key: _fields(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _is_state(tree: Any) -> bool:
    """Whether a tree is a state of nnx, which Flax flattens by the names of attributes."""
    return isinstance(tree, Mapping) and hasattr(tree, "flat_state")


_FIELDS = ("A", "B", "scale")


class PairsState(NamedTuple):
    """The state of `stateful`.

    Attributes:
      count: steps taken.
      pairs: a state in the place of each pair, nothing in the place of other arrays.
    """

    count: jax.Array  # type: ignore[assignment]
    pairs: Any


def stateful(
    start: Callable[[LoRA], Any], step: Callable[[LoRA, LoRA, Any, jax.Array], tuple[LoRA, Any]]
) -> optax.GradientTransformation:
    """A transformation of the gradients of pairs with a state for each; other gradients pass.

    Args:
      start: the state of a pair.
      step: the direction and the new state of a gradient, a pair, its state, and the number of the step from 1.
    """

    def init(delta: Any) -> PairsState:
        states = jax.tree.map(lambda x: start(x) if is_pair(x) else optax.MaskedNode(), delta, is_leaf=is_pair)
        return PairsState(jnp.zeros((), jnp.int32), states)

    def update(grads: Any, state: PairsState, delta: Any = None) -> tuple[Any, PairsState]:
        if delta is None:
            raise ValueError("this rule needs the changes: update(grads, state, params)")
        count = optax.safe_increment(state.count)

        def one(g: Any, x: Any, of_pair: Any) -> _Step:
            return _Step(*step(g, x, of_pair, count)) if is_pair(g) else _Step(g, of_pair)

        steps = jax.tree.map(one, grads, delta, state.pairs, is_leaf=is_pair)
        take = lambda i: jax.tree.map(lambda x: x[i], steps, is_leaf=lambda x: isinstance(x, _Step))  # noqa: E731
        return take(0), PairsState(count, take(1))

    return optax.GradientTransformation(init, update)


class _Step(NamedTuple):
    direction: Any
    state: Any


def power_of_gram(gram: jax.Array, power: float) -> jax.Array:
    """A negative power of a symmetric positive semidefinite matrix, on the space of its eigenvalues above rounding."""
    w, q = jnp.linalg.eigh(gram)
    floor = gram.shape[0] * jnp.finfo(w.dtype).eps * jnp.maximum(w[-1:], jnp.finfo(w.dtype).tiny)
    return (q * jnp.where(w > floor, jnp.where(w > floor, w, 1.0) ** power, 0.0)[None]) @ q.T
