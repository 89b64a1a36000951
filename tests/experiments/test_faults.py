"""Training runs survive kills, signals, a full disk and damaged checkpoints, and resume to the bit."""

import functools
import json
import pathlib
import resource
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lowrank_optax as lro
from experiments import faults, matrix, metrics, trainer

pytestmark = pytest.mark.usefixtures("settings_of_a_user")

KINDS = {
    "fixed": ("--method", "lowrank_adam", "--rank", "4"),
    "adaptive": (
        *("--method", "lowrank_adam", "--geometry", "tangent", "--rank", "2", "--max-rank", "8"),
        *("--tolerance", "0.03", "--lr", "0.1"),
    ),
}
KINDS["resized"] = (*KINDS["adaptive"], "--resize-every", "2", "--bucket", "2")
N = 8


def run(out: pathlib.Path, kind: str, *flags: str) -> None:
    sizes = ("--steps", str(2 * N), "--batch", "14", "--columns", "12", "--target-rank", "6", "--condition", "10")
    intervals = ("--log-every", "1", "--eval-every", str(N), "--save-every", "3")
    matrix.main([*sizes, *intervals, *KINDS[kind], "--out", str(out), *flags])


def records(out: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    clock = {"step_ms", "rows_per_s"}
    kept = metrics.read(out / "lowrank_adam.jsonl")[1]
    return [{k: v for k, v in record.items() if k not in clock} for record in kept]


def checkpoint(out: pathlib.Path) -> lro.checkpoint.Restored:
    with ocp.CheckpointManager((out / "checkpoints" / "lowrank_adam").absolute()) as manager:
        return lro.checkpoint.restore(manager)


def same(first: pathlib.Path, second: pathlib.Path) -> None:
    assert records(first) == records(second)
    a, b = checkpoint(first), checkpoint(second)
    assert a.step == b.step == 2 * N
    assert faults.digest(a.tree) == faults.digest(b.tree)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pathlib.Path]:
    """The folder of 2 N steps in one go, each kind run once; beside it the number of compilations."""

    @functools.cache
    def one(kind: str) -> pathlib.Path:
        out = tmp_path_factory.mktemp(kind) / "run"
        trainer.load.cache_clear()  # a new loss and optimizer, for which nothing is compiled
        trainer.build.cache_clear()
        before = trainer.train_step._cache_size()
        run(out, kind)
        (out / "compilations").write_text(str(trainer.train_step._cache_size() - before))
        return out

    return one


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fixed", "adaptive", "resized"])
def test_twice_n_steps_are_n_and_n(kind: str, straight: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> None:
    """To the bit: losses, ranks, parameters, moments; widths too, with a break at the step that changes them."""
    whole, broken = straight(kind), tmp_path / "run"
    sizes = {r["step"]: r["parameters"] for r in records(whole) if "parameters" in r}
    resized = [step for step in sizes if step > 1 and sizes[step] != sizes[step - 1]]
    assert bool(resized) == (kind == "resized")
    for stop in sorted({N, *(step for first in resized[:1] for step in (first - 1, first))}):
        with pytest.raises(SystemExit):
            run(broken, kind, "--stop-at", str(stop), *(("--resume",) if broken.exists() else ()))
    run(broken, kind, "--resume")
    same(whole, broken)
    ranks = {record["rank"] for record in records(broken) if "rank" in record}
    assert (len(ranks) == 1) == (kind == "fixed")


@pytest.mark.slow
def test_widths_follow_ranks_and_compile_once_for_each(straight: Callable[[str], pathlib.Path]) -> None:
    out = straight("resized")
    parameters = [record["parameters"] for record in records(out) if "parameters" in record]
    assert 1 < len(set(parameters)) <= 4  # widths are multiples of 2 up to 8
    assert int((out / "compilations").read_text()) == len(set(parameters))
    assert int((straight("adaptive") / "compilations").read_text()) == 1
    assert checkpoint(out).tree["params"]["kernel"].size == parameters[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(
    number: signal.Signals,
    straight: Callable[[str], pathlib.Path],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As from a preemptible machine, at a step at which nothing would be saved."""
    whole, out, steps, step = straight("resized"), tmp_path / "run", iter(range(2 * N)), trainer.train_step

    def interrupted(*args: Any) -> Any:
        if next(steps) == 4:
            signal.raise_signal(number)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupted)
        with pytest.raises(SystemExit) as left:
            run(out, "resized")
    assert left.value.code == 130 and f"--resume --out {out}" in capsys.readouterr().err
    assert checkpoint(out).step == 5
    run(out, "resized", "--resume")
    same(whole, out)


def test_a_full_disk_keeps_what_was_saved(tmp_path: pathlib.Path) -> None:
    """Files cannot grow past 20 kB, which cuts a save off in its middle as a full disk does."""
    state = {"w": jax.random.normal(jax.random.key(0), (100, 100))}
    with ocp.CheckpointManager(tmp_path) as manager:
        lro.checkpoint.save(manager, 1, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with (
            pytest.raises(Exception, match=r"(?i)file too large|space|EFBIG"),
            ocp.CheckpointManager(tmp_path) as manager,
        ):
            lro.checkpoint.save(manager, 2, {"w": state["w"] + 1})
            manager.wait_until_finished()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)) as manager:
        step, restored = lro.checkpoint.restore(manager, state)
        assert step == 1
        np.testing.assert_array_equal(restored["w"], state["w"])
        lro.checkpoint.save(manager, 2, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    straight: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    whole, out = straight("resized"), tmp_path / "run"
    with pytest.raises(SystemExit):
        run(out, "resized", "--stop-at", str(N))
    manifest = out / "checkpoints" / "lowrank_adam" / str(N) / "default" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=f"checkpoint {N} in .* is skipped"):
        run(out, "resized", "--resume")
    same(whole, out)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_whose_checkpoints_are_all_damaged_says_so(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        run(out, "fixed", "--stop-at", "3")
    (out / "checkpoints" / "lowrank_adam" / "3" / "default" / "manifest.ocdbt").unlink()
    with pytest.raises(SystemExit, match=r"no checkpoint in .* can be restored\. 3: "):
        run(out, "fixed", "--resume")


def test_a_metrics_file_is_replaced_at_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while a resume drops the later records leaves the file as it was."""
    path = tmp_path / "full.jsonl"
    content = '{"steps": 9}\n{"step": 3, "loss": 2.0}\n{"step": 4, "loss": 1.0}\n'
    path.write_text(content)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.Metrics(path, {"steps": 9}, start=3)
    assert path.read_text() == content


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_kills_and_damages(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults.main(["--smoke", "--out", str(tmp_path)])
    rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["part"] for line in rounds] == ["kill"] * 2 + ["damage"] * 4
    assert all(line["result"] == "whole" and not line.get("skipped") for line in rounds[:2])
    assert all(line["result"] in ("newer", "older, newer named") for line in rounds[2:])
    assert len(capsys.readouterr().out.splitlines()) <= 6


def test_the_bench_sees_a_lost_and_a_corrupt_checkpoint(tmp_path: pathlib.Path) -> None:
    run = object.__new__(faults.Run)
    run.folder, run.checkpoints = tmp_path, tmp_path / "checkpoints"
    with ocp.CheckpointManager(run.checkpoints) as manager:
        lro.checkpoint.save(manager, 5, {"w": jnp.arange(3.0)})
    run.reference = {5: faults.digest({"w": np.arange(3.0, dtype=np.float32)})}
    assert run.check([5])["result"] == "whole"
    assert run.check([5, 10])["result"] == "lost"
    run.reference = {5: faults.digest({"w": np.arange(3.0, dtype=np.float32) + 1})}
    assert run.check([5])["result"] == "corrupt"
