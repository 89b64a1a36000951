"""Whether a target fits a checkpoint, known from names, shapes and dtypes before any value is read."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.boxes import opened
from lowrank_optax.checkpoint.fingerprint import Description, dtype_name, is_python, leaf_name
from lowrank_optax.factors import FactoredKernel
from lowrank_optax.geometry.base import is_coordinates, registered_coordinates
from lowrank_optax.paths import path_name


def width_axes(kind: type) -> dict[str, int]:
    """For each field of a kernel or moment, how many of its last axes are the width of the kernel."""
    mirrors = dict(zip("USV", "USV", strict=True)) if _is_kernel(kind) else registered_coordinates()[kind].mirrors
    return {field: 2 if factor == "S" else 1 for field, factor in mirrors.items()}


def _is_kernel(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, FactoredKernel)


def _geometry_name(kind: type) -> str:
    return f"lro.{type(registered_coordinates()[kind].geometry).__name__}()"


class Node(NamedTuple):
    """A kernel, a moment of one, or any other leaf of a tree.

    Attributes:
      name: of the node, see `leaf_name`.
      parts: keys of its path, without the wrappers of nnx.
      kind: the class of a kernel, a class of coordinates for a moment, None for other leaves.
      fields: its leaves by name, in the order of `width_axes`.
    """

    name: str
    parts: tuple[str, ...]
    kind: type | None
    fields: dict[str, Any]

    @property
    def is_kernel(self) -> bool:
        """True for a factored kernel."""
        return _is_kernel(self.kind)

    @property
    def is_mirror(self) -> bool:
        """True for a moment, which goes with a kernel elsewhere in the tree."""
        return self.kind in registered_coordinates()

    @property
    def axes(self) -> list[int]:
        """How many of the last axes of each field are the width, for a kernel or moment."""
        return [] if self.kind is None else [*width_axes(self.kind).values()]

    @property
    def width(self) -> int:
        """The number of columns of a kernel or moment."""
        return int(next(iter(self.fields.values())).shape[-1])


def nodes_of(tree: Any) -> list[Node]:
    """Kernels, moments and other leaves. In a state of nnx the moments are plain containers, known by their keys."""
    found: list[Node] = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_node):
        name, parts, kind = leaf_name(path), tuple(path_name(path).split("/")), type(x) if _is_node(x) else None
        found.append(Node(name, parts, kind, {name: x} if kind is None else _fields(name, x)))
    ends = {node.parts[-1] for node in found if node.is_kernel}
    groups: dict[tuple[str, ...], dict[str, Node]] = {}
    for node in found:
        if node.kind is None and node.parts[-2:-1] and node.parts[-2] in ends:
            groups.setdefault(node.parts[:-1], {})[node.parts[-1]] = node
    joined: dict[str, Node | None] = {}  # name of a leaf -> the moment of which it is the first; None for the others
    for parts, leaves in groups.items():
        kind = next((each for each in registered_coordinates() if set(width_axes(each)) == set(leaves)), None)
        if kind is not None and all(hasattr(x, "ndim") for leaf in leaves.values() for x in leaf.fields.values()):
            ordered = [leaves[field] for field in width_axes(kind)]
            name = ordered[0].name.rsplit(f"/{ordered[0].parts[-1]}", 1)[0]
            joined |= dict.fromkeys(leaf.name for leaf in ordered)
            joined[ordered[0].name] = Node(name, parts, kind, {leaf.name: leaf.fields[leaf.name] for leaf in ordered})
    return [each for node in found if (each := joined.get(node.name, node)) is not None]


def _is_node(x: Any) -> bool:
    is_kind = isinstance(x, FactoredKernel) or is_coordinates(x)
    return is_kind and all(hasattr(opened(getattr(x, field)), "ndim") for field in width_axes(type(x)))


def _fields(name: str, node: Any) -> dict[str, Any]:
    """The leaves of a kernel or moment by name; a leaf in a box of Flax has the name of its value."""
    return {
        "/".join(filter(None, (name, field, leaf_name(path)))): x
        for field in width_axes(type(node))
        for path, x in jax.tree_util.tree_leaves_with_path(getattr(node, field))
    }


def owners(node: Node, kernels: list[Node]) -> list[Node]:
    """The kernels that a node of the state belongs to: the longest end of their paths is a part of its path."""

    def common(kernel: Node) -> int:
        for n in range(len(kernel.parts), 0, -1):
            end = kernel.parts[-n:]
            if any(node.parts[i : i + n] == end for i in range(len(node.parts) - n + 1)):
                return n
        return 0

    lengths = [common(kernel) for kernel in kernels]
    most = max(lengths, default=0)
    return [kernel for kernel, n in zip(kernels, lengths, strict=True) if n == most > 0]


def saved_width(node: Node, saved: Description) -> int | None:
    """The width at which the arrays of a kernel or moment were saved; None if they differ in more than that."""
    widths: set[int] = set()
    for (name, x), axes in zip(node.fields.items(), node.axes, strict=True):
        shape = tuple(saved[name]["shape"])
        if len(shape) != x.ndim or shape[:-axes] != tuple(x.shape[:-axes]):
            return None
        widths.update(shape[-axes:])
    return widths.pop() if len(widths) == 1 else None


def misfits(like: Any, saved: Description, partial: bool) -> list[str]:
    """The differences of a target from a checkpoint, one message for each node; empty if it fits."""
    nodes = nodes_of(like)
    found: list[str] = []
    seen: set[str] = set()
    kernels = [node for node in nodes if node.is_kernel]
    for node in nodes:
        seen.update(node.fields)
        absent = [name for name in node.fields if name not in saved]
        if absent:
            found.append(missing(node, absent[0], saved, seen))
        elif node.kind is not None:
            found += _node_misfits(node, kernels, saved)
        else:
            found += leaf_misfit(node.name, node.fields[node.name], saved)
    if not partial:
        found += [f"the target has no {name}" for name in sorted({*saved} - seen)]
    return found


def leaf_misfit(name: str, x: Any, saved: Description, shape: Any = None) -> list[str]:
    """The message for a leaf that cannot be read as x, at another shape if one is given."""
    entry = saved[name]
    there = f"{entry['dtype']} {tuple(entry['shape'])}"
    if is_python(x):
        fits = not entry["shape"] and _kind(entry["dtype"]) == _kind(type(x).__name__)
        return [] if fits else [f"{name} is {there} in it, not a Python {type(x).__name__}"]
    if not hasattr(x, "shape"):
        return [f"{name} is {there} in it, not a {type(x).__name__}"]
    if entry.get("python"):
        fits = not x.shape and _kind(entry["dtype"]) == _kind(dtype_name(x.dtype))
        return [] if fits else [f"{name} is a Python number, {entry['dtype']}, in it, not {_shown(x)}"]
    if "fingerprint" not in entry and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return []  # orbax alone describes the numbers that a key is made of
    expected = tuple(x.shape) if shape is None else shape
    fits = tuple(entry["shape"]) == expected and entry["dtype"] == dtype_name(x.dtype)
    return [] if fits else [f"{name} is {there} in it, not {_shown(x)}"]


def _node_misfits(node: Node, kernels: list[Node], saved: Description) -> list[str]:
    width = saved_width(node, saved)
    if width is None:
        return [message for name, x in node.fields.items() for message in leaf_misfit(name, x, saved)]
    found = [
        message
        for name, x in node.fields.items()
        for message in leaf_misfit(name, x, saved, shape=tuple(saved[name]["shape"]))
    ]
    if node.is_mirror and width != node.width:
        mine = owners(node, kernels)
        known = [k for k in mine if all(name in saved for name in k.fields)]
        if mine and not any((k.width, saved_width(k, saved)) == (node.width, width) for k in known):
            found.append(
                f"{node.name} has width {width} in it, not {node.width}, and its kernel {mine[0].name} has not"
            )
    return found


def missing(node: Node, name: str, saved: Description, seen: set[str]) -> str:
    """The message for a node that is not there; another geometry is named."""
    start = f"{node.name}/"
    if node.kind is not None and node.is_mirror:
        there = [other for other in saved if other.startswith(start)]
        for kind in registered_coordinates():
            if {other.removeprefix(start).removesuffix("/value") for other in there} == set(width_axes(kind)):
                seen.update(there)
                theirs, ours = (", ".join(width_axes(each)) for each in (kind, node.kind))
                return (
                    f"there is no {name} in it: it holds moments of {_geometry_name(kind)} at {node.name} ({theirs}), "
                    f"not of {_geometry_name(node.kind)} ({ours})"
                )
    return f"there is no {name} in it"


def _shown(x: Any) -> str:
    return f"{dtype_name(x.dtype)} {tuple(x.shape)}"


def _kind(name: str) -> str:
    """bool, int, float or something else, of a dtype or of a type of Python."""
    if name in ("bool", "int", "float") or name.startswith("key<") or name == "str":
        return name
    dtype = np.dtype(name)
    return "int" if jnp.issubdtype(dtype, jnp.integer) else "float" if jnp.issubdtype(dtype, jnp.floating) else name


# --- what orbax is asked for ------------------------------------------------------------


def request(x: Any, entry: dict[str, Any]) -> Any:
    """The leaf of a target of orbax that reads a leaf for x, at the shape at which it was saved."""
    shape = tuple(entry["shape"])
    if entry.get("python"):
        return {"bool": False, "int": 0, "float": 0.0}[_kind(entry["dtype"])]
    if is_python(x):
        return type(x)(0)
    if isinstance(x, np.ndarray | np.generic) or not is_native(x.dtype):
        return np.broadcast_to(np.zeros((), x.dtype), shape)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        shape = tuple(x.shape)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=getattr(x, "sharding", None))


def delivered(value: Any, x: Any) -> Any:
    """A value that orbax read, in the form of x: an array or a number of NumPy, of JAX or of Python."""
    if is_python(x):
        return type(x)(value)
    if isinstance(x, np.generic):
        return np.asarray(value, x.dtype)[()]
    if isinstance(x, np.ndarray):
        return np.asarray(value, x.dtype)
    if is_python(value):
        return jax.device_put(np.asarray(value, x.dtype), getattr(x, "sharding", None))
    return value


def is_native(dtype: Any) -> bool:
    """Whether JAX has arrays of a dtype now: without x64 none of 64 bits."""
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return is_key or jax.dtypes.canonicalize_dtype(dtype) == dtype
