"""Checkpoints that are checked when they are restored: orbax serialises, this file checks."""

from __future__ import annotations

import re
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lowrank_optax.lowrank import LowRank, is_lowrank

_KEY = "lowrank_optax"  # in orbax's metadata of a step: shape, dtype and fingerprint of every leaf


class Restored(NamedTuple):
    """The result of `restore`.

    Attributes:
      step: the step of the checkpoint.
      tree: the tree that was saved.
    """

    step: int
    tree: Any


def save(manager: ocp.CheckpointManager, step: int, tree: Any, **options: Any) -> bool:
    """Saves a tree with `manager.save`, and beside it a fingerprint of every leaf, by which `restore` knows damage.

    Orbax commits both together or neither. The fingerprint reads every value once, on its device; a sharded leaf
    is not gathered.

    Args:
      manager: an orbax manager of a single item, the default.
      step: number of the checkpoint.
      tree: arrays in any containers: a linen `TrainState`, `nnx.state((model, optimizer))`, a dict of parameters
        and optimizer state.
      **options: for `manager.save`, e.g. `force=True`, `metrics`, `custom_metadata`.

    Returns:
      Whether the manager saved, as its save policy decides. Orbax writes in the background: call
      `manager.wait_until_finished()` before buffers of the tree are donated.

    Example:
      >>> import jax.numpy as jnp, orbax.checkpoint as ocp, tempfile, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2)
      >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
      ...     saved = lro.checkpoint.save(manager, 7, params)
      ...     step, again = lro.checkpoint.restore(manager, params)
      >>> step, again["kernel"].U.shape
      (7, (6, 2))
    """
    if not manager.should_save(step) and not options.get("force"):
        return False
    metadata = {**options.pop("custom_metadata", {}), _KEY: _describe(tree)}
    return bool(manager.save(step, args=ocp.args.StandardSave(tree), custom_metadata=metadata, **options))


def restore(manager: ocp.CheckpointManager, like: Any = None, step: int | None = None) -> Restored | None:
    """The newest whole checkpoint, at the widths it was saved with.

    A checkpoint that cannot be read, or whose values differ from the saved ones, is skipped for the next older one, and
    a warning names it. Its folder gets the ending `.damaged` and a number, so that the step can be saved again. Keep
    more than one checkpoint (`preservation_policy` of the manager), and open the manager with
    `lightweight_initialize=True`, because damaged metadata of one step may otherwise keep it from opening.

    Args:
      manager: the manager of `save`. Checkpoints that `manager.save` wrote without `save` are read and not checked.
      like: the tree that was saved, of arrays or `jax.ShapeDtypeStruct`. The result is sharded like its leaves, on
        any mesh. Its factors may have other widths than the checkpoint: the result has the widths of the checkpoint,
        and `resize` changes them. Without `like` the result consists of dicts and lists, with `LowRank` nodes as
        `rebuild` makes them.
      step: the number of the checkpoint to read; default the newest.

    Returns:
      Step and tree, or None where there is no checkpoint.

    Raises:
      ValueError: if there are checkpoints and none can be used, because of damage or because `like` does not fit.
    """
    manager.wait_until_finished()  # all_steps also lists a save that still goes on
    steps = sorted(manager.all_steps(), reverse=True) if step is None else [step]
    failed: list[tuple[int, Exception]] = []
    for each in steps:
        try:
            restored = Restored(each, _restore(manager, each, like))
        # A damaged file raises any error of the parser that reads it.
        except Exception as error:
            failed.append((each, error))
            continue
        for bad, cause in failed:
            warnings.warn(f"checkpoint {bad} in {manager.directory} is skipped: {_reason(cause)}", stacklevel=2)
            _set_aside(manager, bad)
        return restored
    if failed:
        reasons = "; ".join(f"{bad}: {_reason(cause)}" for bad, cause in failed)
        raise ValueError(f"no checkpoint in {manager.directory} can be restored. {reasons}") from failed[0][1]
    return None


