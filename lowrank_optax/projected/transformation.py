"""The loop: an Optax transformation works in subspaces of the gradients of dense kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax.axes import Rank, Where, check_where
from lowrank_optax.boxes import unboxed, unwrapped
from lowrank_optax.checks import arrays_of
from lowrank_optax.guard import MOST_SKIPS, skip_not_finite
from lowrank_optax.layout.mesh import Mesh
from lowrank_optax.moments import Moments
from lowrank_optax.projected.carry import CARRIES, Carry, Change
from lowrank_optax.projected.leaves import SIDES, Leaf, chosen_leaves, placed, zeros
from lowrank_optax.projected.projectors import Projector, Refreshing, both_sides, key_of
from lowrank_optax.projected.ranks import RankRule
from lowrank_optax.projected.refresh import Refresh, every
from lowrank_optax.projected.residuals import Projection, Residual, drop
from lowrank_optax.projected.storage import stored_as
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
    """

    count: jax.Array
    key: jax.Array
    basis: Any
    inner: optax.OptState
    residual: Any
    rank: Any
    clock: Any


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
    scale: float | jax.Array = 1.0,
    basis_dtype: Any = None,
    where: Where | None = None,
    ordinary: optax.GradientTransformation | None = None,
    seed: int = 0,
    first_moments: Sequence[str] = (),
    second_moments: Sequence[str] = (),
    max_consecutive_skips: int | jax.Array = MOST_SKIPS,
) -> optax.GradientTransformationExtraArgs:
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
      rank: r, an int, a fraction of the most that the side allows, or a callable of path and shape that returns either.
      refresh: when bases are made, from `lowrank_optax.refresh`; a number is a period. Default: every 200 steps.
      carry: how moments change basis, from `lowrank_optax.carry` or by name: "keep", "reset", "reset_count", "rotate"
        or "lift".
      residual: what becomes of the rest of the gradient, from `lowrank_optax.residuals`. Default: it is dropped.
      adapt_rank: rule that chooses at a refresh how many columns are in use, `lowrank_optax.projected.energy`. Columns
        that are not in use are zero; `lowrank_optax.projected.resize` frees their memory.
      side: which side of a matrix is projected: "short"; "long"; "left", its inputs, or "right", its outputs; "both";
        or "entries", for a projector of coordinates that chooses single entries.
      scale: factor of the lifted part.
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
    return _Subspace(
        inner=optax.with_extra_args_support(inner),
        projector=projector,
        rank=rank,
        refresh=refresh if isinstance(refresh, Refresh) else every(refresh),
        carry=CARRIES[carry]() if isinstance(carry, str) and carry in CARRIES else carry,
        residual=residual,
        rule=adapt_rank,
        side=side,
        scale=scale,
        basis_dtype=basis_dtype,
        where=where,
        ordinary=ordinary,
        seed=seed,
        names=(first_moments, second_moments),
    ).transformation(max_consecutive_skips)


