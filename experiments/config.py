"""The settings of a pre-training run and their command line."""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.gpt import GPTConfig
from experiments.methods import METHODS, Settings


class ConfigError(Exception):
    """The settings cannot be used; the message is one line."""


def _field(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers, saved in `config.json` and in each metrics file."""

    method: str = _field(
        "full,lora,naive,lowrank_adam,lowrank_muon",
        f"one or several, separated by commas, of: {', '.join(METHODS)}",
    )
    steps: int = _field(300, "training steps; the learning-rate schedule ends with them")
    batch: int = _field(24, "windows a step")
    context: int = _field(64, "bytes a window")
    rank: int = _field(16, "rank of every kernel in the transformer blocks")
    tolerance: float = _field(0.0, "relative tail that lowrank_* may discard; 0 keeps the rank")
    momentum: str = _field("coefficient", "of lowrank_*: coefficient (r x r kept) or tangent")
    lr: float = _field(0.0, "peak step size of the block kernels; 0 is the method's tuned one")
    weight_decay: float = _field(0.01, "decoupled weight decay")
    seed: int = _field(0, "seed of the initial weights and of the batches")
    data: str = _field("", "text file or folder; empty is the standard library's *.py files")
    d: int = _field(128, "width of the model")
    layers: int = _field(3, "transformer blocks")
    heads: int = _field(4, "attention heads")
    dtype: str = _field("float32", "of the activations: float32 or bfloat16")
    eval_windows: int = _field(384, "validation windows")
    eval_every: int = _field(50, "steps between validations")
    log_every: int = _field(10, "steps between records of the training loss")
    save_every: int = _field(100, "steps between checkpoints")

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ConfigError(f"--method {self.method}: choose from {', '.join(METHODS)}")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if self.rank > self.d:
            raise ConfigError(f"--rank {self.rank}: at most the width, --d {self.d}")
        if self.d % self.heads:
            raise ConfigError(f"--d {self.d}: not a multiple of --heads {self.heads}")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"--tolerance {self.tolerance}: at least 0 and below 1")
        if self.momentum not in ("coefficient", "tangent"):
            raise ConfigError(f"--momentum {self.momentum}: coefficient or tangent")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"--dtype {self.dtype}: float32 or bfloat16")

    @property
    def methods(self) -> list[str]:
        return [name.strip() for name in self.method.split(",") if name.strip()]

    @property
    def settings(self) -> Settings:
        return Settings(self.steps, self.weight_decay, self.momentum, self.tolerance)

    @property
    def model(self) -> GPTConfig:
        return GPTConfig(self.d, self.layers, self.heads, self.context, self.dtype)


_POSITIVE = "steps batch context rank d layers heads eval_windows eval_every log_every save_every"
_POSITIVE = _POSITIVE.split()

SMOKE = {
    "steps": 6,
    "batch": 4,
    "context": 16,
    "rank": 4,
    "d": 32,
    "layers": 1,
    "heads": 2,
    "eval_windows": 8,
    "eval_every": 3,
    "log_every": 1,
    "save_every": 3,
}


@dataclasses.dataclass(frozen=True)
class Session:
    """What concerns this process only."""

    out: Path
    resume: bool
    overwrite: bool
    stop_at: int | None


def parse(argv: Sequence[str] | None = None) -> tuple[Config, Session]:
    """Flags over `--smoke` over the run that `--resume` continues over the defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pretrain",
        description="Pre-train a byte-level GPT with full and low-rank kernels and compare them.",
    )
    for field in dataclasses.fields(Config):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=field.type,
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} (default: {field.default!r})",
        )
    parser.add_argument("--out", type=Path, help="default: the first new runs/demo, runs/demo-2, ...")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a minute model")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --out")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="save and leave at this step")
    flags = vars(parser.parse_args(argv))
    smoke = SMOKE if flags.pop("smoke") else {}
    flags["out"] = flags["out"] or _default_folder("smoke" if smoke else "demo", flags["resume"])
    session = Session(*(flags.pop(f.name) for f in dataclasses.fields(Session)))

    saved = session.out / "config.json"
    if not session.resume:
        if saved.exists() and not session.overwrite:
            raise ConfigError(f"{session.out} holds a run: add --resume, --overwrite or --out PATH")
        return Config(**{**smoke, **flags}), session
    if not saved.exists():
        raise ConfigError(f"--resume: no run in {session.out} (config.json is missing)")
    before = json.loads(saved.read_text())
    for name, value in {**smoke, **flags}.items():
        if value != before[name]:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {value}: {session.out} was started with {before[name]}")
    return Config(**before), session


def _default_folder(name: str, resume: bool) -> Path:
    """The first free one of runs/name, runs/name-2, ...; to resume, the last one taken."""
    folders = [Path("runs", name + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 1000)))]
    taken = list(itertools.takewhile(lambda folder: (folder / "config.json").exists(), folders))
    return folders[max(len(taken) - 1, 0) if resume else len(taken)]
