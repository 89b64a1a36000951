"""Trees of changes beside trees of parameters: `attach`, `merge`, `unmerge`, `add`, `as_lora`, `labels`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.change import Adapted, Change, dense_base, is_change, is_parameter
from lowrank_optax.adapters.core import Core, SingularValues
from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.lowrank import LowRankChange, as_change
from lowrank_optax.adapters.magnitude import Magnitude
from lowrank_optax.adapters.shared import SharedBank, is_shared
from lowrank_optax.boxes import closed, opened
from lowrank_optax.linalg import highest_precision
from lowrank_optax.lowrank import LowRank, is_lowrank
from lowrank_optax.paths import listed, path_name


def nested(found: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of values by path."""
    tree: dict[str, Any] = {}
    for name, value in found.items():
        *parents, last = name.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    return tree


def changes(delta: Any) -> dict[str, Any]:
    """The changes of a tree by the path of their kernel, those that share a bank with it."""
    leaves = jax.tree_util.tree_leaves_with_path(delta, is_leaf=lambda x: is_change(x) or is_bank(x))
    found = {path_name(path): x for path, x in leaves if not is_bank(x)}
    banks = {path_name(path): x for path, x in leaves if is_bank(x)}
    wrong = [f"{name!r} ({type(x).__name__})" for name, x in found.items() if not is_change(x)]
    if wrong:
        raise TypeError(
            f"a tree of adapters has changes made by lro.adapters.init as leaves, got {', '.join(wrong[:5])}"
        )
    return {name: with_banks(x, banks) for name, x in found.items()} if banks else found


def is_bank(x: Any) -> bool:
    """Whether x is a bank."""
    return isinstance(x, SharedBank)


def with_banks(change: Any, banks: dict[str, Any]) -> Any:
    """A change with the banks that it shares, also inside of another."""

    def one(x: Any) -> Any:
        return x.with_bank(banks[x.bank_name]) if is_shared(x) and x.bank_name in banks else x

    return jax.tree.map(one, change, is_leaf=lambda x: is_shared(x) or is_lowrank(x))


def attach(params: Any, delta: Any) -> Any:
    """The parameters with `Adapted` kernels, which multiply as `x @ W` and in `lowrank_optax.einsum`.

    `lowrank_optax.linen.apply` and `factored` do this by themselves. Use it for models that are functions of arrays.

    Args:
      params: the frozen parameters.
      delta: the tree of changes.

    Returns:
      The tree of parameters with an `Adapted` node for each kernel that has a change.

    Raises:
      ValueError: for changes without a kernel, or of other shapes.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> base, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2)
      >>> loss = lambda delta: jnp.sum(jnp.ones(6) @ lro.adapters.attach(base, delta)["kernel"])
      >>> jax.grad(loss)(delta)["kernel"].S.shape
      (2, 2)
    """
    return _mapped(lambda name, base, change: Adapted(base, change), params, delta, inside_box=False)


def merge(params: Any, delta: Any) -> Any:
    """The parameters of an ordinary model that computes the same, with dense kernels W in the dtype of W0.

    Args:
      params: the frozen parameters.
      delta: the tree of changes.

    Returns:
      The tree of parameters with arrays W in the place of W0.

    Raises:
      ValueError: for changes without a kernel, or of other shapes.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2)
      >>> lro.adapters.merge(params, delta)["kernel"].shape
      (6, 6)
    """
    run = highest_precision(lambda name, base, change: change.dense(dense_base(base)).astype(base.dtype))
    return _mapped(run, params, delta)


def unmerge(params: Any, delta: Any) -> Any:
    """The frozen parameters from merged ones, up to rounding; the inverse of `merge`.

    Args:
      params: the parameters that `merge` returned.
      delta: the tree of changes.

    Returns:
      The tree of parameters with W0 in the place of W.

    Raises:
      ValueError: for changes that do not tell W0 from W (kind `dora`), without a kernel, or of other shapes.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2)
      >>> lro.adapters.unmerge(lro.adapters.merge(params, delta), delta)["kernel"].shape
      (6, 6)
    """
    run = highest_precision(lambda name, merged, change: change.undo(merged).astype(merged.dtype))
    return _mapped(run, params, delta)


