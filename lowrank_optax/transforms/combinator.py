"""The combinator: any Optax transformation becomes its low-rank counterpart."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax import rank as rank_lib
from lowrank_optax.explicit import Placement
from lowrank_optax.lowrank import LowRank, cast_like, flatten, unflatten
from lowrank_optax.transforms import steps as st
from lowrank_optax.transforms.carry import SECOND_MOMENTS, check_carries
from lowrank_optax.transforms.checks import check_gradients, check_kernels
from lowrank_optax.transforms.split import Split, is_kernel
from lowrank_optax.transforms.stack import Stacks


class FixedRankState(NamedTuple):
    """State of `fixed_rank`.

    Attributes:
      inner_state: state of the inner transformation; at a kernel its mirrors hold r x r coefficients, or triples
        of the shapes of (U, S, V) for tangent momentum, in float32 or better.
      kernels: tree with a `KernelState` (rank, gradient_norm, truncation) at every kernel; a scalar if there is none.
      phase: position in the galerkin loop, int32: 0 when the next call augments; always 0 otherwise.
      notfinite_count: number of calls that changed nothing because something was not finite, int32.
    """

    inner_state: optax.OptState
    kernels: Any
    phase: jax.Array
    notfinite_count: jax.Array


def fixed_rank(
    inner: optax.GradientTransformation,
    *,
    momentum: Literal["balanced", "tangent", "coefficient"] | None = None,
    gradient: Literal["projected", "galerkin"] = "projected",
    local_steps: int = 1,
    retraction: Literal["svd", "bug"] = "svd",
    rank: rank_lib.RankPolicy | None = None,
    ordinary: optax.GradientTransformation | None = None,
    move_ordinary: bool = False,
    second_moments: tuple[str, ...] = SECOND_MOMENTS,
    stack: Literal["kernels", "all"] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The low-rank counterpart of an Optax transformation.

    Every `LowRank` node of the parameters moves along the manifold of matrices of its rank: the gradient is
    projected onto the tangent space, `inner` works on its coordinates, the result is retracted, and the state of
    `inner` is carried into the new bases. Ordinary leaves get `inner` unchanged. With the coefficient momentum
    of the paper a step is

    .. math::

      \hat U &= \mathrm{orth}[U, U_p], \quad \hat V = \mathrm{orth}[V, V_p], \\
      \hat S &= \hat U^\top U S V^\top \hat V, \quad
      \hat G = \hat U^\top (P(W) G) \hat V, \quad
      \hat N = \hat U^\top U N V^\top \hat V, \\
      \hat S &\leftarrow \hat S + \mathrm{inner}(\hat G, \hat N, \hat S)
        = P\, \mathrm{diag}(\sigma)\, Q^\top, \\
      U &\leftarrow \hat U P_1, \quad S \leftarrow \mathrm{diag}(\sigma_{1:r'}), \quad
      V \leftarrow \hat V Q_1, \quad N \leftarrow P_1^\top \hat N Q_1

    and second moments are carried by :math:`v \leftarrow (P_1^\top \sqrt{v}\, Q_1)^{\circ 2}`, or, where they do not
    ride on coefficients, with squared weights: :math:`v_{U} \leftarrow v_{U} (V^\top V')^{\circ 2}`. The gradients are
    those of the factors, as `jax.grad` gives them; no array of the size of W is formed.

    What `inner` sees at a kernel is one matrix whose norm is the Riemannian norm: weight decay inside decays W and
    never the bases, global-norm clipping inside clips the Riemannian norm. Both must be inside: outside they act
    on factors. Its step size has the unit of `inner`, so sgd's h moves W by h P(W)G. With balanced momentum it sees
    the gradients of the two factors, and half of each as parameters, so that weight decay decays W here too.

    A step in which a gradient, or anything computed from it, is not finite changes nothing and is counted.

    Args:
      inner: transformation with state that mirrors the parameters or is scalar: sgd, adam, adamw, rmsprop, lion,
        chains of them with schedules, clipping, decay. Not adafactor or sm3, whose state is factored.
      momentum: what `inner` works on and its state is kept as.
        "coefficient", as in the paper: the r x r coefficients of W; what leaves the kept bases is dropped. Next to no
        memory, but directions outside the bases never average more than one gradient, which shows in long runs.
        "tangent": tangent vectors, `r (m + n) + r^2` numbers each, transported by projection. Indifferent to the
        condition of W, therefore the choice for heavy ball.
        "balanced": the factors of W = (U S^{1/2}) (V S^{1/2})^T, as many numbers. A direction of singular value sigma
        moves sqrt(sigma) times as far, steps grow with the weights, and a step needs no basis of twice the rank. Best
        with normalised steps (Adam, Muon) on networks; keeps the rank. Plain gradient steps want a step size that
        falls like 1 / sigma: use "tangent" for them.
        Default: "tangent", or "coefficient" with a galerkin gradient. `RESULTS.md` compares the three.
      gradient: "projected" needs one gradient a step. "galerkin" is the loop of the authors, over
        `local_steps + 1` calls: the first only augments the bases, then `inner` updates the full augmented S with
        the gradients of the later batches, the bases frozen, and the last truncates. Its factors need a width of
        twice the rank (`max_rank` of `factorize`).
      local_steps: coefficient steps of a galerkin loop.
      retraction: "svd" truncates the augmented S at its best rank. "bug" (basis update and galerkin) keeps the
        rank and replaces the SVD of size 2r by two QR of 2r x r and an SVD of size r.
      rank: `tolerance(...)`, `budget(...)`, or None to keep the rank of every kernel.
      ordinary: transformation for leaves that are not `LowRank`; default `inner`.
      move_ordinary: whether ordinary leaves also move on the augmenting call of a galerkin loop. In the loop of
        the authors they do not. If they do, step counters inside `inner` advance on that call too.
      second_moments: names of the fields in the state of `inner` that hold squares; they are carried so
        that they stay non-negative, see above, all other mirrors linearly.
      stack: "kernels" gives `inner` all kernels of equal shape as one with a batch axis, in the place of the first, and
        `None` for the others; "all" does so with ordinary vectors (biases, scales) too. The compiled step then grows
        little with depth. Allowed where all that is stacked is treated alike, elementwise or through sums over all
        leaves (adam, lion, sgd, clipping by global norm), not with norms of single leaves (lamb) or masks that tell
        kernels apart; with "all" also not with masks by path or number of axes. State and updates have the same
        structure. On a mesh with explicit axes nothing is stacked.

    Returns:
      A transformation whose updates are `new - old` for every factor, so that `optax.apply_updates` lands on the
      manifold. Chain nothing after it that rescales updates. Its `update` needs `params`. With a galerkin gradient it
      takes an optional extra argument `grad_fn`, a function from parameters to gradients: each call is then a whole
      loop on one batch. It passes `kernels`, the tree of factored parameters, and `momentum` to `inner` as extra
      arguments.

    Raises:
      ValueError: for options that exclude each other; from `init` for kernels that are no valid factorisation or an
        `inner` whose state cannot be carried; from `update` for missing params or gradients of another structure.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> target = jnp.outer(jnp.arange(6.0), jnp.ones(5))
      >>> params = {"kernel": lro.lowrank_init(1)(jax.random.key(0), (6, 5))}
      >>> loss = lambda p: jnp.sum((jnp.eye(6) @ p["kernel"] - target) ** 2)
      >>> inner = optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(0.1, momentum=0.5))
      >>> tx = lro.fixed_rank(inner)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(60):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 1e-3)
      True

    References:
      Schotthöfer, Klein, Kusch, arXiv:2506.17475, low-rank heavy ball and low-rank Adam. The combinator, tangent
      momentum and budgets go beyond it.
    """
    if momentum is None:
        momentum = "coefficient" if gradient == "galerkin" else "tangent"
    for name, value, allowed in (
        ("momentum", momentum, ("balanced", "tangent", "coefficient")),
        ("gradient", gradient, ("projected", "galerkin")),
        ("retraction", retraction, ("svd", "bug")),
        ("stack", stack, (None, "kernels", "all")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if rank is not None and not isinstance(rank, rank_lib.RankPolicy):
        raise ValueError(
            f"rank takes a policy, tolerance(theta) or budget(parameters), or None to keep the rank that factorize "
            f"chose; got {rank!r}"
        )
    if momentum == "balanced" and (rank is not None or retraction != "svd"):
        raise ValueError(
            "momentum='balanced' keeps the rank of every kernel and has a retraction of its own: use "
            "momentum='tangent' with a rank policy or with retraction='bug'"
        )
    if gradient == "galerkin" and momentum != "coefficient":
        raise ValueError(
            "gradient='galerkin' works in augmented coefficients: use momentum='coefficient' with it, or "
            "gradient='projected' with another momentum"
        )
    if retraction == "bug" and (rank is not None or gradient == "galerkin"):
        raise ValueError(
            "retraction='bug' keeps the rank and needs the tangent gradient: use retraction='svd' with a rank policy "
            "or with gradient='galerkin'"
        )
    # Without a loop the number is not used, and inject_hyperparams may have made an array of it.
    if gradient == "galerkin" and (not isinstance(local_steps, int) or local_steps < 1):
        raise ValueError(
            f"local_steps must be a Python int of at least 1 (list it in static_args of inject_hyperparams), got "
            f"{local_steps!r}"
        )
    policy = rank_lib.keep() if rank is None else rank
    galerkin = gradient == "galerkin"
    kernel_step = {"balanced": st.balanced_step, "tangent": st.tangent_step, "coefficient": st.coefficient_step}[
        momentum
    ]

    def method_for(params: Any, place: Placement) -> st.Method:
        tx, kernel_tx = inner, None
        if ordinary is not None:
            labels = jax.tree.map(lambda x: "kernel" if is_kernel(x) else "ordinary", params, is_leaf=is_kernel)
            tx = optax.partition({"kernel": inner, "ordinary": ordinary}, labels)
            kernel_tx = optax.masked(inner, jax.tree.map(lambda label: label == "kernel", labels))
        tx = optax.with_extra_args_support(tx)
        return st.Method(
            inner=optax.GradientTransformationExtraArgs(place.explicit(tx.init), place.explicit(tx.update)),
            kernel_inner=kernel_tx,
            policy=policy,
            retraction=retraction,
            momentum=momentum,
            in_place=galerkin,
            second_moments=second_moments,
        )

    def init(params: Any) -> FixedRankState:
        params = _values(params)
        check_kernels(params, galerkin)
        params = jax.tree.map(_array, params)
        place = Placement(params)
        method, split = method_for(params, place), Split(params)
        return place.auto(functools.partial(start, method, split), params)

    def start(method: st.Method, split: Split, params: Any) -> FixedRankState:
        work = _working(params, params)
        views = split.merge(map(method.view, split.kernels(work)), split.ordinary(params))
        inner_state = method.inner.init(views)
        kernels: Any = jnp.zeros((), jnp.int32)
        if split:
            try:
                check_carries(*method.kernel_part(inner_state), split, views)
            except ValueError as error:
                raise ValueError(
                    "fixed_rank cannot carry the state of this inner transformation between bases: its leaves must "
                    "mirror the parameters in shape, or be scalars. Factored second moments (adafactor, sm3) do not; "
                    f"use adam, rmsprop, lion, sgd or another elementwise transformation. Cause: {error}"
                ) from error
            states = (_kernel_state(W, galerkin) for W in split.kernels(work))
            kernels = split.merge(states, [None] * split.ordinary_count)
        return FixedRankState(inner_state, kernels, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        updates: Any,
        state: FixedRankState,
        params: Any = None,
        *,
        grad_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, FixedRankState]:
        check_gradients(updates, params)
        place = Placement(params)
        method, split = method_for(params, place), Split(params)
        grad_fn = place.explicit(grad_fn) if grad_fn else None
        # What inner gets as extra arguments stays as it lies on the mesh.
        extra = {**extra_args, "kernels": params, "momentum": momentum}

        def step(updates: Any, state: FixedRankState, params: Any) -> tuple[Any, FixedRankState]:
            _check_state(method, split, state, params)
            whole = state.inner_state
            updates, state = lay_out(updates, state._replace(inner_state=method.working_state(whole, split)), params)
            return updates, state._replace(inner_state=method.whole_state(state.inner_state, whole, split))

        def lay_out(updates: Any, state: FixedRankState, params: Any) -> tuple[Any, FixedRankState]:
            if stack is None or place or not split:
                return move(method, split, grad_fn, extra, updates, state, params)
            stacks = Stacks(method.inner, Split(params, vectors=stack == "all"), params)
            below = stacks.stack(params)
            at = grad_fn and (lambda p: stacks.stack(_working(grad_fn(stacks.unstack(p)), params)))
            grads, before = stacks.stack(_working(updates, params)), stacks.stack_state(state)
            stacked = {**extra, "kernels": below}
            updates, state = move(
                method_for(below, place), Split(below, stacked=True), at, stacked, grads, before, below
            )
            return stacks.unstack_step(updates, state)

        return place.auto(step, updates, state, params, like=(params, state))

    def move(
        method: st.Method, split: Split, grad_fn: Any, extra: dict[str, Any], updates: Any, state: Any, params: Any
    ) -> tuple[Any, FixedRankState]:
        finite = linalg.all_finite(split.ordinary(updates))
        if not split:
            moved_updates, inner_state = method.inner.update(updates, state.inner_state, params, **extra)
            moved, phase = st.Point(moved_updates, state.kernels, inner_state, finite), state.phase
        else:
            grads = _working(updates, params)
            if momentum != "balanced":  # whose gradient norm sees every value
                finite &= linalg.all_finite(split.kernels(grads))
            point = st.Point(_working(params, params), state.kernels, state.inner_state, finite)
            if galerkin and grad_fn is None:
                moved, phase = _galerkin_call(
                    method, split, point, grads, extra, state.phase, local_steps, move_ordinary
                )
            else:
                if galerkin:
                    at = functools.partial(_gradients_at, grad_fn, params, split)
                    moved = st.coefficient_step(method, split, point, grads, extra, at, local_steps)
                else:
                    moved = kernel_step(method, split, point, grads, extra)
                phase = state.phase
        ordinary_updates = split.ordinary(moved.params)

        def rest_finite() -> jax.Array:
            rest = method.rest_finite(state.inner_state, moved.inner_state, split)
            return linalg.all_finite(ordinary_updates) & rest

        # In a branch, or else the compiler makes every leaf a second time inside its check: twice the compile time.
        finite = jax.lax.cond(moved.finite, rest_finite, lambda: jnp.zeros((), bool))

        def select(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: a if a is b else jnp.where(finite, a, b), new, old)

        skipped = optax.safe_increment(state.notfinite_count)
        state = FixedRankState(
            inner_state=select(moved.inner_state, state.inner_state),
            kernels=select(moved.kernels, state.kernels),
            phase=select(phase, state.phase),
            notfinite_count=select(state.notfinite_count, skipped),
        )
        ordinary_updates = select(ordinary_updates, jax.tree.map(jnp.zeros_like, ordinary_updates))
        return split.merge_each(_differences(params, moved.params, split, finite), ordinary_updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _values(params: Any) -> Any:
    """`nnx.Optimizer` gives `init` a tree of variables and `update` one of their values: this makes it the latter."""

    def is_variable(x: Any) -> bool:
        return hasattr(x, "get_raw_value")

    return jax.tree.map(lambda x: x.get_raw_value() if is_variable(x) else x, params, is_leaf=is_variable)


def _array(x: Any) -> Any:
    """`init` accepts shapes in the place of arrays, as Optax does."""
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


def _check_state(method: st.Method, split: Split, state: Any, params: Any) -> None:
    try:
        if not isinstance(state, FixedRankState):
            raise ValueError(f"it is a {type(state).__name__}")
        if split:
            split.each(state.kernels)
            # Kernels of a group have views of the same shape.
            views = (
                [jax.eval_shape(lambda W: method.view(flatten(W)), Ws[0])] * len(Ws) for Ws in split.groups(params)
            )
            places = split.merge_each((view for group in views for view in group), split.ordinary(params))
            check_carries(*method.kernel_part(state.inner_state), split, places)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "the optimizer state does not belong to these parameters and this optimizer: make it with tx.init(params), "
            f"and change the width of factors with lowrank_optax.resize, which changes both. Cause: {error}"
        ) from error


def _kernel_state(W: LowRank, galerkin: bool) -> st.KernelState:
    """The rank is the number of non-zero singular values; a zero kernel may use all columns that there is room for."""
    most, count = max(1, W.rank // 2) if galerkin else W.rank, mf.rank(W.S)
    rank = jnp.where(count == 0, most, count).astype(jnp.int32)
    return st.KernelState(rank, *(jnp.zeros(W.batch_shape, W.S.dtype) for _ in range(2)))


def _working(tree: Any, params: Any) -> Any:
    """`tree` with its kernels flattened and in the working dtype of the parameters."""

    def one(p: Any, x: Any) -> Any:
        return flatten(x.astype(linalg.working_dtype(p.U, p.S, p.V))) if is_kernel(p) else x

    return jax.tree.map(one, params, tree, is_leaf=is_kernel)


def _gradients_at(grad_fn: Any, params: Any, split: Split, point: Any) -> Any:
    """`grad_fn` at flattened kernels: in the axes and dtypes of the user, and back."""
    pairs = zip(split.each(point), split.each(params), strict=True)
    kernels = (cast_like(unflatten(W, like), like) for W, like in pairs)
    at = split.merge_each(kernels, split.ordinary(point))
    grads = grad_fn(at)
    check_gradients(grads, at)
    return _working(grads, at)


def _galerkin_call(
    method: st.Method,
    split: Split,
    point: st.Point,
    grads: Any,
    extra: dict[str, Any],
    phase: jax.Array,
    local_steps: int,
    move_ordinary: bool,
) -> tuple[st.Point, jax.Array]:
    """One of the `local_steps + 1` calls of a galerkin loop."""

    def first(point: st.Point, grads: Any) -> st.Point:
        return st.augment_step(method, split, point, grads, extra, move_ordinary)

    def later(point: st.Point, grads: Any) -> st.Point:
        point = st.frozen_step(method, split, point, grads, extra)
        cut = functools.partial(st.truncate_step, method, split)
        return jax.lax.cond(phase == local_steps, cut, lambda p: p, point)

    moved = jax.lax.cond(phase == 0, first, later, point, grads)
    return moved, jnp.where(phase == local_steps, 0, phase + 1).astype(jnp.int32)


def _differences(params: Any, moved: Any, split: Split, finite: jax.Array) -> list[LowRank]:
    """new - old for every factor of every kernel, in its dtype; zero unless `finite`."""

    def one(old: LowRank, new: LowRank) -> LowRank:
        new = cast_like(unflatten(new, old), old)
        return jax.tree.map(lambda a, b: jnp.where(finite, a - b, jnp.zeros_like(b)), new, old)

    return [one(old, new) for old, new in zip(split.each(params), split.each(moved), strict=True)]
