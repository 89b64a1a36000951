"""The loop: an Optax transformation works in subspaces of the gradients of dense kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax.axes import Rank, Where
from lowrank_optax.boxes import unwrapped
from lowrank_optax.checks import arrays_of
from lowrank_optax.guard import MOST_SKIPS, Guarded, check_guarded, guarded, is_finite, let_through, unskipped
from lowrank_optax.layout.mesh import Mesh
from lowrank_optax.moments import Copy, Moments
from lowrank_optax.projected.base import Projector
from lowrank_optax.projected.carry import Carry
from lowrank_optax.projected.kernel import Halves, Prepared, keys_of, over
from lowrank_optax.projected.leaves import Leaf, chosen_leaves, placed, zeros
from lowrank_optax.projected.method import Method
from lowrank_optax.projected.ranks import RankRule
from lowrank_optax.projected.refresh import Refresh
from lowrank_optax.projected.residuals import Residual, drop
from lowrank_optax.sharding import boxed_state


class SubspaceState(NamedTuple):
    """State of `subspace`, which keeps it in a `SkipNotFiniteState`.

    Trees have one entry for every projected kernel and nothing at other leaves. Kernels with batch axes have them in
    front of every array.

    Attributes:
      count: number of steps, int32.
      key: data of the random key, uint32, the same in every step.
      basis: bases as their projector stores them: `(p, r)` with orthonormal columns, indices `(r,)`, or key data. Rows
        of a basis are inputs of the kernel if `m <= n` with `side="short"`, and outputs otherwise.
      inner: state of the inner transformation. In the place of a projected kernel it holds coordinates `(r, q)`.
      residual: state of the residual: an error, a norm, or nothing.
      rank: number of columns in use, int32; 0 before the first gradient that is not zero.
      clock: of the refresh schedule.
      ordinary: state of the transformation of other leaves, if they have one of their own.
    """

    count: jax.Array  # type: ignore[assignment]
    key: jax.Array
    basis: Any
    inner: optax.OptState
    residual: Any
    rank: Any
    clock: Any
    ordinary: optax.OptState


def subspace(
    inner: optax.GradientTransformation,
    projector: Projector,
    *,
    rank: Rank,
    refresh: Refresh | int | jax.Array = 200,
    carry: str | Carry = "keep",
    residual: Residual = drop(),  # noqa: B008
    adapt_rank: RankRule | None = None,
    side: str = "short",
    scale: float | jax.Array | Callable[[int, int], float] = 1.0,
    basis_dtype: Any = None,
    where: Where | None = None,
    ordinary: optax.GradientTransformation | None = None,
    seed: int = 0,
    first_moments: Sequence[str] = (),
    second_moments: Sequence[str] = (),
    max_consecutive_skips: int | jax.Array = MOST_SKIPS,
) -> Guarded:
    r"""An Optax transformation in subspaces of the gradients of dense kernels, so that its state is small.

    .. math::

      R = P^\top A, \quad N = \mathrm{inner}(R), \quad U = \text{scale} \cdot P N + \mathrm{residual}(A - P R, \dots)

    for every kernel as a matrix, transposed so that its shorter side is projected. A is the gradient G, or G + E with
    an error E that the residual has fed back. With Adam inside, the state of an m x n kernel is `r (m + 2 n)` numbers
    for m <= n, in the place of `2 m n`.

    It scales gradients like `optax.scale_by_adam`: clipping comes before it, weight decay and the learning rate after
    it. `optax.MultiSteps`, masks, schedules and averages of parameters work as with any transformation of Optax.

    Args:
      inner: transformation of coordinates; leaves that are not projected get it unchanged.
      projector: how bases are made, from `lowrank_optax.projectors`.
      rank: r, an int, a fraction of the most that the side allows, rounded to the nearest, or a callable of path and
        shape that returns either.
      refresh: when bases are made, from `lowrank_optax.refresh`; a number is a period. Default: every 200 steps.
      carry: how moments change basis, from `lowrank_optax.carry` or by name: "keep", "reset", "reset_count", "rotate"
        or "lift".
      residual: what becomes of the rest of the gradient, from `lowrank_optax.residuals`. Default: it is dropped.
      adapt_rank: rule that chooses at a refresh how many columns are in use, `lowrank_optax.projected.energy`. Columns
        that are not in use are zero; `lowrank_optax.projected.resize` frees their memory.
      side: which side of a matrix is projected: "short"; "long"; "left", its inputs, or "right", its outputs; "both";
        or "entries", for a projector of coordinates that chooses single entries.
      scale: factor of the lifted part, or a callable of (m, n), inputs and outputs, that returns it.
      basis_dtype: how bases are stored: None, the dtype of the computation; a dtype such as `jax.numpy.bfloat16`; or
        `lowrank_optax.projected.int4()`.
      where: callable of path and shape that returns True, False or `Axes`, as in `factorize`. Default: leaves named
        `kernel` that the rank fits, the output layer among them.
      ordinary: transformation for leaves that are not projected. Default: `inner`.
      seed: of the random keys.
      first_moments: names of fields that hold first moments, for an `inner` whose state no transformation of Optax has.
      second_moments: names of fields that hold second moments, likewise.
      max_consecutive_skips: most steps in a row that are skipped because something is not finite, see
        `skip_not_finite`.

    Returns:
      A transformation with a `SubspaceState` inside a `SkipNotFiniteState`.

    Raises:
      TypeError: for options of another kind, and from `init` for a tree with `LowRank` kernels.
      ValueError: for options that do not go together, and from `init` for ranks that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params = {"kernel": jnp.ones((6, 8)), "bias": jnp.zeros(8)}
      >>> tx = optax.chain(
      ...     lro.subspace(optax.scale_by_adam(), lro.projectors.svd(), rank=2, refresh=50),
      ...     optax.add_decayed_weights(1e-2),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "basis")["kernel"].shape, optax.tree.get(state, "mu")["kernel"].shape
      ((6, 2), (2, 8))

    References:
      The methods that are special cases have their references at their aliases, `lowrank_optax.galore` and others.
    """
    method = Method(
        projector,
        rank,
        refresh,
        carry,
        residual,
        adapt_rank,
        side,
        scale,
        basis_dtype,
        where,
        ordinary,
        seed,
        first_moments,
        second_moments,
    ).ready()
    loop = _Loop(optax.with_extra_args_support(inner), method, max_consecutive_skips)
    inside = optax.GradientTransformationExtraArgs(loop.init, loop.update)
    return guarded(loop.init_guarded, loop.update_guarded, inside, max_consecutive_skips)


class _Kernel(NamedTuple):
    """The entries of one kernel in the trees of a `SubspaceState`."""

    basis: Any
    residual: Any
    rank: Any
    clock: Any


class _Loop:
    """The loop of a method around an inner transformation: trees outside, kernels inside."""

    def __init__(self, inner: optax.GradientTransformationExtraArgs, method: Method, max_consecutive_skips: Any):
        self._inner, self._method, self._halves = inner, method, Halves(method)
        self._most_skips = max_consecutive_skips
        self._ordinary = inner if method.ordinary is None else optax.with_extra_args_support(method.ordinary)
        self._moments = Moments(inner, method.first_moments, method.second_moments)

    def init_guarded(self, params: Any) -> Any:
        """The state before the first step, with the guard around it."""
        return unskipped(self.init(params))

    def init(self, params: Any) -> Any:
        """The state before the first step. Its arrays lie and have boxes like the parameters that they mirror."""
        boxed, params = params, arrays_of(unwrapped(params)[0])
        mesh, start = Mesh(params), self._start
        if mesh:
            # Compiled, because eager operations in explicit mode would need `jax.set_mesh`. No number of the
            # parameters is used, but they tell the compiler the devices.
            start = jax.jit(functools.partial(mesh.auto, start), keep_unused=True)
        return boxed_state(start(params), boxed)

    def _start(self, params: Any) -> SubspaceState:
        method = self._method
        leaves, treedef, chosen = chosen_leaves(params, method, warn=True)
        key = jax.random.key(method.seed, impl="threefry2x32")
        kernels = {i: self._kernel(leaf, leaves[i], jax.random.fold_in(key, i)) for i, leaf in chosen.items()}
        inner, others = self._split(treedef, chosen, self._coordinates(leaves, chosen))
        inner_state = self._inner.init(inner)
        ordinary: Any = ()
        if others is not None:
            # `optax.tree.map_params` makes a state of no leaves, which cannot know whether there are other leaves.
            ordinary = self._ordinary.init(others) if leaves else jnp.zeros((), jnp.int32)
        if method.carry.moment is not None:
            _check_moments(self._moments.open(inner_state)[0], chosen)
        count = jnp.zeros((), jnp.int32)
        trees = _of_kernels(treedef, kernels)
        return SubspaceState(count, jax.random.key_data(key), inner=inner_state, ordinary=ordinary, **trees)

    def _kernel(self, leaf: Leaf, x: Any, key: jax.Array) -> _Kernel:
        method, dtype = self._method, linalg.working_dtype(x)
        of_basis, _, of_matrix = leaf.specs(x)
        start = functools.partial(method.projector.init, shape=leaf.matrix_shape, rank=leaf.rank, dtype=dtype)
        stored = over(leaf, lambda key: start(jax.random.wrap_key_data(key, impl="threefry2x32")))(
            keys_of(jax.random.key_data(key), leaf)
        )
        if method.adapt_rank is not None and not (isinstance(stored, jax.Array) and leaf.holds_basis(stored)):
            raise ValueError("adapt_rank sets columns of stored bases to zero, and this projector stores none")
        stored = jax.tree.map(lambda y: placed(y, x, of_basis) if leaf.holds_basis(y) else y, stored)
        shapes = jax.eval_shape(lambda: method.residual.init(leaf.matrix_shape, dtype))
        residual = jax.tree.map(
            lambda y: zeros((*leaf.batch, *y.shape), y.dtype, x, of_matrix if y.ndim else None), shapes
        )
        return _Kernel(stored, residual, jnp.zeros(leaf.batch, jnp.int32), method.refresh.init())

    def _coordinates(self, leaves: list[Any], chosen: dict[int, Leaf]) -> list[Any]:
        """The leaves that the inner transformation sees, with zeros in the place of kernels."""
        projected = list(leaves)
        for i, leaf in chosen.items():
            shape, x = (*leaf.batch, *leaf.projected_shape), leaves[i]
            projected[i] = zeros(shape, linalg.working_dtype(x), x, leaf.specs(x)[1])
        return projected

    def _split(self, treedef: Any, chosen: dict[int, Leaf], leaves: list[Any]) -> tuple[Any, Any]:
        """The tree of the inner transformation, and the one of other leaves if these have a state of their own."""
        alike = self._method.ordinary is None and not self._method.carry.restarts
        if alike or (leaves and len(chosen) == len(leaves)):
            return treedef.unflatten(leaves), None

        def only(kernels: bool) -> Any:
            shown = [x if (i in chosen) == kernels else optax.MaskedNode() for i, x in enumerate(leaves)]
            return treedef.unflatten(shown)

        return only(True), only(False)

    def update_guarded(self, grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        """One step, skipped if something is not finite."""
        check_guarded(state)
        updates, new, finite = self._step(grads, state.inner_state, params, extra_args)
        return let_through(finite, updates, new, state, self._most_skips)

    def update(self, grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        """One step. Parameters are needed only by an inner transformation that looks at them."""
        return self._step(grads, state, params, extra_args)[:2]

    def _step(self, grads: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any, jax.Array]:
        """Updates, the new state, and whether all is finite."""
        (grads, rebox), (state, rebox_state), (params, _) = map(unwrapped, (grads, state, params))
        method = self._method
        leaves, treedef, chosen = chosen_leaves(grads, method)
        weights = None if params is None else treedef.flatten_up_to(params)
        kernels = _kernels(treedef, chosen, state)
        mesh = Mesh(grads)

        copies, close = self._moments.open(state.inner) if method.moves_moments else ([], lambda trees: None)
        moments = [(copy.degree, _arrays(copy.tree, chosen)) for copy in copies]
        prepared: dict[int, Prepared] = {}
        for number, (i, leaf) in enumerate(chosen.items()):
            own = [(degree, arrays[i]) for degree, arrays in moments if i in arrays]
            static = tuple(degree for degree, _ in own), len(chosen)
            run = functools.partial(self._halves.prepare_compiled, leaf.nameless(), static)
            basis, residual, rank, clock = kernels[i]
            error = residual if method.residual.feeds else ()
            arrays = (leaves[i], error, basis, rank, clock, tuple(x for _, x in own))
            places = jnp.asarray([i, number], jnp.int32)
            prepared[i] = mesh.auto(run, *arrays, state.key, state.count, places, specs=leaf.mirror(leaves[i]))
        inner_state = state.inner
        if method.carry.moment is not None:
            inner_state = close(_with_moments(copies, chosen, prepared))
        if method.carry.restarts:
            inner_state = _restarted(inner_state, method.refresh.due((), state.count, 0, 1, None))

        projected, points = list(leaves), weights and list(weights)
        for i, leaf in chosen.items():
            projected[i] = prepared[i].projected
            if points:
                run = functools.partial(self._halves.project_compiled, leaf.nameless())
                points[i] = mesh.auto(run, prepared[i].basis, points[i], specs=leaf.mirror(leaves[i]))
        steps, *states = self._steps(treedef, chosen, projected, points, inner_state, state.ordinary, extra_args)
        updates = list(steps)
        for i, leaf in chosen.items():
            dtype = jnp.result_type(leaves[i] if weights is None else weights[i])
            run = functools.partial(self._halves.finish_compiled, leaf.nameless(), dtype)
            ends = mesh.auto(
                run, prepared[i], updates[i], kernels[i].residual, state.count, specs=leaf.mirror(leaves[i])
            )
            updates[i] = ends[0]
            kernels[i] = _Kernel(ends[1], ends[2], prepared[i].rank, prepared[i].clock)
        trees = _of_kernels(treedef, kernels)
        count = optax.safe_increment(state.count)
        new = SubspaceState(count, state.key, inner=states[0], ordinary=states[1], **trees)
        # Coordinates tell whether a gradient and an update are finite, unless they are some of its entries. They are
        # much smaller.
        seen = leaves if method.projector.coordinates else projected
        finite = is_finite(seen, steps, state, new)
        return rebox(treedef.unflatten(updates)), rebox_state(new), finite

    def _steps(
        self,
        treedef: Any,
        chosen: dict[int, Leaf],
        leaves: list[Any],
        points: list[Any] | None,
        inner_state: Any,
        ordinary: Any,
        extra_args: dict[str, Any],
    ) -> tuple[list[Any], Any, Any]:
        """The steps of all leaves, of kernels in coordinates, and the new states."""
        inner, others = self._split(treedef, chosen, leaves)
        at_inner, at_others = (None, None) if points is None else self._split(treedef, chosen, points)
        steps, inner_state = self._inner.update(inner, inner_state, at_inner, **extra_args)
        updates = list(treedef.flatten_up_to(steps))
        if others is not None and leaves:
            steps, ordinary = self._ordinary.update(others, ordinary, at_others, **extra_args)
            pairs = zip(updates, treedef.flatten_up_to(steps), strict=True)
            updates = [x if i in chosen else y for i, (x, y) in enumerate(pairs)]
        return updates, inner_state, ordinary


def _of_kernels(treedef: Any, kernels: dict[int, _Kernel]) -> dict[str, Any]:
    """Trees with one value for every kernel; a number if there is none, see `layout.Layout.scatter_kernels`."""
    if not kernels:
        return {field: jnp.zeros((), jnp.int32) for field in _Kernel._fields}
    rows = [kernels.get(i, _Kernel((), (), (), ())) for i in range(treedef.num_leaves)]
    columns = zip(*rows, strict=True)
    return {field: treedef.unflatten(column) for field, column in zip(_Kernel._fields, columns, strict=True)}


def _kernels(treedef: Any, chosen: dict[int, Leaf], state: SubspaceState) -> dict[int, _Kernel]:
    """The inverse of `_of_kernels`. ValueError for a state of other parameters."""
    if not chosen:
        return {}
    try:
        trees = (treedef.flatten_up_to(x) for x in (state.basis, state.residual, state.rank, state.clock))
        rows = [_Kernel._make(row) for row in zip(*trees, strict=True)]
        for i, leaf in chosen.items():
            if jnp.shape(rows[i].rank) != leaf.batch:
                raise ValueError(f"it holds nothing for the kernel {jax.tree_util.keystr(leaf.path)}")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the optimizer state does not belong to these parameters: make it with tx.init(params). Cause: {error}"
        ) from error
    return {i: rows[i] for i in chosen}


def _arrays(tree: Any, chosen: dict[int, Leaf]) -> dict[int, jax.Array]:
    """The moments of kernels in a copy of the parameters, by their position."""
    found = {tuple(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    return {
        i: found[leaf.path]
        for i, leaf in chosen.items()
        if leaf.path in found and jnp.ndim(found[leaf.path]) == len(leaf.batch) + 2
    }


def _with_moments(copies: list[Copy], chosen: dict[int, Leaf], prepared: dict[int, Prepared]) -> list[Any]:
    """The copies with the moments that a change of basis has moved."""
    left = {i: list(p.moments) for i, p in prepared.items()}
    trees = []
    for copy in copies:
        own = {chosen[i].path: left[i].pop(0) for i in _arrays(copy.tree, chosen)}
        trees.append(jax.tree_util.tree_map_with_path(lambda path, x, own=own: own.get(tuple(path), x), copy.tree))
    return trees


def _restarted(state: Any, due: Any) -> Any:
    """The state of the inner transformation with its counts at zero if a refresh is due."""

    def one(path: Any, x: Any) -> Any:
        is_count = path and getattr(path[-1], "name", None) == "count"
        return jnp.where(due, jnp.zeros_like(x), x) if is_count else x

    return jax.tree_util.tree_map_with_path(one, state)


def _check_moments(copies: list[Copy], chosen: dict[int, Leaf]) -> None:
    """Raises ValueError for moments that no rule can carry."""
    unknown = sorted({f"{x.owner}.{x.field}" for x in copies if x.degree is None and _arrays(x.tree, chosen)})
    if unknown:
        raise ValueError(
            f"subspace cannot carry {', '.join(unknown)} between bases: it knows no such field. If it is linear in "
            "gradients, name it in first_moments=(...), if it is a mean of squares, in second_moments=(...), or use "
            "carry='keep'"
        )
