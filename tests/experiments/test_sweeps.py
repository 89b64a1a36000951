"""Sweeps search by their rule and never repeat a run; reports show what the results hold."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from experiments import report
from experiments.names import LEARNING_RATES, WORDS, in_words
from experiments.sweep import Candidate, Store, Sweep, final, named, read

ROOT = Path(__file__).parents[2]


def run(label: str, lr: float, seed: int, loss: float | None, steps: int = 10) -> dict[str, Any]:
    settings = {"method": label.split(":")[0], "lr": lr, "seed": seed, "steps": 10, "geometry": "", "rank": 4}
    settings |= dict(pair.split("=") for pair in label.split(":")[1:])
    curve = [[0, 5.0], [5, 3.0], [steps, loss]]
    kept = {"parameters": 1000, "state_bytes": 800, "data": "bytes", "unit": "nats", "device": "cpu"}
    return {"label": label, **kept, "settings": settings, "curve": curve, "step_ms": 1.0}


class Fake(Sweep):
    """Runs whose loss is a function of the step size."""

    def __init__(self, loss: Any, fixed: bool = False) -> None:
        super().__init__(None, pin=False, fixed=fixed)  # type: ignore[arg-type]
        self.loss, self.calls = loss, []

    def run(self, candidate: Candidate, lr: float, seed: int) -> dict[str, Any]:
        self.calls.append((lr, seed))
        return run(candidate.label, lr, seed, self.loss(lr))


FULL = named("pretrain", "full", [])


@pytest.mark.parametrize("best", [7.5e-4, 3e-3, 2.4e-2])
def test_search_ends_inside_the_grid(best: float) -> None:
    sweep = Fake(lambda lr: abs(math.log2(lr / best)))
    line = sweep.search(FULL, [0, 1, 2])
    tried = {lr for lr, seed in sweep.calls if seed == 0}
    assert f"at {best:g}" in line and tried >= {best / 2, best, best * 2}
    assert len(tried) <= 4 + abs(math.log2(best / 3e-3))
    assert {seed for lr, seed in sweep.calls if lr == best} == {0, 1, 2}


def test_search_ends_where_all_step_sizes_are_equal() -> None:
    sweep = Fake(lambda lr: 2.5)
    assert "at 0.003" in sweep.search(FULL, [0]) and len(sweep.calls) == 4  # three, and the best again


def test_search_goes_down_from_divergence_and_may_be_left_out() -> None:
    sweep = Fake(lambda lr: math.inf if lr > 1e-3 else lr)
    assert "at 0.00075" in Fake(lambda lr: math.inf if lr > 1e-3 else -lr).search(FULL, [0])
    assert sweep.loss(3e-3) == math.inf
    sweep = Fake(lambda lr: lr, fixed=True)
    sweep.search(named("pretrain", "full:lr=0.5", []), [0, 1])
    assert set(sweep.calls) == {(0.5, 0), (0.5, 1)}


def test_runs_on_different_data_are_not_compared(tmp_path: Path) -> None:
    """The files of a corpus, such as the source code of this library, may change between two runs."""

    class Changed(Fake):
        def run(self, candidate: Candidate, lr: float, seed: int) -> dict[str, Any]:
            return super().run(candidate, lr, seed) | {"data": "older bytes" if seed else "bytes"}

    with pytest.raises(RuntimeError, match=r"full: runs on different data .*'older bytes'"):
        Changed(lambda lr: lr, fixed=True).search(FULL, [0, 1])
    runs = [run("full", 0.1, 0, 1.0), run("factors", 0.1, 0, 1.0) | {"data": "older bytes"}]
    (tmp_path / "pretrain.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    assert report.block("pretrain labels=full", tmp_path)
    with pytest.raises(SystemExit, match="different data"):
        report.block("pretrain steps=10", tmp_path)


def test_store_keeps_runs_and_finds_them_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    first = run("full", 0.1, 0, 1.5)
    Store(path).add(first)
    again = Store(path)
    assert again.find(first["settings"], {}) == first and again.find({**first["settings"], "lr": 0.2}, {}) is None
    later = {**first["settings"], "added": 3}
    assert again.find(later, {"added": 3}) == first and again.find(later, {"added": 4}) is None
    path.write_text(path.read_text() + '{"label": "tru')
    with pytest.raises(SystemExit, match=r"x\.jsonl: line 2 is not JSON"):
        read(path)


def test_a_diverged_run_is_infinitely_bad() -> None:
    assert final(run("full", 0.1, 0, 1.5)) == 1.5
    assert final(run("full", 0.1, 0, None)) == math.inf
    assert final(run("full", 0.1, 0, 1.5, steps=7)) == math.inf  # cut off by a loss that is no number


def test_report_fills_its_blocks(tmp_path: Path) -> None:
    runs = [
        *(run("full", lr, 0, loss) for lr, loss in ((0.1, 2.0), (0.2, 1.0), (0.4, None))),
        run("full", 0.2, 1, 1.2),
        run("factors", 0.1, 0, 3.1),
        run("lowrank_adam:geometry=tangent", 0.1, 0, 1.6)
        | {"spectra": [[0, [1, 0.5]], [10, [1, 0.1]]], "ranks": [[1, 4.0], [10, 3.5]]},
    ]
    results = tmp_path / "results"
    results.mkdir()
    (results / "pretrain.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    document = tmp_path / "RESULTS.md"
    document.write_text(
        "before\n<!-- runs: pretrain steps=10 show=table,curves,clock,ranks,spectra -->\nold\n<!-- end -->\nbetween\n"
        "<!-- runs: pretrain steps=10 labels=factors,full -->\n<!-- end -->\nafter\n"
    )
    arguments = ["--document", str(document), "--results", str(results)]
    report.main(arguments)
    text = document.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert "| `full` | 1,000 | 800 | 0.2 | 3 | 2 | 1.1000 ± 0.1 |  |" in text
    # 3.1 - 1.6 of 3.1 - 1.1
    assert "| `lowrank_adam:geometry=tangent` | 1,000 | 800 | 0.1 | 1 | 1 | 1.6000 | 75% |" in text
    for kind in ("curves", "clock", "ranks", "spectra"):
        assert (results / f"pretrain-steps-10-{kind}.png").stat().st_size > 1000
    second = text[text.index("between") :]
    assert second.index("`factors`") < second.index("`full`") and "tangent" not in second
    report.main(arguments)
    assert document.read_text() == text


def test_a_picture_of_seeds_shows_every_loss_and_the_best_method_at_the_top() -> None:
    runs = [run("full", 0.1, seed, loss) for seed, loss in ((0, 2.0), (11, 3.0))]
    rows = report.select([*runs, run("lora", 0.1, 0, 1.0), run("lora", 0.1, 11, 3.0)], {}, None)
    axis = Figure().subplots()
    report.seeds(axis, rows)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["dense AdamW (1.0k)", "LoRA, AdamW (1.0k)"]
    points = {c.get_label(): sorted(map(tuple, c.get_offsets().tolist())) for c in axis.collections}
    assert points == {"seed 0": [(1.0, 1.0), (2.0, 0.0)], "seed 11": [(3.0, 0.0), (3.0, 1.0)]}


def test_no_gap_is_closed_where_full_rank_is_behind(tmp_path: Path) -> None:
    runs = [run("full", 0.1, 0, 3.0), run("factors", 0.1, 0, 2.9), run("lowrank_adam", 0.1, 0, 2.0)]
    (tmp_path / "pretrain.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    assert "gap closed" not in report.block("pretrain steps=10", tmp_path)


def test_labels_become_words() -> None:
    assert in_words("lowrank_adam:blocks=16:rank=32:lr=0.012") == "low-rank Adam, 16 x 16 blocks, rank 32"
    assert in_words("full:d=64:init_scale=0.5") == "dense AdamW, width 64"
    assert in_words("adapter:kind=lora:start=pissa") == "PiSSA"
    assert set(WORDS) == set(LEARNING_RATES)


def test_a_block_shows_the_runs_with_its_settings_alone(tmp_path: Path) -> None:
    runs = [run(f"lowrank_adam:geometry={name}", 0.1, 0, 1.0) for name in ("tangent", "galerkin")]
    (tmp_path / "pretrain.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    text = report.block("pretrain geometry=tangent", tmp_path)
    assert "geometry=tangent" in text and "galerkin" not in text


def test_results_are_what_the_committed_runs_say(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results", tmp_path / "results")
    document = shutil.copy(ROOT / "RESULTS.md", tmp_path)
    report.main(["--document", str(document), "--results", str(tmp_path / "results")])
    assert Path(document).read_text() == (ROOT / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("vision show=table", "no such results"),
        ("pretrain labels=galore", "no runs of galore"),
        ("pretrain labels=full", "differ in other settings"),  # two ranks of one seed
    ],
)
def test_report_names_what_is_missing_or_mixed(words: str, message: str, tmp_path: Path) -> None:
    runs = [run("full", 0.1, 0, 1.0), run("full", 0.1, 0, 2.0)]
    runs[1]["settings"]["rank"] = 8
    (tmp_path / "pretrain.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    with pytest.raises(SystemExit, match=message):
        report.block(words, tmp_path)
