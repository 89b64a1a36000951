"""Search the step size of every method by the same rule, then repeat the best with more seeds.

    python -m experiments sweep experiments/configs/gpt_blocks.py experiments/configs/gpt_narrow.py --fixed
    python -m experiments sweep pretrain --method full lowrank_adam lowrank_adam:geometry=tangent -- --steps 1500

Methods are given as configuration files, or by name, where each may carry settings of its own after colons. For each
the step size moves by factors of two from the one
the experiment gives, on the first seed, until the best lies inside the grid; then the other seeds run at the best. All
settings after `--` go to every run. Each finished run adds one line to `results/<experiment>.jsonl`, and a run that is
there already is not repeated: start the same command again after an interruption.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import metrics
from experiments.config import EXPERIMENTS, Config, ConfigError, experiment, parse
from experiments.names import LEARNING_RATES
from experiments.task import DataError

NOT_SETTINGS = {"eval_every", "log_every", "save_every"}  # they change no number
DIVERGED = math.inf


class Store:
    """The results file: one finished run a line."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.runs = read(path) if path.exists() else []

    def find(self, settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any] | None:
        """The run with these settings; one from before a setting was added had its default."""
        return next((run for run in self.runs if {**defaults, **run["settings"]} == settings), None)

    def add(self, run: dict[str, Any]) -> None:
        with self._lock:
            self.runs.append(run)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run, separators=(",", ":")) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file."""
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError as error:
            sys.exit(f"{path}: line {number} is not JSON ({error.msg})")
    return runs


def final(run: dict[str, Any]) -> float:
    """The last validation loss; infinite for a run that diverged."""
    value = run["curve"][-1][1]
    return DIVERGED if value is None or run["curve"][-1][0] < run["settings"]["steps"] else value


def summarise(label: str, settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """One line from the metrics file of a run."""
    header, records = metrics.read(path)
    checks = [r for r in records if "validation_loss" in r]
    times = [r["step_ms"] for r in records if "step_ms" in r]
    ranks = [[r["step"], round(r["rank"], 2)] for r in records if "rank" in r]
    kept = ("experiment", "parameters", "state_bytes", "data", "unit", "jax", "device")
    run = {"label": label, **{k: header[k] for k in kept}, "settings": settings}
    run["curve"] = [[r["step"], _round(r["validation_loss"])] for r in checks]
    for name in checks[-1]:
        if name not in ("step", "validation_loss"):
            run[name.removeprefix("validation_")] = _round(checks[-1][name])
    if settings["tolerance"] or settings["budget"] or len({rank for _, rank in ranks}) > 1:
        run["ranks"] = ranks[:: max(1, len(ranks) // 20)]
    run["spectra"] = [[r["step"], [_round(x, 3) for x in r["spectrum"]]] for r in records if "spectrum" in r]
    run["step_ms"] = round(statistics.median(times), 1) if times else None
    return run


def _round(value: float | None, digits: int = 5) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One method with settings of its own.

    Attributes:
      label: its name in the results.
      command: the words that run it, but for step size, seed and folder.
      config: its settings; its step size is where a search begins, 0 for the method's own.
    """

    label: str
    command: tuple[str, ...]
    config: Config


def named(what: str, label: str, flags: Sequence[str]) -> Candidate:
    """The candidate of an experiment and a label as `lowrank_adam:blocks=16:lr=0.012`."""
    method, *pairs = label.split(":")
    if method not in LEARNING_RATES:
        raise ConfigError(f"--method {method}: choose from {', '.join(LEARNING_RATES)}")
    if not all("=" in pair for pair in pairs):
        raise ConfigError(f"--method {label}: after a method come settings as :name=value")
    own = [x for name, value in (pair.split("=", 1) for pair in pairs) for x in (f"--{name.replace('_', '-')}", value)]
    return _candidate(label, what, experiment(what), (*flags, *own, "--method", method))


def filed(file: str, flags: Sequence[str]) -> Candidate:
    """The candidate of a configuration file."""
    found = _candidate(Path(file).stem, f"run {file}", Path(file), flags)
    if len(found.config.methods) != 1:
        raise ConfigError(f"{file}: a sweep takes files of one method each")
    return found


def _candidate(label: str, command: str, base: type[Config] | Path, flags: Sequence[str]) -> Candidate:
    config, _ = parse(base, [*flags, "--overwrite"])  # of no folder, so none has to be new
    return Candidate(label, (*command.split(" ", 1), *flags), config)


