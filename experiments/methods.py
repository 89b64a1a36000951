"""The methods that the experiments compare, as data: the form of a kernel, and the optimizer that moves it.

    full                dense kernels, AdamW
    full_muon           dense kernels, `optax.contrib.muon`
    galore              dense kernels, `optax.contrib.galore`: Adam in a subspace of the gradient
    subspace_galore, fira, apollo, apollo_mini, frugal, ldadam, adarankgrad
                        dense kernels, low-rank optimizer state by `lowrank_optax.subspace`
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
at first; then there is also

    adapter             a change of `--kind`, from `--start`, AdamW by `--rule`: see `lowrank_optax.adapters`

Every method trains all other parameters by the same AdamW.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

import lowrank_optax as lro
from experiments import kernels
from experiments.config import Config
from experiments.task import Params, Task

B2 = 0.99
BETA = 0.9  # of heavy ball
BETA_MUON = 0.95
CLIP = 1.0
WARM_UP = 0.1  # of the steps

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """How kernels are kept and how they are stepped.

    An optimizer on the manifold also gets the optimizer of all other leaves, which it applies to them itself, and the
    name of its geometry.
    """

    form: str
    optimizer: Callable[..., optax.GradientTransformation]
    on_manifold: bool = False


def _adamw(schedule: Schedule, config: Config) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(CLIP)
    return optax.chain(clip, optax.adamw(schedule, b2=B2, weight_decay=config.weight_decay))


def _heavy_ball(schedule: Schedule, config: Config) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(CLIP)
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(clip, optax.trace(BETA), decay, optax.scale_by_learning_rate(schedule))


def _muon(schedule: Schedule, config: Config) -> optax.GradientTransformation:
    def matrix(x: jax.Array) -> Any:
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    def axes(params: Params) -> Any:
        return jax.tree.map(matrix, params)

    return optax.contrib.muon(schedule, weight_decay=config.weight_decay, muon_weight_dimension_numbers=axes)


def _galore(schedule: Schedule, config: Config) -> optax.GradientTransformation:
    gap = max(1, config.steps // 30)  # the default, 200, would leave short runs with one or two bases
    inner = optax.scale_by_adam(b2=B2)
    return optax.contrib.galore(schedule, config.rank, gap, base_optimizer=inner, weight_decay=config.weight_decay)


def _subspace(make: Callable[..., Any], schedule: Schedule, config: Config) -> optax.GradientTransformation:
    """A published method of `lowrank_optax` with the rank and the clipping of the others and a period as above."""
    gap = max(1, config.steps // 30)
    options: dict[str, Any] = {"refresh": gap}
    if make is lro.ldadam:  # a new basis in every step
        options = {}
    if make is lro.adarankgrad:
        options = {"refresh": lro.refresh.converged(at_most=gap)}
    if make is not lro.apollo_mini:  # of rank 1
        options["rank"] = config.rank
    # The optimizer sees kernels only: others are masked.
    tx = make(schedule, b2=B2, weight_decay=config.weight_decay, where=lambda path, shape: True, **options)
    return optax.chain(optax.clip_by_global_norm(CLIP), tx)


def _lowrank_adam(schedule: Schedule, config: Config, others: optax.GradientTransformation, geometry: str) -> Any:
    return _on_manifold(_adamw(schedule, config), config, others, geometry)


def _lowrank_heavy_ball(schedule: Schedule, config: Config, others: optax.GradientTransformation, geometry: str) -> Any:
    return _on_manifold(_heavy_ball(schedule, config), config, others, geometry)


def _lowrank_muon(schedule: Schedule, config: Config, others: optax.GradientTransformation, geometry: str) -> Any:
    if geometry != "galerkin":
        options = {"geometry": _geometry(config, geometry), "ordinary": others}
        return lro.lowrank_muon(schedule, BETA_MUON, weight_decay=config.weight_decay, **options)
    inner = optax.chain(
        optax.trace(BETA_MUON, nesterov=True),
        lro.scale_by_polar_factor(),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    return _on_manifold(inner, config, others, geometry)


def _on_manifold(
    inner: optax.GradientTransformation, config: Config, others: optax.GradientTransformation, geometry: str
) -> Any:
    """`inner` for kernels, with its clipping inside, where it clips coordinates; `others` for other leaves."""
    both = optax.partition({"kernel": inner, "ordinary": others}, lro.kernel_labels)
    if geometry != "galerkin":
        return lro.fixed_rank(both, geometry=_geometry(config, geometry))
    # All other leaves move with every batch, as with the methods without a loop.
    return lro.galerkin(both, config.local_steps, rank=_policy(config), move_ordinary=True)


def _geometry(config: Config, name: str) -> lro.geometry.Geometry:
    if name == "balanced":
        return lro.Balanced()
    kind = lro.Tangent if name == "tangent" else lro.Coefficient
    return kind(rank=_policy(config), retraction=config.retraction)


def _policy(config: Config) -> lro.RankPolicy | None:
    if config.budget:
        return lro.budget(config.budget)
    return lro.tolerance(config.tolerance) if config.tolerance else None


METHODS: dict[str, Method] = {
    "full": Method("dense", _adamw),
    "full_muon": Method("dense", _muon),
    "full_heavy_ball": Method("dense", _heavy_ball),
    "galore": Method("dense", _galore),
    "subspace_galore": Method("dense", functools.partial(_subspace, lro.galore)),
    **{
        name: Method("dense", functools.partial(_subspace, getattr(lro, name)))
        for name in ("fira", "apollo", "apollo_mini", "frugal", "ldadam", "adarankgrad")
    },
    "lora": Method("zero pair", _adamw),
    "lora_muon": Method("zero pair", _muon),
    "factors": Method("pair", _adamw),
    "factors_muon": Method("pair", _muon),
    "factors_heavy_ball": Method("pair", _heavy_ball),
    "naive": Method("low rank", _adamw),
    "naive_heavy_ball": Method("low rank", _heavy_ball),
    "lowrank_adam": Method("low rank", _lowrank_adam, on_manifold=True),
    "lowrank_heavy_ball": Method("low rank", _lowrank_heavy_ball, on_manifold=True),
    "lowrank_muon": Method("low rank", _lowrank_muon, on_manifold=True),
    "adapter": Method("change", _adamw),
}


def factor(method: Method, task: Task, params: Params, config: Config, key: jax.Array) -> Params:
    """The dense parameters with every kernel in the form of the method."""
    if method.form == "dense":
        return scale_kernels(task, params, config.dense_scale)
    if method.form == "change":
        return lro.adapters.attach(*lro.adapters.init(key, params, config.rank, where=task.is_kernel, **config.change))
    width = config.max_rank if method.on_manifold and config.max_rank else None
    blocks = (config.blocks or None) if method.on_manifold else None
    truncated = functools.partial(
        lro.factorize, rank=config.rank, max_rank=width, where=task.is_kernel, scale=config.init_scale, blocks=blocks
    )
    # A change needs the shapes of the factors and no decomposition.
    lowrank = jax.eval_shape(truncated, params) if config.adapt else truncated(params)
    leaves = len(jax.tree.leaves(params))
    keys = iter(jax.random.split(key, leaves))

    def change(W: Any) -> Any:
        if method.form == "low rank":
            return kernels.zero_lowrank(next(keys), W) if config.adapt else W
        if config.adapt:
            return kernels.zero_change(next(keys), W)
        return kernels.zero_pair(next(keys), W) if method.form == "zero pair" else kernels.balanced(W)

    def one(W: Any, dense: Any) -> Any:
        if not lro.is_lowrank(W):
            return dense
        return lro.adapters.Adapted(dense, change(W)) if config.adapt else change(W)

    return jax.tree.map(one, lowrank, params, is_leaf=lro.is_lowrank)


def scale_kernels(task: Task, params: Params, scale: float) -> Params:
    """The dense parameters with every kernel times `scale`."""

    def one(path: tuple, x: jax.Array) -> jax.Array:
        return scale * x if task.is_kernel(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape) else x

    return params if scale == 1 else jax.tree_util.tree_map_with_path(one, params)


def apply(method: Method, model: nn.Module) -> Callable[..., Any]:
    """The model's apply function for parameters in the form of the method."""
    return model.apply if method.form == "dense" else kernels.apply(model)


