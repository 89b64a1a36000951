"""Checkpoints that are checked when they come back: orbax does the serialisation, this package the checking.

`save` and `restore` are all that a run needs. Only `save` and `set_aside` ever change a folder: a process that reads
leaves it as it is, whatever it finds there.
"""

from lowrank_optax.checkpoint.adapting import Adapted, adapt
from lowrank_optax.checkpoint.fingerprint import fingerprint as _fingerprint  # noqa: F401  for the tests
from lowrank_optax.checkpoint.folder import set_aside
from lowrank_optax.checkpoint.restoring import Restored, rebuild, restore
from lowrank_optax.checkpoint.saving import save

__all__ = ["Adapted", "Restored", "adapt", "rebuild", "restore", "save", "set_aside"]