class _Subspace:
    """The options of `subspace` and the functions that they make."""

    def __init__(self, *, inner: Any, projector: Any, basis_dtype: Any, **options: Any):
        self.inner, self.projector = inner, projector
        self.rank: Rank = options["rank"]
        self.refresh: Refresh = options["refresh"]
        self.carry: Carry = options["carry"]
        self.residual: Residual = options["residual"]
        self.rule, self.side, self.scale = options["rule"], options["side"], options["scale"]
        self.where, self.ordinary, self.seed, self.names = (options[x] for x in ("where", "ordinary", "seed", "names"))
        self._check(basis_dtype)
        if basis_dtype is not None:
            self.projector = stored_as(self.projector, basis_dtype)
        if self.side == "both":
            self.projector = both_sides(self.projector)
        self.moves_moments = self.carry.moment is not None or self.projector.momentum or self.residual.drops
        # Compiled once for all kernels of equal shape, because equal bound methods are equal keys.
        self._prepared = jax.jit(self._prepare, static_argnums=(0, 1))
        self._finished = jax.jit(self._finish, static_argnums=(0, 1))

    def _check(self, basis_dtype: Any) -> None:
        kinds = (
            ("projector", self.projector, Projector, "lro.projectors.svd()"),
            ("residual", self.residual, Residual, "lro.residuals.drop()"),
            ("carry", self.carry, Carry, f"lro.carry.keep() or one of {', '.join(map(repr, CARRIES))}"),
        )
        for name, value, kind, example in kinds:
            if not isinstance(value, kind):
                raise TypeError(f"{name} takes an object such as {example}, got {value!r}")
        check_where(self.where)
        if self.side not in SIDES:
            raise ValueError(f"side is one of {', '.join(map(repr, SIDES))}, got {self.side!r}")
        if self.side == "entries" and not self.projector.coordinates:
            raise ValueError("side='entries' chooses single entries: use lro.projectors.rows() with it")
        if self.side == "both" and (self.carry.turns or self.projector.coordinates or self.rule is not None):
            raise ValueError("side='both' goes with bases of columns, a fixed rank and carry='keep', 'reset' or 'lift'")
        if self.carry.restarts and not self.refresh.together:
            raise ValueError(
                "carry='reset_count' restarts the one count that all kernels share: refresh all kernels together, with "
                "lro.refresh.every(period), or use carry='reset'"
            )
        if self.rule is not None and (basis_dtype is not None or self.projector.coordinates):
            raise ValueError("adapt_rank sets columns of stored bases to zero: use a projector of matrices, basis_dtype=None")

    def transformation(self, max_consecutive_skips: int | jax.Array) -> optax.GradientTransformationExtraArgs:
        return skip_not_finite(
            optax.GradientTransformationExtraArgs(self._init, self._update), max_consecutive_skips
        )

    def _chosen(self, tree: Any, warn: bool = False) -> Any:
        return chosen_leaves(tree, self.rank, self.side, self.where, self.projector.coordinates, warn)

    def _inner(self, treedef: Any, chosen: dict[int, Leaf]) -> Any:
        """The inner transformation of trees. Kernels have a state of their own if other leaves move otherwise."""
        if self.ordinary is None and not self.carry.restarts:
            return self.inner
        labels = treedef.unflatten(["kernel" if i in chosen else "ordinary" for i in range(treedef.num_leaves)])
        parts = {"kernel": self.inner, "ordinary": self.ordinary or self.inner}
        return optax.with_extra_args_support(optax.partition(parts, labels))

    # --- init ---

    def _init(self, params: Any) -> Any:
        boxed, params = params, arrays_of(unwrapped(params)[0])
        leaves, treedef, chosen = self._chosen(params, warn=True)
        key = jax.random.key(self.seed, impl="threefry2x32")
        basis, rank, residual, clock, projected = {}, {}, {}, {}, list(leaves)
        for i, leaf in chosen.items():
            x, dtype = leaves[i], linalg.working_dtype(leaves[i])
            of_basis, of_coordinates, of_matrix = leaf.specs(x)
            keys = _keys(jax.random.key_data(jax.random.fold_in(key, i)), leaf)
            start = functools.partial(self.projector.init, shape=leaf.matrix_shape, rank=leaf.rank, dtype=dtype)
            basis[i] = jax.tree.map(
                lambda y, leaf=leaf, x=x, s=of_basis: placed(y, x, s) if leaf.holds_basis(y) else y,
                _over(leaf, lambda key, start=start: start(key))(keys),
            )
            self._check_stored(basis[i], leaf, dtype)
            rank[i], clock[i] = jnp.zeros(leaf.batch, jnp.int32), self.refresh.init()
            like = jax.eval_shape(lambda leaf=leaf, dtype=dtype: self.residual.init(leaf.matrix_shape, dtype))
            residual[i] = jax.tree.map(
                lambda y, leaf=leaf, x=x, s=of_matrix: zeros((*leaf.batch, *y.shape), y.dtype, x, s if y.ndim else None),
                like,
            )
            projected[i] = zeros((*leaf.batch, *leaf.projected_shape), dtype, x, of_coordinates)
        inner = self._inner(treedef, chosen)
        state = inner.init(treedef.unflatten(projected))
        if self.carry.moment is not None:
            self._check_moments(inner, state, chosen)
        trees = (_of_kernels(treedef, chosen, x) for x in (basis, residual, rank, clock))
        basis, residual, rank, clock = trees
        count = jnp.zeros((), jnp.int32)
        state = SubspaceState(count, jax.random.key_data(key), basis, state, residual, rank, clock)
        return boxed_state(state, boxed)

    def _check_stored(self, stored: Any, leaf: Leaf, dtype: Any) -> None:
        if self.rule is not None and not (isinstance(stored, jax.Array) and leaf.holds_basis(stored)):
            raise ValueError("adapt_rank sets columns of stored bases to zero, and this projector stores none")

    def _check_moments(self, inner: Any, state: Any, chosen: dict[int, Leaf]) -> None:
        found = self._moments(inner).open(state)[0]
        unknown = sorted(
            {f"{copy.owner}.{copy.field}" for copy in found if copy.degree is None and _arrays(copy.tree, chosen)}
        )
        if unknown:
            raise ValueError(
                f"subspace cannot carry {', '.join(unknown)} between bases: it knows no such field. If it is linear in "
                "gradients, name it in first_moments=(...), if it is a mean of squares, in second_moments=(...), or "
                "use carry='keep'"
            )

    def _moments(self, inner: Any) -> Moments:
        return Moments(inner, *self.names)

    # --- update ---

    def _update(self, grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        (grads, rebox), (state, rebox_state), (params, _) = map(unboxed, (grads, state, params))
        leaves, treedef, chosen = self._chosen(grads)
        weights = None if params is None else treedef.flatten_up_to(params)
        trees = [_from_kernels(treedef, chosen, x) for x in (state.basis, state.residual, state.rank, state.clock)]
        self._check_state(trees, leaves, chosen)
        mesh = Mesh(grads)

        inner, moments, close = self._inner(treedef, chosen), [], None
        if self.moves_moments:
            moments, close = self._moments(inner).open(state.inner)
        arrays = [(copy.degree, _arrays(copy.tree, chosen)) for copy in moments]

        prepared: dict[int, Any] = {}
        for number, (i, leaf) in enumerate(chosen.items()):
            degrees = tuple(degree for degree, found in arrays if i in found)
            error = trees[1][i] if self.residual.feeds else ()
            own = tuple(found[i] for _, found in arrays if i in found)
            run = functools.partial(self._prepared, leaf.nameless(), (degrees, len(chosen)))
            args = (leaves[i], error, *(trees[k][i] for k in (0, 2, 3)), own, state.key, state.count)
            places = jnp.asarray([i, number], jnp.int32)
            prepared[i] = mesh.auto(run, *args, places, specs=leaf.mirror(leaves[i]))

        projected, projected_weights = list(leaves), None if weights is None else list(weights)
        for i, leaf in chosen.items():
            projected[i] = prepared[i].projected
            if projected_weights is not None:
                project = functools.partial(self._project, leaf)
                projected_weights[i] = mesh.auto(
                    project, prepared[i].basis, weights[i], specs=leaf.mirror(leaves[i])  # type: ignore[index]
                )
        inner_state = self._carried(state.inner, close, moments, arrays, chosen, prepared)
        if self.carry.restarts:
            due = self.refresh.due((), state.count, 0, 1, None)
            inner_state = _restarted(inner_state, due)
        given = None if projected_weights is None else treedef.unflatten(projected_weights)
        steps, inner_state = inner.update(treedef.unflatten(projected), inner_state, given, **extra_args)

        updates, ends = treedef.flatten_up_to(steps), {}
        for i, leaf in chosen.items():
            dtype = jnp.result_type(leaves[i] if weights is None else weights[i])
            run = functools.partial(self._finished, leaf.nameless(), dtype)
            args = (prepared[i], updates[i], trees[1][i], state.count)
            updates[i], *ends[i] = mesh.auto(run, *args, specs=leaf.mirror(leaves[i]))
        new = (
            {i: end[0] for i, end in ends.items()},
            {i: end[1] for i, end in ends.items()},
            {i: p.rank for i, p in prepared.items()},
            {i: p.clock for i, p in prepared.items()},
        )
        basis, residual, rank, clock = (_of_kernels(treedef, chosen, x) for x in new)
        count = optax.safe_increment(state.count)
        state = SubspaceState(count, state.key, basis, inner_state, residual, rank, clock)
        return rebox(treedef.unflatten(updates)), rebox_state(state)

    def _check_state(self, trees: Any, leaves: list[Any], chosen: dict[int, Leaf]) -> None:
        for i, leaf in chosen.items():
            if jnp.shape(trees[2][i]) != leaf.batch:
                raise ValueError(
                    f"the optimizer state does not belong to these parameters: make it with tx.init(params). The rank "
                    f"of {jax.tree_util.keystr(leaf.path)} has shape {jnp.shape(trees[2][i])} in it"
                )

    def _carried(
        self, state: Any, close: Any, moments: Any, arrays: Any, chosen: dict[int, Leaf], prepared: dict[int, Any]
    ) -> Any:
        """The inner state with the moments that a change of basis has moved."""
        if self.carry.moment is None:
            return state
        left = {i: list(p.moments) for i, p in prepared.items()}
        new = []
        for copy, (_, found) in zip(moments, arrays, strict=True):
            own = {chosen[i].path: left[i].pop(0) for i in found}
            new.append(jax.tree_util.tree_map_with_path(lambda path, x, own=own: own.get(tuple(path), x), copy.tree))
        return close(new)

    # --- one kernel ---

    @linalg.highest_precision
    def _prepare(
        self,
        leaf: Leaf,
        static: tuple[tuple[int | None, ...], int],
        grad: jax.Array,
        error: Any,
        stored: Any,
        rank: jax.Array,
        clock: Any,
        moments: tuple[jax.Array, ...],
        key: jax.Array,
        count: jax.Array,
        places: jax.Array,
    ) -> _Prepared:
        """Everything before the inner transformation: the gradient with its error, bases, carried moments."""
        degrees, number = static
        a = leaf.matrices(grad)
        if self.residual.feeds:
            a = a + error.astype(a.dtype)
        leaf = leaf.of_width(stored)
        key = jax.random.fold_in(jax.random.fold_in(key_of(key), places[0]), count)
        keys = _keys(jax.random.key_data(key), leaf)
        nonzero = _over(leaf, lambda x: jnp.any(x != 0))(a)
        first = jnp.any((rank == 0) & nonzero)

        def coordinates(stored: Any) -> tuple[Any, jax.Array]:
            def one(stored: Any, a: jax.Array) -> tuple[Any, jax.Array]:
                basis = self.projector.basis(stored, a, leaf.rank)
                return basis, self.projector.down(basis, a)

            basis, projected = _over(leaf, one)(stored, a)
            return basis, projected

        due = self.refresh.due(clock, count, places[1], number, lambda: _norm(coordinates(stored)[1]))
        dropped = jnp.zeros_like(a) if self.residual.drops else ()
        movable = moments if self.carry.moment is not None else ()

        def refreshed(x: Any) -> Any:
            stored, rank, _, overlap, dropped = x
            one = functools.partial(self._refresh, leaf, degrees, due, first, count)
            return _over(leaf, one)(a, keys, nonzero, stored, rank, moments, overlap, dropped)

        overlap = jnp.ones(leaf.batch, a.dtype)
        x = stored, rank, movable, overlap, dropped
        x = refreshed(x) if due is True else linalg.cond_without_copy(due | first, refreshed, x)
        stored, rank, movable, overlap, dropped = x
        basis, projected = coordinates(stored)
        clock = self.refresh.after(clock, due | first, count, jnp.mean(overlap), _norm(projected))
        return _Prepared(a, projected, basis, stored, rank, clock, movable, dropped)

    def _refresh(
        self,
        leaf: Leaf,
        degrees: tuple[int | None, ...],
        due: Any,
        first: jax.Array,
        count: jax.Array,
        a: jax.Array,
        key: jax.Array,
        nonzero: jax.Array,
        stored: Any,
        rank: jax.Array,
        moments: tuple[jax.Array, ...],
        overlap: jax.Array,
        dropped: Any,
    ) -> Any:
        """A new basis of one matrix, and moments in it. A gradient of zeros changes nothing."""
        projector, r = self.projector, leaf.rank
        working = [m.astype(a.dtype) for m in moments]
        firsts = [m for m, degree in zip(working, degrees, strict=True) if degree == 1]
        momentum = firsts[0] if firsts else jnp.zeros(leaf.projected_shape, a.dtype)
        new = projector.refresh(stored, Refreshing(a, momentum, key_of(key), count, first))
        new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, stored)
        old_basis, basis = (projector.basis(x, a, r) for x in (stored, new))
        active = jnp.asarray(r, jnp.int32)
        if self.rule is not None:
            active = self.rule(projector.down(basis, a), a).astype(jnp.int32)
            new = linalg.first_columns(new, active)
            basis = projector.basis(new, a, r)
        take = nonzero & (due | (rank == 0))

        def lift(x: jax.Array) -> jax.Array:
            return projector.down(basis, projector.up(old_basis, x, a.shape[0]))

        change = Change(lambda: projector.overlap(old_basis, basis), lift, momentum, count)
        carried = []
        if self.carry.moment is not None:
            for m, degree, old in zip(working, degrees, moments, strict=True):
                moved = m if degree is None else self.carry.moment(change, m, degree)
                carried.append(jnp.where(take, moved, m).astype(old.dtype))
        if self.residual.drops:
            after = [m for m, degree in zip(carried, degrees, strict=False) if degree == 1]
            after_momentum = after[0].astype(a.dtype) if after else momentum
            lost = projector.up(old_basis, momentum, a.shape[0]) - projector.up(basis, after_momentum, a.shape[0])
            dropped = jnp.where(take, lost, 0)
        if self.refresh.observes:
            overlap = jnp.abs(change.overlap()[0, 0]).astype(a.dtype)
        kept = jax.tree.map(lambda x, y: jnp.where(take, x, y), new, stored)
        return kept, jnp.where(take, active, rank), tuple(carried), overlap, dropped

    @linalg.highest_precision
    def _project(self, leaf: Leaf, basis: Any, weight: jax.Array) -> jax.Array:
        """The weight in coordinates, which the inner transformation gets as parameter."""
        return _over(leaf, self.projector.down)(basis, leaf.matrices(weight))

    @linalg.highest_precision
    def _finish(self, leaf: Leaf, dtype: Any, x: _Prepared, step: jax.Array, residual: Any, count: jax.Array) -> Any:
        """Everything after the inner transformation: the update, the stored basis and the state of the residual."""
        rows = leaf.matrix_shape[0]

        def one(x: Any, step: jax.Array, residual: Any) -> Any:
            a, projected, basis, stored, dropped = x
            inside = lambda: self.projector.up(basis, projected, rows)  # noqa: E731
            step = step.astype(a.dtype)
            direction, residual = self.residual.apply(residual, Projection(a, inside, projected, step, dropped))
            if not self.residual.replaces:
                lifted = self.scale * self.projector.up(basis, step, rows)
                direction = lifted if direction is None else lifted + direction
            return direction, self.projector.after(stored, basis, a, projected, count), residual

        parts = (x.gradient, x.projected, x.basis, x.stored, x.dropped)
        direction, stored, residual = _over(leaf, one)(parts, step, residual)
        return leaf.leaf(direction, dtype), stored, residual


