"""The folder of a manager: its checkpoints, the metadata beside them, and the renaming of damaged ones."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from lowrank_optax.checkpoint.fingerprint import Description, checksum, dtype_name, leaf_name

DESCRIPTION = "lowrank_optax"  # in orbax's metadata of a step: shape, dtype and fingerprint of every leaf
CHECKSUM = "lowrank_optax_checksum"  # of the description

# Damage that `restore` has proved in this process: folder of a manager -> step -> identity of the folder of the step.
_proved: dict[str, dict[int, Any]] = {}
_LISTINGS = 10


def check_manager(manager: object, call: str) -> None:
    """Raises TypeError for anything but a manager of orbax, e.g. the folder itself."""
    if not isinstance(manager, ocp.CheckpointManager):
        raise TypeError(
            f"{call} takes an orbax CheckpointManager, got {manager!r}: "
            "with orbax.checkpoint.CheckpointManager(folder) as manager: ..., with the absolute path of the folder"
        )


def steps_of(manager: ocp.CheckpointManager) -> dict[int, Any]:
    """Step and folder of every checkpoint that stands there now, which other processes may have saved.

    `manager.reload()` would list them too, but also read the metadata of each, where damage to one is an error.
    """
    for _ in range(_LISTINGS):
        try:
            found = _steps_in(manager)
        except FileNotFoundError:  # one was removed meanwhile, or there is no folder
            found = {}
        # Orbax leaves out those that are removed while it lists them, which may be all.
        if found or not manager.directory.exists() or not any(manager.directory.iterdir()):
            return found
    return _steps_in(manager)


def _steps_in(manager: ocp.CheckpointManager) -> dict[int, Any]:
    return {found.step: found.path for found in manager._step_name_format.find_all(manager.directory)}


def may_write(manager: ocp.CheckpointManager) -> bool:
    """False for a manager that was opened with `read_only=True`."""
    return not manager._options.read_only


def item_of(folder: Any) -> Any:
    """Where the single item of a checkpoint lies."""
    return folder / "default" if (folder / "default").exists() else folder


def identity(folder: Any) -> Any:
    """Another one after a checkpoint was removed and its step was saved again; None where there is no folder."""
    try:
        stat = os.stat(folder)
        return stat.st_ino, stat.st_mtime_ns
    except FileNotFoundError:  # or no local folder
        return folder.stat().mtime if folder.exists() else None


def described(manager: ocp.CheckpointManager, step: int, folder: Any) -> Description:
    """The shape and dtype of every saved leaf, and its fingerprint if `save` wrote it.

    Raises:
      OSError: if files cannot be read.
      Exception: of any kind if they are damaged, like the damage.
    """
    try:
        contents = json.loads((folder / "_CHECKPOINT_METADATA").read_bytes())  # orbax takes no notice of errors here
    except FileNotFoundError:
        contents = {}
    with _without_a_warning():
        manager.metadata(step)
    custom = contents.get("custom_metadata") or {}
    saved = custom.get(DESCRIPTION)
    if CHECKSUM in custom and (saved is None or checksum(saved) != custom[CHECKSUM]):
        raise ValueError("its metadata are not those that were saved")
    if saved is not None:
        return dict(saved)
    leaves = jax.tree_util.tree_leaves_with_path(item_metadata(folder))
    return {
        leaf_name(path): {
            "shape": list(getattr(leaf, "shape", None) or ()),
            "dtype": dtype_name(leaf.dtype) if hasattr(leaf, "dtype") else "str",
            **({"python": True} if type(leaf).__name__ == "ScalarMetadata" else {}),
        }
        for path, leaf in leaves
    }


@contextlib.contextmanager
def _without_a_warning() -> Iterator[None]:
    """Without orbax's log that an item could not be restored: a manager that has not saved learns how in `restore`."""
    wanted = lambda record: "was found in the checkpoint, but could not" not in str(record.msg)  # noqa: E731
    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def item_metadata(folder: Any) -> Any:
    """Orbax's own description of the item: dicts and lists, with metadata in the place of arrays."""
    return ocp.PyTreeCheckpointHandler().metadata(item_of(folder)).tree


def files_in(folder: Any) -> Any:
    """The identity of a folder and the names in it, which differ once the folder changes."""
    try:
        return identity(folder), sorted(_names_in(folder))
    except (FileNotFoundError, NotADirectoryError):  # removed while it was listed
        return None


def _names_in(folder: Any) -> Iterator[str]:
    for path in folder.iterdir():
        yield str(path)
        if path.is_dir():
            yield from _names_in(path)


def note_damage(manager: ocp.CheckpointManager, step: int, folder: Any) -> None:
    """Remembers that a checkpoint is damaged, for `set_aside`."""
    _proved.setdefault(str(manager.directory), {})[step] = identity(folder)


def set_aside(manager: ocp.CheckpointManager) -> list[str]:
    """Renames the checkpoints that `restore` has found damaged in this process, so that their steps can be saved again.

    A folder `<step>` becomes `<step>.damaged<number>`, which no manager takes for a checkpoint; nothing is removed.
    `save` calls this. Call it yourself where you save with `manager.save`: orbax saves no step that is not newer than
    all that stand there. A process that only reads never comes here.

    Args:
      manager: the manager of `restore`, or another one of the same folder.

    Returns:
      The new names.

    Raises:
      TypeError: if `manager` is no `CheckpointManager`.
      ValueError: for a manager that was opened with `read_only=True`.

    Example:
      >>> import orbax.checkpoint as ocp, tempfile, lowrank_optax as lro
      >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
      ...     lro.checkpoint.set_aside(manager)
      []
    """
    check_manager(manager, "set_aside")
    if not may_write(manager):
        raise ValueError(f"the manager of {manager.directory} was opened with read_only=True, which sets nothing aside")
    damaged, names = _proved.pop(str(manager.directory), {}), []
    if not damaged:
        return []
    manager.wait_until_finished()
    folders = steps_of(manager)
    for step, known in sorted(damaged.items()):
        path = folders.get(step)
        if path is None or identity(path) != known:  # removed, or saved again
            continue
        names.append(f"{path.name}.damaged{time.time_ns()}")
        if jax.process_index() == 0:
            path.rename(path.with_name(names[-1]))
    ocp.multihost.sync_global_processes("lowrank_optax.checkpoint.set_aside")
    left = steps_of(manager)
    manager._checkpoints.delete_if(lambda info: info.step in damaged and info.step not in left)
    return names
