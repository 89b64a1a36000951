r"""Changes that go into their base during training: ReLoRA's restarts and SwitchLoRA's exchange of single components.

These are functions between steps. A sum of changes of rank r has a larger rank than r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.adapters.allora import ALLoRA
from lowrank_optax.adapters.change import is_parameter
from lowrank_optax.adapters.create import Variant, init, magnitude
from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.lowrank import LowRankChange, as_change
from lowrank_optax.adapters.magnitude import Magnitude
from lowrank_optax.adapters.pairs import flatten_pair, is_pair
from lowrank_optax.adapters.trees import changes, merge
from lowrank_optax.boxes import opened
from lowrank_optax.door import FixedRankState, nodes
from lowrank_optax.lowrank import LowRank, is_lowrank
from lowrank_optax.paths import path_name
from lowrank_optax.product import is_composed
from lowrank_optax.rank import check_number


def restart(key: jax.Array, params: Any, delta: Any) -> tuple[Any, Any]:
    """Puts the changes into the base and draws new ones that start at zero, of the same kinds, ranks and scales.

    The function that the model computes stays. Moments of the optimizer belong to the old changes, see `forget`.

    Args:
      key: a PRNG key, a new one for each restart.
      params: the frozen parameters.
      delta: the tree of changes, of kinds `lora`, `allora`, `dora` or `lowrank`.

    Returns:
      `params, delta`, the new ones.

    Raises:
      ValueError: for changes of other kinds, or a base that is quantized, whose rounding would lose the change.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2, kind="lora")
      >>> params, delta = lro.adapters.restart(jax.random.key(1), params, delta)

    References:
      ReLoRA, arXiv:2307.05695.
    """
    found = changes(delta)
    kinds = {name: _kind(name, change) for name, change in found.items()}
    shapes = {name: base.shape for name, base in _bases(params).items()}
    merged = merge(params, delta)
    for name, change in found.items():
        axes, rank = as_change(change).axes(tuple(shapes[name])), _rank(change)
        only = lambda path, shape, at=name, axes=axes: axes if path == at else False  # noqa: E731
        _, fresh = init(key, merged, rank, kind=kinds[name], where=only)
        new = changes(fresh)[name]
        delta = _replaced(delta, name, _with_scale(new, change))
    return merged, delta


def forget(tx: Any, state: Any) -> Any:
    """The state of an optimizer with all moments set to zero; counts stay.

    ReLoRA may keep the largest entries of each moment. A first moment without its second one makes a huge step of Adam,
    so here nothing is kept. Let the rate rise again after it, see `restarts`.

    Args:
      tx: the transformation.
      state: its state.

    Returns:
      The state.

    Raises:
      ValueError: for changes of kind `lowrank` below an `optimizer` without a rule, whose form nothing but the changes
        tells: name the rule, `optimizer(inner, "manifold")`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, optax
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2, kind="lora")
      >>> tx = lro.adapters.optimizer(optax.adam(1e-3))
      >>> state = lro.adapters.forget(tx, tx.init(delta))
    """
    try:
        return optax.tree.map_params(tx, jnp.zeros_like, state)
    except ValueError as error:
        if nodes(state, FixedRankState):
            raise ValueError(
                "forget finds another form of state than tx makes by itself: for changes of kind 'lowrank' name the "
                "rule, lro.adapters.optimizer(inner, 'manifold')"
            ) from error
        raise


def restarts(envelope: Callable[[Any], Any] | float, every: int, warmup: int) -> Callable[[Any], jax.Array]:
    r"""A schedule that rises again from zero after each restart: the envelope times :math:`\min(1, (t \bmod e) / w)`.

    Before the first restart it is the envelope, which may have a warm-up of its own.

    Args:
      envelope: a schedule, or a number.
      every: e, the steps from one restart to the next; the first is at step e.
      warmup: w, the steps of a rise.

    Returns:
      A schedule for Optax.

    Example:
      >>> import lowrank_optax as lro
      >>> rate = lro.adapters.restarts(1.0, every=100, warmup=10)
      >>> [round(float(rate(t)), 2) for t in (0, 99, 100, 105, 150)]
      [1.0, 1.0, 0.0, 0.5, 1.0]
    """
    if every < 1 or warmup < 1:
        raise ValueError(f"every and warmup are numbers of steps from 1, got {every} and {warmup}")

    def schedule(count: Any) -> jax.Array:
        value = envelope(count) if callable(envelope) else envelope
        return jnp.asarray(value) * jnp.where(count < every, 1.0, jnp.minimum((count % every) / warmup, 1.0))

    return schedule


def switch(key: jax.Array, params: Any, delta: Any, share: float) -> tuple[Any, Any, Any]:
    r"""Gives single components of pairs a new column of A, and the base what the old one did.

    .. math:: W_0 \leftarrow W_0 + s\,(a_k - a_k') b_k, \quad a_k \leftarrow a_k'

    with :math:`a_k'` drawn as at the start. The function that the model computes stays. SwitchLoRA takes :math:`a_k'`
    from a pool, where it puts :math:`a_k`, and exchanges rows of B likewise; here all columns are new draws. It sets
    the moments of the counterpart to zero and freezes it for some steps: multiply the moments by `kept`, and the
    updates of these steps.

    Args:
      key: a PRNG key, a new one for each call.
      params: the frozen parameters.
      delta: the tree of changes, of kind `lora`.
      share: the probability that a component is exchanged, from 0 to 1.

    Returns:
      `params, delta, kept`: `kept` is a tree like `delta` with 0 for the columns of A that are new and the rows of B
      beside them, else 1, and nothing in the place of scales, like moments below `optimizer`. So with the rules
      `plain`, `plus` and `precondition`, whose moments are pairs,
      `optax.tree.map_params(tx, lambda x, k: x * k, state, kept)` forgets the moments of new components.

    Raises:
      TypeError, ValueError: for changes of other kinds, a share that is no number from 0 to 1, or a base that is
        quantized.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2, kind="lora")
      >>> params, delta, kept = lro.adapters.switch(jax.random.key(1), params, delta, share=0.5)

    References:
      arXiv:2406.06564.
    """
    check_number("share", share)
    if not 0 <= share <= 1:
        raise ValueError(f"share is a probability, from 0 to 1, got {share}")
    found = changes(delta)
    for name, change in found.items():
        if not is_pair(change):
            raise ValueError(f"switch takes pairs of kind 'lora', and the change of {name!r} is {_title(change)}")
    _bases(params)
    keys = iter(jax.random.split(key, 2 * len(found)))

    def one(pair: LoRA) -> tuple[LoRA, LoRA]:
        _, _, A, B = flatten_pair(pair, pair)[0]
        m, r = A.shape[-2:]
        stays = jax.random.bernoulli(next(keys), 1.0 - share, (*A.shape[:-2], r)).astype(A.dtype)
        fresh = jax.random.uniform(next(keys), A.shape, A.dtype, -1, 1) * m**-0.5
        new = stays[..., None, :] * A + (1 - stays[..., None, :]) * fresh
        back = flatten_pair(pair, pair)[1]
        masks = jnp.broadcast_to(stays[..., None, :], A.shape), jnp.broadcast_to(stays[..., None], B.shape)
        return back(new, B), dataclasses.replace(back(*masks), scale=optax.MaskedNode())

    steps = jax.tree.map(one, delta, is_leaf=is_pair)
    take = lambda i: jax.tree.map(lambda x: x[i], steps, is_leaf=lambda x: isinstance(x, tuple))  # noqa: E731
    moved = jax.tree.map(lambda x, y: dataclasses.replace(x, A=x.A - y.A), delta, take(0), is_leaf=is_pair)
    return merge(params, moved), take(0), take(1)


def _bases(params: Any) -> dict[str, Any]:
    """The kernels by path, none of them quantized."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_parameter)
    found = {path_name(path): opened(x) for path, x in leaves}
    for name, x in found.items():
        if is_composed(x):
            raise ValueError(f"{name!r} is quantized: the rounding of its integers would lose the change")
    return found