class Sweep:
    """Runs of candidates, each in a process of its own."""

    def __init__(self, store: Store, pin: bool, fixed: bool) -> None:
        self.store, self.pin, self.fixed = store, pin, fixed

    def run(self, candidate: Candidate, lr: float, seed: int) -> dict[str, Any]:
        """The line of one run, from the store if it is there."""
        config = dataclasses.replace(candidate.config, lr=float(f"{lr:.6g}"), seed=seed)
        settings = {k: v for k, v in vars(config).items() if k not in NOT_SETTINGS}
        defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name in settings}
        found = self.store.find(settings, defaults)
        if found is None:
            with tempfile.TemporaryDirectory() as folder:
                own = ["--lr", str(config.lr), "--seed", str(seed), "--save-every", "0", "--out", folder]
                command = [sys.executable, "-m", "experiments", *candidate.command, *own]
                done = subprocess.run(self._pinned() + command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
                found = summarise(candidate.label, settings, Path(folder) / f"{config.method}.jsonl")
                self.store.add(found)
        return found

    def _pinned(self) -> list[str]:
        """The prefix that keeps a run to the core of its worker: two runs on a core each beat one on two cores."""
        if not self.pin:
            return []
        worker = int(threading.current_thread().name.rsplit("_", 1)[1])
        cores = sorted(os.sched_getaffinity(0), reverse=True)
        return ["taskset", "-c", str(cores[worker % len(cores)])]

    def search(self, candidate: Candidate, seeds: Sequence[int]) -> str:
        """Tune one candidate and repeat its best; returns a line about it."""
        label, config = candidate.label, candidate.config
        lr = config.lr or config.tuned.get(label, config.learning_rate(config.method))
        tried = {lr: self.run(candidate, lr, seeds[0])}
        while True:
            # The first of equals, so that a flat search ends; of those that diverged the smallest, to go down from.
            losses = {x: final(run) for x, run in tried.items()}
            best = min(losses, key=lambda x: (losses[x], x if math.isinf(losses[x]) else 0))
            # A diverged best says to go down; else both neighbours are wanted.
            wanted = [best / 2] if math.isinf(losses[best]) else [best / 2, best * 2]
            wanted = [float(f"{x:.6g}") for x in wanted]
            missing = (
                [] if self.fixed else [x for x in wanted if not any(math.isclose(x, y, rel_tol=1e-3) for y in tried)]
            )
            if not missing:
                break
            tried[missing[0]] = self.run(candidate, missing[0], seeds[0])
        repeated = [self.run(candidate, best, seed) for seed in seeds]
        if len(data := {run["data"] for run in (*tried.values(), *repeated)}) > 1:  # files that have changed since
            raise RuntimeError(f"{label}: runs on different data do not compare, drop the runs on one: {sorted(data)}")
        values = [final(run) for run in repeated]
        grid = ", ".join(f"{x:g}: {losses[x]:.4g}" for x in sorted(losses))
        return f"{label}: {statistics.mean(values):.4f} at {best:g}, seeds {values} (grid {grid})"


def _candidates(what: Sequence[str], labels: Sequence[str], flags: Sequence[str]) -> list[Candidate]:
    if what[0] in EXPERIMENTS:
        if len(what) > 1 or not labels:
            raise ConfigError(f"sweep {' '.join(what)}: after one experiment comes --method with its methods")
        return [named(what[0], label, flags) for label in labels]
    if labels:
        raise ConfigError(f"--method {labels[0]}: configuration files have their methods; or name an experiment")
    candidates = [filed(file, flags) for file in what]
    if len(names := sorted({candidate.config.name for candidate in candidates})) > 1:
        raise ConfigError(f"sweep: files of one experiment, not of {' and '.join(names)}")
    return candidates


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(prog="python -m experiments sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", help=f"configuration files, or one of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--method", nargs="+", default=[], help="methods of that experiment, as name:setting=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--pin", action="store_true", help="keep every run to one core")
    parser.add_argument("--fixed", action="store_true", help="take the first step size and do not search")
    parser.add_argument("--out", type=Path, help="default: results/<experiment>.jsonl")
    args = parser.parse_args(own)
    try:
        candidates = _candidates(args.what, args.method, flags)
    except ConfigError as error:
        sys.exit(str(error))
    store = Store(args.out or Path("results") / f"{candidates[0].config.name}.jsonl")
    sweep = Sweep(store, args.pin, args.fixed)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(sweep.search, candidate, args.seeds) for candidate in candidates]
        with tqdm(total=len(futures), unit="method") as bar:
            for future in concurrent.futures.as_completed(futures):
                try:
                    bar.write(future.result())
                except (ConfigError, DataError, RuntimeError) as error:
                    sys.exit(str(error))
                bar.update()


if __name__ == "__main__":
    main()