def split(task: Task, params: Params) -> tuple[Params, Params]:
    """What is trained and what is frozen, as nested dicts; of an adapted kernel its change and its base."""

    def part(node: Any, label: Any, frozen: bool) -> Any:
        if isinstance(node, Mapping):
            parts = {name: part(child, label[name], frozen) for name, child in node.items()}
            return {name: x for name, x in parts.items() if x is not None} or None
        if isinstance(node, lro.adapters.Adapted):
            return node.base if frozen else node.change
        return node if (label == "frozen") is frozen else None

    names = labels(task, params)
    return part(params, names, frozen=False) or {}, part(params, names, frozen=True) or {}


def join(trained: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    if not isinstance(frozen, Mapping):
        return lro.adapters.Adapted(frozen, trained)
    if not frozen:
        return trained
    both = {name: join(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
    return {**frozen, **trained, **both}


def labels(task: Task, params: Params) -> Any:
    """A tree that ends at kernels, with the optimizer of each leaf: "kernels", "others", or "frozen" for none."""

    def label(path: tuple, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, lro.adapters.Adapted):
            return lro.adapters.Adapted("frozen", "kernels")
        if kernels.is_factored(leaf) or task.is_kernel(name, leaf.shape):
            return "kernels"
        return "frozen" if task.is_frozen(name) else "others"

    return jax.tree_util.tree_map_with_path(label, params, is_leaf=kernels.is_factored)


def trained_parameters(trained: Params) -> int:
    """The number of values that a method may change: of a change not its scale, nor a frame that it keeps."""

    def count(label: str, node: Any) -> int:
        return 0 if label == "frozen" else sum(leaf.size for leaf in jax.tree.leaves(node))

    return sum(jax.tree.leaves(jax.tree.map(count, lro.adapters.labels(trained), trained)))


def optimizer(name: str, task: Task, config: Config) -> optax.GradientTransformation:
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

    of_kernels = step(others, config.geometry_of(name)) if method.on_manifold else step()
    if config.adapt:
        rule = config.change_rule if method.form == "change" else {}
        if rule.get("rule") == "manifold":
            rule = {**rule, "geometry": _geometry(config, config.geometry_of(name))}
        of_kernels = lro.adapters.optimizer(of_kernels, **rule)
    return optax.partition({"kernels": of_kernels, "others": others, "frozen": optax.set_to_zero()}, who)


def mean_rank(params: Params, opt_state: Any) -> float | None:
    """Mean rank of the factored kernels: the active one if low-rank, else their width; or of subspaces of gradients.

    None where there is none of them.
    """
    nodes = [x for x in jax.tree.leaves(params, is_leaf=kernels.is_factored) if kernels.is_factored(x)]
    pairs = [width for width in map(kernels.width, nodes) if width is not None]
    lowrank = [x for x in nodes if lro.is_lowrank(x)]
    if pairs:
        return float(np.mean(pairs))
    if not lowrank:
        is_state = lambda x: isinstance(x, lro.SubspaceState)  # noqa: E731
        states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
        subspaces = jax.device_get(jax.tree.leaves([x.rank for x in states]))
        return float(np.mean(np.concatenate([np.ravel(x) for x in subspaces]))) if subspaces else None
    return float(np.mean([np.asarray(r, float).mean() for r in _ranks(lowrank).values()]))


def spectrum(task: Task, params: Params) -> list[float]:
    """Mean over the kernels of the singular values relative to the largest, as many as every kernel has."""
    nodes, groups = (jax.tree.leaves(x, is_leaf=kernels.is_factored) for x in (params, labels(task, params)))
    of_kernels = [x for x, group in zip(nodes, groups, strict=True) if group == "kernels"]
    values = [v for v in map(kernels.singular_values, of_kernels) if v is not None]
    if not values:
        return []
    least = min(v.shape[-1] for v in values)
    relative = np.concatenate([v[:, :least] / np.maximum(v[:, :1], np.finfo(np.float32).tiny) for v in values])
    return [float(x) for x in relative.mean(0)]


_ranks = jax.jit(lro.ranks)  # its small operations take seconds to compile one by one
