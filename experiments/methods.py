"""The methods that the experiments compare, as data: how a kernel is kept, and what steps it.

    full                dense kernels, AdamW
    full_muon           dense kernels, `optax.contrib.muon`
    galore              dense kernels, `optax.contrib.galore`: Adam in a subspace of the gradient
    lora                W = A B, A random, B = 0, AdamW. Trained from scratch, without LoRA's frozen weight, every
                        residual branch is zero and so is the gradient of its factors
    lora_muon           the same, Muon on A and on B
    factors             W = A B from the truncated SVD of the dense kernel, AdamW
    factors_muon        the same, Muon on A and on B
    naive               W = U S V^T from that SVD, AdamW on the three factors as if they were ordinary arrays
    lowrank_adam        W = U S V^T from that SVD, on the manifold
    lowrank_muon
    lowrank_heavy_ball
    full_heavy_ball, factors_heavy_ball, naive_heavy_ball
                        heavy ball on W, on A and B, on U, S and V

Where the task is to adapt a pretrained model, W stays and these are the forms of a change added to it, which is zero
at first. Every method trains all other parameters by the same AdamW.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np
import optax

import lowrank_optax as lro
from experiments import kernels
from experiments.task import Params, Task
from lowrank_optax.optimizers import balanced_where_allowed

if TYPE_CHECKING:
    from experiments.config import Config

B2 = 0.99
BETA = 0.9  # of heavy ball
CLIP = 1.0
WARM_UP = 0.1  # of the steps

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """How kernels are kept, how they are stepped, and a step size to begin a search with.

    An optimizer on the manifold is also given what steps all other leaves, which it applies to them itself.
    """

    form: str
    optimizer: Callable[..., optax.GradientTransformation]
    learning_rate: float

    @property
    def on_manifold(self) -> bool:
        """Whether ranks may change within the width of the factors."""
        return self.optimizer in (_lowrank_adam, _lowrank_heavy_ball, _lowrank_muon)


def _adamw(schedule: Schedule, config: "Config") -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(CLIP)
    return optax.chain(clip, optax.adamw(schedule, b2=B2, weight_decay=config.weight_decay))


def _heavy_ball(schedule: Schedule, config: "Config") -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(CLIP)
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(clip, optax.trace(BETA), decay, optax.scale_by_learning_rate(schedule))


def _muon(schedule: Schedule, config: "Config") -> optax.GradientTransformation:
    def matrix(x: jax.Array) -> Any:
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    def axes(params: Params) -> Any:
        return jax.tree.map(matrix, params)

    return optax.contrib.muon(schedule, weight_decay=config.weight_decay, muon_weight_dimension_numbers=axes)


def _galore(schedule: Schedule, config: "Config") -> optax.GradientTransformation:
    gap = max(1, config.steps // 30)  # the default, 200, would leave short runs with one or two bases
    inner = optax.scale_by_adam(b2=B2)
    return optax.contrib.galore(schedule, config.rank, gap, base_optimizer=inner, weight_decay=config.weight_decay)


def _geometry(config: "Config") -> dict[str, Any]:
    """The options of `lro.fixed_rank` that the config names."""
    policy = None
    if config.budget:
        policy = lro.budget(config.budget)
    elif config.tolerance:
        policy = lro.tolerance(config.tolerance)
    options = {"gradient": config.gradient, "local_steps": config.local_steps, "retraction": config.retraction}
    # All other leaves move with every batch, as those of the methods without a loop.
    return {**options, "rank": policy, "momentum": config.momentum or None, "move_ordinary": True}


def _lowrank_adam(schedule: Schedule, config: "Config", others: optax.GradientTransformation) -> Any:
    # lro.lowrank_adam with its default momentum and clipping, which must be inside to act on what the step sees.
    g = _geometry(config)
    g["momentum"] = balanced_where_allowed(g["momentum"], g["gradient"], g["retraction"], g["rank"])
    return lro.fixed_rank(_adamw(schedule, config), **g, ordinary=others, stack="all")


def _lowrank_heavy_ball(schedule: Schedule, config: "Config", others: optax.GradientTransformation) -> Any:
    return lro.fixed_rank(_heavy_ball(schedule, config), **_geometry(config), ordinary=others, stack="all")


def _lowrank_muon(schedule: Schedule, config: "Config", others: optax.GradientTransformation) -> Any:
    return lro.lowrank_muon(schedule, weight_decay=config.weight_decay, **_geometry(config), ordinary=others)


METHODS: dict[str, Method] = {
    "full": Method("dense", _adamw, 3e-3),
    "full_muon": Method("dense", _muon, 2e-2),
    "full_heavy_ball": Method("dense", _heavy_ball, 0.3),
    "galore": Method("dense", _galore, 1e-2),
    "lora": Method("zero pair", _adamw, 3e-3),
    "lora_muon": Method("zero pair", _muon, 2e-2),
    "factors": Method("pair", _adamw, 1.5e-3),
    "factors_muon": Method("pair", _muon, 2e-2),
    "factors_heavy_ball": Method("pair", _heavy_ball, 0.3),
    "naive": Method("low rank", _adamw, 3e-3),
    "naive_heavy_ball": Method("low rank", _heavy_ball, 0.3),
    "lowrank_adam": Method("low rank", _lowrank_adam, 6e-3),
    "lowrank_heavy_ball": Method("low rank", _lowrank_heavy_ball, 0.3),
    "lowrank_muon": Method("low rank", _lowrank_muon, 2e-2),
}


def factor(method: Method, task: Task, params: Params, config: "Config", key: jax.Array) -> Params:
    """The dense parameters with every kernel in the form of the method."""
    if method.form == "dense":
        return scale_kernels(task, params, config.dense_scale)
    width = config.max_rank if method.on_manifold and config.max_rank else None
    lowrank = lro.factorize(params, config.rank, max_rank=width, where=task.is_kernel, scale=config.init_scale)
    leaves = len(jax.tree.leaves(params))
    keys = iter(jax.random.split(key, leaves))

    def change(W: lro.LowRank) -> Any:
        if method.form == "low rank":
            return kernels.zero_lowrank(next(keys), W) if config.adapt else W
        zero = config.adapt or method.form == "zero pair"
        return kernels.zero_pair(next(keys), W) if zero else kernels.balanced(W)

    def one(W: Any, dense: Any) -> Any:
        if not lro.is_lowrank(W):
            return W
        return kernels.Adapter(dense, change(W)) if config.adapt else change(W)

    return jax.tree.map(one, lowrank, params, is_leaf=lro.is_lowrank)


def scale_kernels(task: Task, params: Params, scale: float) -> Params:
    """The dense parameters with every kernel times `scale`."""

    def one(path: tuple, x: jax.Array) -> jax.Array:
        return scale * x if task.is_kernel(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape) else x

    return params if scale == 1 else jax.tree_util.tree_map_with_path(one, params)


def apply(method: Method, model: nn.Module) -> Callable[..., Any]:
    """The model's apply function for parameters in the form of the method."""
    return model.apply if method.form == "dense" else kernels.apply(model)


