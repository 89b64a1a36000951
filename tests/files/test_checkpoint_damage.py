"""Only proved damage is damage, and reading never writes: misfits, errors of the system, removals, real damage."""

import json
import pathlib
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lowrank_optax as lro
from lowrank_optax.checkpoint import proof

pytestmark = [
    pytest.mark.usefixtures("settings_of_a_user"),
    # Orbax leaves coroutines behind when it meets damaged files.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PARAMS = {"kernel": lro.factorize(np.eye(6, 5, dtype=np.float32), 2, max_rank=3), "bias": np.zeros(5, np.float32)}
PARAMS = jax.tree.map(jnp.asarray, PARAMS)
LIGHT = ocp.CheckpointManagerOptions(lightweight_initialize=True)


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with the steps 1 and 2."""
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            lro.checkpoint.save(manager, step, jax.tree.map(lambda x, s=step: x + s, PARAMS))
    return tmp_path / "run"


def files(folder: pathlib.Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_ino, p.stat().st_mtime_ns) for p in [folder, *folder.rglob("*")])


def raiser(error: BaseException) -> Callable[..., Any]:
    def f(*args: Any, **options: Any) -> Any:
        raise error

    return f


ERRORS = {
    "io": OSError(5, "Input/output error"),
    "permission": PermissionError(13, "Permission denied"),
    "timeout": TimeoutError("deadline"),
    "descriptors": OSError(24, "Too many open files"),
    "memory": MemoryError(),
    "device memory": RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
    "runtime": RuntimeError("can't start new thread"),
}


@pytest.mark.parametrize("where", ["metadata", "values"])
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_the_system_is_raised_and_changes_nothing(
    name: str, where: str, run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, error = files(run), ERRORS[name]
    with ocp.CheckpointManager(run) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(manager, "restore" if where == "values" else "metadata", raiser(error))
            with pytest.raises(type(error)) as caught:
                lro.checkpoint.restore(manager, PARAMS)
        assert caught.value is error and any("checkpoint 2 in" in note for note in error.__notes__)
        assert lro.checkpoint.restore(manager, PARAMS).step == 2
    assert files(run) == before


TENSORSTORE = {
    "PERMISSION_DENIED: Failed to open: manifest.ocdbt: Permission denied [os_error_code='13']": PermissionError,
    "UNKNOWN: Failed to read from file: Input/output error [os_error_code='5']": OSError,
    "UNAVAILABLE: connection reset": OSError,
    "DEADLINE_EXCEEDED: no answer": OSError,
}


@pytest.mark.parametrize("message", TENSORSTORE)
def test_errors_of_the_system_come_as_such_from_tensorstore(
    message: str, run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises ValueError for them too, and orbax wraps that in an Exception."""
    error = Exception("Encountered error while reading array index")
    error.__cause__ = ValueError(message)
    before = files(run)
    with ocp.CheckpointManager(run) as manager:
        monkeypatch.setattr(manager, "restore", raiser(error))
        with pytest.raises(TENSORSTORE[message], match=message[:9]):
            lro.checkpoint.restore(manager, PARAMS)
    assert files(run) == before


@pytest.mark.parametrize("error", [ValueError("DATA_LOSS: crc"), FileNotFoundError("gone"), KeyError("k")])
def test_an_error_that_a_second_reading_does_not_confirm_is_no_damage(
    error: Exception, run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(run)
    with ocp.CheckpointManager(run) as manager:
        monkeypatch.setattr(manager, "restore", raiser(error))
        with pytest.raises(
            ValueError, match=r"checkpoint 2 in .* is whole, but does not fit the target\. " + type(error).__name__
        ):
            lro.checkpoint.restore(manager, PARAMS)
    assert files(run) == before


def test_an_error_while_fingerprints_are_read_does_not_leave_values_unchecked(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax takes no notice of it and goes on without them."""
    path = type(ocp.CheckpointManager(run).directory)
    read = path.read_bytes

    def failing(self: Any) -> bytes:
        if self.name == "_CHECKPOINT_METADATA":
            raise OSError(5, "Input/output error")
        return read(self)

    monkeypatch.setattr(path, "read_bytes", failing)
    with ocp.CheckpointManager(run) as manager, pytest.raises(OSError, match="Input/output"):
        lro.checkpoint.restore(manager, PARAMS)


# --- misfits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saver", ["lowrank_optax", "orbax"])
def test_a_misfit_is_known_before_values_are_read(
    saver: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is no reason to take an older checkpoint that fits."""
    older, newer = {"bias": jnp.zeros(4)}, {"bias": jnp.zeros(5)}
    with ocp.CheckpointManager(tmp_path) as manager:
        for step, tree in ((1, older), (2, newer)):
            if saver == "orbax":
                manager.save(step, args=ocp.args.StandardSave(tree))
            else:
                lro.checkpoint.save(manager, step, tree)
        manager.wait_until_finished()
        before = files(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(manager, "restore", raiser(AssertionError("values were read")))
            with pytest.raises(
                ValueError, match=r"checkpoint 2 in .*: bias is float32 \(5,\) in it, not float32 \(4,\)"
            ):
                lro.checkpoint.restore(manager, older)
        assert files(tmp_path) == before
        assert lro.checkpoint.restore(manager, older, step=1).step == 1
        assert lro.checkpoint.restore(manager, newer).step == 2


# --- removal and new checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [True, False])
def test_a_second_process_sees_the_newest_and_what_is_gone(read_only: bool, run: pathlib.Path) -> None:
    options = ocp.CheckpointManagerOptions(read_only=read_only)
    with ocp.CheckpointManager(run) as training, ocp.CheckpointManager(run, options=options) as reading:
        assert lro.checkpoint.restore(reading, PARAMS).step == 2
        lro.checkpoint.save(training, 5, PARAMS)
        training.wait_until_finished()
        assert lro.checkpoint.restore(reading, PARAMS).step == 5
        for step in (5, 2):
            training.delete(step)
        before = files(run)
        assert lro.checkpoint.restore(reading, PARAMS).step == 1
        with pytest.raises(FileNotFoundError, match=r"there is no checkpoint 2 in .*; there are \[1\]"):
            lro.checkpoint.restore(reading, PARAMS, step=2)
        assert files(run) == before
        training.delete(1)
        assert lro.checkpoint.restore(reading, PARAMS) is None


@pytest.mark.parametrize("moment", ["before", "half", "saved again"])
def test_a_checkpoint_that_is_removed_while_it_is_read_is_gone(
    moment: str, run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ocp.CheckpointManager(run) as manager:
        restore, times = manager.restore, []

        def while_it_is_removed(step: int, **options: Any) -> Any:
            times.append(step)
            if len(times) > 1:
                return restore(step, **options)
            if moment == "half":  # the rest goes while we look again
                shutil.rmtree(run / "2" / "default" / "d")
                wait = lambda seconds: shutil.rmtree(run / "2", ignore_errors=True)  # noqa: E731
                monkeypatch.setattr(proof.time, "sleep", wait)
                return restore(step, **options)
            shutil.rmtree(run / "2")
            if moment == "saved again":
                with ocp.CheckpointManager(run) as other:
                    lro.checkpoint.save(other, 2, PARAMS)
            return restore(step, **options)

        monkeypatch.setattr(manager, "restore", while_it_is_removed)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            step, tree = lro.checkpoint.restore(manager, PARAMS)
        assert step == (2 if moment == "saved again" else 1)
        assert tree["bias"][0] == (0 if moment == "saved again" else 1)


# --- damage -----------------------------------------------------------------------------------------------------


def test_a_listing_from_which_all_steps_vanished_is_taken_again(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax leaves out steps that are removed while it lists them: a slow reader beside a fast trainer may see none."""
    with ocp.CheckpointManager(run, options=LIGHT) as manager:
        real, listed = manager._step_name_format, []

        class Vanishing:
            def find_all(self, folder: Any) -> Any:
                listed.append(folder)
                return iter(()) if len(listed) < 3 else real.find_all(folder)

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        monkeypatch.setattr(manager, "_step_name_format", Vanishing())
        found = lro.checkpoint.restore(manager, PARAMS)
        monkeypatch.undo()
    assert found is not None and found.step == 2


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_description(path: pathlib.Path) -> None:
    """Damage that leaves JSON: another shape, which would look like a misfit."""
    contents = json.loads(path.read_text())
    contents["custom_metadata"]["lowrank_optax"]["bias"]["shape"] = [6]
    path.write_text(json.dumps(contents))


def lose_description(path: pathlib.Path) -> None:
    path.write_text(path.read_text().replace('"lowrank_optax"', '"lowrank_optay"'))


DAMAGES = {
    "metadata of the step": (cut, "_CHECKPOINT_METADATA"),
    "description": (edit_description, "_CHECKPOINT_METADATA"),
    "no description": (lose_description, "_CHECKPOINT_METADATA"),
    "tree": (cut, "default/_METADATA"),
    "arrays of JAX": (cut, "default/array_metadatas/process_0"),
    "manifest": (cut, "default/manifest.ocdbt"),
    "manifest gone": (pathlib.Path.unlink, "default/manifest.ocdbt"),
}


@pytest.mark.parametrize("options", [{"read_only": True}, {}])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_skipped_and_nothing_is_written(name: str, options: dict[str, bool], run: pathlib.Path) -> None:
    damage, file = DAMAGES[name]
    damage(run / "2" / file)
    before = files(run)
    options = ocp.CheckpointManagerOptions(lightweight_initialize=True, **options)
    with ocp.CheckpointManager(run, options=options) as manager:
        for _ in range(2):
            with pytest.warns(UserWarning, match=r"checkpoint 2 in .* is skipped: \w+") as caught:
                assert lro.checkpoint.restore(manager, PARAMS).step == 1
            (said,) = (text for text in map(str, (w.message for w in caught)) if "is skipped" in text)
            assert ("renames its folder" in said) == (not options.read_only)
            with pytest.raises(ValueError, match=r"no checkpoint in .* can be restored\. 2: "):
                lro.checkpoint.restore(manager, PARAMS, step=2)
        assert files(run) == before
        if options.read_only:
            with pytest.raises(ValueError, match="read_only=True"):
                lro.checkpoint.set_aside(manager)
            assert not lro.checkpoint.save(manager, 2, PARAMS)
            assert files(run) == before


def test_save_frees_the_step_that_was_damaged(run: pathlib.Path) -> None:
    """In another manager of the same process too; what was saved again meanwhile is left alone."""
    for step in "12":
        cut(run / step / "default" / "manifest.ocdbt")
    with (
        ocp.CheckpointManager(run, options=LIGHT) as manager,
        pytest.raises(ValueError, match=r"restored\. 2: .*; 1: "),
    ):
        lro.checkpoint.restore(manager, PARAMS)
    shutil.rmtree(run / "1")
    with ocp.CheckpointManager(run, options=LIGHT) as other:
        other.save(1, args=ocp.args.StandardSave(PARAMS), force=True)
        other.wait_until_finished()
        assert lro.checkpoint.save(other, 2, PARAMS)
        other.wait_until_finished()
        assert lro.checkpoint.restore(other, PARAMS).step == 2
    assert sorted(path.name[:9] for path in run.iterdir()) == ["1", "2", "2.damaged"]


def test_set_aside_by_hand(run: pathlib.Path) -> None:
    cut(run / "2" / "default" / "manifest.ocdbt")
    with ocp.CheckpointManager(run, options=LIGHT) as manager:
        with pytest.warns(UserWarning, match="is skipped"):
            lro.checkpoint.restore(manager, PARAMS)
        (name,) = lro.checkpoint.set_aside(manager)
        assert lro.checkpoint.set_aside(manager) == [] and (run / name).is_dir()
        assert manager.save(2, args=ocp.args.StandardSave(PARAMS))


def test_damage_outside_of_the_part_that_is_read(tmp_path: pathlib.Path) -> None:
    """Values of the optimizer state are wrong; the parameters beside them are read."""
    w = jax.random.normal(jax.random.key(0), (64, 48))  # does not compress: orbax alone notices nothing
    with ocp.CheckpointManager(tmp_path) as manager:
        lro.checkpoint.save(manager, 1, {"params": PARAMS, "mu": w})
    largest = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert lro.checkpoint.restore(manager, {"params": PARAMS}, partial=True).step == 1
        with pytest.raises(ValueError, match="1: ValueError: mu is not what was saved"):
            lro.checkpoint.restore(manager, {"mu": w}, partial=True)
