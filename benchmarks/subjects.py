"""The subjects of the measurements: a transformer on random bytes, and one training step of it by each method."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from experiments import gpt, kernels, methods, pretrain
from experiments.task import Task, random_params

HEAD = 64  # width of an attention head
BLOCKS = 8  # each way, of the grids
LABELS = {
    "full": "dense, AdamW",
    "full_muon": "dense, Muon",
    "galore": "dense, GaLore",
    "factors": "A B, AdamW",
    "lowrank_adam": "low-rank Adam",
    "lowrank_adam:blocks": "low-rank Adam, 8 x 8 blocks",
    "lowrank_adam:coefficient": "low-rank Adam, coefficient geometry",
    "lowrank_adam:tangent": "low-rank Adam, tangent geometry",
    "lowrank_adam:bug": "low-rank Adam, coefficient geometry, bug retraction",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the model, of the kernels' rank and of the batch."""

    d: int
    rank: int
    layers: int
    tokens: int = 2048
    context: int = 256
    dtype: str = "float32"

    @property
    def config(self) -> pretrain.Pretrain:
        # The schedule of a long run, so that GaLore changes its subspace every 200 steps, its default.
        return pretrain.Pretrain(
            d=self.d,
            layers=self.layers,
            heads=max(1, self.d // HEAD),
            context=self.context,
            rank=self.rank,
            dtype=self.dtype,
            batch=self.tokens // self.context,
            steps=6000,
        )


@dataclasses.dataclass
class Subject:
    """One method: parameters, optimizer state, and the functions to time."""

    params: Any
    state: Any
    batch: jax.Array
    gradient: Callable[..., Any]
    update: Callable[..., Any]

    def step(self, params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        """A whole training step."""
        loss, grads = self.gradient(params, batch)
        return *self.update(grads, params, state), loss


def build(name: str, size: Size) -> Subject:
    """The method `name`, or `name:option`, at its start."""
    name, _, option = name.partition(":")
    config = size.config
    blocks = BLOCKS if option == "blocks" else None
    if option and not blocks:
        retraction, geometry = ("bug", "coefficient") if option == "bug" else ("svd", option)
        config = dataclasses.replace(config, retraction=retraction, geometry=geometry)
    task, method = task_of(size), methods.METHODS[name]
    params = start(task, method.form, size.rank, blocks)
    tx = methods.optimizer(name, task, config)
    apply_fn = pair_apply(task.model) if method.form == "pair" else methods.apply(method, task.model)
    tokens = np.random.default_rng(0).integers(0, gpt.VOCABULARY, (config.batch, size.context + 1), np.int32)

    def gradient(params: Any, batch: jax.Array) -> Any:
        return jax.value_and_grad(lambda p: task.loss(apply_fn, p, batch)[0])(params)

    def update(grads: Any, params: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Subject(params, jax.jit(tx.init)(params), jnp.asarray(tokens), gradient, update)


def task_of(size: Size) -> Task:
    """The task of the pre-training experiment, without its text."""
    config = size.config
    model = gpt.GPT(gpt.GPTConfig(config.d, config.layers, config.heads, config.context, config.dtype))
    example = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
    return Task(
        data="random bytes",
        model=model,
        init=functools.partial(random_params, model, example),
        is_kernel=gpt.is_block_kernel,
        loss=pretrain.loss_fn,
        batch=lambda seed, step: None,
        validation=(),
        unit="nats/byte",
        work=("tokens", size.tokens),
    )


def start(task: Task, form: str, rank: int, blocks: int | None = None) -> Any:
    """Random parameters, the kernels in the form of the method and drawn in it: an SVD of each would take minutes.

    Each by a program for its shape: one for all of them takes half a minute to compile at 48 blocks.
    """

    def one(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if form == "dense" or not task.is_kernel(name, leaf.shape):
            return _draw(leaf.shape, leaf.dtype)
        W = _draw(leaf.shape, leaf.dtype, rank, blocks)
        return kernels.balanced(W) if form == "pair" else W

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(task.init, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(shape: tuple[int, ...], dtype: Any, rank: int | None = None, blocks: int | None = None) -> Any:
    key = jax.random.key(0)
    if rank is None:
        return jax.random.normal(key, shape, dtype) / shape[0] ** 0.5
    return lro.lowrank_init(rank, blocks=blocks)(key, shape, dtype)


def pair_apply(model: nn.Module) -> Callable[..., Any]:
    """The model with kernels A B, `(x A) B`: without the product with an identity of `kernels.apply`."""

    def product(run: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            kernel = context.module.get_variable("params", "kernel")
            if isinstance(kernel, kernels.Pair):
                x, A, B = (jnp.asarray(y, context.module.dtype) for y in (*args, kernel.A, kernel.B))
                return (x @ A) @ B
        return run(*args, **kwargs)

    def applied(variables: Any, *args: Any) -> Any:
        with nn.intercept_methods(product):
            return model.apply(variables, *args)

    return applied


@functools.cache
def flops(size: Size, form: str) -> float:
    """Operations of the products with the block kernels in a forward and a backward pass."""
    d, r, t = size.d, size.rank, size.tokens
    shapes = [(d, d)] * 4 + [(d, 4 * d), (4 * d, d)]
    each = {
        "dense": sum(t * m * n for m, n in shapes),
        "pair": sum(t * r * (m + n) for m, n in shapes),
        "low rank": sum(t * r * (m + n) + min(t, m, n) * r * r for m, n in shapes),
    }
    return 6.0 * size.layers * each[form]
