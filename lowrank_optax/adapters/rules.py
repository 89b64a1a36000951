"""`optimizer`: an Optax transformation for the trained arrays of a tree of changes, by one of several rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.adapters.allocate import Allocation, allocating
from lowrank_optax.adapters.components import changes_of
from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.muon import scale_by_muon
from lowrank_optax.adapters.pairs import flatten_pair, is_pair, on_pairs, power_of_gram, with_nodes, without_nodes
from lowrank_optax.adapters.pro import pro
from lowrank_optax.adapters.rite import scale_by_rite
from lowrank_optax.adapters.trees import labels
from lowrank_optax.door import FixedRankState, nodes
from lowrank_optax.galerkin import GalerkinState
from lowrank_optax.geometry import Geometry, Tangent
from lowrank_optax.layout import map_matrices
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.optimize import fixed_rank
from lowrank_optax.paths import path_name
from lowrank_optax.rank import check_range


def optimizer(
    inner: optax.GradientTransformation,
    rule: str | None = None,
    *,
    ratio: float | jax.Array = 16.0,
    damping: float | jax.Array | None = None,
    geometry: Geometry | None = None,
    b1: float | jax.Array | None = None,
    b2: float | jax.Array = 0.999,
    rank: Allocation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The optimizer of a tree of changes: `inner` on its trained arrays, no state for the others.

    With :math:`W = W_0 + s\,A B`, A of m x r and B of r x n, and the gradients :math:`G_A, G_B` of a pair:

    ============== ======================================================================================
    None           `manifold` for kind `lowrank`, unless `inner` is `lro.lowrank_adam(...)` or another optimizer on the
                   manifold; else `plain`.
    `plain`        `inner` as it is.
    `plus`         LoRA+: the updates of B times `ratio`.
    `precondition` :math:`G_A (B B^\top + \lambda I)^{-1}` and :math:`(A^\top A + \lambda I)^{-1} G_B` go to `inner`.
    `pro`          LoRA-Pro: `inner` sees the gradient of W that a step of both factors stands for (m x n, which is
                   the size of its state), and its update is brought to the factors.
    `frozen_a`     LoRA-FA: A is not trained and has no state. With a damping :math:`s^{-2} (A^\top A + \lambda I)^{-1}
                   G_B` goes to `inner`.
    `muon`         Polar factors of the momenta of both factors go to `inner`, with a damping LoRA-Muon's, see
                   `scale_by_muon`. Its learning rate is the spectral norm of a step.
    `rite`         LoRA-RITE: a direction that does not depend on how A B is shared between A and B goes to `inner`, see
                   `scale_by_rite`. It has both moments, so `inner` is `optax.sgd(...)`.
    `manifold`     `fixed_rank(inner, geometry=geometry)` for kernels of kind `lowrank`.
    ============== ======================================================================================

    Arrays that belong to no pair get `inner` under every rule, also below `muon` and `rite`, where `inner` has no
    moments: choose a kind without such arrays, or `optax.partition`.

    Args:
      inner: a transformation of Optax, with its learning rate.
      rule: a rule of the table. By default every kind trains with an ordinary optimizer, `optax.adamw(...)` say.
      ratio: of `plus`, the step of B over the step of A.
      damping: lambda of `precondition`, default 1e-2, of `pro` and `rite`, default 1e-8, of `frozen_a`, default no
        preconditioning, and of `muon`, default each factor by itself. A small one makes the first steps from B = 0
        large. Where it does not lift an eigenvalue above rounding, inverses are pseudo-inverses.
      geometry: of `manifold`, see `fixed_rank`; default `Tangent()`, which leaves a zero change sooner than the others.
      b1: the decay of the momentum of `muon`, default 0.95, or of the first moment of `rite`, default 0.9.
      b2: the decay of the second moment of `rite`.
      rank: `lowrank_optax.adapters.budget(...)`, the components that changes of kind `adalora` keep.

    Returns:
      An Optax transformation of trees of changes. Scales, frozen frames and banks get zero updates.

    Raises:
      TypeError: for arguments of other types.
      ValueError: for an unknown rule or an option outside its range; from `init` if no change in the tree is of the
        kind that the rule, or `rank`, is for, and for changes of kind `lowrank` that another rule would take off the
        manifold; from `update` without the changes, where a rule reads them.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2, kind="lora")
      >>> tx = lro.adapters.optimizer(optax.adamw(3e-4), rule="plus", ratio=8.0)
      >>> state = tx.init(delta)
      >>> sum(x.size for x in jax.tree.leaves(state) if x.ndim)  # two moments of A and B
      48

    References:
      LoRA+: arXiv:2402.12354, section 4. Preconditioning: arXiv:2402.02347, equation 3. LoRA-Pro: arXiv:2407.18242,
      theorems 2.1 and 2.2. LoRA-FA: arXiv:2308.03303. LoRA-Muon: arXiv:2606.12921. LoRA-RITE: arXiv:2410.20625.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner is a transformation of Optax, optax.adamw(1e-3) say, got {inner!r}")
    if rule is not None and (not isinstance(rule, str) or rule not in RULES):
        raise ValueError(f"rule is one of {sorted(RULES)}, got {rule!r}")
    if rank is not None and not isinstance(rank, Allocation):
        raise TypeError(
            f"rank is lro.adapters.budget(...), got {type(rank).__name__}; policies of kernels on the manifold go into "
            "their geometry, geometry=lro.Tangent(rank=...)"
        )
    check_range("ratio", ratio)
    check_range("damping", damping)
    check_range("b1", b1, below=1.0)
    check_range("b2", b2, below=1.0)
    options = {"ratio": ratio, "damping": damping, "geometry": geometry, "b1": b1, "b2": b2}
    of_rule = _by_kind if rule is None else RULES[rule]
    tx = optax.with_extra_args_support(of_rule(optax.with_extra_args_support(inner), options))
    tx = tx if rank is None else allocating(tx, rank)
    needed = is_lowrank if rule == "manifold" else None if rule in (None, "plain") else is_pair
    reads_changes = needed is is_pair and (rule != "frozen_a" or damping is not None)

    def init(delta: Any) -> Any:
        delta = with_nodes(delta)
        # A placeholder of `optax.tree.map_params` has no leaves, and no kind either.
        if needed is not None and jax.tree.leaves(delta) and not any(map(needed, _nodes(delta))):
            kind = "'lowrank'" if rule == "manifold" else "'lora' or 'dora'"
            raise ValueError(f"rule {rule!r} is for changes of kind {kind}, and the tree has none")
        if rank is not None and jax.tree.leaves(delta) and not changes_of(delta):
            raise ValueError("rank=budget(...) is for changes of kind 'adalora', and the tree has none")
        state = tx.init(delta)
        if not _is_on_manifold(state):
            _refuse_off_manifold(delta)
        return state

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if reads_changes and params is None:
            raise ValueError(f"rule {rule!r} needs the changes: update(grads, state, params)")
        updates, state = tx.update(with_nodes(grads), state, with_nodes(params), **extra_args)
        return without_nodes(updates, grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def _nodes(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: is_pair(x) or is_lowrank(x))


def _is_on_manifold(state: Any) -> bool:
    """Whether a state, or its shapes, belongs to an optimizer of this library for kernels U S V^T."""
    return bool(nodes(state, FixedRankState) or nodes(state, GalerkinState))


def _refuse_off_manifold(delta: Any) -> None:
    """Raises ValueError for a kernel U S V^T, whose U and V ordinary steps would leave far from orthonormal."""
    leaves = jax.tree_util.tree_leaves_with_path(delta, is_leaf=is_lowrank)
    names = [path_name(path) for path, x in leaves if is_lowrank(x)]
    if names:
        raise ValueError(
            f"the change of {names[0]!r} is of kind 'lowrank', and ordinary steps would take it off the manifold: "
            "leave rule out, or choose rule='manifold' or an optimizer such as lro.lowrank_adam(...)"
        )


def trained(inner: Any, label: Callable[[Any], Any] = labels) -> optax.GradientTransformationExtraArgs:
    """`inner` for the arrays with the label "trained" and no state for the others."""
    return optax.with_extra_args_support(optax.partition({"trained": inner, "frozen": optax.set_to_zero()}, label))


def _by_kind(inner: Any, options: dict[str, Any]) -> Any:
    plain, manifold = _plain(inner, options), _manifold(inner, options)

    def chosen(delta: Any) -> Any:
        if not any(map(is_lowrank, _nodes(delta))):
            return plain
        return plain if _is_on_manifold(jax.eval_shape(plain.init, delta)) else manifold

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        new: tuple[Any, Any] = chosen(grads if params is None else params).update(grads, state, params, **extra_args)
        return new

    return optax.GradientTransformationExtraArgs(lambda delta: chosen(delta).init(delta), update)


def _plain(inner: Any, options: dict[str, Any]) -> Any:
    return trained(inner)


def _plus(inner: Any, options: dict[str, Any]) -> Any:
    ratio = options["ratio"]

    def faster(update: LoRA, pair: LoRA) -> LoRA:
        return dataclasses.replace(update, B=(ratio * update.B).astype(update.B.dtype))

    return optax.chain(trained(inner), optax.stateless(lambda updates, delta: on_pairs(faster, updates, delta)))


def _precondition(inner: Any, options: dict[str, Any]) -> Any:
    damping = 1e-2 if options["damping"] is None else options["damping"]

    def scaled(gradient: LoRA, pair: LoRA) -> LoRA:
        flat, back = flatten_pair(gradient, pair)
        return back(*map_matrices(_preconditioned, *flat, jnp.full(pair.scale.shape, damping, flat[0].dtype)))

    return optax.chain(optax.stateless(lambda grads, delta: on_pairs(scaled, grads, delta)), trained(inner))


def _frozen_a(inner: Any, options: dict[str, Any]) -> Any:
    def without_A(delta: Any) -> Any:
        return jax.tree.map(
            lambda x: dataclasses.replace(x, A="frozen") if is_pair(x) else x, labels(delta), is_leaf=is_pair
        )

    damping = options["damping"]
    if damping is None:
        return trained(inner, without_A)

    def scaled(gradient: LoRA, pair: LoRA) -> LoRA:
        flat, back = flatten_pair(gradient, pair)
        scale = pair.scale.astype(flat[0].dtype)
        new_B = map_matrices(_preconditioned_B, *flat[1:3], scale, jnp.full(scale.shape, damping, scale.dtype))
        return back(flat[0], new_B)

    return optax.chain(optax.stateless(lambda grads, delta: on_pairs(scaled, grads, delta)), trained(inner, without_A))


def _muon(inner: Any, options: dict[str, Any]) -> Any:
    b1 = 0.95 if options["b1"] is None else options["b1"]
    return optax.chain(scale_by_muon(b1, options["damping"]), trained(inner))


def _rite(inner: Any, options: dict[str, Any]) -> Any:
    b1 = 0.9 if options["b1"] is None else options["b1"]
    damping = 1e-8 if options["damping"] is None else options["damping"]
    return optax.chain(scale_by_rite(b1, options["b2"], damping), trained(inner))


def _manifold(inner: Any, options: dict[str, Any]) -> Any:
    geometry = options["geometry"]
    return trained(fixed_rank(inner, geometry=Tangent() if geometry is None else geometry))


def _pro(inner: Any, options: dict[str, Any]) -> Any:
    return pro(trained(inner), 1e-8 if options["damping"] is None else options["damping"])


RULES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "plain": _plain,
    "plus": _plus,
    "precondition": _precondition,
    "pro": _pro,
    "frozen_a": _frozen_a,
    "muon": _muon,
    "rite": _rite,
    "manifold": _manifold,
}


def _preconditioned(gA: jax.Array, gB: jax.Array, A: jax.Array, B: jax.Array, damping: jax.Array) -> Any:
    return gA @ _inverse(B @ B.T, damping), _inverse(A.T @ A, damping) @ gB


def _preconditioned_B(gB: jax.Array, A: jax.Array, s: jax.Array, damping: jax.Array) -> jax.Array:
    return _inverse(A.T @ A, damping) @ gB / s**2


def _inverse(gram: jax.Array, damping: jax.Array) -> jax.Array:
    """Zero where the damping does not lift an eigenvalue above rounding: gradients of factors vanish there too."""
    return power_of_gram(gram + damping * jnp.eye(gram.shape[0], dtype=gram.dtype), -1)
