"""The settings that all experiments share, and their command line."""

import argparse
import dataclasses
import importlib
import itertools
import json
import runpy
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from experiments.names import DEFAULT_GEOMETRY, GEOMETRIES, LEARNING_RATES
from experiments.task import Task

EXPERIMENTS = ("pretrain", "vision", "matrix", "finetune")  # modules with a `CONFIG` of that name
GROUPS = {  # of flags in --help; all others are of the model and its data
    "methods": "method rank max_rank blocks geometry retraction local_steps init_scale dense_scale",
    "ranks that change": "tolerance budget resize_every bucket",
    "training": "steps batch lr lr_others weight_decay seed",
    "records": "eval_every log_every save_every",
}


class ConfigError(Exception):
    """The settings cannot be used; the message is one line."""


def option(default: Any, text: str, *choices: str) -> Any:
    """A setting with its description, and the values it may have."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers, saved in `config.json` and in each metrics file.

    An experiment is a subclass with more settings and the method `task`.
    """

    name: ClassVar[str]
    smoke: ClassVar[Mapping[str, Any]] = {"steps": 6, "eval_every": 3, "log_every": 1, "save_every": 3}
    tuned: ClassVar[Mapping[str, float]] = {}  # the step size of each method, where it was searched for
    next_runs: ClassVar[Mapping[str, str]] = {}  # what else is worth a look after the default run, and its flags

    method: str = option("full,lowrank_adam", "one or several of those below, separated by commas")
    steps: int = option(300, "training steps; the learning-rate schedule ends with them")
    batch: int = option(24, "examples a step")
    rank: int = option(16, "rank of every factored kernel, at most")
    max_rank: int = option(0, "width of the factors that ranks may grow into; 0 is the rank")
    blocks: int = option(0, "cut every kernel of lowrank_* into a grid of so many blocks each way; 0 is one matrix")
    init_scale: float = option(1.0, "factor on the singular values that factored kernels start with")
    dense_scale: float = option(1.0, "factor on the kernels that dense methods start with")
    tolerance: float = option(0.0, "relative tail that lowrank_* may discard; 0 keeps the rank")
    budget: int = option(0, "parameters that all kernels of lowrank_* may have together; 0 keeps the ranks")
    resize_every: int = option(0, "steps between fits of the factors' width to the ranks of lowrank_*; 0 keeps it")
    bucket: int = option(8, "the widths that factors are fitted to are multiples of this")
    geometry: str = option("", "of lowrank_*; empty is the method's own", "", *GEOMETRIES)
    local_steps: int = option(1, "steps with frozen bases in a loop of --geometry galerkin")
    retraction: str = option("svd", "of --geometry tangent and coefficient", "svd", "bug")
    lr: float = option(0.0, "peak step size of the factored kernels; 0 is the method's tuned one")
    lr_others: float = option(3e-3, "peak step size of AdamW for all other parameters")
    weight_decay: float = option(0.01, "decoupled weight decay")
    seed: int = option(0, "seed of the initial weights and of the batches")
    eval_every: int = option(50, "steps between validations")
    log_every: int = option(10, "steps between records of the training loss")
    save_every: int = option(100, "steps between checkpoints; 0 saves none")

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in LEARNING_RATES]
        if unknown or not self.methods:
            raise ConfigError(f"--method {self.method}: choose from {', '.join(LEARNING_RATES)}")
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), field.name.replace("_", "-")
            choices = field.metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(f"--{flag} {value}: choose from {', '.join(filter(None, choices))}")
            least = 0 if field.default == 0 or field.name in ("save_every", "seed") else 1
            if isinstance(value, int) and value < least:
                raise ConfigError(f"--{flag} {value}: at least {least}")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"--tolerance {self.tolerance}: at least 0 and below 1")
        if self.max_rank and self.max_rank < self.rank:
            raise ConfigError(f"--max-rank {self.max_rank}: at least the rank, {self.rank}")
        for name in self.methods:
            if name in DEFAULT_GEOMETRY:
                self._check_geometry(name)
        if "adapter" in self.methods and not self.adapt:
            raise ConfigError("--method adapter: changes a pretrained kernel, which only finetune --mode adapter has")
        if self.blocks and self.adapt:
            raise ConfigError(f"--blocks {self.blocks}: a change of pretrained kernels is one matrix of low rank")

    def _check_geometry(self, method: str) -> None:
        """Raises ConfigError for options that the geometry of a method does not have."""
        geometry = self.geometry_of(method)
        where = f"{method} has the geometry {geometry}"
        if geometry == "balanced" and (self.tolerance or self.budget):
            flag = "--budget" if self.budget else "--tolerance"
            raise ConfigError(f"{flag}: {where}, which keeps ranks; choose --geometry tangent, coefficient or galerkin")
        if self.blocks and geometry not in ("balanced", "tangent"):
            raise ConfigError(f"--blocks {self.blocks}: {where}; choose --geometry balanced or tangent")
        if self.retraction != "svd" and geometry not in ("tangent", "coefficient"):
            raise ConfigError(f"--retraction {self.retraction}: {where}; choose --geometry tangent or coefficient")
        if self.retraction == "bug" and (self.tolerance or self.budget):
            raise ConfigError("--retraction bug: keeps ranks; choose svd, or neither --tolerance nor --budget")
        if self.local_steps > 1 and geometry != "galerkin":
            raise ConfigError(f"--local-steps {self.local_steps}: {where}; choose --geometry galerkin")
        if self.resize_every and geometry == "galerkin":
            raise ConfigError("--resize-every: a galerkin loop needs its width; choose another --geometry")

    @property
    def methods(self) -> list[str]:
        return [name.strip() for name in self.method.split(",") if name.strip()]

    @property
    def adapt(self) -> bool:
        """Whether kernels keep their first value and a low-rank change of it is trained."""
        return False

    def learning_rate(self, method: str) -> float:
        return self.lr or self.tuned.get(method, LEARNING_RATES[method])

    def geometry_of(self, method: str) -> str:
        """The geometry of a method on the manifold."""
        return self.geometry or DEFAULT_GEOMETRY[method]

    def task(self) -> Task:
        raise NotImplementedError


