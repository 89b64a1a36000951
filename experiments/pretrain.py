"""Pre-train a byte-level GPT with full and with low-rank kernels, and compare them.

    python -m experiments pretrain                  # the demo: five methods, five minutes on two cores
    python -m experiments pretrain --smoke          # seconds, for tests
    python -m experiments pretrain --method lowrank_muon --rank 32 --data my_text/ --out runs/mine
    python -m experiments pretrain --d 768 --layers 12 --heads 12 --context 1024 --dtype bfloat16 --rank 96

The last is the size of GPT-2 and wants a GPU. Ctrl-C saves after the current step; `--resume` continues to the bit.
Expect low-rank methods between dense ones and `factors`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from experiments import gpt, text, trainer
from experiments.config import Config, ConfigError, option, shared
from experiments.task import Batch, Params, Task, random_params


@dataclasses.dataclass(frozen=True)
class Pretrain(Config):
    """Pre-train a byte-level GPT with full and low-rank kernels and compare them."""

    name: ClassVar[str] = "pretrain"
    next_runs: ClassVar[Mapping[str, str]] = {
        "a dense model of as many parameters": "--method full,full_muon --d 64",
        "grids of blocks, as many parameters again": "--method lowrank_adam --blocks 16 --init-scale 0.5 --lr 0.012",
    }
    # The best of a grid of factors of two, by the validation loss of the demo on seed 0: results/pretrain.jsonl.
    tuned: ClassVar[Mapping[str, float]] = {
        "full": 3e-3,
        "full_muon": 2e-2,
        "lora": 3e-3,
        "factors": 3e-3,
        "factors_muon": 1e-2,
        "naive": 3e-3,
        "lowrank_adam": 6e-3,
        "lowrank_adam:geometry=coefficient": 1.2e-2,
        "lowrank_adam:geometry=tangent": 1.2e-2,
        "lowrank_heavy_ball": 0.3,
        "lowrank_muon": 2e-2,
        "lowrank_muon:geometry=coefficient": 4e-2,
        "lowrank_muon:geometry=tangent": 2e-2,
    }
    smoke: ClassVar[Mapping[str, Any]] = {
        **Config.smoke,
        "batch": 4,
        "context": 16,
        "rank": 4,
        "d": 32,
        "layers": 1,
        "heads": 2,
        "eval_windows": 8,
    }

    method: str = shared("method", "full,full_muon,factors,lowrank_adam,lowrank_muon")
    init_scale: float = shared("init_scale", 0.2)
    context: int = option(64, "bytes a window")
    data: str = option("", "text file or folder; empty is the standard library's *.py files")
    d: int = option(128, "width of the model")
    layers: int = option(3, "transformer blocks")
    heads: int = option(4, "attention heads")
    dtype: str = option("float32", "of the activations", "float32", "bfloat16")
    eval_windows: int = option(384, "validation windows")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank > self.d:
            raise ConfigError(f"--rank {self.rank}: at most the width, --d {self.d}")
        if self.d % self.heads:
            raise ConfigError(f"--d {self.d}: not a multiple of --heads {self.heads}")

    def task(self) -> Task:
        corpus = text.load(self.data or None)
        text.check_length(corpus, self.context)
        model = gpt.GPT(gpt.GPTConfig(self.d, self.layers, self.heads, self.context, self.dtype))
        example = jax.ShapeDtypeStruct((1, self.context), jnp.int32)
        windows = text.validation_windows(corpus, self.eval_windows, self.context)
        return Task(
            data=f"{corpus.name}: {len(corpus.train):,} bytes to train, {len(corpus.validation):,} held out",
            model=model,
            init=functools.partial(random_params, model, example),
            is_kernel=gpt.is_block_kernel,
            loss=loss_fn,
            batch=lambda seed, step: text.batch(corpus.train, seed, step, self.batch, self.context),
            validation=[windows[i : i + self.batch] for i in range(0, len(windows), self.batch)],
            unit="nats/byte",
            work=("tokens", self.batch * self.context),
        )


def loss_fn(apply_fn: Callable[..., Any], params: Params, windows: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats/byte of each window's bytes after the first."""
    logits = apply_fn({"params": params}, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(), {}


CONFIG = Pretrain


def main(argv: Sequence[str] | None = None) -> None:
    trainer.main(CONFIG, argv)


if __name__ == "__main__":
    main()