def _title(change: Any) -> str:
    return f"a {type(change).__name__}"


def _kind(name: str, change: Any) -> Any:
    if isinstance(change, Magnitude) and isinstance(change.change, LoRA):
        return magnitude(_kind(name, change.change))
    if isinstance(change, ALLoRA):
        return Variant(type(change), {"eta": change.eta})
    if isinstance(change, LoRA | LowRank | LowRankChange):
        return "lora" if is_pair(change) else "lowrank"
    raise ValueError(f"restart takes kinds 'lora', 'allora', 'dora' and 'lowrank', and {name!r} has {_title(change)}")


def _rank(change: Any) -> int:
    if isinstance(change, Magnitude):
        return _rank(change.change)
    if isinstance(change, LoRA):
        return int(change.A.shape[-1])
    return _rank(change.kernel) if isinstance(change, LowRankChange) else int(change.width)


def _with_scale(new: Any, old: Any) -> Any:
    """The new change with the scale and the dtypes of the old one."""
    if isinstance(old, Magnitude):
        return dataclasses.replace(new, change=_with_scale(new.change, old.change))
    if isinstance(old, LowRankChange):
        new = LowRankChange(new)
    if not isinstance(old, LowRank):
        new = dataclasses.replace(new, scale=old.scale)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), new, old)


def _replaced(delta: Any, name: str, new: Any) -> Any:
    """The tree with another change in the place of one."""
    is_leaf = lambda x: is_pair(x) or is_lowrank(x) or isinstance(x, Magnitude | LowRankChange)  # noqa: E731
    one = lambda path, x: new if path_name(path) == name else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, delta, is_leaf=is_leaf)