def labels(task: Task, params: Params) -> Any:
    """The tree, ending at kernels, of what steps a leaf: "kernels", "others", or nothing for "frozen"."""

    def label(path: tuple, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, kernels.Adapter):
            return kernels.Adapter("frozen", "kernels")
        if kernels.is_factored(leaf) or task.is_kernel(name, leaf.shape):
            return "kernels"
        return "frozen" if task.is_frozen(name) else "others"

    return jax.tree_util.tree_map_with_path(label, params, is_leaf=kernels.is_factored)


def trained_parameters(task: Task, params: Params) -> int:
    """The number of values that a method may change."""

    def count(label: str, node: Any) -> int:
        return 0 if label == "frozen" else sum(leaf.size for leaf in jax.tree.leaves(node))

    return sum(jax.tree.leaves(jax.tree.map(count, labels(task, params), params)))


def optimizer(name: str, task: Task, config: "Config") -> optax.GradientTransformation:
    """The method for the kernels and AdamW for all other leaves, each clipped by itself."""

    def schedule(peak: float) -> Schedule:
        steps = max(2, config.steps)
        warm_up = max(1, round(WARM_UP * steps))
        return optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, steps, 0.1 * peak)

    method, others = METHODS[name], _adamw(schedule(config.lr_others), config)
    step = functools.partial(method.optimizer, schedule(config.learning_rate(name)), config)

    def who(params: Params) -> Any:
        names = labels(task, params)
        return jax.tree.map(lambda x: "kernels" if x == "others" and method.on_manifold else x, names)

    of_kernels = step(others) if method.on_manifold else step()
    return optax.partition({"kernels": of_kernels, "others": others, "frozen": optax.set_to_zero()}, who)


def mean_rank(params: Params) -> float | None:
    """Mean rank of the factored kernels: the active one if low-rank, else their width; None for a dense model."""
    nodes = [x for x in jax.tree.leaves(params, is_leaf=kernels.is_factored) if kernels.is_factored(x)]
    nodes = [x.delta if isinstance(x, kernels.Adapter) else x for x in nodes]
    pairs = [x.A.shape[-1] for x in nodes if isinstance(x, kernels.Pair)]
    if pairs or not nodes:
        return float(np.mean(pairs)) if pairs else None
    return float(np.mean([np.asarray(r, float).mean() for r in _ranks(nodes).values()]))


def spectrum(task: Task, params: Params) -> list[float]:
    """Mean over the kernels of the singular values relative to the largest, as many as every kernel has."""
    nodes, groups = (jax.tree.leaves(x, is_leaf=kernels.is_factored) for x in (params, labels(task, params)))
    pairs = zip(nodes, groups, strict=True)
    values = [kernels.singular_values(x) for x, group in pairs if group == "kernels" or kernels.is_factored(group)]
    least = min(v.shape[-1] for v in values)
    relative = np.concatenate([v[:, :least] / np.maximum(v[:, :1], np.finfo(np.float32).tiny) for v in values])
    return [float(x) for x in relative.mean(0)]


_ranks = jax.jit(lro.ranks)  # its small operations take seconds to compile one by one
