"""From one training state to another: what fits is kept, and a report says what is not."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from lowrank_optax.checkpoint import fit
from lowrank_optax.checkpoint.fingerprint import Description, dtype_name, is_python, named_leaves
from lowrank_optax.checkpoint.fit import Node, nodes_of, owners
from lowrank_optax.moments import DEGREES

_FIELDS = {field for field in DEGREES if "." not in field} | {"aux", "info"}  # of states, with copies of the parameters
_WRAPPERS = ("opt_state", "inner_state", "inner_states", "inner_opt_state")  # fields of states that hold other states


class Adapted(NamedTuple):
    """The result of `adapt`; `print` shows the report.

    Attributes:
      tree: of the structure of the target.
      kept: names of leaves, kernels and moments whose values were saved.
      new: names of the leaves, kernels and moments that have the values of the target, each with the reason.
      dropped: names of leaves that were saved and are not used.
    """

    tree: Any
    kept: tuple[str, ...]
    new: dict[str, str]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"kept: {', '.join(self.kept) or 'nothing'}"]
        lines += [f"new: {name} ({reason})" for name, reason in self.new.items()]
        return "\n".join([*lines, f"dropped: {', '.join(self.dropped) or 'nothing'}"])


def adapt(saved: Any, like: Any) -> Adapted:
    r"""Brings a saved state to another structure, e.g. of another optimizer, and keeps the leaves that fit.

    Leaves are matched by their names. One transformation more in a chain changes all names in an optimizer state, so a
    moment is also found by its name without the positions, `mu/dense/kernel`, if there is only one; the rest of its
    state, such as `count`, goes with it.

    A leaf is kept if it has the shape and the dtype of the target. A kernel may have been saved at another width; it is
    kept at that width, and its moments with it. Moments of one geometry are never read as moments of another, and
    nothing that belongs to a kernel is kept without it. `count` is kept if any of the moments beside it are: with Adam,
    a moment that is new at a large count makes the first steps of its parameter up to
    :math:`(1 - b_1) / \sqrt{1 - b_2}` times as long, 3.2 by default.

    Args:
      saved: the tree of `restore`, made with a target or without one.
      like: the state that is wanted, with values: what is new is taken from it. Values are placed as its are.

    Returns:
      The new tree, and the names of what was kept, made new, dropped.

    Raises:
      ValueError: if a kernel was saved at another width than in `like` and moments of it are new, which would then have
        the wrong width: make `like` from parameters of the saved width; if `like` has shapes without values there.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6), "bias": jnp.ones(6)}, rank=2)
      >>> old = {"params": params, "opt_state": lro.lowrank_adam(1e-3).init(params)}
      >>> new = {"params": params, "opt_state": lro.lowrank_adam(1e-3, geometry=lro.Tangent()).init(params)}
      >>> report = lro.checkpoint.adapt(old, new)
      >>> for name, reason in report.new.items():
      ...     print(name, reason)  # doctest: +ELLIPSIS
      opt_state/.../mu/kernel there is no ...
      opt_state/.../nu/kernel there is no ...
      ...
    """
    values = named_leaves(saved)
    there: Description = {name: _entry(x) for name, x in values.items()}
    nodes = nodes_of(like)
    kernels = [node for node in nodes if node.is_kernel]
    places = _places(nodes, there)  # where each node was saved
    reasons: dict[str, str] = {}
    for node in [*kernels, *(node for node in nodes if not node.is_kernel)]:
        reason = _reason(node, places, there, kernels, reasons)
        if reason:
            reasons[node.name] = reason
    reasons |= _lonely_counts(nodes, reasons)
    _check_widths(nodes, kernels, places, there, reasons)

    leaves: dict[str, Any] = {}
    for node in nodes:
        for name, x in node.fields.items():
            if node.name not in reasons:
                leaves[name] = _placed(values[places[node.name] + name[len(node.name) :]], x)
            elif isinstance(x, jax.ShapeDtypeStruct):
                raise ValueError(f"{name} is new ({reasons[node.name]}), and `like` has only its shape: give values")
            else:
                leaves[name] = x
    used = {places[n.name] + name[len(n.name) :] for n in nodes if n.name not in reasons for name in n.fields}
    tree = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named_leaves(like)])
    return Adapted(
        tree,
        tuple(node.name for node in nodes if node.name not in reasons),
        {node.name: reasons[node.name] for node in nodes if node.name in reasons},
        tuple(sorted(values.keys() - used)),
    )


def _entry(x: Any) -> dict[str, Any]:
    if is_python(x):
        return {"shape": [], "dtype": dtype_name(np.asarray(x).dtype), "python": True, "fingerprint": 0}
    return {"shape": list(x.shape), "dtype": dtype_name(x.dtype), "fingerprint": 0}


def _places(nodes: list[Node], there: Description) -> dict[str, str]:
    """The name under which each node was saved: its own, or one that differs in positions in the optimizer state."""

    def is_there(name: str, node: Node) -> bool:
        return all(name + field[len(node.name) :] in there for field in node.fields)

    places = {node.name: node.name for node in nodes}
    lost = [node for node in nodes if not is_there(node.name, node)]
    taken = {field for node in nodes if is_there(node.name, node) for field in node.fields}
    free = [name for name in there if name not in taken]
    moved: set[tuple[str, str]] = set()
    for node in lost:
        fields = [field[len(node.name) :] for field in node.fields]
        called = _called(node.name)
        if called is None:
            continue
        ends = [name[: len(name) - len(fields[0])] for name in free if name.endswith(fields[0])]
        found = [name for name in ends if _called(name) == called and is_there(name, node)]
        rivals = [other for other in lost if _called(other.name) == called]
        if len(found) == 1 and len(rivals) == 1:
            places[node.name] = found[0]
            moved.add(_beginnings(node.name, found[0]))
    for node in lost:
        for new, old in sorted(moved, key=lambda pair: -len(pair[0])):
            if places[node.name] == node.name and new and node.name.startswith(new):
                name = old + node.name[len(new) :]
                if is_there(name, node):
                    places[node.name] = name
    return places


def _called(name: str) -> tuple[str, ...] | None:
    """The name of a moment without the positions and wrappers in front of its field; None for other leaves.

    Behind the field come the keys of the parameters, where a position tells a layer.
    """
    parts = name.split("/")
    start = next((i for i, part in enumerate(parts) if part in _FIELDS), None)
    if start is None:
        return None
    return (*(part for part in parts[:start] if not part.isdigit() and part not in _WRAPPERS), *parts[start:])


def _beginnings(new: str, old: str) -> tuple[str, str]:
    """The beginnings of two names, without their common end."""
    a, b = new.split("/"), old.split("/")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return "".join(part + "/" for part in a), "".join(part + "/" for part in b)


def _belongs(node: Node) -> bool:
    """Whether a node goes with a kernel: a moment of it, or a rank or report beside the moments."""
    pairs = zip(node.parts, node.parts[1:], strict=False)
    return node.is_mirror or any(a in ("inner_state", "loop") and b in ("aux", "info") for a, b in pairs)


def _entries(node: Node, places: dict[str, str], there: Description) -> Description:
    """The saved entries of a node, by the names of the target."""
    names = {name: places[node.name] + name[len(node.name) :] for name in node.fields}
    return {name: there[place] for name, place in names.items() if place in there}


def _reason(
    node: Node, places: dict[str, str], there: Description, kernels: list[Node], reasons: dict[str, str]
) -> str | None:
    """Why a node is not kept; None if it is. Kernels come first."""
    seen = _entries(node, places, there)
    absent = [name for name in node.fields if name not in seen]
    if absent:
        return fit.missing(node, absent[0], there, set())
    mine = owners(node, kernels) if _belongs(node) else []
    if mine and all(kernel.name in reasons for kernel in mine):
        return f"{mine[0].name} is new"
    if node.kind is None:
        return "; ".join(fit.leaf_misfit(node.name, node.fields[node.name], seen)) or None
    width = fit.saved_width(node, seen)
    shapes = {name: None if width is None else tuple(entry["shape"]) for name, entry in seen.items()}
    found = [m for name, x in node.fields.items() for m in fit.leaf_misfit(name, x, seen, shape=shapes[name])]
    if not found and node.is_mirror and width != node.width:
        kept = [kernel for kernel in mine if kernel.name not in reasons]
        if not any(fit.saved_width(kernel, _entries(kernel, places, there)) == width for kernel in kept):
            found = [f"{node.name} has width {width} in it, not the width of its kernel"]
    return "; ".join(found) or None


def _lonely_counts(nodes: list[Node], reasons: dict[str, str]) -> dict[str, str]:
    """Counters of states whose moments are all new start anew too."""
    found = {}
    for node in nodes:
        start, depth = node.parts[:-1], len(node.parts) - 1
        if node.parts[-1] == "count" and node.name not in reasons:
            beside = [n for n in nodes if n.parts[:depth] == start and n.parts[depth : depth + 1] != ("count",)]
            if beside and all(n.name in reasons for n in beside):
                found[node.name] = "the moments beside it are new"
    return found


def _check_widths(
    nodes: list[Node], kernels: list[Node], places: dict[str, str], there: Description, reasons: dict[str, str]
) -> None:
    """Raises ValueError where a kernel comes at another width than moments of it that are new."""
    for kernel in kernels:
        if kernel.name in reasons:
            continue
        width = fit.saved_width(kernel, _entries(kernel, places, there))
        for node in nodes:
            if node.is_mirror and width != kernel.width and kernel in owners(node, kernels) and node.name in reasons:
                raise ValueError(
                    f"{kernel.name} was saved at width {width}, `like` has {kernel.width}, and {node.name} is new "
                    f"({reasons[node.name]}): make `like` from the parameters that were saved, tx.init(saved_params)"
                )


def _placed(value: Any, x: Any) -> Any:
    """A value that was saved, in the form of x and where x lies."""
    value = fit.delivered(value, x)
    return value if is_python(x) or isinstance(x, np.generic | np.ndarray) else jax.device_put(value, _sharding(x))


def _sharding(x: Any) -> Any:
    return getattr(x, "sharding", None)
