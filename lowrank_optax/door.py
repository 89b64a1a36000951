"""The door: it turns a transformation of groups of leaves into a transformation of the user's trees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.boxes import unwrapped
from lowrank_optax.checks import arrays_of, check_gradients, check_kernels, check_moments, check_state
from lowrank_optax.geometry import Geometry
from lowrank_optax.guard import skip_not_finite
from lowrank_optax.inner import check_inner, treats_leaves_alike
from lowrank_optax.layout import Layout
from lowrank_optax.moments import Moments
from lowrank_optax.sharding import boxed_state


class FixedRankState(NamedTuple):
    """State of the loop; `fixed_rank` keeps it in a `SkipNotFiniteState`.

    Attributes:
      inner_state: state of the inner transformation. In the place of a kernel it holds coordinates of the geometry, in
        float32 or better.
      aux: tree with the numbers that the geometry carries for every kernel beside the moments: its rank.
      info: tree with the `Info` of every kernel, for `diagnostics`.
      degrees: int32, for each copy of the kernels in `inner_state`, in order: 1 for first and 2 for second moments.
        `resize`, which does not know `inner`, reads here how moments change basis.
    """

    inner_state: optax.OptState
    aux: Any
    info: Any
    degrees: jax.Array


Make = Callable[[optax.GradientTransformationExtraArgs, Layout], Any]


class Door:
    """Trees outside, groups inside.

    Args:
      inner: transformation of trees in coordinates.
      moments: opens its states.
      geometry: of the kernels.
      kind: class of the state inside the `SkipNotFiniteState`.
    """

    def __init__(self, inner: Any, moments: Moments, geometry: Geometry, kind: type = FixedRankState):
        self._inner, self._moments, self._geometry, self._kind = inner, moments, geometry, kind
        self._alike = treats_leaves_alike(inner)

    def transformation(
        self, make: Make, max_consecutive_skips: int | jax.Array, first: Callable[[FixedRankState], Any] = lambda s: s
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation of trees, which skips steps that are not finite.

        Args:
          make: `make(inner, layout)` returns the `update` of groups.
          max_consecutive_skips: see `skip_not_finite`.
          first: makes the first state of the transformation from the first state of the loop.
        """

        def guarded(update: Any) -> optax.GradientTransformationExtraArgs:
            tx = optax.GradientTransformationExtraArgs(lambda params: first(self.init(params)), update)
            return skip_not_finite(tx, max_consecutive_skips)

        def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
            return self.update(lambda *args: guarded(make(*args)), grads, state, params, extra_args)

        return optax.GradientTransformationExtraArgs(guarded(None).init, update)

    def init(self, params: Any) -> FixedRankState:
        """The state before the first step. Its moments have boxes like the parameters that they mirror."""
        boxed, params = params, unwrapped(params)[0]
        check_kernels(params, self._geometry)
        params = arrays_of(params)
        layout = Layout(params, self._geometry, self._alike)

        def start(params: Any) -> FixedRankState:
            weights = layout.weights(params)
            coordinates = layout.scatter(layout.map("template", weights))
            check_inner(self._inner, self._geometry, coordinates)
            state = layout.mesh.explicit(self._inner.init)(coordinates)
            degrees = jnp.asarray(check_moments(layout, self._moments, state), jnp.int32)
            starts = layout.map("init", weights)
            aux, info = (layout.scatter_kernels(start[i] for start in starts) for i in (0, 1))
            return FixedRankState(state, aux, info, degrees)

        if layout.mesh:  # Compiled, because eager operations in explicit mode would need `jax.set_mesh`.
            start = jax.jit(functools.partial(layout.mesh.auto, start))
        return boxed_state(start(params), boxed)

    def update(self, make: Make, grads: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> Any:
        """A step of `make(inner, layout)`, a transformation of groups. It gets extra arguments unchanged."""
        (grads, _), (state, rebox_state), (params, rebox) = map(unwrapped, (grads, state, params))
        check_gradients(grads, params)
        layout = Layout(params, self._geometry, self._alike)
        check_state(layout, self._moments, getattr(state, "inner_state", state), self._kind)

        def step(grads: Any, state: Any, params: Any) -> Any:
            groups = _map_states(functools.partial(self._gather, layout), state)
            tx = make(self._of_groups(layout, state), layout)
            differences, groups = tx.update(layout.weights(grads), groups, layout.weights(params), **extra_args)
            return layout.updates(differences), _map_states(functools.partial(self._scatter, layout), groups, state)

        updates, state = layout.mesh.auto(step, grads, state, params, like=(params, state))
        return rebox(updates), rebox_state(state)

    def _gather(self, layout: Layout, state: FixedRankState) -> FixedRankState:
        inner_state = self._moments.map(lambda copy: layout.gather_copy(copy.tree), state.inner_state)
        aux, info = map(layout.gather_kernels, (state.aux, state.info))
        return state._replace(inner_state=inner_state, aux=aux, info=info)

    def _scatter(self, layout: Layout, state: FixedRankState, like: FixedRankState) -> FixedRankState:
        inner_state = self._moments.map(
            lambda copy, old: layout.scatter_copy(copy.tree, old.tree), state.inner_state, like.inner_state
        )
        aux, info = map(layout.scatter_kernels, (state.aux, state.info))
        return state._replace(inner_state=inner_state, aux=aux, info=info)

    def _of_groups(self, layout: Layout, state: Any) -> optax.GradientTransformationExtraArgs:
        """The inner transformation for groups. Unless it treats leaves alike, it sees the tree of the user."""
        if self._alike and not layout.mesh:
            return self._inner
        (node,) = nodes(state, FixedRankState)

        def update(grads: Any, state: Any, weights: Any, **extra_args: Any) -> Any:
            state = self._moments.map(
                lambda copy, old: layout.scatter_copy(copy.tree, old.tree), state, node.inner_state
            )
            step = layout.mesh.explicit(self._inner.update)
            steps, state = step(layout.scatter(grads), state, layout.scatter(weights), **extra_args)
            return layout.gather(steps), self._moments.map(lambda copy: layout.gather_copy(copy.tree), state)

        return optax.GradientTransformationExtraArgs(self._inner.init, update)


def nodes(tree: Any, kind: type) -> list[Any]:
    """The nodes of a class in a tree."""
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in found if isinstance(x, kind)]


def _map_states(f: Callable[..., Any], *states: Any) -> Any:
    """The states with `f` of each state of the loop inside them."""

    def one(x: Any, *rest: Any) -> Any:
        return f(x, *rest) if isinstance(x, FixedRankState) else x

    return jax.tree.map(one, *states, is_leaf=lambda x: isinstance(x, FixedRankState))
