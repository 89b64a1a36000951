"""Trees of parameters as groups of equal leaves, and methods of a geometry mapped over each group.

A network has many kernels of few shapes. One call for each shape, and not for each kernel, keeps the compiled step
small. A `Layout` knows the geometry and the group of every leaf. Leaves of a group have equal shapes, dtypes, geometry
and, on an explicit mesh, shardings. The value of a group is one stacked tree with a new first axis; a leaf that is
alone keeps its own axes. During a step a list with the value of every group takes the place of a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.geometry import Euclidean, Geometry, is_coordinates
from lowrank_optax.layout import fusion
from lowrank_optax.layout.kernels import mapped
from lowrank_optax.layout.mesh import Mesh, spec

_EUCLIDEAN = Euclidean()


@dataclasses.dataclass(frozen=True)
class Group:
    """Leaves that are computed together.

    Attributes:
      geometry: their geometry.
      members: their positions among the leaves.
      batch: the number of batch axes of each.
      template: shapes of the moments of one weight, without those axes; None for ordinary leaves.
    """

    geometry: Geometry
    members: tuple[int, ...]
    batch: int = 0
    template: Any = None

    @property
    def stacked(self) -> bool:
        """Whether the value has an axis of the group."""
        return len(self.members) > 1

    @property
    def ordinary(self) -> bool:
        """Whether its leaves belong to no geometry but the Euclidean one."""
        return self.geometry is _EUCLIDEAN

    def call(self, method: str, *args: Any, **static: Any) -> Any:
        """A method of the geometry on values of the group."""
        f = getattr(self.geometry, method)
        return (
            f(*args, **static) if self.ordinary else mapped(f, self.batch + self.stacked, tuple(static.items()), args)
        )

    def holds_moments(self, value: Any) -> bool:
        """Whether a value has the form of moments: no mask leaves out the kernels, and no number stands for each."""
        if self.ordinary or not same_structure(value, self.template):
            return False
        axes = self.batch + self.stacked
        pairs = zip(jax.tree.leaves(value), jax.tree.leaves(self.template), strict=True)
        return all(jnp.ndim(x) == axes + t.ndim for x, t in pairs)


class Layout:
    """The leaves of a parameter tree in groups.

    Args:
      params: the parameters, arrays or their shapes.
      geometry: of the leaves that it owns; all others are ordinary.
      vectors: whether ordinary vectors (biases, scales) of equal length are a group too.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> a, b = lro.factorize([jnp.eye(4), 2 * jnp.eye(4)], 2, where=lambda path, shape: True)
      >>> params = {"a": a, "b": b, "bias": jnp.zeros(4)}
      >>> layout = Layout(params, lro.Balanced())
      >>> kernels, bias = layout.weights(params)
      >>> kernels.shape
      (2, 4, 4)
    """

    def __init__(self, params: Any, geometry: Geometry, vectors: bool = False):
        self._treedef: Any
        paths: Any
        paths, self._treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=geometry.owns)
        self._paths, self._leaves = [tuple(path) for path, _ in paths], [leaf for _, leaf in paths]
        self.mesh = Mesh(params)
        found: dict[Any, list[int]] = {}
        for i, leaf in enumerate(self._leaves):
            if geometry.owns(leaf):
                found.setdefault(_key(geometry, leaf), []).append(i)
            else:
                together = vectors and jnp.ndim(leaf) == 1
                found.setdefault((jnp.shape(leaf), jnp.result_type(leaf)) if together else i, []).append(i)
        self.groups = [self._group(geometry, tuple(members)) for members in found.values()]
        self.has_kernels = not all(group.ordinary for group in self.groups)
        self._coordinates = tuple({type(g.template) for g in self.groups} - {type(None), jax.ShapeDtypeStruct})

    def _group(self, geometry: Geometry, members: tuple[int, ...]) -> Group:
        leaf = self._leaves[members[0]]
        if not geometry.owns(leaf):
            return Group(_EUCLIDEAN, members)
        geometry = geometry.of(leaf)
        batch = geometry.batch_axes(leaf)

        def template(leaf: Any) -> Any:
            weight = geometry.weight(leaf, leaf)
            for _ in range(batch):
                weight = jax.tree.map(lambda x: x[0], weight)
            return geometry.template(weight)

        return Group(geometry, members, batch, jax.eval_shape(template, _shapes(leaf)))

    # --- between trees and groups ---

    def gather(self, tree: Any) -> list[Any]:
        """The values of a tree of the structure of the parameters, group by group."""
        leaves = self._treedef.flatten_up_to(tree)
        return [_stacked([leaves[i] for i in group.members]) for group in self.groups]

    def scatter(self, values: Iterable[Any]) -> Any:
        """The inverse of `gather`."""
        return self._treedef.unflatten(self._parts(values))

    def gather_kernels(self, tree: Any) -> list[Any]:
        """The values of a tree from `scatter_kernels`; nothing for ordinary leaves."""
        return self.gather(tree) if self.has_kernels else [()] * len(self.groups)

    def scatter_kernels(self, values: Iterable[Any]) -> Any:
        """A tree with one value for every kernel and nothing at ordinary leaves; a number where there is no kernel.

        `optax.tree.map_params` makes a state of no leaves, and takes that number for a prefix of the tree.
        """
        return self.scatter(values) if self.has_kernels else jnp.zeros((), jnp.int32)

    def weights(self, tree: Any) -> list[Any]:
        """The weights of a tree of parameters, or their gradients from a tree of gradients."""
        leaves = self._treedef.flatten_up_to(tree)
        return [
            _stacked([group.geometry.weight(leaves[i], self._leaves[i]) for i in group.members])
            for group in self.groups
        ]

    def differences(self, new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
        """The updates from old to new weights, in the dtypes of the parameters."""
        rows = zip(self.groups, new, old, strict=True)
        return [g.geometry.difference(x, y, self._leaves[g.members[0]]) for g, x, y in rows]

    def updates(self, differences: Iterable[Any]) -> Any:
        """Differences as a tree of the structure of the parameters."""
        return self._treedef.unflatten(self._with_axes(differences))

    def params(self, weights: Iterable[Any]) -> Any:
        """The inverse of `weights`."""
        pairs = zip(self._with_axes(weights), self._leaves, strict=True)
        return self._treedef.unflatten([jax.tree.map(lambda x, y: x.astype(y.dtype), *pair) for pair in pairs])

    def _with_axes(self, values: Iterable[Any]) -> list[Any]:
        geometries = {i: group.geometry for group in self.groups for i in group.members}
        parts = enumerate(zip(self._parts(values), self._leaves, strict=True))
        return [geometries[i].leaf(part, leaf) for i, (part, leaf) in parts]

    def _parts(self, values: Iterable[Any]) -> list[Any]:
        """The part of every leaf in the values of the groups."""
        values = list(values)
        stacks = [(value, len(g.members)) for g, value in zip(self.groups, values, strict=True) if g.stacked]
        each = iter(fusion.unstack(stacks) if stacks else [])
        parts = {
            i: part
            for group, value in zip(self.groups, values, strict=True)
            for i, part in zip(group.members, next(each) if group.stacked else [value], strict=True)
        }
        return [parts[i] for i in range(len(self._leaves))]

    # --- copies of the parameters in optimizer states ---

    def gather_copy(self, copy: Any) -> list[Any]:
        """The moments in a copy. Where a mask leaves out some kernels of a group, they are zero here."""
        nodes, _ = self._nodes(copy)
        return [_stacked(self._filled([nodes.get(self._paths[i]) for i in group.members])) for group in self.groups]

    def scatter_copy(self, values: Sequence[Any], like: Any) -> Any:
        """The inverse of `gather_copy`, given the copy."""
        nodes, treedef = self._nodes(like)
        parts = dict(zip(self._paths, self._parts(values), strict=True))
        return treedef.unflatten([x if _is_masked(x) else parts[path] for path, x in nodes.items()])

    def check_copy(self, copy: Any) -> bool:
        """Whether a copy holds a moment. ValueError if it holds anything else in the place of one."""
        nodes, _ = self._nodes(copy)
        masked = {path for path, node in nodes.items() if isinstance(node, optax.MaskedNode)}
        found = False
        for group in self.groups:
            for path in map(self._paths.__getitem__, () if group.ordinary else group.members):
                node = nodes.get(path)
                if node is None and not any(path[:i] in masked for i in range(len(path))):
                    raise ValueError(f"it holds nothing for the kernel at {jax.tree_util.keystr(path)}")
                shapes = [jnp.shape(x) for x in jax.tree.leaves(node)]
                if not any(shapes):
                    continue
                found = True
                expected = [x.shape for x in jax.tree.leaves(group.template)]
                if not same_structure(node, group.template) or [shape[group.batch :] for shape in shapes] != expected:
                    raise ValueError(
                        f"it holds {type(node).__name__} arrays of shapes {shapes} for a kernel whose coordinates are "
                        f"{type(group.template).__name__} arrays of shapes {expected}"
                    )
        return found

    def _nodes(self, copy: Any) -> tuple[dict[Any, Any], Any]:
        """The nodes of a copy by their paths; the node of a kernel is whole."""

        def is_node(x: Any) -> bool:
            return isinstance(x, (optax.MaskedNode, *self._coordinates)) or is_coordinates(x)

        nodes: Any
        nodes, treedef = jax.tree_util.tree_flatten_with_path(copy, is_leaf=is_node)
        return {tuple(path): node for path, node in nodes}, treedef

    @staticmethod
    def _filled(nodes: list[Any]) -> list[Any]:
        present = [x for x in nodes if not _is_masked(x)]
        if not present:
            return [optax.MaskedNode()] * len(nodes)
        return [jax.tree.map(jnp.zeros_like, present[0]) if _is_masked(x) else x for x in nodes]

    # --- methods ---

    def map(self, method: str, *values: Sequence[Any], **static: Any) -> list[Any]:
        """A method of each group's geometry on its values."""
        rows = zip(self.groups, *values, strict=True)
        return [group.call(method, *args, **static) for group, *args in rows]

    def map_moments(self, method: str, values: Sequence[Any], moments: Sequence[Any], degree: int | None) -> list[Any]:
        """`method(value, moment, degree)` for the moments among the values of a copy, in the dtype of the weights."""
        return [
            _in_dtype_of(group, method, value, moment, degree) if group.holds_moments(moment) else moment
            for group, value, moment in zip(self.groups, values, moments, strict=True)
        ]


