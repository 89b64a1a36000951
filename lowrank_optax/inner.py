"""Facts about Optax's transformations inside `fixed_rank`: which fail in coordinates, which may get leaves in groups.

A transformation is two functions, so its kind is read off the names of the functions in their closures. An unknown one
gets every leaf by itself and is not refused here.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import optax

from lowrank_optax.geometry import Coefficient, Frozen, Geometry, is_coordinates

# Transformations that treat every entry alike, or depend on all leaves through sums over the whole tree: they may get
# leaves of equal shape as one stacked leaf. Transformations with masks or norms of single leaves may not.
ALIKE = {
    "add_decayed_weights",
    "chain",
    "clip",
    "clip_by_global_norm",
    "ema",
    "identity",
    "init_empty_state",
    "partition",  # by `kernel_labels` only, see below
    "scale",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_belief",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_polar_factor",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_sign",
    "scale_by_yogi",
    "set_to_zero",
    "trace",
    "with_extra_args_support",
}

_ELEMENTWISE = "use adam, adamw, rmsprop, lion, sgd or another elementwise transformation"
_NORMS = (
    "it (inside lamb, lars and fromage, say) compares norms, means or signs of single leaves, and the entries of a "
    f"kernel are shared out over two or three arrays of coordinates: {_ELEMENTWISE}, and clip_by_global_norm inside or "
    "lro.clip_by_tangent_norm in front"
)
_COPIES = f"it keeps copies of the parameters or sums of gradients that no change of basis carries: {_ELEMENTWISE}"
_SQUARES = f"no change of basis keeps numbers of its state positive, which they must be: {_ELEMENTWISE}"
_FACTORED = f"its state does not mirror the parameters, like the state of adafactor, sm3 and galore: {_ELEMENTWISE}"
_EVALUATES = (
    "it evaluates the loss at parameters, and inside it sees coordinates: use it around the low-rank optimizer, or an "
    "elementwise transformation inside"
)
# Transformations whose steps mean nothing in coordinates, each with the reason and the transformations to use.
REFUSED = {
    **dict.fromkeys(
        (
            "adaptive_grad_clip",
            "centralize",
            "keep_params_nonnegative",
            "scale_by_param_block_norm",
            "scale_by_param_block_rms",
            "scale_by_trust_ratio",
        ),
        _NORMS,
    ),
    **dict.fromkeys(
        (
            "dadapt_adamw",
            "lookahead",
            "mechanize",
            "momo",
            "momo_adam",
            "prodigy",
            "scale_by_cocob",
            "scale_by_distance_over_gradients",
            "scale_by_madgrad",
            "schedule_free",
        ),
        _COPIES,
    ),
    **dict.fromkeys(("scale_by_rprop", "scale_by_stddev"), _SQUARES),
    **dict.fromkeys(("flatten", "scale_by_factored_rms", "scale_by_galore", "scale_by_sm3"), _FACTORED),
    **dict.fromkeys(
        (
            "differentially_private_aggregate",
            "sam",
            "scale_by_backtracking_linesearch",
            "scale_by_lbfgs",
            "scale_by_sophia",
            "scale_by_zoom_linesearch",
        ),
        _EVALUATES,
    ),
}
# In augmented bases a new direction has no second moment yet, by which this one divides.
REFUSED_BY_COEFFICIENT = {
    "scale_by_acprop": "it divides by the second moment of the step before, which new directions lack with "
    "Coefficient: use geometry=lro.Balanced() or lro.Tangent()"
}


def kernel_labels(tree: Any) -> Any:
    """ "kernel" at the coordinates of every kernel and "ordinary" at other leaves, for `optax.partition` inside.

    Example:
      >>> import lowrank_optax as lro, optax
      >>> parts = {"kernel": optax.adam(1e-3), "ordinary": optax.sgd(1e-2)}
      >>> tx = lro.fixed_rank(optax.partition(parts, lro.kernel_labels))
    """
    return jax.tree.map(lambda x: "kernel" if is_coordinates(x) else "ordinary", tree, is_leaf=is_coordinates)


def treats_leaves_alike(inner: optax.GradientTransformation) -> bool:
    """Whether a transformation may get leaves of equal shape as one stacked leaf."""
    pieces = _pieces(inner)
    labels = pieces.get("partition", {}).get("param_labels", kernel_labels)
    return labels is kernel_labels and set(pieces) <= ALIKE


def check_inner(inner: optax.GradientTransformation, geometry: Geometry, coordinates: Any) -> None:
    """Raises ValueError for a transformation that is known to fail in coordinates, given the tree that it sees."""
    refused = {**REFUSED, **(REFUSED_BY_COEFFICIENT if isinstance(geometry, Coefficient | Frozen) else {})}
    names = [name for name in _pieces(inner, coordinates) if name in refused]
    if names:
        raise ValueError(f"{names[0]} does not work inside fixed_rank: {refused[names[0]]}")


def _pieces(inner: optax.GradientTransformation, coordinates: Any = None) -> dict[str, dict[str, Any]]:
    """The names of the functions that made a transformation and its parts, with the variables of each.

    Given a tree with coordinates, only those parts of a partition count that kernels get.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()

    def visit(x: Any) -> None:
        members = x.values() if isinstance(x, dict) else x
        if isinstance(x, dict | tuple | list):  # transformations, and the lists of their functions in a chain
            for y in members:
                take(y) if inspect.isfunction(y) else visit(y)
        elif inspect.isfunction(x) and x.__name__ in ("init", "update", "init_fn", "update_fn"):
            take(x)  # others are schedules, masks, measures

    def take(f: Any) -> None:
        if id(f) in seen:
            return
        seen.add(id(f))
        name, variables = f.__qualname__.split(".")[0], _variables(f)
        found.setdefault(name, {}).update(variables)
        if name == "partition" and coordinates is not None:
            labels = _labels_of_kernels(variables["param_labels"], coordinates)
            variables = {label: tx for label, tx in variables["transforms"].items() if label in labels}
        for variable in variables.values():
            visit(variable)

    def unwrapped(f: Any) -> Any:
        return unwrapped(f.func) if isinstance(f, functools.partial) else f

    visit((unwrapped(inner.init), unwrapped(inner.update)))
    return found


def _labels_of_kernels(labels: Any, coordinates: Any) -> set[Any]:
    """The labels of a partition at kernels; a label may stand for a subtree."""
    labels = labels(coordinates) if callable(labels) else labels
    found: set[Any] = set()

    def one(label: Any, below: Any) -> None:
        if any(map(is_coordinates, jax.tree.leaves(below, is_leaf=is_coordinates))):
            found.add(label)

    jax.tree.map(one, labels, coordinates)
    return found


def _variables(f: Any) -> dict[str, Any]:
    """The variables in the closure of a function that have a value."""
    if hasattr(f, "__wrapped__"):
        f = f.__wrapped__
    cells = zip(
        getattr(getattr(f, "__code__", None), "co_freevars", ()), getattr(f, "__closure__", None) or (), strict=False
    )
    values = {}
    for name, cell in cells:
        try:
            values[name] = cell.cell_contents
        except ValueError:
            continue
    return values
