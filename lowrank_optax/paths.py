"""Names of leaves and kernels in trees of parameters, and the wrappers of nnx around values."""

from __future__ import annotations

from typing import Any

import jax

_WRAPPERS = tuple(map(jax.tree_util.GetAttrKey, ("value", "raw_value")))
_FACTORS = tuple(map(jax.tree_util.GetAttrKey, "USV"))


def path_name(path: Any) -> str:
    """The name of a leaf, `"block/dense/kernel"`, without the wrapper that nnx puts around values.

    The wrapper has the last key, or the last one in front of a factor. A key further up is the name of a layer, such as
    the layer `value` of an attention.
    """
    keys = list(path)
    at = len(keys) - (2 if keys and keys[-1] in _FACTORS else 1)
    if at >= 0 and keys[at] in _WRAPPERS:
        del keys[at]
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def is_wrapper(x: Any) -> bool:
    """Whether x is a variable of nnx, which wraps a value."""
    return hasattr(x, "get_raw_value")


def listed(lines: list[str]) -> str:
    """The first twelve lines of a message, and the number of the others."""
    more = [f"  and {len(lines) - 12} more"] if len(lines) > 12 else []
    return "\n".join([*lines[:12], *more] or ["  none"])


def refuse_shape(name: str, leaf: Any, call: str) -> None:
    """Raises TypeError for a shape in the place of an array, which only `jax.eval_shape` gives to a function."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{name!r} is a shape and no array: jax.eval_shape(lambda params: {call}, shapes) gives the shapes of the "
            "result"
        )


def refuse_nnx(params: Any, call: str, instead: str) -> None:
    """Raises TypeError for an nnx module, optimizer, or state of variables, where layers must change with parameters.

    Args:
      params: a tree of parameters, which has no nnx variables.
      call: the function that was called, for the message.
      instead: the call to write.
    """
    if not any(map(is_wrapper, jax.tree.leaves(params, is_leaf=is_wrapper))):
        return
    raise TypeError(
        f"{call} takes a tree of arrays and got a {type(params).__name__} with nnx variables, whose layers would not "
        f"run on factors: call {instead}, which changes the model in place"
    )
