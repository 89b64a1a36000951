r"""Partition specs of factored parameters and of their optimizer state, from the specs of dense kernels.

A kernel :math:`W = U S V^\top` has the axes of the dense W in two arrays. Rows of U are sharded like the input axes of
W, rows of V like its output axes. S and the rank axis are replicated, because every row needs all of S. Axes in front,
which index stacked layers, stay in front of all three factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lowrank_optax.axes import Axes, factor_entries
from lowrank_optax.boxes import closed, is_box, named, names_of, refuse_unfactored_boxes, unboxed
from lowrank_optax.geometry.base import registered_coordinates
from lowrank_optax.lowrank import LowRank, is_lowrank
from lowrank_optax.paths import path_name

Rule = Callable[[str, tuple[int, ...]], PartitionSpec | None]


def partition_specs(params: Any, dense: Rule | Any) -> Any:
    r"""Specs of parameters with `LowRank` nodes, from specs of the dense model.

    .. math:: W: (b, i, o) \quad\mapsto\quad U: (b, i, \cdot), \quad S: (b, \cdot, \cdot), \quad V: (b, o, \cdot)

    with b, i, o the mesh axes of the batch, input and output axes of W, and a dot for a replicated axis. The two
    factors are two arrays, so a mesh axis may shard both: `P("fsdp", "fsdp")`, which no dense kernel can have, splits
    all of a kernel's rows over the axis `fsdp`.

    Args:
      params: a tree with `LowRank` nodes of arrays or shapes (`jax.eval_shape`).
      dense: the specs of the dense model: a callable of path (`"block/dense/kernel"`) and dense shape, or a tree with
        one spec in the place of each parameter and of each kernel, such as `flax.linen.get_partition_spec` returns.
        None means replicated; a spec may be shorter than the shape.

    Returns:
      The tree of `params` with a `PartitionSpec` in the place of each array. Shardings are
      `jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)`.

    Raises:
      ValueError: for a spec with more axes than its parameter, or a tree of another structure.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"up": {"kernel": lro.factorize(jnp.ones((8, 6)), 2), "bias": jnp.zeros(6)}}
      >>> specs = lro.partition_specs(params, lambda path, shape: P("fsdp", "tensor") if len(shape) == 2 else P())
      >>> specs["up"]["kernel"]
      LowRank(U=P('fsdp',), S=P(), V=P('tensor',))
    """
    paths, nodes, treedef = _flatten(unboxed(params)[0])
    names = [path_name(path) for path in paths]
    if callable(dense):
        given = [dense(name, tuple(jnp.shape(x))) for name, x in zip(names, nodes, strict=True)]
    else:
        try:
            given = treedef.flatten_up_to(dense)
        except ValueError as error:
            raise ValueError(
                "the tree of specs needs the structure of the parameters, with one PartitionSpec for each kernel, "
                f"or pass a callable of path and shape. Cause: {error}"
            ) from error
    specs = [_spec(name, x, spec) for name, x, spec in zip(names, nodes, given, strict=True)]
    return treedef.unflatten(specs)


def state_specs(state: Any, params: Any, specs: Any) -> Any:
    """Specs of an optimizer state, or of a whole train state, from the specs of the parameters.

    Moments and accumulated gradients are sharded like the parameter that they mirror: pairs like U and V, tangent
    vectors like U, S and V, coefficients, which are r x r, like S. Counters and diagnostics are replicated. A leaf
    mirrors a parameter if its path ends in the path of the parameter and the shapes fit. In a state of `subspace` the
    rows of a basis and the columns of coordinates are sharded like the axes of the kernel that they stand for.

    Args:
      state: a state of any Optax transformation, a Flax `TrainState`, or `nnx.state(optimizer)`, with arrays or shapes
        (`jax.eval_shape`).
      params: the parameters, or their shapes.
      specs: their specs, see `partition_specs`.

    Returns:
      The tree of `state` with a `PartitionSpec` in the place of each array. `jax.jit(tx.init, out_shardings=...)` takes
      the shardings made of these specs.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"kernel": lro.factorize(jnp.ones((8, 6)), 2)}
      >>> specs = lro.partition_specs(params, {"kernel": P("fsdp", "tensor")})
      >>> state = jax.eval_shape(lro.lowrank_adam(1e-3).init, params)
      >>> optax.tree.get(lro.state_specs(state, params, specs), "mu")["kernel"].B
      P('tensor',)
    """
    paths, nodes, treedef = _flatten(unboxed(params)[0])
    rows = zip(paths, nodes, treedef.flatten_up_to(specs), strict=True)
    owners = {_key(path): (p, spec, None) for path, p, spec in rows}
    return _map_mirrors(lambda x, spec, _: spec, unboxed(state)[0], owners)


def boxed_state(state: Any, params: Any) -> Any:
    """An optimizer state whose leaves have the boxes of the parameters that they mirror.

    The box of a moment of a factored kernel names its axes; where none has a name there is no box.

    Args:
      state: a state without boxes.
      params: parameters in boxes; others leave the state as it is.
    """
    if not any(map(is_box, jax.tree.leaves(params, is_leaf=is_box))):
        return state
    refuse_unfactored_boxes(params)

    def one(x: Any, spec: PartitionSpec, box: Any) -> Any:
        if not is_lowrank(box):
            return closed(box, x)
        names = tuple(_one_name(entry) if hasattr(box.U, "rules") else entry for entry in spec)
        return named(box.U, (*names, *(None,) * (jnp.ndim(x) - len(names))), x) if names else x

    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda x: is_lowrank(x) or is_box(x))
    owners = {_key(path): (unboxed(x)[0], _names_as_specs(x), x) for path, x in leaves if jax.tree.leaves(x)}
    return _map_mirrors(one, state, owners)


def _names_as_specs(x: Any) -> Any:
    return jax.tree.map(lambda y: _short(names_of(y)), x, is_leaf=is_box)


def _one_name(entry: Any) -> Any:
    """The first of several logical names that one axis of a moment joins; rules map one name."""
    return entry[0] if isinstance(entry, tuple) else entry


def _map_mirrors(f: Callable[..., Any], state: Any, owners: dict[tuple[str, ...], Any]) -> Any:
    """The state with `f(x, spec, box)` in the place of each array x.

    `owners` has by path every parameter or kernel, its specs and its box or boxed factors. `spec` is the spec of x, and
    `box` the box of the parameter which x mirrors, None if it mirrors none.
    """

    mirrors = _mirrors()

    def owner(key: tuple[str, ...]) -> Any:
        """The parameter whose path is the longest end of `key`."""
        return next((owners[key[i:]] for i in range(len(key) + 1) if key[i:] in owners), (None, None, None))

    def one(path: Any, x: Any) -> Any:
        key = _key(path)
        p, spec, box = owner(key)
        if p is not None and not is_lowrank(p) and jnp.shape(x) == jnp.shape(p):
            return f(x, spec, box)
        if p is not None and not is_lowrank(p) and jnp.ndim(x) >= 2:
            return f(x, _of_projection(jnp.shape(x), jnp.shape(p), spec), None)
        W, factors, boxes = owner(key[:-1])
        if not is_lowrank(W):  # a rank, whose path is the path of its kernel
            return f(x, _of_batch(x, p, spec), box) if is_lowrank(p) else f(x, PartitionSpec(), None)
        factor = mirrors.get(key[-1]) if key else None
        if factor is None:  # a field of the diagnostics of a kernel
            return f(x, _of_batch(x, W, factors), boxes)
        mirrored = _factor_mirror(x, W, factor, getattr(factors, factor))
        return f(x, mirrored, boxes)

    return jax.tree_util.tree_map_with_path(one, state)


def _flatten(params: Any) -> tuple[list[Any], list[Any], Any]:
    """Paths and values of kernels and ordinary leaves, and the structure that holds them."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_lowrank)
    return [path for path, _ in leaves], [x for _, x in leaves], treedef