def rebuild(tree: Any) -> Any:
    """Makes `LowRank` nodes of the dicts `{"U", "S", "V"}` that orbax returns when it restores without a target.

    Args:
      tree: the result of `manager.restore(step)`.

    Returns:
      The tree with `LowRank` nodes in the place of those dicts.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> W = lro.factorize(jnp.eye(4), 2)
      >>> lro.checkpoint.rebuild({"kernel": {"U": W.U, "S": W.S, "V": W.V}})["kernel"].shape
      (4, 4)
    """

    def is_node(x: Any) -> bool:
        return isinstance(x, dict) and set(x) == {"U", "S", "V"} and not any(map(_is_container, x.values()))

    return jax.tree.map(lambda x: LowRank(**x) if is_node(x) else x, tree, is_leaf=is_node)


def _is_container(x: Any) -> bool:
    return isinstance(x, dict | list)


def _restore(manager: ocp.CheckpointManager, step: int, like: Any) -> Any:
    saved = (manager.metadata(step).custom_metadata or {}).get(_KEY)
    target = like if like is None or saved is None else _at_saved_widths(like, saved)
    tree = manager.restore(step, args=ocp.args.StandardRestore(target))
    if saved is not None:
        found = _describe(tree)
        changed = sorted(name for name in {*saved, *found} if saved.get(name) != found.get(name))
        if changed:
            raise ValueError(f"{changed[0]} and {len(changed) - 1} more leaves are not what was saved")
    return rebuild(tree) if like is None else tree


def _at_saved_widths(like: Any, saved: dict[str, Any]) -> Any:
    """The structure, dtypes and shardings of `like` with the widths of the checkpoint; nothing else may differ."""
    kernels = {_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(like, is_leaf=is_lowrank) if is_lowrank(x)}
    widths = {(W.S.shape[-1], saved[f"{p}/S"]["shape"][-1]) for p, W in kernels.items() if f"{p}/S" in saved}

    def one(path: Any, x: Any) -> Any:
        name = _name(path)
        if name not in saved:
            raise ValueError(f"there is no {name} in it")
        if not hasattr(x, "shape"):
            return x  # a Python number
        shape, dtype = tuple(saved[name]["shape"]), saved[name]["dtype"]
        fits = len(shape) == x.ndim and all(a == b or (a, b) in widths for a, b in zip(x.shape, shape, strict=True))
        if not fits or str(x.dtype) != dtype:
            raise ValueError(f"{name} is {dtype} {shape} in it, not {x.dtype} {tuple(x.shape)}")
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=getattr(x, "sharding", None))

    return jax.tree_util.tree_map_with_path(one, like)


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    """Renames the folder of a checkpoint, so that the manager no longer lists it."""
    if jax.process_index() == 0:
        for path in manager.directory.iterdir():
            if re.fullmatch(rf"(.*_)?0*{step}", path.name):
                path.rename(path.with_name(f"{path.name}.damaged{time.time_ns()}"))
    ocp.multihost.sync_global_processes("lowrank_optax.checkpoint.set_aside")
    manager.reload()


def _reason(error: Exception) -> str:
    """The first line of an error; errors of tensorstore go on with specifications."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _name(path: Any) -> str:
    """One name for a leaf of the tree that was saved and for the same leaf in the dicts and lists of orbax."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _describe(tree: Any) -> dict[str, Any]:
    """Shape, dtype and fingerprint of every leaf, by name."""
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    numbers = jax.device_get(_fingerprints(leaves))
    return {
        name: {"shape": list(jnp.shape(leaf)), "dtype": str(jnp.result_type(leaf)), "fingerprint": int(numbers[name])}
        for name, leaf in leaves.items()
    }


@jax.jit
def _fingerprints(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: _fingerprint(jnp.asarray(leaf)) for name, leaf in leaves.items()}


def _fingerprint(x: jax.Array) -> jax.Array:
    r"""The sum of `(2 i + 1) b_i` modulo 2^32 over the values of an array, `b_i` the bits of value i.

    An odd number has an inverse modulo 2^32, so any one changed value changes the sum; a damaged block keeps it
    with a chance of 2^-32. A sum of integers does not depend on the order of its terms, so it does not depend on the
    devices that hold x, and a sharded axis costs an all-reduce of one number.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)  # 8 bytes are two values on a new axis
    weight, stride = jnp.uint32(1), 2
    for axis in reversed(range(bits.ndim)):
        weight = weight + jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        stride *= bits.shape[axis]
    return jnp.sum(bits * weight, dtype=jnp.uint32)
