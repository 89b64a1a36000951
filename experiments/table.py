"""The table and the figure at the end of a run, from its JSON lines."""

import statistics
from pathlib import Path
from typing import Any

from experiments import metrics
from experiments.names import LEARNING_RATES

COLUMNS = ("method", "parameters", "optimizer state (bytes)", "step (ms)", "validation loss")

Run = tuple[dict[str, Any], list[dict[str, Any]]]


def load(folder: Path) -> dict[str, Run]:
    """All runs in `folder`: baselines first, then by name."""
    runs = {path.stem: metrics.read(path) for path in sorted(folder.glob("*.jsonl"))}
    return dict(sorted(runs.items(), key=lambda item: _place(item[0])))


def rows(runs: dict[str, Run]) -> list[tuple[str, ...]]:
    """One row of text a method; an unfinished or diverged run says so beside its loss."""
    return [(name, *_row(*run)) for name, run in runs.items()]


def table(runs: dict[str, Run]) -> str:
    """The rows under their headings, numbers flush right."""
    unit = next(iter(runs.values()))[0]["unit"]
    lines = [(*COLUMNS[:-1], f"{COLUMNS[-1]} ({unit})"), *rows(runs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for name, *numbers in lines:
        cells = [f"{n:>{w}}" for n, w in zip(numbers, widths[1:], strict=True)]
        text.append("  ".join([f"{name:<{widths[0]}}", *cells]).rstrip())
    text.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(text)


def figure(runs: dict[str, Run], path: Path) -> None:
    """Validation loss against steps, a curve a method."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, (_, records)) in enumerate(runs.items()):
        points = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss")]
        style = "-" if name.startswith("lowrank") else "--"
        axis.plot(*zip(*points, strict=True), style, color=f"C{i}", marker=".", label=name)
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
    figure(runs, folder / "loss.png")
    print(f"\n{table(runs)}\n\ncurves: {folder / 'loss.png'}")


def _place(name: str) -> tuple[int, str]:
    """Methods in the order in which `LEARNING_RATES` lists them."""
    return list(LEARNING_RATES).index(name) if name in LEARNING_RATES else len(LEARNING_RATES), name


def _row(header: dict[str, Any], records: list[dict[str, Any]]) -> tuple[str, ...]:
    times = [r["step_ms"] for r in records if "step_ms" in r]
    losses = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    step, loss = losses[-1] if losses else (0, None)
    shown = "-" if loss is None else f"{loss:.3f}" if loss > 0.01 else f"{loss:.1e}"
    if records and records[-1].get("loss", 0.0) is None:
        shown = f"diverged at step {records[-1]['step']}"
    elif step < header["steps"]:
        shown += f" at step {step} of {header['steps']}"
    return (
        f"{header['parameters']:,}",
        f"{header['state_bytes']:,}",
        f"{statistics.median(times):.1f}" if times else "-",
        shown,
    )
