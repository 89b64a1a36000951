"""The copies of the parameters inside the state of an Optax transformation, opened and closed as a whole.

`optax.tree.map_params` finds the copies. The class and the field of the state that holds a copy tell what it is, and no
key of the user's own tree does. Its degree says how it changes basis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

# Fields of Optax's states that hold moments, with the class where the field alone does not tell. Degree 1: linear in
# gradients. Degree 2: squares of gradients, per coordinate.
DEGREES = {
    **dict.fromkeys(("mu", "trace", "ema", "grad_acc", "acc_grads", "previous_gradient"), 1),
    **dict.fromkeys(("nu", "nu_max", "sum_of_squares", "e_g", "e_x"), 2),
    **{f"ScaleByAdanState.{field}": degree for field, degree in (("m", 1), ("v", 1), ("g", 1), ("n", 2))},
    **{f"ScaleByAdemamixState.{field}": 1 for field in ("m1", "m2")},
    "ScaleBySimplifiedAdEMAMixState.m": 1,
    "ScaleBySimplifiedAdEMAMixState.n": 2,
}


@dataclasses.dataclass(frozen=True)
class Copy:
    """One copy of the parameters, a leaf for JAX.

    Attributes:
      tree: of the structure of the parameters, with `optax.MaskedNode` where a mask leaves them out.
      owner: class of the state that holds it.
      field: its field there.
      degree: 1 for first moments, 2 for second moments, None if it is not known.
    """

    tree: Any
    owner: str = ""
    field: str = ""
    degree: int | None = None


class Moments:
    """Opens the states of a transformation.

    Args:
      tx: the transformation.
      first: names of further fields that hold first moments.
      second: names of further fields that hold second moments.
    """

    def __init__(self, tx: optax.GradientTransformation, first: Sequence[str] = (), second: Sequence[str] = ()):
        self._tx = tx
        self._degrees = {**DEGREES, **dict.fromkeys(first, 1), **dict.fromkeys(second, 2)}

    def open(self, state: Any) -> tuple[list[Copy], Callable[[Sequence[Any]], Any]]:
        """The copies in a state, and a function that puts trees in their places."""
        marked = optax.tree.map_params(self._tx, Copy, state, is_leaf=lambda _: True)
        leaves, treedef = jax.tree.flatten(marked)
        copies = [
            dataclasses.replace(copy, owner=owner, field=field, degree=self._degree(owner, field))
            for copy, owner, field in _named(marked)
        ]

        def close(trees: Sequence[Any]) -> Any:
            each = iter(trees)
            return jax.tree.unflatten(treedef, [next(each) if isinstance(x, Copy) else x for x in leaves])

        return copies, close

    def map(self, f: Callable[..., Any], *states: Any) -> Any:
        """The first state with each of its copies replaced by `f` of it and of the same copies of the other states."""
        (first, close), *others = map(self.open, states)
        return close([f(*copies) for copies in zip(first, *(copies for copies, _ in others), strict=True)])

    def _degree(self, owner: str, field: str) -> int | None:
        return self._degrees.get(f"{owner}.{field}", self._degrees.get(field))


def _named(node: Any, owner: str = "", field: str = "") -> list[tuple[Copy, str, str]]:
    """The copies below a node in the order of its leaves, each with the innermost state and field that hold it."""
    if isinstance(node, Copy):
        return [(node, owner, field)]
    found = []
    for key, child in _children(node):
        inside = (type(node).__name__, key.name) if isinstance(key, jax.tree_util.GetAttrKey) else (owner, field)
        found += _named(child, *inside)
    return found


def _children(node: Any) -> list[tuple[Any, Any]]:
    """The keys and children of a node, one level down; none for a leaf."""
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    return [(path[0], child) for path, child in children if path]
