"""The memory of one training step: what the compiled program needs, and what a process took.

    python -m experiments footprint pretrain --method full,lowrank_adam
    python -m experiments footprint experiments/configs/gpt_blocks.py
    python -m experiments footprint finetune --model smollm2 --method lora,lowrank_adam,full
    python -m experiments footprint finetune --model smollm2 --method lora --measure    # one method, a fresh process

After an experiment or a configuration file come its options. A line for each method, in MB:

    base        the frozen parameters
    trained     the trained parameters and their optimizer state
    activations temporary arrays of the program that computes the gradient of the trained parameters and no more
    step        arguments, temporary arrays and outputs of the whole step; outputs that take the place of an argument
                count once
    excess      (step - base - activations) / trained: 1 for a step without further copies

`--measure` loads the model, takes three steps, and prints the largest resident memory of the process so far: before the
model is loaded, after it is, and at the end, which includes what the compiler took.
"""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import methods, trainer
from experiments.config import EXPERIMENTS, Config, ConfigError, experiment, first_word, parse
from experiments.task import DataError, Params

MB = 1e6


def bytes_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def programs(config: Config, name: str) -> dict[str, float]:
    """The columns of one method, from shapes alone."""
    task, apply_fn, _ = trainer.build(config, name)
    state, frozen = jax.eval_shape(lambda: trainer.create_state(config, name))
    batch = jax.eval_shape(lambda: task.batch(0, 1))

    @jax.jit
    def gradient(trained: Params, frozen: Params, batch: Any) -> Params:
        return jax.grad(lambda x: task.loss(apply_fn, methods.join(x, frozen), batch)[0])(trained)

    activations = gradient.lower(state.params, frozen, batch).compile().memory_analysis().temp_size_in_bytes
    m = trainer.train_step.lower(task.loss, state, frozen, batch).compile().memory_analysis()
    step = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    base, trained = bytes_of(frozen), bytes_of((state.params, state.opt_state))
    sizes = {"base": base, "trained": trained, "activations": activations, "step": step}
    return {k: v / MB for k, v in sizes.items()} | {"excess": (step - base - activations) / trained}


def measured(config: Config, name: str) -> dict[str, float]:
    """Resident memory of this process at its largest so far, at three times."""
    found = {"before": _peak()}
    task, _, _ = trainer.build(config, name)
    state, frozen = trainer.create_state(config, name)
    found["loaded"] = _peak()
    for step in range(1, 4):
        state, _ = trainer.train_step(task.loss, state, frozen, task.batch(config.seed, step))
    jax.block_until_ready(state)
    return {**found, "end": _peak()}


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def main(argv: Sequence[str] | None = None) -> None:
    what, flags = first_word(argv, __doc__ or "")
    run = measured if "--measure" in flags else programs
    try:
        base = experiment(what) if what in EXPERIMENTS else Path(what)
        config, _ = parse(base, ["--overwrite", *(flag for flag in flags if flag != "--measure")])
        for name in config.methods:
            print(name, *(f"{key} {value:,.3f}" for key, value in run(config, name).items()), sep="  ", flush=True)
    except (ConfigError, DataError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