def _in_dtype_of(group: Group, method: str, value: Any, moment: Any, degree: int | None) -> Any:
    """`method` in the dtype of the weights, and its result in the dtype of the moment."""
    working = jax.tree.map(lambda x, t: x.astype(jnp.promote_types(x.dtype, t.dtype)), moment, group.template)
    result = group.call(method, value, working, degree=degree)
    return jax.tree.map(lambda x, old: x.astype(old.dtype), result, moment)


def same_structure(a: Any, b: Any) -> bool:
    """Whether two trees have the same nodes."""
    of_a: Any = jax.tree.structure(a)
    return bool(of_a == jax.tree.structure(b))


def _key(geometry: Geometry, leaf: Any) -> Any:
    """The properties that the weights of a group share."""
    weight = jax.eval_shape(lambda x: geometry.weight(x, x), _shapes(leaf))
    dtypes = (jnp.result_type(x) for x in jax.tree.leaves(leaf))
    shapes = (x.shape for x in jax.tree.leaves(weight))
    return geometry.of(leaf), jax.tree.structure(weight), *shapes, *dtypes, *map(spec, jax.tree.leaves(leaf))


def _shapes(leaf: Any) -> Any:
    """Without the shardings of explicit meshes, on which axes cannot be flattened outside of `Mesh.auto`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), leaf)


def _stacked(trees: list[Any]) -> Any:
    return trees[0] if len(trees) == 1 or not jax.tree.leaves(trees) else fusion.fusion_barrier(fusion.stack(trees))


def _is_masked(node: Any) -> bool:
    """Whether a mask leaves out a kernel. Inside a subtree that is masked as a whole its node is missing."""
    return node is None or not jax.tree.leaves(node)
