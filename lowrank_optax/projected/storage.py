"""Bases in fewer bits: bfloat16, or four-bit numbers in groups that share a scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.projected.base import Projector, Refreshing, unmoved


@dataclasses.dataclass(frozen=True)
class int4:
    """Four-bit storage of a basis, an argument of `subspace(basis_dtype=...)`.

    Args:
      group: numbers that share a scale and an offset, which cost 8 bytes.

    References:
      Zhang et al., Q-GaLore, `arXiv:2407.08296 <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.2.
    """

    group: int = 256


class Packed(NamedTuple):
    """Numbers `offset + scale * k` with k from 0 to 15, two to a byte, one row for each group."""

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array


def pack(x: jax.Array, group: int) -> Packed:
    """The numbers of an array, rounded to 16 equidistant values between the least and the largest of each group."""
    size = min(group, x.size + x.size % 2)
    flat = jnp.pad(x.reshape(-1), (0, -x.size % size), mode="edge").reshape(-1, size).astype(jnp.float32)
    offset = jnp.min(flat, axis=1, keepdims=True)
    scale = (jnp.max(flat, axis=1, keepdims=True) - offset) / 15
    codes = jnp.round((flat - offset) / jnp.where(scale > 0, scale, 1)).astype(jnp.uint8)
    return Packed(codes[:, ::2] | (codes[:, 1::2] << 4), scale, offset)


def unpack(x: Packed, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The array of a shape whose numbers were packed."""
    codes = jnp.stack([x.codes & 15, x.codes >> 4], axis=-1).reshape(x.codes.shape[0], -1)
    return (x.offset + x.scale * codes).reshape(-1)[: math.prod(shape)].reshape(shape).astype(dtype)


def stored_as(projector: Projector, basis_dtype: Any) -> Projector:
    """The projector of stored matrices with another form in the state."""
    close: Callable[[jax.Array], Any]
    opened: Callable[..., jax.Array]
    if isinstance(basis_dtype, int4):
        if basis_dtype.group % 2 or basis_dtype.group < 2:
            raise ValueError(f"a group of int4 numbers has an even size, got {basis_dtype.group}")
        group = basis_dtype.group
        close, opened = (lambda x: pack(x, group)), unpack
    else:
        close = lambda x: x.astype(basis_dtype)  # noqa: E731
        opened = lambda x, shape, dtype: x.astype(dtype)  # noqa: E731

    if projector.after is not unmoved:
        raise ValueError(
            "basis_dtype rounds a basis, and this projector moves it in every step: leave basis_dtype=None"
        )

    def init(key: jax.Array, shape: tuple[int, int], rank: int, dtype: Any) -> Any:
        first = projector.init(key, shape, rank, dtype)
        if not isinstance(first, jax.Array) or first.shape != (shape[0], rank) or projector.coordinates:
            raise ValueError(
                "basis_dtype changes how a matrix is stored, and this projector stores a key, indices or several "
                "arrays: leave basis_dtype=None"
            )
        return close(first)

    def refresh(stored: Any, at: Refreshing) -> Any:
        shape = at.gradient.shape[0], at.momentum.shape[0]
        return close(projector.refresh(opened(stored, shape, at.gradient.dtype), at))

    def basis(stored: Any, gradient: jax.Array, rank: int) -> Any:
        return projector.basis(opened(stored, (gradient.shape[0], rank), gradient.dtype), gradient, rank)

    return projector._replace(init=init, refresh=refresh, basis=basis)