class _Prepared(NamedTuple):
    """The numbers of one kernel between the two halves of a step; all have its batch axes in front."""

    gradient: jax.Array
    projected: jax.Array
    basis: Any
    stored: Any
    rank: jax.Array
    clock: Any
    moments: tuple[jax.Array, ...]
    dropped: Any


def _over(leaf: Leaf, f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` of one matrix, mapped over the batch axes of a kernel."""
    for _ in leaf.batch:
        f = jax.vmap(f)
    return f


def _keys(data: jax.Array, leaf: Leaf) -> jax.Array:
    """Key data for every matrix of a kernel."""
    return jax.random.key_data(jax.random.split(key_of(data), leaf.batch)) if leaf.batch else data


def _norm(x: jax.Array) -> jax.Array:
    return linalg.norm(x.reshape(1, -1))


def _of_kernels(treedef: Any, chosen: dict[int, Leaf], values: dict[int, Any]) -> Any:
    """A tree with one value for every kernel; a number if there is none, see `layout.Layout.scatter_kernels`."""
    if not chosen:
        return jnp.zeros((), jnp.int32)
    return treedef.unflatten([values.get(i, ()) for i in range(treedef.num_leaves)])


def _from_kernels(treedef: Any, chosen: dict[int, Leaf], tree: Any) -> list[Any]:
    if not chosen:
        return []
    try:
        return list(treedef.flatten_up_to(tree))
    except ValueError as error:
        raise ValueError(
            f"the optimizer state does not belong to these parameters: make it with tx.init(params). Cause: {error}"
        ) from error


def _arrays(tree: Any, chosen: dict[int, Leaf]) -> dict[int, jax.Array]:
    """The moments of kernels in a copy of the parameters, by their position."""
    found = {tuple(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    return {i: found[leaf.path] for i, leaf in chosen.items() if jnp.ndim(found.get(leaf.path)) == len(leaf.batch) + 2}


def _restarted(state: Any, due: jax.Array) -> Any:
    """The state of the partition with counts of its kernels at zero if a refresh is due."""

    def one(path: Any, x: Any) -> Any:
        is_count = path and getattr(path[-1], "name", None) == "count"
        return jnp.where(due, jnp.zeros_like(x), x) if is_count else x

    kernel = jax.tree_util.tree_map_with_path(one, state.inner_states["kernel"])
    return state._replace(inner_states={**state.inner_states, "kernel": kernel})
