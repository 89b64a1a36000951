"""The table and the figure at the end of a run, from its JSON lines."""

import json
import statistics
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments import metrics
from experiments.names import LEARNING_RATES

TIMES = "times.json"  # milliseconds a step of methods that were timed in turns
BASELINE = "full"
# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Run = tuple[dict[str, Any], list[dict[str, Any]]]


def load(folder: Path) -> dict[str, Run]:
    """All runs in `folder`: baselines first, then by name."""
    runs = {path.stem: metrics.read(path) for path in sorted(folder.glob("*.jsonl"))}
    return dict(sorted(runs.items(), key=lambda item: _place(item[0])))


def table(runs: dict[str, Run], times: dict[str, float]) -> str:
    """A row a method; in brackets ratios to dense AdamW, if it is one of them."""
    unit = next(iter(runs.values()))[0]["unit"]
    baseline = _numbers(*runs[BASELINE], times.get(BASELINE)) if BASELINE in runs else (None,) * 3
    headings = ["method", "parameters", "optimizer state (bytes)", "step (ms)", f"validation loss ({unit})"]
    rows = []
    for name, run in runs.items():
        numbers = _numbers(*run, times.get(name))
        cells = [_ratio(*pair, spec) for *pair, spec in zip(numbers, baseline, (",", ",", ".1f"), strict=True)]
        rows.append([name, *cells, _outcome(*run)])
    return tabulate(rows, headings, "simple", colalign=("left", *["right"] * 3, "left"), disable_numparse=True)


def sentence(runs: dict[str, Run], times: dict[str, float]) -> str:
    """The best method on the manifold against dense AdamW; empty unless both came to their ends."""
    ends = {name: _last_loss(*run) for name, run in runs.items() if not _diverged(run[1])}
    losses = {name: loss for name, (step, loss) in ends.items() if step == runs[name][0]["steps"] and loss is not None}
    ours = [name for name in losses if name.startswith("lowrank")]
    if not ours or BASELINE not in losses:
        return ""
    best = min(ours, key=lambda name: losses[name])
    parameters, state, time = (
        x / y if x and y else None
        for x, y in zip(*(_numbers(*runs[name], times.get(name)) for name in (best, BASELINE)), strict=True)
    )
    gap = losses[best] - losses[BASELINE]
    unit = runs[best][0]["unit"]
    side = f"a loss {abs(gap):.3f} {unit} {'above' if gap > 0 else 'below'}" if abs(gap) >= 5e-4 else "the loss of"
    speed = f", and {time:.2f} of its time a step" if time else ""
    return (
        f"{best} reaches {side} dense AdamW, with {parameters:.0%} of its parameters, {state:.0%} of its optimizer "
        f"state{speed}."
    )


def figure(runs: dict[str, Run], path: Path) -> None:
    """Validation loss against steps, a curve a method."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, (header, records)) in enumerate(runs.items()):
        points = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss")]
        style = "-" if name.startswith("lowrank") else "--"
        label = f"{name}, {header['parameters']:,} parameters"
        axis.plot(*zip(*points, strict=True), style, color=COLOURS[i % len(COLOURS)], marker=".", label=label)
    settings = next(iter(runs.values()))[0]
    axis.set(
        xlabel="training steps",
        ylabel=f"validation loss ({settings['unit']})",
        title=f"{settings['experiment']}, rank {settings['rank']}, seed {settings['seed']}",
    )
    later = [r["validation_loss"] for _, rs in runs.values() for r in rs if r.get("validation_loss") and r["step"]]
    if later:  # the untrained model's loss would squeeze all curves into the lowest fifth
        margin = 0.05 * (max(later) - min(later)) + 1e-3
        axis.set_ylim(min(later) - margin, max(later) + margin)
    axis.grid(alpha=0.3)
    axis.legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def write(folder: Path) -> None:
    """Print the table of the runs in `folder` and write `loss.png` beside them."""
    runs = load(folder)
    times = json.loads((folder / TIMES).read_text()) if (folder / TIMES).exists() else {}
    figure(runs, folder / "loss.png")
    parts = [table(runs, times), sentence(runs, times), f"curves: {folder / 'loss.png'}"]
    print("\n" + "\n\n".join(filter(None, parts)))


def _place(name: str) -> tuple[int, str]:
    """Methods in the order in which `LEARNING_RATES` lists them."""
    return list(LEARNING_RATES).index(name) if name in LEARNING_RATES else len(LEARNING_RATES), name


def _numbers(header: dict[str, Any], records: list[dict[str, Any]], time: float | None) -> tuple[Any, Any, Any]:
    """Parameters, bytes of state and milliseconds a step, in turns if the method was timed so."""
    times = [r["step_ms"] for r in records if "step_ms" in r]
    return header["parameters"], header["state_bytes"], time or (statistics.median(times) if times else None)


def _ratio(value: float | None, baseline: float | None, spec: str) -> str:
    if value is None:
        return "-"
    return f"{value:{spec}} ({value / baseline:.2f})" if baseline else f"{value:{spec}}"


def _last_loss(header: dict[str, Any], records: list[dict[str, Any]]) -> tuple[int, float | None]:
    losses = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    return losses[-1] if losses else (0, None)


def _diverged(records: list[dict[str, Any]]) -> bool:
    return bool(records) and records[-1].get("loss", 0.0) is None


def _outcome(header: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The last loss; of an unfinished or diverged run also where it ended."""
    step, loss = _last_loss(header, records)
    if _diverged(records):
        return f"diverged at step {records[-1]['step']}"
    shown = "-" if loss is None else f"{loss:.3f}" if loss > 0.01 else f"{loss:.1e}"
    return shown if step == header["steps"] else f"{shown} at step {step} of {header['steps']}"
