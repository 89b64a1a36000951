"""Two processes in one folder: one trains, the other evaluates, with targets that do not fit and I/O errors."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

SAVES = 200

COMMON = """
    import json, os, pathlib, resource, sys, time, warnings
    import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
    import lowrank_optax as lro

    folder = pathlib.Path(sys.argv[1])
    saves = int(sys.argv[2])
    log = folder.with_suffix(".log")  # the training tells what it has saved
    params = {"kernel": lro.factorize(jnp.eye(6, 5), 2), "bias": jnp.zeros(5)}
    state = {"params": params, "opt_state": lro.lowrank_adam(1e-2).init(params)}

    def standing():
        return sorted(int(name) for name in os.listdir(folder) if name.isdigit())
"""

TRAINING = """
    def snapshot(step):
        paths = [folder / str(step), *(folder / str(step)).rglob("*")]
        return [(str(p), p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in paths]

    options = ocp.CheckpointManagerOptions(preservation_policy=ocp.checkpoint_managers.LatestN(5))
    seen = {}
    with ocp.CheckpointManager(folder, options=options) as manager:
        for step in range(1, saves + 1):
            for old, files in seen.items():  # before the save removes one of them
                assert snapshot(old) == files, f"checkpoint {old} was changed"
            time.sleep(0.02)  # a step of training
            assert lro.checkpoint.save(manager, step, jax.tree.map(lambda x: jnp.full_like(x, step), state))
            manager.wait_until_finished()
            seen = {step: snapshot(step) for step in standing()}
            assert [*seen] == list(range(max(1, step - 4), step + 1)), [*seen]
            log.write_text(str(step))
            assert not [name for name in os.listdir(folder) if not name.isdigit()], os.listdir(folder)
"""

EVALUATION = """
    writes = []

    def watch(event, args):
        changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime",
                   "os.chmod", "shutil.rmtree", "shutil.move", "shutil.copyfile")
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (event in changes or opened) and str(folder) in " ".join(map(str, args)):
            writes.append((event, *map(str, args)))

    sys.addaudithook(watch)
    warnings.simplefilter("error")  # a warning would name a damaged checkpoint
    warnings.filterwarnings("ignore", "Sharding info not provided")
    errors = [OSError(5, "Input/output error"), PermissionError(13, "Permission denied"), TimeoutError("deadline")]
    misfits = [
        {"params": {**params, "bias": jnp.zeros(6)}, "opt_state": state["opt_state"]},
        {"params": params, "opt_state": lro.lowrank_adam(1e-2, geometry=lro.Tangent()).init(params)},
        {"params": params},
    ]
    counts = dict.fromkeys(("polls", "read", "gone", "misfits", "errors", "descriptors"), 0)
    told, read, gone = 0, set(), set()

    def failing(error):
        def restore(*args, **options):
            raise error
        return restore

    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    managers = [ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=r)) for r in (True, False)]
    while not {*range(1, saves + 1)} <= read | gone:
        counts["polls"] += 1
        manager = managers[counts["polls"] % 2]
        newest = standing()[-1]
        like = [state, None, {"params": params}][counts["polls"] % 3]
        step, tree = lro.checkpoint.restore(manager, like, partial=counts["polls"] % 3 == 2)
        assert step >= newest, (step, newest)
        assert np.all(tree["params"]["kernel"].U == step) and np.all(tree["params"]["bias"] == step)
        read.add(step)

        kind = counts["polls"] % 4
        if kind == 0:
            try:
                lro.checkpoint.restore(manager, misfits[counts["polls"] // 4 % 3])
                raise AssertionError("a misfit was read")
            except ValueError as error:
                assert "does not fit checkpoint" in str(error), error
                counts["misfits"] += 1
        elif kind == 1:
            error = errors[counts["polls"] // 4 % 3]
            manager.restore = failing(error)
            try:
                lro.checkpoint.restore(manager, state)
                raise AssertionError("an error was lost")
            except OSError as caught:
                assert caught is error, caught
                counts["errors"] += 1
            finally:
                del manager.restore
        elif kind == 2:  # no file can be opened any more
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            few = len(os.listdir("/proc/self/fd")) + counts["polls"] // 4 % 4
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
            try:
                lro.checkpoint.restore(manager, state)
            except OSError as caught:
                assert caught.errno == 24, caught
                counts["descriptors"] += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)

        told = int(log.read_text() or told)
        for step in sorted(set(range(1, told + 1)) - read - gone):
            try:
                found, tree = lro.checkpoint.restore(manager, state, step=step)
                assert found == step and np.all(tree["params"]["kernel"].U == step)
                read.add(step)
            except FileNotFoundError:
                assert not (folder / str(step)).exists(), step
                gone.add(step)
    for manager in managers:
        manager.close()
    assert read | gone == set(range(1, saves + 1)), "some were missed"
    counts |= {"read": len(read), "gone": len(gone)}
    print(json.dumps({"writes": writes, **counts}))
"""


@pytest.mark.slow
def test_training_and_evaluation_share_a_folder(tmp_path: pathlib.Path) -> None:
    """The evaluation reads the newest at every poll, and each of the 200 steps is read or gone when it is told of it.

    It changes nothing: an audit hook in it sees every file that Python opens to write, and the training looks whether
    inodes, times and sizes are still those of its save.
    """

    def start(script: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(COMMON) + textwrap.dedent(script),
                str(tmp_path / "run"),
                str(SAVES),
            ],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            cwd=pathlib.Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    training, evaluation = start(TRAINING), start(EVALUATION)
    _, errors = training.communicate(timeout=900)
    if training.returncode:
        evaluation.kill()
    out, more = evaluation.communicate(timeout=300)
    assert training.returncode == 0, errors[-3000:]
    assert evaluation.returncode == 0, more[-3000:]
    report = json.loads(out.splitlines()[-1])
    assert report["writes"] == []
    assert min(report[kind] for kind in ("read", "misfits", "errors", "descriptors")) >= 5, report
    print(report)
