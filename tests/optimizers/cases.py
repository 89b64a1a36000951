"""The optimizers of the conformance tests, and the small problem that they step on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lowrank_optax as lro


def _riemannian(learning_rate):
    return optax.chain(
        lro.project_to_tangent(),
        optax.clip_by_global_norm(20.0),
        optax.scale_by_learning_rate(learning_rate),
        lro.retract(),
    )


# Name of the case to the optimizer as a function of its learning rate.
CASES = {
    "adam": lambda learning_rate: lro.lowrank_adam(learning_rate),
    "adam-coefficient": lambda learning_rate: lro.lowrank_adam(learning_rate, geometry=lro.Coefficient()),
    "adam-tangent": lambda learning_rate: lro.lowrank_adam(learning_rate, geometry=lro.Tangent()),
    "adam-galerkin": lambda learning_rate: lro.galerkin(optax.adam(learning_rate), 2),
    "adam-bug": lambda h: lro.lowrank_adam(h, geometry=lro.Tangent(retraction="bug")),
    "adam-tolerance": lambda h: lro.lowrank_adam(h, geometry=lro.Tangent(rank=lro.tolerance(1e-3))),
    "adamw-tangent": lambda learning_rate: lro.lowrank_adamw(learning_rate, geometry=lro.Tangent()),
    "heavy-ball": lambda learning_rate: lro.lowrank_heavy_ball(learning_rate, geometry=lro.Coefficient()),
    "heavy-ball-tangent": lambda learning_rate: lro.lowrank_heavy_ball(learning_rate),
    "muon": lambda learning_rate: lro.lowrank_muon(learning_rate, adam_learning_rate=0.1),
    "muon-coefficient": lambda h: lro.lowrank_muon(h, adam_learning_rate=0.1, geometry=lro.Coefficient()),
    "muon-tangent": lambda h: lro.lowrank_muon(h, adam_learning_rate=0.1, geometry=lro.Tangent()),
    "lion": lambda learning_rate: lro.fixed_rank(optax.lion(learning_rate), geometry=lro.Coefficient()),
    "rmsprop": lambda learning_rate: lro.fixed_rank(optax.rmsprop(learning_rate), geometry=lro.Coefficient()),
    "adabelief": lambda learning_rate: lro.fixed_rank(optax.adabelief(learning_rate), geometry=lro.Coefficient()),
    "nesterov": lambda h: lro.fixed_rank(optax.sgd(h, momentum=0.9, nesterov=True), geometry=lro.Tangent()),
    "riemannian-sgd": _riemannian,
}


# The optimizer that ordinary leaves get.
INNER = {
    "adam": optax.adam,
    "adam-galerkin": optax.adam,
    "adamw-tangent": lambda h: optax.adamw(h),
    "heavy-ball-tangent": lambda h: optax.sgd(h, momentum=0.9),
    "muon": lambda h: optax.adamw(0.1, weight_decay=0.0),
    "lion": optax.lion,
    "rmsprop": optax.rmsprop,
    "adabelief": optax.adabelief,
    "nesterov": lambda h: optax.sgd(h, momentum=0.9, nesterov=True),
    "riemannian-sgd": lambda h: optax.chain(optax.clip_by_global_norm(20.0), optax.sgd(h)),
}


def names(*fast):
    """Every case, slow unless it is named."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in CASES]


def is_galerkin(name):
    return "galerkin" in name


def small(dtype=jnp.float64, rank=2, max_rank=4):
    """One kernel of rank 2 in factors of width 4, and a bias."""
    W = jax.random.normal(jax.random.key(0), (5, 4), jnp.float64)
    params = lro.factorize({"kernel": W, "bias": jnp.ones(4)}, rank, max_rank=max_rank)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def small_loss(params):
    x = jnp.eye(5, dtype=params["bias"].dtype)
    target = 3 * jnp.sin(jnp.arange(20.0)).reshape(5, 4).astype(x.dtype)  # Neither W nor of low rank.
    return jnp.sum(jnp.square(x @ params["kernel"] + params["bias"][None] - target))


def signature(tree):
    """The properties that never change: structure, shapes, dtypes, weak types."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(tuple(x.shape), jnp.dtype(x.dtype), bool(x.weak_type)) for x in leaves]


def in_variables(params):
    """The tree as `nnx.state` gives it: a variable around every array and around every kernel."""
    return nnx.State(jax.tree.map(nnx.Param, params, is_leaf=lro.is_lowrank))
