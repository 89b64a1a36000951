"""Linen models of every kind of layer, factored kernels drawn for them, and sizes of arrays in a program."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro
from lowrank_optax.paths import path_name


class Block(nn.Module):
    """Attention, dropout and a rematerialised dense layer, with a carry for nn.scan."""

    features: int = 8

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = x + nn.remat(nn.Dense)(self.features, name="mlp")(nn.relu(x))
        return x, None


class Stack(nn.Module):
    layers: int = 3
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        axes, rngs = {"params": self.axis}, {"params": True}
        blocks = nn.scan(Block, variable_axes=axes, split_rngs=rngs, length=self.layers)
        return blocks(name="blocks")(nn.Dense(8, name="in")(x), None)[0]


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)
        return dense(6, name="experts")(x)


class Activated(nn.Dense):
    """A subclass whose forward pass is not that of nn.Dense."""

    @nn.compact
    def __call__(self, inputs):
        return nn.relu(super().__call__(inputs)) + 1.0


class Image(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=2, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x)
        return nn.Dense(5, name="head")(x.mean((-3, -2)))


# model, shape of the input, number of factored kernels
CASES = {
    "dense": (nn.Dense(6), (4, 3, 8), 1),
    "dense without bias": (nn.Dense(6, use_bias=False), (8,), 1),
    "general": (nn.DenseGeneral((2, 5), axis=(1, -1)), (3, 4, 2, 6), 1),
    "general, batch": (nn.DenseGeneral(5, axis=(-2, -1), batch_dims=(0, 1)), (2, 3, 4, 3, 2), 1),
    "conv 1d causal": (nn.Conv(8, 3, padding="CAUSAL", kernel_dilation=2), (2, 9, 4), 1),
    "conv 2d same": (nn.Conv(8, (3, 3), strides=2), (7, 6, 3), 1),
    "conv 2d valid": (nn.Conv(8, (2, 3), padding="VALID", strides=(1, 2)), (2, 7, 6, 3), 1),
    "conv 2d circular": (nn.Conv(8, (3, 3), padding="CIRCULAR", kernel_dilation=(1, 2)), (2, 7, 6, 3), 1),
    "conv 2d explicit": (nn.Conv(8, (3, 3), padding=((1, 0), (2, 1)), input_dilation=2), (2, 5, 5, 3), 1),
    "conv transpose": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), (2, 5, 5, 4), 1),
    "conv transpose circular": (nn.ConvTranspose(6, (4,), strides=(2,), padding="CIRCULAR"), (2, 5, 4), 1),
    "scan, attention, remat": (Stack(), (2, 5, 8), 6),
    "vmap": (Experts(), (3, 4, 8), 1),
    "subclass": (Activated(6), (4, 8), 1),
    "recurrent": (nn.RNN(nn.GRUCell(6, param_dtype=jnp.float64)), (2, 4, 5), 6),
    "mixed": (Image(), (2, 8, 8, 3), 2),
}


def draw(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def draw_kernel(shape, axes, rank, seed=1):
    """A kernel in the canonical gauge; NumPy, because JAX would compile an SVD for every shape."""
    batch, inputs = shape[: axes.batch], shape[axes.batch : axes.batch + axes.inputs]
    outputs = shape[axes.batch + axes.inputs :]
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(*batch, math.prod(n), rank)))[0] for n in (inputs, outputs))
    S = np.broadcast_to(np.diag(np.linspace(2.0, 0.5, rank)), (*batch, rank, rank))
    factors = U.reshape(*batch, *inputs, rank), S, V.reshape(*batch, *outputs, rank)
    return lro.LowRank(*map(jnp.asarray, factors))


def init(model, x, rank=3, where=None):
    """Variables with LowRank kernels wherever `kernels` or `where` finds one."""
    where = where or lro.linen.kernels(model, jax.ShapeDtypeStruct(x.shape, x.dtype))

    def one(path, leaf):
        axes = where(path_name(path), leaf.shape)
        return draw_kernel(leaf.shape, axes, rank) if axes else 1.0 + 0.3 * draw(leaf.shape)

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    return jax.tree_util.tree_map_with_path(one, shapes)


def count_kernels(tree):
    return sum(map(lro.is_lowrank, jax.tree.leaves(tree, is_leaf=lro.is_lowrank)))


def close(a, b, tol=1e-9):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b)


def shapes_inside(jaxpr):
    """The shapes of all values that a jaxpr computes, in loops, branches and calls too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from shapes_inside(getattr(inner, "jaxpr", inner))


def largest(fun, *args):
    """The number of entries of the largest array that `fun` computes."""
    return max(math.prod(s) for s in shapes_inside(jax.make_jaxpr(fun)(*args).jaxpr))
