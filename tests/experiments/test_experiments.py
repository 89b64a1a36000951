"""The scripts in `experiments/`: every method trains, resumes to the bit, and reports."""

import functools
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lowrank_optax as lro
from experiments import __main__ as command_line
from experiments import kernels, metrics, pretrain, table, text, timing
from experiments.methods import METHODS
from experiments.names import DEFAULT_GEOMETRY, LEARNING_RATES

# Methods without a rank of their own, or with one that Optax hides in its state.
WITHOUT_RANK = ("full", "full_muon", "full_heavy_ball", "galore")
TEXT = "To be factored, or not to be factored: that is the question.\n" * 40


pytestmark = pytest.mark.usefixtures("settings_of_a_user")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, book: Path) -> Callable[[str], Path]:
    """The folder of a smoke run of one method from start to end; each is run once."""

    @functools.cache
    def run(name: str) -> Path:
        out = tmp_path_factory.mktemp(name) / "run"
        smoke(out, book, "--method", name)
        return out

    return run


def smoke(out: Path, data: Path, *flags: str) -> None:
    pretrain.main(["--smoke", "--out", str(out), "--data", str(data), *flags])


def records(out: Path, name: str) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    clock = {"step_ms", "tokens_per_s"}
    kept = metrics.read(out / f"{name}.jsonl")[1]
    return [{k: v for k, v in record.items() if k not in clock} for record in kept]


def checkpoint(out: Path, name: str) -> list[np.ndarray]:
    with ocp.CheckpointManager((out / "checkpoints" / name).absolute()) as manager:
        tree = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_run(first: Path, second: Path, name: str) -> None:
    assert records(first, name) == records(second, name)
    for a, b in zip(checkpoint(first, name), checkpoint(second, name), strict=True):
        np.testing.assert_array_equal(a, b)


def test_singular_values_are_those_of_the_kernel() -> None:
    kernel = np.random.default_rng(0).normal(size=(3, 4, 5)) @ np.diag([3.0, 1, 1, 0.1, 0])
    expected = np.linalg.svd(kernel.reshape(12, 5), compute_uv=False)
    W = lro.factorize({"W": kernel}, 5, where=lambda path, shape: lro.Axes(0, 2))["W"]
    pair = kernels.balanced(W)
    change = lro.adapters.LoRA(pair.A, pair.B / 2, jnp.array(2.0))
    for x in (jnp.asarray(kernel), W, pair, change):
        np.testing.assert_allclose(kernels.singular_values(x)[0], expected, atol=1e-5)  # rounding of float32
    assert np.isnan(kernels.singular_values(jnp.full((3, 2), jnp.nan))).all()


# Those made like Fira are tested with it.
ALIKE = ("subspace_galore", "apollo", "frugal")


@pytest.mark.slow
@pytest.mark.parametrize("name", [k for k, method in METHODS.items() if method.form != "change" and k not in ALIKE])
def test_every_method_trains(name: str, finished: Callable[[str], Path]) -> None:
    header, rows = metrics.read(finished(name) / f"{name}.jsonl")
    assert header["method"] == name and header["seed"] == 0 and header["jax"] == jax.__version__
    validation = [r["validation_loss"] for r in rows if "validation_loss" in r]
    assert len(validation) == 3 and validation[-1] < validation[0]
    (first, start), (last, end) = ((r["step"], r["spectrum"]) for r in rows if "spectrum" in r)
    assert (first, last) == (0, header["steps"]) and sorted(end, reverse=True) == end
    dead = METHODS[name].form == "zero pair"  # no gradient reaches it
    assert (start[0], end[0]) == ((0, 0) if dead else (1, 1)) and (start != end) != dead
    ranks = {r["rank"] for r in rows if "rank" in r}
    if name == "adarankgrad":
        assert ranks and max(ranks) <= 4
    else:
        assert ranks == (set() if name in WITHOUT_RANK else {1.0 if name == "apollo_mini" else 4.0})


