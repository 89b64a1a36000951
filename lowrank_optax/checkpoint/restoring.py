"""Restoring: orbax's restore, with the target checked before and the values after it. Nothing here writes."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lowrank_optax.blocks import BlockLowRank
from lowrank_optax.checkpoint import fit
from lowrank_optax.checkpoint.fingerprint import Description, changed_leaves, leaf_name, named_leaves
from lowrank_optax.checkpoint.folder import (
    check_manager,
    described,
    files_in,
    identity,
    item_metadata,
    may_write,
    note_damage,
    steps_of,
)
from lowrank_optax.checkpoint.proof import Damaged, Gone, judged, read_leaves
from lowrank_optax.lowrank import LowRank

_TRIES = 50  # listings of a folder from which checkpoints are removed faster than they can be read
_SHOWN = 6  # misfits in a message


class Restored(NamedTuple):
    """The result of `restore`.

    Attributes:
      step: the step of the checkpoint.
      tree: the tree that was saved, or the part of it that was wanted.
    """

    step: int
    tree: Any


def restore(
    manager: ocp.CheckpointManager, like: Any = None, step: int | None = None, *, partial: bool = False
) -> Restored | None:
    """The newest checkpoint that is whole, at the widths it was saved with. Nothing on disk changes.

    The folder is listed anew at every call, so an evaluating process sees what a training process has saved since.
    A checkpoint that is removed meanwhile counts as gone.

    A checkpoint is damaged if a second reading finds the fault again: its parser refuses a file, a file is missing, or
    values differ from the saved ones. `restore` then skips it for the next older one, and a warning names it. The next
    `save` of this process, or `set_aside`, renames its folder. Everything else is an error. A target that does not fit
    raises one before any value is read. Errors of the system (I/O, permissions, memory) are raised as they come.

    Keep more than one checkpoint (`preservation_policy` of the manager), and open the manager with
    `lightweight_initialize=True`, because damaged metadata of one step may otherwise keep it from opening.

    Args:
      manager: an orbax manager of a single item; `read_only=True` is enough. Checkpoints that `manager.save` wrote
        without `save` are read and not checked for damage.
      like: the tree that was saved, of arrays or `jax.ShapeDtypeStruct`. The result is sharded like its leaves, on
        any mesh. Its kernels, and their moments with them, may have other widths than the checkpoint: the result has
        the widths of the checkpoint, and `resize` changes them. Without `like` the result consists of dicts and lists,
        with `LowRank` nodes as `rebuild` makes them. Its arrays lie where they were saved, or on the first device if
        those devices are missing; without x64, arrays of 64 bits are arrays of NumPy.
      step: the number of the checkpoint to read; default the newest.
      partial: whether `like` is a part of what was saved, under the keys that it had there: `{"params": params}` of a
        `TrainState`. Only its leaves are read and checked.

    Returns:
      Step and tree, or None where there is no checkpoint.

    Raises:
      TypeError: if `manager` is no `CheckpointManager`.
      ValueError: if `like` does not fit the newest checkpoint that is whole, with the leaves that differ; or if there
        are checkpoints and all are damaged.
      FileNotFoundError: if `step` is given and not there, or no longer.
      OSError: if files cannot be read.

    Example:
      >>> import jax.numpy as jnp, orbax.checkpoint as ocp, tempfile, lowrank_optax as lro
      >>> state = {"params": lro.factorize({"kernel": jnp.eye(6)}, rank=2), "step": jnp.int32(7)}
      >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
      ...     saved = lro.checkpoint.save(manager, 7, state)
      ...     step, part = lro.checkpoint.restore(manager, {"params": state["params"]}, partial=True)
      >>> step, part["params"]["kernel"].shape
      (7, (6, 6))
    """
    check_manager(manager, "restore")
    if partial and like is None:
        raise ValueError("partial=True needs `like`, the part of the tree that is wanted")
    manager.wait_until_finished()  # a save that is going on is one of the steps
    damaged: dict[int, str] = {}
    for tries in range(_TRIES):
        folders = steps_of(manager)
        if step is not None and step not in folders:
            raise FileNotFoundError(
                f"there is no checkpoint {step} in {manager.directory}; there are {sorted(folders)}"
            )
        for each in sorted(folders, reverse=True) if step is None else [step]:
            if each in damaged:
                continue
            try:
                tree = _read(manager, each, folders[each], like, partial)
            except Gone:
                if tries + 1 == _TRIES:
                    raise
                break
            except Damaged as error:
                damaged[each] = str(error)
                note_damage(manager, each, folders[each])
                continue
            _warn(manager, damaged)
            return Restored(each, tree)
        else:
            break
    if damaged:
        reasons = "; ".join(f"{bad}: {reason}" for bad, reason in sorted(damaged.items(), reverse=True))
        raise ValueError(f"no checkpoint in {manager.directory} can be restored. {reasons}")
    return None


def _warn(manager: ocp.CheckpointManager, damaged: dict[int, str]) -> None:
    later = ". The next save by this process renames its folder" if may_write(manager) else ""
    for bad, reason in damaged.items():
        warnings.warn(f"checkpoint {bad} in {manager.directory} is skipped: {reason}{later}", stacklevel=3)


def _read(manager: ocp.CheckpointManager, step: int, folder: Any, like: Any, partial: bool) -> Any:
    """The tree of one checkpoint, or `Gone`, `Damaged`, or the error that the caller shall see."""
    place = f"checkpoint {step} in {manager.directory}"
    before = identity(folder)
    if before is None:
        raise Gone(f"{place} was removed")
    try:
        saved = described(manager, step, folder)
    except Exception as error:
        _raise(judged(error, manager, step, folder, before, None), error)
    found = [] if like is None else fit.misfits(like, saved, partial)
    if found:
        raise ValueError(_misfit_message(manager, step, found, partial))
    names = set(named_leaves(like)) if partial else set(saved)
    checked = any("fingerprint" in saved[name] for name in names)
    files = None if checked else files_in(folder)
    try:
        tree = _values(manager, step, folder, like, saved, partial)
    except Exception as error:
        _raise(judged(error, manager, step, folder, before, names), error)
    changed = changed_leaves(tree, saved, names)
    if changed:
        raise judged(None, manager, step, folder, before, changed)
    if not checked and files_in(folder) != files:  # perhaps only half of it was there, and nothing would tell
        raise Gone(f"{place} was removed while it was read")
    if like is None:
        return rebuild(tree)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    values = named_leaves(tree)
    return jax.tree.unflatten(treedef, [fit.delivered(values[leaf_name(path)], x) for path, x in leaves])


def _raise(verdict: Exception, error: Exception) -> NoReturn:
    """Raises a verdict on an error, which may be the error itself."""
    raise verdict from (error.__cause__ if verdict is error else error)


def _misfit_message(manager: ocp.CheckpointManager, step: int, found: list[str], partial: bool) -> str:
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    part = any(message.startswith("the target has no") for message in found) and not partial
    return (
        f"the target does not fit checkpoint {step} in {manager.directory}: {'; '.join(found[:_SHOWN])}{more}. "
        + ("To read only a part, pass partial=True. " if part else "")
        + "Nothing was read or changed; lowrank_optax.checkpoint.adapt keeps what fits"
    )


def _values(
    manager: ocp.CheckpointManager, step: int, folder: Any, like: Any, saved: Description, partial: bool
) -> Any:
    """The leaves of a checkpoint as orbax reads them."""
    elsewhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # for devices that are not here

    def sharding(leaf: Any) -> Any:
        try:
            return leaf.sharding.to_jax_sharding()
        except (AttributeError, ValueError):
            return elsewhere

    def where_it_was(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or type(leaf).__name__ == "ScalarMetadata":
            return fit.request(0, {"shape": (), "dtype": str(leaf.dtype), "python": True})
        if leaf.sharding is None or not fit.is_native(leaf.dtype):
            return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf))

    if partial:
        metadata, wanted = item_metadata(folder), {}
        there = named_leaves(metadata)
        for name, x in named_leaves(like).items():
            wanted[name] = fit.request(x, saved[name])
            if isinstance(wanted[name], jax.ShapeDtypeStruct) and wanted[name].sharding is None:
                wanted[name] = wanted[name].update(sharding=sharding(there[name]))
        return read_leaves(folder, metadata, wanted, synchronized=True)
    if like is not None:
        target = jax.tree_util.tree_map_with_path(lambda path, x: fit.request(x, saved[leaf_name(path)]), like)
    elif all(
        entry["dtype"].startswith(("key<", "str")) or fit.is_native(np.dtype(entry["dtype"]))
        for entry in saved.values()
    ):
        target = None
    else:
        target = jax.tree.map(where_it_was, item_metadata(folder))
    return manager.restore(step, args=ocp.args.StandardRestore(target, fallback_sharding=elsewhere))


def rebuild(tree: Any) -> Any:
    """Makes factored kernels of the dicts `{"U", "S", "V"}` that orbax returns when it restores without a target.

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
        if not isinstance(x, dict) or set(x) != {"U", "S", "V"}:
            return False
        return not any(map(_is_container, map(_without_box, x.values())))

    def node(x: Any) -> Any:
        return _kernel(**{name: _without_box(y) for name, y in x.items()}) if is_node(x) else x

    return jax.tree.map(node, tree, is_leaf=is_node)


def _kernel(U: Any, S: Any, V: Any) -> Any:
    """The form is told by the axes in front of the matrices of S, which a `LowRank` has in all factors."""
    stack = jnp.shape(S)[:-2]
    same = all(jnp.shape(x)[: len(stack)] == stack for x in (U, V))
    return LowRank(U, S, V) if same else BlockLowRank(U, S, V)


def _without_box(x: Any) -> Any:
    """The value in a dict that was a box of Flax around a factor."""
    return x["value"] if isinstance(x, dict) and set(x) == {"value"} else x


def _is_container(x: Any) -> bool:
    return isinstance(x, dict | list)
