r"""Boxes: what Flax linen wraps around a parameter to name its axes, and the names of the factors of a kernel.

`nn.with_partitioning` and `nn.with_logical_partitioning` put a parameter in a box, and `nn.get_partition_spec` reads
the names off it. A kernel :math:`W = U S V^\top` in a tree of boxes has a box around each factor: the axes of U keep
the names of the inputs, the axes of V the names of the outputs, and the rank axis has no name.

A box is known by the method `replace_boxed` of `flax.core.meta.AxisMetadata`; nothing here imports Flax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax.axes import factor_entries
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import is_wrapper
from lowrank_optax.product import axes_of


def is_box(x: Any) -> bool:
    """Whether x is a box of Flax around a value."""
    return hasattr(type(x), "replace_boxed")


def opened(x: Any) -> Any:
    """The value in a box; a value without one stays as it is.

    A box has `unbox` too, but that constrains the value to the mesh axes of the names, and values here may be shapes.
    """
    return opened(_content(x)) if is_box(x) else x


def closed(box: Any, value: Any) -> Any:
    """The value in the box, without one if there is none."""
    return box.replace_boxed(closed(_content(box), value)) if is_box(box) else value


def _content(box: Any) -> Any:
    return box.value if hasattr(box, "value") else box.unbox()


def named(box: Any, names: tuple[Any, ...], value: Any) -> Any:
    """The value in a box like this one, with the same mesh and rules and other names."""
    if not (dataclasses.is_dataclass(box) and hasattr(box, "names")):
        raise TypeError(
            f"a {type(box).__name__} around a kernel has no names of axes that factors could inherit: a box must be a "
            "dataclass with the field `names`, as nn.Partitioned is; or take flax.linen.unbox(params)"
        )
    box_of_names: Any = dataclasses.replace(box, names=names)  # type: ignore[type-var]
    return box_of_names.replace_boxed(value)


def names_of(x: Any) -> tuple[Any, ...]:
    """The names of a box; none for a value without one or a box of another kind."""
    return tuple(getattr(x, "names", None) or ()) if is_box(x) else ()


def unboxed(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The tree with values in the place of boxes, and a function that puts new values into these boxes."""
    return _without(is_box, tree, opened, closed)


def unwrapped(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The tree with values in the place of boxes and nnx variables, and a function that wraps new values likewise."""
    values, rebox = unboxed(tree)
    values, wrap = _without(is_wrapper, values, lambda x: x.get_raw_value(), lambda x, new: x.copy(new))
    return values, lambda new: rebox(wrap(new))


def _without(is_around: Callable[[Any], bool], tree: Any, take: Any, put: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The tree with `take(x)` in the place of everything that is around a value, and its inverse by `put(x, value)`."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_around)
    if not any(map(is_around, leaves)):
        return tree, lambda new: new

    def back(new: Any) -> Any:
        parts = zip(leaves, treedef.flatten_up_to(new), strict=True)
        return treedef.unflatten([put(x, y) if is_around(x) else y for x, y in parts])

    return treedef.unflatten([take(x) if is_around(x) else x for x in leaves]), back


# --- kernels ----------------------------------------------------------------------------


def boxed_factors(box: Any, W: Any) -> Any:
    """The kernel with a box around each factor, given the box of the dense kernel."""
    if not is_box(box):
        return W
    entries = factor_entries(names_of(box), W.ndim, axes_of(W))
    factors = zip(entries, (W.U, W.S, W.V), strict=True)
    return type(W)(*(named(box, (*names, *(None,) * (len(x.shape) - len(names))), x) for names, x in factors))


def boxed_dense(like: Any, dense: jax.Array) -> Any:
    """A dense kernel in the box whose names the boxed factors `like` have; the inverse of `boxed_factors`."""
    if not is_lowrank(like) or not is_box(like.U):
        return closed(like, dense)
    W = unboxed(like)[0]
    batch, inputs, outputs = (len(axes) for axes in (W.batch_shape, W.in_shape, W.out_shape))
    u, v = names_of(like.U)[: batch + inputs], names_of(like.V)[batch : batch + outputs]
    return named(like.U, (*u, *v), dense)


def refuse_unfactored_boxes(params: Any) -> None:
    """Raises TypeError for a box around a whole `LowRank`, whose names belong to the dense kernel."""
    for box in filter(is_box, jax.tree.leaves(params, is_leaf=is_box)):
        if is_lowrank(opened(box)):
            raise TypeError(
                f"a {type(box).__name__} with names {names_of(box)} is around a whole LowRank kernel, so its factors "
                "have no names of their own: call lowrank_optax.factorize(params, rank), which gives them names, or "
                "initialise with lowrank_init(rank, nn.with_partitioning(init, names)) in this order"
            )