def add(*deltas: Any, weights: Iterable[float] | None = None) -> Any:
    r"""The weighted sum of several changes of one base, as pairs of factors beside each other.

    .. math:: \sum_i w_i D_i = A B, \quad A = (U_1 S_1, U_2 S_2, \dots), \quad B = (w_1 V_1, w_2 V_2, \dots)^\top

    Args:
      *deltas: trees of changes of kinds `lowrank`, `lora` or `core`; a kernel need not be in all of them.
      weights: one number for each, 1 by default.

    Returns:
      A tree of changes of kind `lora` with scale 1 and the sum of the ranks.

    Raises:
      TypeError: for weights that are no sequence.
      ValueError: for other kinds, changes of kernels of different shapes, or another number of weights.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.eye(6)}
      >>> params, one = lro.adapters.init(jax.random.key(0), params, rank=2)
      >>> params, two = lro.adapters.init(jax.random.key(1), params, rank=1, kind="lora")
      >>> lro.adapters.add(one, two, weights=(0.5, 0.5))["kernel"].A.shape
      (6, 3)
    """
    if weights is not None and not isinstance(weights, Iterable):
        raise TypeError(f"weights is a sequence of numbers, one for each tree, got {type(weights).__name__}")
    weights = (1.0,) * len(deltas) if weights is None else tuple(weights)
    if len(weights) != len(deltas) or not deltas:
        raise ValueError(f"add takes one weight for each tree, got {len(weights)} for {len(deltas)}")
    parts: dict[str, list[tuple[Any, Any]]] = {}
    for delta, weight in zip(deltas, weights, strict=True):
        for name, change in changes(delta).items():
            parts.setdefault(name, []).append((weight, low_rank_part(name, change)))
    for name, terms in parts.items():
        shapes = sorted({D.shape for _, D in terms})
        if len(shapes) > 1:
            raise ValueError(f"the changes of {name!r} are for kernels of different shapes, {shapes}")
    return nested({name: _beside(terms) for name, terms in parts.items()})


def low_rank_part(name: str, change: Any) -> LowRank:
    """D of a change that is a product of two factors whatever the base."""
    change = as_change(change)
    if not isinstance(change, LoRA | LowRankChange | Core | SingularValues):
        raise ValueError(
            f"the change of {name!r} is a {type(change).__name__}, which is no product of two factors whatever the "
            "base: as_lora(params, delta) makes pairs of those that are one, merge takes all"
        )
    return change.part(None)


@highest_precision
def _beside(terms: list[tuple[Any, LowRank]]) -> LoRA:
    """The sum of weighted parts as one pair."""
    batch = len(terms[0][1].batch_shape)
    lefts, rights = [], []
    for weight, D in terms:
        flat = D.flatten()
        US = (flat.U @ flat.S).reshape(D.U.shape)
        lefts.append(US)
        rights.append(jnp.moveaxis(weight * D.V, -1, batch))
    A, B = jnp.concatenate(lefts, -1), jnp.concatenate(rights, batch)
    return LoRA(A, B, jnp.ones(A.shape[:batch], A.dtype))


def as_lora(params: Any, delta: Any) -> Any:
    """Changes of any kind whose D has low rank as pairs of factors, for `export`, `add`, or to train on.

    Args:
      params: the frozen parameters: D may depend on them (`hra`), and on their shapes (`vera`).
      delta: the tree of changes.

    Returns:
      A tree of changes of kind `lora` with scale 1, of the ranks that the products have.

    Raises:
      ValueError: for changes that are no product of two factors.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2, kind="vera")
      >>> lro.adapters.as_lora(params, delta)["kernel"].A.shape
      (6, 2)
    """
    pairs: dict[str, Any] = {}

    def one(name: str, base: Any, change: Change) -> Any:
        part = None if isinstance(change, Magnitude) else change.part(dense_base(base))
        if not isinstance(part, LowRank):
            raise ValueError(
                f"the change of {name!r} is a {type(change).__name__}, which is no product of two factors: merge it"
            )
        pairs[name] = _beside([(1.0, part)])
        return base

    _mapped(one, params, delta)
    return nested(pairs)


def labels(delta: Any) -> Any:
    """`"trained"` or `"frozen"` for every array of a tree of changes, for `optax.partition`.

    Scales, frozen frames and random banks are not trained. A `LowRank` gets one label.

    Args:
      delta: the tree of changes.

    Returns:
      A tree of labels, a prefix of `delta`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2, kind="lora")
      >>> lro.adapters.labels(delta)["kernel"]
      LoRA(A='trained', B='trained', scale='frozen')
    """
    known = Change | SharedBank
    is_leaf = lambda x: isinstance(x, known) or is_lowrank(x)  # noqa: E731
    return jax.tree.map(lambda x: x.labels() if isinstance(x, known) else "trained", delta, is_leaf=is_leaf)


def _mapped(f: Callable[[str, Any, Change], Any], params: Any, delta: Any, inside_box: bool = True) -> Any:
    """`f(name, base, change)` in the place of every kernel with a change."""
    found = changes(delta)
    used: set[str] = set()

    def one(path: Any, box: Any) -> Any:
        name = path_name(path)
        if name not in found:
            return box
        used.add(name)
        change, base = as_change(found[name]), opened(box)
        shape = tuple(base.shape)
        if not change.fits(shape):
            raise ValueError(f"the change of {name!r} is for a kernel of another shape than {shape}")
        return closed(box, f(name, base, change)) if inside_box else f(name, box, change)

    out = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_parameter)
    missing = sorted(set(found) - used)
    if missing:
        raise ValueError("the parameters have no kernel for the changes of\n" + listed([f"  {x}" for x in missing]))
    return out
