"""A ResNet in the style of flax/examples/imagenet: partial layers, batch statistics in the TrainState, heavy ball."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import common_utils, train_state

import lowrank_optax as lro

ModuleDef = Any


class ResNetBlock(nn.Module):
    filters: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[..., Any]
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        residual = x
        y = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.filters, (3, 3))(y))
        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return self.act(residual + y)


class ResNet(nn.Module):
    stage_sizes: tuple[int, ...] = (1, 1)
    block_cls: ModuleDef = ResNetBlock
    num_classes: int = 5
    num_filters: tuple[int, ...] = (11, 13)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = conv(self.num_filters[0], (3, 3), name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        for i, block_size in enumerate(self.stage_sizes):
            for j in range(block_size):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = self.block_cls(self.num_filters[i], conv=conv, norm=norm, act=nn.relu, strides=strides)(x)
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


class TrainState(train_state.TrainState):
    batch_stats: Any


model = ResNet()
tx = lro.lowrank_heavy_ball(5e-2, 0.9, nesterov=True)  # lowrank_optax


def create_train_state(rng: jax.Array, rank: float | None) -> TrainState:
    @jax.jit
    def init() -> Any:
        return model.init(rng, BATCH["image"])

    variables = init()
    params = variables["params"]
    if rank is not None:
        params = lro.factorize(params, rank, where=lro.linen.kernels(model, BATCH["image"]))  # lowrank_optax
    apply_fn = lro.linen.apply(model)  # lowrank_optax
    return TrainState.create(apply_fn=apply_fn, params=params, tx=tx, batch_stats=variables["batch_stats"])


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new_model_state = state.apply_fn(variables, batch["image"], mutable=["batch_stats"])
        loss = jnp.mean(optax.softmax_cross_entropy(logits, common_utils.onehot(batch["label"], model.num_classes)))
        weight_l2 = sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)
        return loss + 1e-5 * weight_l2, (new_model_state, loss)

    (_, (new_model_state, loss)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=new_model_state["batch_stats"]), {"loss": loss}


def start(rank: float | None) -> TrainState:
    return create_train_state(jax.random.key(0), rank)


def step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
    state, metrics = train_step(state, batch)
    return state, metrics["loss"]


@jax.jit
def forward(state: TrainState, batch: Any) -> jax.Array:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return state.apply_fn(variables, batch["image"], train=False, mutable=False)


def params(state: TrainState) -> Any:
    return state.params


def reasons() -> dict[str, str]:
    return lro.linen.kernels(model, BATCH["image"]).reasons


_rng = np.random.default_rng(0)
BATCH = {
    "image": _rng.standard_normal((4, 8, 8, 3)).astype(np.float32),
    "label": _rng.integers(0, 5, 4).astype(np.int32),
}
RANK = 4
FACTORED = {f"{name}/kernel" for name in ("conv_init", "Dense_0", "ResNetBlock_1/conv_proj")} | {
    f"ResNetBlock_{i}/Conv_{j}/kernel" for i in range(2) for j in range(2)
}
DENSE: dict[str, str] = {}
