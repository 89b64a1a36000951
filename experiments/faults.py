"""Kill a training run at random moments and damage its checkpoints: a saved state must always come back.

    python -m experiments faults                      # 200 kills and 200 damaged checkpoints, half an hour on one core
    python -m experiments faults --smoke              # two kills of a short run, four damaged checkpoints

Kills. Every round starts `experiments.matrix`, whose ranks and widths change as it trains and which saves every few
steps, stops it (SIGSTOP) after a random time, notes what it was doing, and kills it (SIGKILL). The newest checkpoint
must then load without a warning, be no older than the newest one that stood in the folder when the kill came, and
hold to the bit the state of that step in a run that was never interrupted. A run that reaches its end is followed by
one with the next seed.

Damage. Every round copies a folder of two checkpoints and, in a random file of the newer one, turns over a random bit,
cuts the end off, or deletes the file. Restoring must give the newer state to the bit, or name it in a warning and give
the older one.

Every round adds a line to `rounds.jsonl` in --out; the same command goes on where it was stopped.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import lowrank_optax as lro
from experiments import matrix, metrics, trainer
from experiments.config import parse

METHOD = "lowrank_adam"
# Too large a step size, on purpose: ranks run from 2 to 12 and back, widths follow in multiples of 2, and a state that
# is off by one bit soon differs in all of them.
FLAGS = (
    *("--method", METHOD, "--batch", "24", "--columns", "16", "--target-rank", "8"),
    *("--condition", "100", "--rank", "2", "--max-rank", "12", "--geometry", "tangent"),
    *("--tolerance", "0.005", "--lr", "0.05"),
    *("--resize-every", "20", "--bucket", "2", "--save-every", "5", "--log-every", "50", "--eval-every", "3000"),
)
START, LIFE = 3.5, 1.5  # seconds: at most before a kill during the start, and after the first checkpoint


def digest(tree: Any) -> str:
    """A hash of names, dtypes, shapes and bits of all leaves, the same for a state and for orbax's dicts of it."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    content = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        content.update(f"{name} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return content.hexdigest()


def states(config: matrix.Matrix) -> Iterator[tuple[int, Any]]:
    """The checkpoints of a run that is never interrupted."""
    task, _, _ = trainer.build(config, METHOD)
    state, frozen = trainer.create_state(config, METHOD)
    for step in range(1, config.steps + 1):
        state, _ = trainer.train_step(task.loss, state, frozen, task.batch(config.seed, step))
        if step % config.resize_every == 0:
            state = trainer.follow_ranks(config, METHOD, state)
        if step % config.save_every == 0:
            yield step, trainer.saved(state)


def opened(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(lightweight_initialize=True)  # metadata may be damaged
    return ocp.CheckpointManager(folder.absolute(), options=options)


class Run:
    """One training run in `folder`, in as many processes as it takes."""

    def __init__(self, out: Path, steps: int, seed: int) -> None:
        self.folder = out / f"seed-{seed}"
        self.checkpoints = self.folder / "checkpoints" / METHOD
        self.flags = [*FLAGS, "--steps", str(steps), "--seed", str(seed), "--out", str(self.folder)]
        self.config, _ = parse(matrix.Matrix, [*self.flags, "--overwrite"])
        self.reference = {step: digest(tree) for step, tree in states(self.config)}

    def saved(self) -> list[int]:
        """The steps of the checkpoints that stand in the folder."""
        names = os.listdir(self.checkpoints) if self.checkpoints.exists() else []
        return sorted(int(name) for name in names if name.isdigit())

    def saving(self) -> bool:
        """Whether a save, or the removal of an old checkpoint after it, is going on."""
        return len(self.saved()) > 2 or any("tmp" in name for name in os.listdir(self.checkpoints))

    def finished(self) -> bool:
        return self.config.steps in self.saved()

    def kill(self, rng: random.Random) -> dict[str, Any]:
        """Train, kill one time in four before the first checkpoint and else some time after, look at what is left."""
        resume = ["--resume"] if (self.folder / "config.json").exists() else []
        before = self.saved()
        command = [sys.executable, "-m", "experiments.matrix", *self.flags, *resume]
        with open(self.folder.with_suffix(".err"), "w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, START))
        else:
            while process.poll() is None and self.saved() == before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, LIFE))
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        stood = self.saved()
        moment = "save" if stood and self.saving() else "step" if stood != before else "start"
        process.kill()
        if process.wait() != -signal.SIGKILL:
            moment = "end" if process.returncode == 0 else "error"
        return {"moment": moment, **self.check(stood)}

    def check(self, stood: Sequence[int]) -> dict[str, Any]:
        """Whether the newest checkpoint loads, and is the one it should be."""
        if (self.folder / f"{METHOD}.jsonl").exists():
            metrics.read(self.folder / f"{METHOD}.jsonl")
        if not stood:
            return {"step": None, "result": "whole"}
        with watched() as named, opened(self.checkpoints) as manager:
            restored = lro.checkpoint.restore(manager)
        if restored is None or restored.step < max(stood):
            result = "lost"
        else:
            result = "whole" if digest(restored.tree) == self.reference[restored.step] else "corrupt"
        return {"step": restored and restored.step, "result": result, "skipped": len(named)}


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Collects the warnings that name a skipped checkpoint."""
    named: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield named
    named += [str(w.message) for w in caught if "is skipped" in str(w.message)]


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file that is not empty; returns how."""
    kind = rng.choice(("bit", "end", "file"))
    content = bytearray(path.read_bytes())
    if kind == "bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "end":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        path.unlink()
    return kind


