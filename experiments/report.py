"""Fill the tables and pictures of RESULTS.md from the runs in `results/`.

    python -m experiments report

A block of RESULTS.md names the runs that it shows, and everything up to its end is written anew:

    <!-- runs: pretrain steps=300 labels=full,factors,lowrank_adam show=table,curves title="A small GPT" -->
    <!-- end -->

The words after the experiment choose runs by their settings; `labels` (default: all) chooses rows and their order, and
`lines` the rows of the pictures; `show` is a list of `table`, `curves` (loss against steps), `clock` (loss against the
time of the steps, of the run that the machine disturbed least), `ranks` (rank against steps), `spectra` (singular
values of the kernels), `budget` (loss against parameters), `state` (loss against bytes of optimizer state) and `seeds`
(the loss of every seed, a line a method). A method is shown at the step size that was best on the first seed, with all
the seeds run there.
"""

import argparse
import collections
import dataclasses
import itertools
import math
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.config import experiment as settings_of
from experiments.names import LEARNING_RATES, in_words
from experiments.sweep import final, read
from experiments.table import COLOURS

BLOCK = re.compile(r"(<!-- runs: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
# A method with this ending closes so much of the gap between plain factors, or LoRA beside frozen kernels, and dense
# training. From scratch `lora` is no reference: no gradient reaches its factors.
REFERENCES = {"_muon": ("factors_muon", "full_muon"), "_heavy_ball": None, "": ("factors", "full")}
ADAPTERS = {"_muon": ("lora_muon", "full_muon"), "": ("lora", "full")}

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A method at its best step size: one run a seed; and all its runs."""

    label: str
    learning_rate: float
    runs: list[Run]
    all: list[Run]

    @property
    def tried(self) -> int:
        """The number of step sizes."""
        return len({run["settings"]["lr"] for run in self.all})

    @property
    def losses(self) -> list[float]:
        return [final(run) for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses)


def select(runs: list[Run], settings: dict[str, str], labels: list[str] | None) -> list[Row]:
    """The rows of a block."""
    groups: dict[str, list[Run]] = collections.defaultdict(list)
    for run in runs:
        if all(str(run["settings"].get(k)) == v for k, v in settings.items()):
            groups[run["label"]].append(run)
    order = labels or sorted(groups, key=lambda x: (list(LEARNING_RATES).index(x.split(":")[0]), x))
    missing = [label for label in order if label not in groups]
    if missing:
        sys.exit(f"no runs of {', '.join(missing)} with {settings}")
    return [_best(label, groups[label]) for label in order]


def _best(label: str, runs: list[Run]) -> Row:
    first = min(run["settings"]["seed"] for run in runs)
    grid = {run["settings"]["lr"]: final(run) for run in runs if run["settings"]["seed"] == first}
    lr = min(grid, key=lambda x: grid[x])
    best = sorted((r for r in runs if r["settings"]["lr"] == lr), key=lambda r: r["settings"]["seed"])
    if len({run["settings"]["seed"] for run in best}) < len(best):
        sys.exit(f"runs of {label} with one seed and step size differ in other settings: name these in the block")
    return Row(label, lr, best, runs)


def table(rows: list[Row]) -> str:
    """A Markdown table of the rows."""
    extra = [name for name in ("accuracy", "error") if all(name in run for row in rows for run in row.runs)]
    references = {row.label: row.mean for row in rows}
    gaps = [_gap(row, references) for row in rows]
    names = ["method", "parameters", "optimizer state (bytes)", "step size", "tried", "seeds"]
    names += [f"validation loss ({rows[0].runs[0]['unit']})", *extra]
    names += ["gap closed"] if any(gap is not None for gap in gaps) else []
    lines = [names, ["---", *["---:"] * (len(names) - 1)]]
    for row, gap in zip(rows, gaps, strict=True):
        run = row.runs[0]
        cells = [f"`{row.label}`", f"{run['parameters']:,}", f"{run['state_bytes']:,}", f"{row.learning_rate:g}"]
        cells += [str(row.tried), str(len(row.runs)), _spread(row.losses)]
        cells += [_spread([run[name] for run in row.runs]) for name in extra]
        if names[-1] == "gap closed":
            cells.append("" if gap is None else f"{gap:.0%}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: Sequence[float]) -> str:
    if any(math.isinf(v) for v in values):
        return "diverged"
    digits = 4 if min(map(abs, values)) >= 0.01 else 2
    text = f"{statistics.mean(values):.{digits}{'f' if digits == 4 else 'e'}}"
    return text + (f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else "")


def _gap(row: Row, means: dict[str, float]) -> float | None:
    """The share of the gap between a plain factored form and the full-rank run with the same optimizer inside."""
    method = row.label.split(":")[0]
    references = ADAPTERS if row.runs[0]["settings"].get("mode") == "adapter" else REFERENCES
    pair = next(value for ending, value in references.items() if method.endswith(ending))
    dead = method.startswith("lora") and references is REFERENCES
    if pair is None or dead or method in pair or not all(name in means for name in pair):
        return None
    worst, best = (means[name] for name in pair)
    return (worst - row.mean) / (worst - best) if worst > best else None  # else there is no gap to close


def _named(row: Row, seeds: int) -> str:
    return f"{in_words(row.label)} ({seeds} seed{'s' * (seeds > 1)})"


def curves(axis: Any, rows: list[Row]) -> None:
    """Validation loss against steps: mean over seeds, and their range."""
    _curves("training steps", lambda row: 1.0, axis, rows)


def clock(axis: Any, rows: list[Row]) -> None:
    """Validation loss against minutes of training steps, at the least median of a step over the runs of a row."""
    _curves("minutes of training steps", lambda row: min(r["step_ms"] for r in row.all) / 60_000, axis, rows)


def _curves(words: str, unit: Callable[[Row], float], axis: Any, rows: list[Row]) -> None:
    for i, row in enumerate(rows):
        steps = [unit(row) * step for step, _ in row.runs[0]["curve"]][1:]
        series = [[loss for _, loss in run["curve"]][1:] for run in row.runs]
        whole = [s for s in series if len(s) == len(steps) and None not in s]
        if not whole:
            continue
        low, high = ([f(x) for x in zip(*whole, strict=True)] for f in (min, max))
        style = "-" if row.label.startswith("lowrank") else "--"
        middle = [statistics.mean(x) for x in zip(*whole, strict=True)]
        axis.plot(steps, middle, style, color=COLOURS[i % len(COLOURS)], label=_named(row, len(whole)))
        axis.fill_between(steps, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.2, linewidth=0)
        if max(middle) > 1e3 * min(middle):
            axis.set_yscale("log")
    axis.set(xlabel=words, ylabel=f"validation loss ({rows[0].runs[0]['unit']})")


def ranks(axis: Any, rows: list[Row]) -> None:
    """Mean rank of the kernels against steps, a line a run."""
    for i, row in enumerate(rows):
        for j, run in enumerate(row.runs):
            if "ranks" in run:
                label = {"label": _named(row, len(row.runs))} if j == 0 else {}
                axis.plot(*zip(*run["ranks"], strict=True), color=COLOURS[i % len(COLOURS)], **label)
    axis.set(xlabel="training steps", ylabel="mean rank of the kernels")


def spectra(axis: Any, rows: list[Row]) -> None:
    """Singular values relative to the largest, mean over kernels, on the first seed: dotted before training."""
    for i, row in enumerate(rows):
        runs = [run for run in row.runs if run.get("spectra")]
        for (step, values), style in zip(runs[0]["spectra"] if runs else [], (":", "-"), strict=False):
            label = {"label": in_words(row.label)} if step else {}
            axis.semilogy(range(1, len(values) + 1), values, style, color=COLOURS[i % len(COLOURS)], **label)
    axis.set(xlabel="singular value, by size", ylabel="size relative to the largest (dotted: start)")


def budget(axis: Any, rows: list[Row]) -> None:
    """Validation loss against parameters: a line a method, a point a rank or a width."""
    _against("parameters", "trained parameters", axis, rows)


def state(axis: Any, rows: list[Row]) -> None:
    """Validation loss against the bytes of optimizer state."""
    _against("state_bytes", "optimizer state (bytes)", axis, rows)


def seeds(axis: Any, rows: list[Row]) -> None:
    """The loss of every seed: a line a method, with its trained parameters, the lowest mean at the top."""
    from matplotlib import ticker

    ordered = sorted(rows, key=lambda row: -row.mean)
    for y, row in enumerate(ordered):
        axis.plot(row.losses, [y] * len(row.losses), color="0.7", zorder=1)
    for seed in sorted({run["settings"]["seed"] for row in rows for run in row.runs}):
        points = [
            (final(run), y) for y, row in enumerate(ordered) for run in row.runs if run["settings"]["seed"] == seed
        ]
        style = {"color": COLOURS[seed % len(COLOURS)], "marker": "osD^v"[seed % 5]}
        axis.scatter(*zip(*points, strict=True), label=f"seed {seed}", **style)
    size = ticker.EngFormatter(places=1, sep="")
    axis.set_yticks(range(len(rows)), [f"{in_words(row.label)} ({size(row.runs[0]['parameters'])})" for row in ordered])
    axis.set(xlabel=f"validation loss ({rows[0].runs[0]['unit']}); in brackets: parameters")


def _against(key: str, words: str, axis: Any, rows: list[Row]) -> None:
    """Loss against a number of the runs. A form of kernels has one colour, dashed under Muon."""
    lines: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        lines[re.sub(r":(rank|d|lr|init_scale)=[^:]+", "", row.label)].append(row)
    from matplotlib import ticker

    forms = {label: label.replace("_muon", "").replace("_adam", "") for label in lines}
    colours = dict(zip(dict.fromkeys(forms.values()), itertools.cycle(COLOURS), strict=False))
    for label, points in lines.items():
        points.sort(key=lambda row: row.runs[0][key])
        x = [row.runs[0][key] for row in points]
        error = [statistics.stdev(row.losses) if len(row.losses) > 1 else 0 for row in points]
        style = {"linestyle": "--" if "_muon" in label else "-", "marker": "s" if "_muon" in label else "o"}
        axis.errorbar(
            x,
            [row.mean for row in points],
            error,
            **style,
            capsize=3,
            color=colours[forms[label]],
            label=in_words(label),
        )
    axis.set(xlabel=words, ylabel=f"validation loss ({rows[0].runs[0]['unit']})", xscale="log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())


PICTURES = {
    "curves": curves,
    "clock": clock,
    "ranks": ranks,
    "spectra": spectra,
    "budget": budget,
    "state": state,
    "seeds": seeds,
}


def draw(kind: str, rows: list[Row], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 5), layout="constrained")  # legible at the width of a phone
    PICTURES[kind](axis, rows)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    longest = max((len(text) for text in axis.get_legend_handles_labels()[1]), default=0)
    figure.legend(loc="outside lower center", ncols=3 if longest < 10 else 2 if longest < 40 else 1)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def block(words: str, folder: Path) -> str:
    """The text of a block of RESULTS.md, and its pictures as files."""
    experiment, *pairs = shlex.split(words)
    options = dict(pair.split("=", 1) for pair in pairs)
    labels, lines = options.pop("labels", ""), options.pop("lines", "")
    show = options.pop("show", "table").split(",")
    heading = options.pop("title", "")
    path = folder / f"{experiment}.jsonl"
    if not path.exists():
        sys.exit(f"{path}: no such results")
    config = settings_of(experiment)
    # A run from before a setting was added had its default.
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    runs = [{**run, "settings": {**defaults, **run["settings"]}} for run in read(path)]
    rows = select(runs, options, labels.split(",") if labels else None)
    if len(data := {run["data"] for row in rows for run in row.all}) > 1:
        sys.exit(f"block {words!r}: runs on different data do not compare: {sorted(data)}")
    parts = []
    name = " ".join([experiment, *(f"{k} {v}" for k, v in options.items())])
    drawn = [row for row in rows if row.label in lines.split(",")] if lines else rows
    for kind in show:
        if kind == "table":
            parts.append(table(rows))
        elif kind in PICTURES:
            file = re.sub(r"[^\w.-]+", "-", f"{heading or name} {kind}").lower() + ".png"
            draw(kind, drawn, heading or name, folder / file)
            parts.append(f"![{heading or name}]({folder.name}/{file})")
        else:
            sys.exit(f"show={kind}: choose from table, {', '.join(PICTURES)}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--document", type=Path, default=Path("RESULTS.md"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    text = args.document.read_text(encoding="utf-8")
    filled, count = BLOCK.subn(lambda m: f"{m[1]}\n{block(m[2], args.results)}\n\n{m[3]}", text)
    args.document.write_text(filled, encoding="utf-8")
    print(f"{args.document}: {count} blocks written")


if __name__ == "__main__":
    main()