@pytest.mark.slow
def test_a_run_of_two_methods_ends_with_times_in_turns_and_a_sentence(
    tmp_path: Path, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke(tmp_path, book, "--method", "full,lowrank_adam", "--save-every", "0")
    times = json.loads((tmp_path / table.TIMES).read_text())
    assert set(times) == {"full", "lowrank_adam"}
    printed = capsys.readouterr().out
    assert f"{times['lowrank_adam']:.1f} ({times['lowrank_adam'] / times['full']:.2f})" in printed
    assert "lowrank_adam reaches" in printed and "compiling" not in printed


def test_event_files_hold_the_numbers_of_the_records(tmp_path: Path) -> None:
    from tensorboardX.proto import event_pb2

    with metrics.Metrics(tmp_path / "full.jsonl", {"steps": 9}, 0, tmp_path / "events") as file:
        file.write(step=3, loss=2.5, note="text")
        file.write(step=4, loss=1.25, spectrum=[1.0])
    (path,) = (tmp_path / "events").iterdir()
    data, found = path.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert found == [(3, "loss", 2.5), (4, "loss", 1.25)]


def test_every_method_has_a_step_size_and_on_the_manifold_a_geometry() -> None:
    assert list(METHODS) == list(LEARNING_RATES)
    assert [name for name, method in METHODS.items() if method.on_manifold] == list(DEFAULT_GEOMETRY)[:-1]
    assert list(DEFAULT_GEOMETRY)[-1] == "adapter"  # on the manifold if its kind is


@pytest.mark.slow
def test_a_galerkin_loop_trains_beside_ordinary_leaves(tmp_path: Path, book: Path) -> None:
    smoke(tmp_path / "run", book, "--method", "lowrank_muon", "--geometry", "galerkin", "--max-rank", "8")
    _, rows = metrics.read(tmp_path / "run" / "lowrank_muon.jsonl")
    validation = [r["validation_loss"] for r in rows if "validation_loss" in r]
    assert len(validation) == 3 and validation[-1] < validation[0]
    assert {r["rank"] for r in rows if "rank" in r} == {4.0}


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_continues_to_the_bit(
    tmp_path: Path,
    book: Path,
    finished: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def batch(data: np.ndarray, seed: int, step: int, *sizes: int) -> np.ndarray:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return draw(data, seed, step, *sizes)

    straight, broken, draw = finished("full"), tmp_path / "broken", text.batch
    with monkeypatch.context() as patch:
        patch.setattr(text, "batch", batch)
        with pytest.raises(SystemExit) as stop:
            smoke(broken, book, "--method", "full")
    assert stop.value.code == 130
    interpreter, *command = shlex.split(capsys.readouterr().err.rpartition("to go on: ")[2])
    assert shutil.which(interpreter) and command[:2] == ["-m", "experiments"]
    assert records(broken, "full")[-1]["step"] == 4

    monkeypatch.setattr(sys, "argv", ["experiments", *command[2:]])
    command_line.main()
    assert_same_run(straight, broken, "full")
    header, rows = metrics.read(broken / "full.jsonl")
    printed = capsys.readouterr().out
    assert f"{rows[-1]['validation_loss']:.3f}" in printed
    assert f"{header['parameters']:,}" in printed and f"{header['state_bytes']:,}" in printed
    assert (broken / "loss.png").stat().st_size > 1000


@pytest.mark.slow
def test_low_rank_resumes_to_the_bit(tmp_path: Path, book: Path, finished: Callable[[str], Path]) -> None:
    straight, broken = finished("lowrank_adam"), tmp_path / "broken"
    with pytest.raises(SystemExit):
        smoke(broken, book, "--method", "lowrank_adam", "--stop-at", "3")
    pretrain.main(["--resume", "--out", str(broken)])
    assert_same_run(straight, broken, "lowrank_adam")


def test_resume_drops_metrics_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "full.jsonl"
    path.write_text('{"steps": 9}\n{"step": 3, "loss": 2.0}\n{"step": 4, "loss": 1.0}\n')
    with metrics.Metrics(path, {"steps": 9}, start=3) as file:
        file.write(step=4, loss=float("nan"))
    assert metrics.read(path)[1] == [{"step": 3, "loss": 2.0}, {"step": 4, "loss": None}]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "sgd"], "--method sgd: choose from full, "),
        (["--rank", "64"], "--rank 64: at most the width, --d 32"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--geometry", "flat"], "--geometry flat: choose from balanced, tangent, coefficient, galerkin"),
        (["--tolerance", "0.1"], "--tolerance: lowrank_adam has the geometry balanced, which keeps ranks"),
        (["--budget", "99", "--geometry", "balanced"], "choose --geometry tangent, coefficient or galerkin"),
        (["--retraction", "bug"], "--retraction bug: lowrank_adam has the geometry balanced"),
        (["--retraction", "bug", "--geometry", "galerkin"], "choose --geometry tangent or coefficient"),
        (["--retraction", "bug", "--geometry", "tangent", "--budget", "99"], "--retraction bug: keeps ranks"),
        (["--local-steps", "2"], "--local-steps 2: lowrank_adam has the geometry balanced; choose --geometry galerkin"),
        (["--resize-every", "2", "--geometry", "galerkin"], "--resize-every: a galerkin loop needs its width"),
        (["--resume"], "no run in"),
        (["--data", "/no/such/file"], "--data /no/such/file: no such file or folder"),
    ],
)
def test_misuse_is_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--smoke", "--out", str(tmp_path / "run"), *flags])
    assert message in str(stop.value.code) and "\n" not in str(stop.value.code)


