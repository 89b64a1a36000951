"""Whether a failure to restore proves damage. Only proved damage lets `restore` go on to an older checkpoint.

An error of the system (no permission, too many open files, a disk or a network that fails) says nothing about the
checkpoint, nor does a target that does not fit. Damage is proved if a second reading, without the user's target, finds
it again: a file that its parser refuses or that is gone, or a value that the fingerprint contradicts.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lowrank_optax.checkpoint.fingerprint import changed_leaves, leaf_name
from lowrank_optax.checkpoint.fit import is_native
from lowrank_optax.checkpoint.folder import described, files_in, identity, item_metadata, item_of

# The errors that parsers raise. Tensorstore raises ValueError for everything, with a status in front.
_PARSERS = (
    *(ValueError, LookupError, TypeError, AttributeError, NotImplementedError, EOFError, ArithmeticError),
    *(AssertionError, FileNotFoundError),
)
_OF_THE_SYSTEM = re.compile(
    r"(UNKNOWN|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|CANCELLED|ABORTED"
    r"|INTERNAL|UNIMPLEMENTED|ALREADY_EXISTS)\b"
)
_CODE = re.compile(r"os_error_code='(\d+)'")
_AT_ONCE = 2**30  # bytes of arrays that are read at a time


class Gone(Exception):
    """The checkpoint was removed, or saved again, while it was read."""


class Damaged(Exception):
    """The checkpoint is damaged, proved."""


def judged(
    error: Exception | None, manager: ocp.CheckpointManager, step: int, folder: Any, before: Any, names: Any
) -> Exception:
    """The exception to raise for a failure: `Gone`, `Damaged`, or the error itself.

    Args:
      error: the error that came; None where values came back that the fingerprints contradict.
      manager: of the checkpoint.
      step: its number.
      folder: its folder.
      before: the identity of the folder before it was read.
      names: of the leaves that are wanted; None for all.
    """
    place = f"checkpoint {step} in {manager.directory}"
    if identity(folder) is None:
        return Gone(f"{place} was removed while it was read")
    try:
        if error is not None and not may_be_damage(error):
            raise error
        reason = _damage(manager, step, folder, names)
    except Exception as other:
        other = _as_oserror(other)
        other.add_note(f"This came while {place} was read, and says nothing about its files; nothing was changed.")
        return other
    if identity(folder) != before or (reason and is_changing(folder)):
        return Gone(f"{place} was removed or saved again while it was read")
    if reason:
        return Damaged(reason)
    if error is None:
        return Gone(f"the values of {place} came back changed, though its files are whole")
    return ValueError(f"{place} is whole, but does not fit the target. {type(error).__name__}: {error}")


def may_be_damage(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is of a parser, and none of the system."""
    chain = _chain(error)
    if any(isinstance(e, OSError | MemoryError) and not isinstance(e, FileNotFoundError) for e in chain):
        return False
    if any(_OF_THE_SYSTEM.match(str(e)) or _CODE.search(str(e)) for e in chain):
        return False
    return any(isinstance(e, _PARSERS) for e in chain)


def _as_oserror(error: Exception) -> Exception:
    """An error of the system that tensorstore raised as a ValueError, as the OSError that it is; others unchanged."""
    for e in _chain(error):
        if code := _CODE.search(str(e)):
            return OSError(int(code[1]), reason(e))
        if isinstance(e, ValueError) and _OF_THE_SYSTEM.match(str(e)):
            return OSError(reason(e))
    return error


def _chain(error: BaseException) -> list[BaseException]:
    """An error and the errors that led to it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _damage(manager: ocp.CheckpointManager, step: int, folder: Any, names: Iterable[str] | None) -> str | None:
    """The damage; None if everything can be read and is as it was saved. Errors of the system are raised."""
    try:
        saved = described(manager, step, folder)
        metadata = item_metadata(folder)
    except Exception as error:
        if not may_be_damage(error):
            raise
        return reason(error)
    names = set(saved) if names is None else set(names)
    there = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(metadata)}
    absent = sorted(names - there.keys())
    if absent:
        return f"ValueError: there is no {absent[0]} in its tree"
    changed: list[str] = []
    for part in _parts({name: leaf for name, leaf in there.items() if name in names}):
        try:
            tree = read_leaves(folder, metadata, dict.fromkeys(part, np.empty(0)))
            # There are files that orbax reads only for arrays of JAX.
            read_leaves(folder, metadata, {name: _on_one_device(there[name]) for name in part})
        except Exception as error:
            if not may_be_damage(error):
                raise
            return reason(error)
        changed += changed_leaves(tree, saved, part)
    if not changed:
        return None
    more = f" and {len(changed) - 1} more leaves are" if len(changed) > 1 else " is"
    return f"ValueError: {changed[0]}{more} not what was saved"


def _on_one_device(leaf: Any) -> Any:
    """The leaf of a target for one that was saved as an array of JAX, or of NumPy for others."""
    if getattr(leaf, "sharding", None) is None or not is_native(leaf.dtype):
        return np.empty(0)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)


def _parts(leaves: dict[str, Any]) -> Iterator[list[str]]:
    """Names of leaves, about a gigabyte of arrays at a time."""
    part: list[str] = []
    size = 0
    for name, leaf in leaves.items():
        part.append(name)
        size += math.prod(getattr(leaf, "shape", None) or ()) * np.dtype(getattr(leaf, "dtype", np.uint8)).itemsize
        if size >= _AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def read_leaves(folder: Any, metadata: Any, wanted: dict[str, Any], synchronized: bool = False) -> Any:
    """Some leaves of a checkpoint, in the dicts and lists of orbax, and placeholders in the place of the others.

    Args:
      folder: of the checkpoint.
      metadata: of its item, see `item_metadata`.
      wanted: the leaves by name, as in a target of orbax: shapes with shardings for arrays of JAX, arrays of NumPy,
        numbers.
      synchronized: whether all processes read this together.
    """

    def one(path: Any, _: Any) -> Any:
        return wanted.get(leaf_name(path), ocp.PLACEHOLDER)

    def how(x: Any) -> Any:
        if x is ocp.PLACEHOLDER:
            return ocp.RestoreArgs()
        if isinstance(x, np.ndarray):
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return jax.tree.leaves(ocp.checkpoint_utils.construct_restore_args(x))[0]

    item = jax.tree_util.tree_map_with_path(one, metadata)
    args = ocp.args.PyTreeRestore(item, restore_args=jax.tree.map(how, item))
    if not synchronized:
        return ocp.PyTreeCheckpointHandler().restore(item_of(folder), args=args)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(item_of(folder), args=args)


def is_changing(folder: Any) -> bool:
    """Whether a folder is being removed, which may take some time: orbax removes one file after another."""
    before = files_in(folder)
    for _ in range(5):
        time.sleep(0.1)
        if files_in(folder) != before:
            return True
    return False


def reason(error: BaseException) -> str:
    """The first line of an error; errors of tensorstore go on with specifications."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
