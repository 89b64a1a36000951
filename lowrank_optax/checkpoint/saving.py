"""Saving: orbax's save, with a description of every leaf beside it."""

from __future__ import annotations

from typing import Any

import orbax.checkpoint as ocp

from lowrank_optax.checkpoint.fingerprint import checksum, describe
from lowrank_optax.checkpoint.folder import CHECKSUM, DESCRIPTION, check_manager, may_write, set_aside


def save(manager: ocp.CheckpointManager, step: int, tree: Any, **options: Any) -> bool:
    """Saves a tree with `manager.save`, and beside it a fingerprint of every leaf, by which `restore` knows damage.

    Orbax commits both together or neither. The fingerprint reads every value once, on its device; a sharded leaf
    is not gathered. Every leaf that orbax keeps comes back: arrays of JAX of any dtype, typed random keys, arrays and
    numbers of NumPy in 64 bits, Python numbers.

    If `restore` has found damaged checkpoints in this folder since this process started, `save` first calls
    `set_aside`, and their steps can be saved again.

    Args:
      manager: an orbax manager of a single item, the default.
      step: number of the checkpoint.
      tree: arrays in any containers: a linen `TrainState`, `nnx.state((model, optimizer))`, a dict of parameters
        and optimizer state.
      **options: for `manager.save`, e.g. `force=True`, `metrics`, `custom_metadata`.

    Returns:
      Whether the manager saved, as its save policy decides. Orbax writes in the background: call
      `manager.wait_until_finished()` before buffers of the tree are donated.

    Raises:
      TypeError: if `manager` is no `CheckpointManager`.
      ValueError: for leaves that orbax does not keep, or two leaves of one name.

    Example:
      >>> import jax.numpy as jnp, orbax.checkpoint as ocp, tempfile, lowrank_optax as lro
      >>> params = lro.factorize({"kernel": jnp.eye(6)}, rank=2)
      >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
      ...     saved = lro.checkpoint.save(manager, 7, params)
      ...     step, again = lro.checkpoint.restore(manager, params)
      >>> step, again["kernel"].U.shape
      (7, (6, 2))
    """
    check_manager(manager, "save")
    if may_write(manager):
        set_aside(manager)
    if not manager.should_save(step) and not options.get("force"):
        return False
    description = describe(tree)
    ours = {DESCRIPTION: description, CHECKSUM: checksum(description)}
    metadata = {**options.pop("custom_metadata", {}), **ours}
    return bool(manager.save(step, args=ocp.args.StandardSave(tree), custom_metadata=metadata, **options))
