"""What a kind of change gets to make the change of one kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.axes import Axes, matrix_shape


@dataclasses.dataclass(frozen=True)
class Request:
    """One kernel, or a stack of kernels, to be changed.

    Attributes:
      key: for random draws.
      name: the path of the kernel.
      W: W0 as matrices `(batch..., m, n)` in float32 or better.
      shape: its shape in the model.
      split: how its axes split.
      rank: the rank.
      scale: the factor on the change.
      start: a `Start`.
    """

    key: jax.Array
    name: str
    W: jax.Array
    shape: tuple[int, ...]
    split: Axes
    rank: int
    scale: float
    start: Any

    @property
    def batch(self) -> tuple[int, ...]:
        """The axes that stack kernels."""
        return self.shape[: self.split.batch]

    @property
    def m(self) -> int:
        """The number of inputs."""
        return matrix_shape(self.shape, self.split)[0]

    @property
    def n(self) -> int:
        """The number of outputs."""
        return matrix_shape(self.shape, self.split)[1]

    def rows(self, x: jax.Array) -> jax.Array:
        """`(batch..., m, any)` with the input axes of the kernel."""
        inner = self.split.batch + self.split.inputs
        return x.reshape(*self.batch, *self.shape[self.split.batch : inner], x.shape[-1])

    def columns(self, x: jax.Array) -> jax.Array:
        """`(batch..., any..., n)` with the output axes of the kernel."""
        return x.reshape(*x.shape[:-1], *self.shape[self.split.batch + self.split.inputs :])

    def outputs(self, x: jax.Array) -> jax.Array:
        """`(batch..., n, any)` with the output axes of the kernel."""
        inner = self.split.batch + self.split.inputs
        return x.reshape(*self.batch, *self.shape[inner:], x.shape[-1])

    def number(self, value: float) -> jax.Array:
        """A number for every kernel of the stack."""
        return jnp.full(self.batch, value, self.W.dtype)

    def normal(self, tag: int, *shape: int, std: float = 1.0) -> jax.Array:
        """Gaussian draws for every kernel of the stack; another tag gives other draws."""
        key = jax.random.fold_in(self.key, tag)
        return std * jax.random.normal(key, (*self.batch, *shape), self.W.dtype)

    def uniform(self, tag: int, *shape: int, bound: float) -> jax.Array:
        """Draws from the interval of `bound` around zero."""
        key = jax.random.fold_in(self.key, tag)
        return jax.random.uniform(key, (*self.batch, *shape), self.W.dtype, -bound, bound)

    def refuse(self, kind: str, why: str) -> ValueError:
        """The error of a kernel that a kind cannot change."""
        return ValueError(f"kind {kind!r} cannot change {self.name!r} of shape {self.shape}: {why}")
