"""The methods that `experiments.pretrain` compares, as data.

    full                AdamW on the dense kernels
    lora                W = A B, A random, B = 0, AdamW. Without LoRA's frozen weight every residual branch is zero and
                        so is the gradient of its factors: at any step size the model sees one byte and its position.
    factors             W = A B from the truncated SVD of the dense kernel, AdamW: the baseline to beat
    naive               W = U S V^T from that SVD, AdamW on the three factors as if they were ordinary arrays
    lowrank_adam        W = U S V^T from that SVD, on the manifold
    lowrank_heavy_ball
    lowrank_muon

Every method trains embeddings, positions, norms and head by the same AdamW. The step size of the block kernels is the
best of a grid of factors of two around it (of three for heavy ball), by the validation loss of the demo (300 steps,
rank 16, seed 0); the grid was widened until its best was not at an edge:

    full                1.5e-3: 1.999   3e-3: 1.970    6e-3: 2.079
    lora                3e-3: 2.495     1e-2: 2.495, the same to the last digit
    factors             7.5e-4: 2.295   1.5e-3: 2.266  3e-3: 2.288   6e-3: 2.291
    naive               1.5e-3: 2.263   3e-3: 2.257    6e-3: 2.374
    lowrank_adam        1.2e-2: 2.238   2.4e-2: 2.215  4.8e-2: 2.349
    lowrank_heavy_ball  0.1: 2.324      0.3: 2.307     1.0: 2.315
    lowrank_muon        2e-2: 2.182     4e-2: 2.131    8e-2: 2.137
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

import lowrank_optax as lro
from experiments import pair
from experiments.gpt import is_block_kernel

DENSE_LEARNING_RATE = 3e-3  # of embeddings, positions, norms and head, under every method
CLIP = 1.0
WARM_UP = 0.1  # of the steps

Params = Any
Transformation = optax.GradientTransformation
Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all methods share."""

    steps: int
    weight_decay: float = 0.01
    momentum: str = "coefficient"
    tolerance: float = 0.0


@dataclasses.dataclass(frozen=True)
class Method:
    """The tuned step size of the block kernels, how they are kept, and how they are stepped."""

    learning_rate: float
    factor: Callable[[Params, int, jax.Array], Params]
    apply: Callable[[nn.Module], Callable[..., Any]]
    optimizer: Callable[[Schedule, Settings], Transformation]


def _dense(params: Params, rank: int, key: jax.Array) -> Params:
    del rank, key
    return params


def _dense_apply(model: nn.Module) -> Callable[..., Any]:
    return model.apply


def _low_rank(params: Params, rank: int, key: jax.Array) -> Params:
    del key
    return lro.factorize(params, rank, where=is_block_kernel)


def _lora(params: Params, rank: int, key: jax.Array) -> Params:
    keys = iter(jax.random.split(key, len(jax.tree.leaves(params))))
    return _map_kernels(lambda kernel: pair.lora(next(keys), kernel, rank), params)


def _balanced(params: Params, rank: int, key: jax.Array) -> Params:
    del key
    return _map_kernels(lambda kernel: pair.balanced(kernel, rank), params)


def _adamw(schedule: Schedule, settings: Settings) -> Transformation:
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(schedule, b2=0.99, weight_decay=settings.weight_decay),
    )


def _lowrank_adam(schedule: Schedule, settings: Settings) -> Transformation:
    # lro.lowrank_adam with clipping, which must be inside to act on the Riemannian norm.
    return lro.fixed_rank(_adamw(schedule, settings), **_geometry(settings))


def _lowrank_heavy_ball(schedule: Schedule, settings: Settings) -> Transformation:
    inner = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.trace(0.9),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    return lro.fixed_rank(inner, **_geometry(settings))


def _lowrank_muon(schedule: Schedule, settings: Settings) -> Transformation:
    return lro.lowrank_muon(schedule, weight_decay=settings.weight_decay, **_geometry(settings))


def _geometry(settings: Settings) -> dict[str, Any]:
    policy = lro.tolerance(settings.tolerance) if settings.tolerance else None
    return {"momentum": settings.momentum, "rank": policy}


METHODS: dict[str, Method] = {
    "full": Method(3e-3, _dense, _dense_apply, _adamw),
    "lora": Method(3e-3, _lora, pair.apply, _adamw),
    "factors": Method(1.5e-3, _balanced, pair.apply, _adamw),
    "naive": Method(3e-3, _low_rank, lro.linen.apply, _adamw),
    "lowrank_adam": Method(2.4e-2, _low_rank, lro.linen.apply, _lowrank_adam),
    "lowrank_heavy_ball": Method(0.3, _low_rank, lro.linen.apply, _lowrank_heavy_ball),
    "lowrank_muon": Method(4e-2, _low_rank, lro.linen.apply, _lowrank_muon),
}


def optimizer(method: Method, learning_rate: float, settings: Settings) -> Transformation:
    """The method for the block kernels and AdamW for all other leaves, each clipped by itself."""

    def schedule(peak: float) -> Schedule:
        steps = max(2, settings.steps)
        warm_up = max(1, round(WARM_UP * steps))
        return optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, steps, 0.1 * peak)

    def label(path: tuple, leaf: Any) -> str:
        kernel = _is_factored(leaf) or is_block_kernel(_name(path), leaf.shape)
        return "kernels" if kernel else "others"

    def labels(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(label, params, is_leaf=_is_factored)

    return optax.partition(
        {
            "kernels": method.optimizer(schedule(learning_rate), settings),
            "others": _adamw(schedule(DENSE_LEARNING_RATE), settings),
        },
        labels,
    )


def mean_rank(params: Params) -> float:
    """Mean rank of the block kernels: the active one if low-rank, else the largest possible."""
    ranks = [np.asarray(r, float).mean() for r in _ranks(params).values()]
    return float(np.mean(ranks or _kernel_widths(params)))


_ranks = jax.jit(lro.ranks)  # its small operations take seconds to compile one by one


def _kernel_widths(params: Params) -> list[int]:
    widths = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_factored):
        if isinstance(leaf, pair.Pair):
            widths.append(leaf.A.shape[-1])
        elif is_block_kernel(_name(path), leaf.shape):
            widths.append(min(leaf.shape))
    return widths


def _map_kernels(factor: Callable[[jax.Array], pair.Pair], params: Params) -> Params:
    def one(path: tuple, leaf: jax.Array) -> Any:
        return factor(leaf) if is_block_kernel(_name(path), leaf.shape) else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def _is_factored(x: Any) -> bool:
    return isinstance(x, lro.LowRank | pair.Pair)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