def whole(folder: Path) -> dict[int, str]:
    """A new folder with the first two checkpoints of a run; returns their digests."""
    shutil.rmtree(folder, ignore_errors=True)
    config, _ = parse(matrix.Matrix, [*FLAGS, "--out", str(folder)])
    contents = {}
    with opened(folder) as manager:
        for step, tree in itertools.islice(states(config), 2):
            contents[step] = digest(tree)
            lro.checkpoint.save(manager, step, tree)
            manager.wait_until_finished()  # the next step donates these buffers
    return contents


def damaged(folder: Path, contents: dict[int, str], work: Path, rng: random.Random) -> dict[str, Any]:
    """Damage a copy of a folder with two checkpoints, and restore."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)
    old, new = sorted(contents)
    files = sorted(path for path in (work / str(new)).rglob("*") if path.is_file() and path.stat().st_size)
    kind = damage(rng.choice(files), rng)
    with opened(work) as manager:
        try:
            alone = "newer" if digest(manager.restore(new)) == contents[new] else "wrong values"
        except Exception:  # of any kind, like the damage
            alone = "error"
    with watched() as named, opened(work) as manager:
        step, tree = lro.checkpoint.restore(manager)
    right = digest(tree) == contents[step] and bool(named) == (step == old)
    result = {new: "newer", old: "older, newer named"}[step] if right else "wrong"
    return {"moment": kind, "orbax": alone, "result": result}


def rounds(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """How often each kind of round had each result."""

    def outcome(line: dict[str, Any]) -> str:
        alone = f" (orbax alone: {line['orbax']})" if "orbax" in line else ""
        return line["result"] + alone + ", a checkpoint skipped" * line.get("skipped", 0)

    counts = collections.Counter((line["part"], line["moment"], outcome(line)) for line in lines)
    return "\n".join(f"{part:<8}{moment:<8}{n:>5}  {result}" for (part, moment, result), n in sorted(counts.items()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3000, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_const", const={"kills": 2, "damages": 4, "steps": 40}, default={})
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    args = parser.parse_args(argv)
    vars(args).update(args.smoke)
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # orbax narrates
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "rounds.jsonl"
    # Compiled programs are kept, here and in the runs, so that these spend their short lives training.
    cache = {"JAX_COMPILATION_CACHE_DIR": args.out / "cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0}
    for name, value in cache.items():
        os.environ[name] = str(value)
        jax.config.update(name.lower(), str(value) if isinstance(value, Path) else value)

    def done(part: str) -> list[dict[str, Any]]:
        return [line for line in rounds(path) if line["part"] == part]

    def record(**line: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    run = None
    while (number := len(done("kill"))) < args.kills:
        if run is None:
            run = Run(args.out, args.steps, max((line["seed"] for line in done("kill")), default=args.seed))
        if run.finished():
            run = Run(args.out, args.steps, run.config.seed + 1)
        rng = random.Random(f"{args.seed}-{number}")
        record(part="kill", seed=run.config.seed, **run.kill(rng))
    contents = whole(args.out / "whole") if args.damages > len(done("damage")) else {}
    while (number := len(done("damage"))) < args.damages:
        rng = random.Random(f"{args.seed}-{number}")
        record(part="damage", **damaged(args.out / "whole", contents, args.out / "damaged", rng))
    print(table(rounds(path)))


if __name__ == "__main__":
    main()