def test_help_has_groups_choices_examples_and_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    text = capsys.readouterr().out
    assert "python -m experiments pretrain --smoke" in text and "{balanced,tangent,coefficient,galerkin}" in text
    assert all(f"\n{group}:" in text for group in ("model and data", "methods", "ranks that change", "training"))
    assert all(name in text for name in LEARNING_RATES)


def test_unknown_commands_and_sweeps_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["nonsense"], "nonsense: no such command"),
        (["sweep", "pretrain", "--method", "nope"], "--method nope: choose from full"),
        (["sweep", "pretrain", "--method", "full:width"], "full:width: after a method come settings"),
        (["sweep", "pretrain", "--method", "full:rank=999"], "--rank 999: at most the width"),
    ):
        monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
        with pytest.raises(SystemExit, match=message) as stop:
            command_line.main()
        assert "\n" not in str(stop.value.code)


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path, book: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"steps": 7}))
    with pytest.raises(SystemExit, match="holds a run: add --resume, --overwrite or --out"):
        smoke(tmp_path, book)
    with pytest.raises(SystemExit, match=r"--steps 8: .* was started with 7"):
        pretrain.main(["--resume", "--out", str(tmp_path), "--steps", "8"])


def test_a_file_is_split_at_its_end(book: Path) -> None:
    corpus = text.load(str(book))
    whole = corpus.train.tobytes() + corpus.validation.tobytes()
    assert whole == TEXT.encode() and len(corpus.validation) == len(whole) // 20


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for i in range(40):
        (tmp_path / "deep" / f"{i:02}.txt").write_text(f"file {i:02}")
    (tmp_path / "deep" / "picture.bin").write_bytes(b"\0\1\2")
    (tmp_path / ".hidden").write_text("hidden")
    corpus = text.load(str(tmp_path))
    assert corpus.validation.tobytes() == b"file 19\nfile 39"
    assert b"file 20" in corpus.train.tobytes() and b"file 19" not in corpus.train.tobytes()
    assert b"hidden" not in corpus.train.tobytes() and 0 not in corpus.train


@pytest.mark.parametrize("content", [b"", b"\0binary"])
def test_a_file_without_text_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(text.DataError, match=str(path)):
        text.load(str(path))


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("short")
    with pytest.raises(text.DataError, match="a window is 17"):
        text.check_length(text.load(str(path)), 16)