def shared(name: str, default: Any) -> Any:
    """A setting of `Config` with another default."""
    return dataclasses.field(default=default, metadata=Config.__dataclass_fields__[name].metadata)


@dataclasses.dataclass(frozen=True)
class Session:
    """Settings of this process only."""

    out: Path
    resume: bool = False
    overwrite: bool = False
    stop_at: int | None = None
    tensorboard: bool = False


def experiment(name: str) -> type[Config]:
    """The settings of one of `EXPERIMENTS`, as a class."""
    config: type[Config] = importlib.import_module(f"experiments.{name}").CONFIG
    return config


def first_word(argv: Sequence[str] | None, text: str) -> tuple[str, list[str]]:
    """The first word of a command line, and the rest; where there is none, prints the text and exits."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-"):
        print(text)
        sys.exit(0 if words and words[0] in ("-h", "--help") else 2)
    return words[0], words[1:]


def read(file: Path) -> tuple[Config, str]:
    """The settings of a configuration file, its `CONFIG`, and its docstring."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    try:
        names = runpy.run_path(str(file))
    except (SyntaxError, ImportError, NameError, TypeError) as error:
        raise ConfigError(f"{file}: {type(error).__name__}: {error}") from error
    if not isinstance(names.get("CONFIG"), Config):
        raise ConfigError(f"{file}: it has to set CONFIG to the settings of an experiment, as Pretrain(rank=8)")
    return names["CONFIG"], names["__doc__"] or ""


def parse(base: type[Config] | Path, argv: Sequence[str] | None = None) -> tuple[Config, Session]:
    """Flags over `--smoke` over the run that `--resume` continues over `base`: an experiment's defaults, or a file."""
    if isinstance(base, Path):
        config, text = read(base)
        cls, name, written = type(config), base.stem, dataclasses.asdict(config)
        parser = _parser(cls, f"run {base}", text, written)
    else:
        cls, name, written = base, base.name, {}
        parser = _parser(cls, name, sys.modules[cls.__module__].__doc__ or "", written)
    flags = vars(parser.parse_args(argv))
    smoke = cls.smoke if flags.pop("smoke") else {}
    flags["out"] = flags["out"] or _default_folder("smoke" if smoke else name, flags["resume"])
    session = Session(*(flags.pop(f.name) for f in dataclasses.fields(Session)))

    given = {**written, **smoke, **flags}
    saved = session.out / "config.json"
    if not session.resume:
        if saved.exists() and not session.overwrite:
            raise ConfigError(f"{session.out} holds a run: add --resume, --overwrite or --out PATH")
        return cls(**given), session
    if not saved.exists():
        raise ConfigError(f"--resume: no run in {session.out} (config.json is missing)")
    before = json.loads(saved.read_text())
    for setting, value in given.items():
        if value != before.get(setting):
            flag = setting.replace("_", "-")
            raise ConfigError(f"--{flag} {value}: {session.out} was started with {before.get(setting)}")
    return cls(**before), session


def _parser(cls: type[Config], command: str, text: str, written: Mapping[str, Any]) -> argparse.ArgumentParser:
    """A flag for every setting, in groups; a setting that is not given stays absent."""
    from experiments import methods  # which import this module

    parser = argparse.ArgumentParser(
        prog=f"python -m experiments {command}",
        usage="%(prog)s [flags]",
        description=text,
        epilog=f"methods:\n{(methods.__doc__ or '').partition('.')[2].strip(chr(10))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    titles = {name: title for title, names in GROUPS.items() for name in names.split()}
    groups = {title: parser.add_argument_group(title) for title in ("model and data", *GROUPS)}
    for field in dataclasses.fields(cls):
        choices = list(filter(None, field.metadata["choices"]))
        groups[titles.get(field.name, "model and data")].add_argument(
            f"--{field.name.replace('_', '-')}",
            type=typing.cast(Any, field.type),
            default=argparse.SUPPRESS,
            metavar=f"{{{','.join(choices)}}}" if choices else typing.cast(Any, field.type).__name__.upper(),
            help=f"{field.metadata['help']} (default: {written.get(field.name, field.default)!r})",
        )
    own = parser.add_argument_group("this run")
    own.add_argument("--out", type=Path, help="default: a new folder in runs/")
    own.add_argument("--smoke", action="store_true", help="a few steps of a minute model")
    again = own.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --out")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    own.add_argument("--stop-at", type=int, metavar="STEP", help="save and leave at this step")
    own.add_argument("--tensorboard", action="store_true", help="also write event files, to tensorboard/ in --out")
    return parser


def _default_folder(name: str, resume: bool) -> Path:
    """The first free one of runs/name, runs/name-2, ...; to resume, the last one taken."""
    folders = [Path("runs", name + suffix) for suffix in ("", *(f"-{i}" for i in range(2, 1000)))]
    taken = list(itertools.takewhile(lambda folder: (folder / "config.json").exists(), folders))
    return folders[max(len(taken) - 1, 0) if resume else len(taken)]