def _key(path: Any) -> tuple[str, ...]:
    return tuple(path_name(path).split("/")) if path else ()


def _spec(name: str, x: Any, dense: Any) -> Any:
    dense = PartitionSpec() if dense is None else dense
    if not isinstance(dense, PartitionSpec):
        raise ValueError(f"the spec of {name!r} must be a PartitionSpec or None, got {dense!r}")
    if len(dense) > jnp.ndim(x):
        raise ValueError(f"the spec {dense} of {name!r} has more axes than its dense shape {tuple(jnp.shape(x))}")
    if not is_lowrank(x):
        return dense
    return factor_specs(dense, x.ndim, Axes(len(x.batch_shape), len(x.in_shape)), type(x))


def factor_specs(dense: PartitionSpec, ndim: int, split: Axes, kind: Any = LowRank) -> Any:
    """The specs of the factors of a kernel of `ndim` axes, as a node of the class of the kernel."""
    return kind(*map(_short, factor_entries(tuple(dense), ndim, split)))


def _short(axes: tuple[Any, ...]) -> Any:
    """The spec without replicated axes at its end; XLA spells the shardings of outputs so."""
    while axes and axes[-1] is None:
        axes = axes[:-1]
    return PartitionSpec(*axes)


def _mirrors() -> dict[str, str]:
    """The factor that a field of a node mirrors. By name and not by class: `nnx.state` keeps only the names."""
    nodes = [dict(zip("USV", "USV", strict=True)), *(kind.mirrors for kind in registered_coordinates().values())]
    return {field: factor for node in nodes for field, factor in node.items()}