def test_batches_depend_on_seed_and_step_alone() -> None:
    data = np.frombuffer(TEXT.encode(), np.uint8)
    first = text.batch(data, 1, 2, 4, 16)
    assert first.shape == (4, 17)
    np.testing.assert_array_equal(first, text.batch(data, 1, 2, 4, 16))
    assert not np.array_equal(first, text.batch(data, 1, 3, 4, 16))
    assert not np.array_equal(first, text.batch(data, 2, 2, 4, 16))


def test_the_default_corpus_is_the_standard_library() -> None:
    corpus = text.load()
    assert len(corpus.train) > 5_000_000 > len(corpus.validation) > 100_000
    assert b"def " in corpus.validation.tobytes()


def test_the_table_tells_finished_from_unfinished_and_diverged(tmp_path: Path) -> None:
    header = {"parameters": 1234567, "state_bytes": 890, "steps": 20, "unit": "nats/byte"}
    runs = {
        "lowrank_adam": [{"step": 10, "loss": None}],
        "full": [
            {"step": 10, "loss": 2.0, "step_ms": 1.0},
            {"step": 20, "loss": 1.5, "step_ms": 3.0},
            {"step": 20, "validation_loss": 1.75},
        ],
        "lora": [{"step": 10, "validation_loss": 2.5, "step_ms": 4.0}],
    }
    for name, rows in runs.items():
        lines = [json.dumps(line) for line in (header, *rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    shown = table.table(table.load(tmp_path), {"lowrank_adam": 3.0})
    assert [re.split(r" {2,}", line.strip()) for line in shown.splitlines()[2:]] == [
        ["full", "1,234,567 (1.00)", "890 (1.00)", "2.0 (1.00)", "1.750"],
        ["lora", "1,234,567 (1.00)", "890 (1.00)", "4.0 (2.00)", "2.500 at step 10 of 20"],
        ["lowrank_adam", "1,234,567 (1.00)", "890 (1.00)", "3.0 (1.50)", "diverged at step 10"],
    ]


def test_the_closing_sentence_compares_the_best_low_rank_method_with_dense_adamw() -> None:
    def of(parameters: int, loss: float) -> Any:
        header = {"parameters": parameters, "state_bytes": 2 * parameters, "steps": 9, "unit": "nats/byte"}
        return header, [{"step": 9, "validation_loss": loss}]

    runs = {"full": of(1000, 2.0), "lowrank_adam": of(500, 2.5), "lowrank_muon": of(250, 2.25)}
    times = {"full": 10.0, "lowrank_muon": 7.5}
    assert table.sentence(runs, times) == (
        "lowrank_muon reaches a loss 0.250 nats/byte above dense AdamW, with 25% of its parameters, 25% of its "
        "optimizer state, and 0.75 of its time a step."
    )
    assert "0.500 nats/byte below" in table.sentence({**runs, "lowrank_muon": of(250, 1.5)}, {})
    assert table.sentence({"full": of(1000, 2.0)}, {}) == ""
    small = {"full": of(1000, 2e-6), "lowrank_adam": of(500, 0.5)}
    assert "0.500 nats/byte above" in table.sentence(small, {})
    unfinished = {**runs, "full": (runs["full"][0], [{"step": 8, "validation_loss": 2.0}])}
    diverged = {**runs, "full": (runs["full"][0], [*runs["full"][1], {"step": 9, "loss": None}])}
    assert table.sentence(unfinished, {}) == table.sentence(diverged, {}) == ""


def test_methods_are_timed_in_turns() -> None:
    order: list[str] = []

    def step_of(name: str) -> Callable[[Any, int], Any]:
        def step(state: Any, i: int) -> Any:
            order.append(name)
            return state + i

        return step

    times = timing.in_turns({name: step_of(name) for name in "ab"}, {"a": jnp.zeros(()), "b": jnp.zeros(())})
    assert set(times) == {"a", "b"} and min(times.values()) >= 0
    assert order == [*"a" * timing.STEPS, *"b" * timing.STEPS] * (timing.ROUNDS + 1)
