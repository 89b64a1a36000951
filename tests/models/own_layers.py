"""Layers in the style of code bases that have their own, and what a user registers for them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning

import lowrank_optax as lro


class AxesDense(nn.Module):
    """After T5X: several input and output axes in a kernel of two, with logical names of axes beside it."""

    features: int | tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    use_bias: bool = False
    names: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else self.features
        axis = (self.axis,) if isinstance(self.axis, int) else self.axis
        axis = tuple(a % inputs.ndim for a in axis)
        shape = tuple(inputs.shape[a] for a in axis) + features
        names = self.names or tuple(f"axis_{i}" for i in range(len(shape)))
        init = nn.initializers.normal(0.1)
        kernel = partitioning.param_with_axes("kernel", init, shape, jnp.float32, axes=names)
        y = jax.lax.dot_general(inputs, kernel, ((axis, tuple(range(len(axis)))), ((), ())))
        if self.use_bias:
            y += partitioning.param_with_axes("bias", init, features, jnp.float32, axes=names[len(axis) :])
        return y


def axes_dense(module: Any, W: lro.LowRank, x: jax.Array) -> jax.Array:
    axis = (module.axis,) if isinstance(module.axis, int) else module.axis
    y = jnp.moveaxis(x, axis, range(x.ndim - len(axis), x.ndim)) @ W
    return y + module.get_variable("params", "bias") if module.use_bias else y


class WeightEinsum(nn.Module):
    """After deepmind-gemma: a parameter `w`, the equation given at the call."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
        return jnp.einsum(eqn, x, self.param("w", nn.initializers.normal(0.1), self.shape))


class SetupEinsum(nn.Module):
    """After tunix: the equation is an attribute, parameters are made in `setup`."""

    einsum_str: str
    shape: tuple[int, ...]

    def setup(self) -> None:
        self.w = self.param("w", nn.initializers.normal(0.1), self.shape)
        self.scale = self.param("scale", nn.initializers.ones, ())

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * jnp.einsum(self.einsum_str, x, self.w)


class Conv1D(nn.Module):
    """After HF Flax's GPT-2: a dense layer whose kernel is stored as (outputs, inputs)."""

    features: int
    bias_init: Any = nn.initializers.normal(0.1)

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(0.1), (self.features, inputs.shape[-1]))
        bias = self.param("bias", self.bias_init, (self.features,))
        return jax.lax.dot_general(inputs, kernel.transpose(), (((inputs.ndim - 1,), (0,)), ((), ()))) + bias


class Gated(nn.Module):
    """After deepmind-gemma's feed-forward layer: two kernels in one module, boxed."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.normal(0.1), (None, None, None))
        gating = self.param("gating", init, (2, x.shape[-1], self.hidden))
        linear = self.param("linear", nn.initializers.normal(0.1), (self.hidden, x.shape[-1]))
        gate, up = jnp.dot(x, gating[0]), jnp.dot(x, gating[1])
        return jnp.dot(nn.gelu(gate) * up, linear)


def gated(module: Any, gating: Any, linear: Any, x: jax.Array) -> jax.Array:
    gate, up = (x @ gating[i] for i in range(2))
    return (nn.gelu(gate) * up) @ linear


class Tied(nn.Module):
    """An embedding table with two methods."""

    def setup(self) -> None:
        self.table = self.param("table", nn.initializers.normal(0.1), (12, 8))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.decode(nn.relu(self.encode(ids)))

    def encode(self, ids: jax.Array) -> jax.Array:
        return self.table[ids]

    def decode(self, x: jax.Array) -> jax.Array:
        return x @ self.table.T


def encode(module: Any, W: lro.LowRank, ids: jax.Array) -> jax.Array:
    return ((W.U[ids]) @ W.S) @ W.V.T


def register_all() -> None:
    """Again at every call: register replaces."""

    def axes_of(module: Any, x: Any) -> lro.Axes:
        return lro.Axes(0, 1 if isinstance(module.axis, int) else len(module.axis))

    register = lro.linen.register
    register(AxesDense, axes=axes_of, forward=axes_dense)
    register(
        WeightEinsum,
        leaf="w",
        axes=lambda module, eqn, x: lro.einsum_axes(eqn),
        forward=lambda module, W, eqn, x: lro.einsum(eqn, x, W),
    )
    register(
        SetupEinsum,
        leaf="w",
        axes=lambda module, x: lro.einsum_axes(module.einsum_str),
        forward=lambda module, W, x: module.scale * lro.einsum(module.einsum_str, x, W),
    )
    register(
        Conv1D,
        axes=lro.Axes(0, 1),
        forward=lambda module, W, x: x @ W.T + module.param("bias", module.bias_init, (module.features,)),
    )
    register(Gated, leaf=("gating", "linear"), axes=(lro.Axes(1, 1), lro.Axes(0, 1)), forward=gated)
    register(Tied, leaf="table", method="encode", axes=lro.Axes(0, 1), forward=encode)
    register(Tied, leaf="table", method="decode", axes=lro.Axes(0, 1), forward=lambda module, W, x: x @ W.T)