def _of_batch(x: Any, W: LowRank, spec: Any) -> PartitionSpec:
    """The spec of an array with one number for every kernel of a stack; other arrays are replicated."""
    of_stack = jnp.shape(x) in (W.batch_shape, W.stack_shape)
    return _short(tuple(spec.S)[: len(W.batch_shape)]) if of_stack else PartitionSpec()


def _factor_mirror(y: Any, W: Any, name: str, spec: PartitionSpec) -> PartitionSpec:
    """The spec of a moment that mirrors the factor of a name."""
    if jnp.shape(y) == jnp.shape(getattr(W, name)):
        return spec
    batch = len(W.batch_shape)
    if jnp.ndim(y) != len(W.stack_shape) + 2:
        return PartitionSpec()
    if len(W.stack_shape) > batch:
        return _of_grid(W, name, tuple(spec))
    # Moments have their rows in one axis. If it joins several axes and another than the first is sharded, its rows are
    # split over as many devices, but in another order.
    axes = (*spec, *(None,) * batch)
    return _short((*axes[:batch], _merged(tuple(spec)[batch:])))


def _of_grid(W: Any, name: str, spec: tuple[Any, ...]) -> PartitionSpec:
    """The spec of a moment `(batch..., b, c, rows, s)` of a grid. Blocks split the last axis of a factor."""
    batch, axes = len(W.batch_shape), W.in_shape if name == "U" else W.out_shape
    entries = (*spec, *(None,) * (batch + len(axes) - len(spec)))
    *others, last = entries[batch : batch + len(axes)]
    grid = (last, None) if name == "U" else (None, last)
    return _short((*entries[:batch], *grid, _merged(tuple(others))))


def _of_projection(shape: tuple[int, ...], dense: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """The spec of a basis, of coordinates or of an error of `subspace`, from its dense kernel's spec, by the shapes."""
    entries, batch = (*spec, *(None,) * (len(dense) - len(spec))), len(shape) - 2
    for i in range(batch + 1, len(dense)):
        if shape[:batch] != dense[:batch]:
            break
        m, n = math.prod(dense[batch:i]), math.prod(dense[i:])
        ins, outs = joined(entries[batch:i]), joined(entries[i:])
        known = {m: ins, n: outs}
        a, b = shape[batch:]
        if (a, b) in ((m, n), (n, m)):
            pair = (ins, outs) if (a, b) == (m, n) else (outs, ins)
        elif a in (m, n):  # a basis
            pair = known[a] if m != n else ins, None
        elif b in (m, n):  # coordinates
            pair = None, known[b] if m != n else outs
        else:
            continue
        return _short((*entries[:batch], *pair))
    return PartitionSpec()


def joined(entries: tuple[Any, ...]) -> Any:
    """The mesh axes of the product of several axes, None where their order does not allow any."""
    # Parts of the first axis stay in one piece when axes are joined, and parts of others do not.
    return None if any(entry is not None for entry in entries[1:]) else entries[0]


def _merged(entries: tuple[Any, ...]) -> Any:
    """One entry for the product of several axes."""
    names = [
        name for entry in entries if entry is not None for name in (entry if isinstance(entry, tuple) else (entry,))
    ]
    return tuple(names) if len(names) > 1 else (names[0] if names else None)
