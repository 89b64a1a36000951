"""Run one configuration file: a copy of the settings of an experiment that one edits.

    python -m experiments run experiments/configs/gpt_blocks.py
    python -m experiments run my_config.py --seed 1 --out runs/mine     # flags win over the file
    python -m experiments run my_config.py --help

A file sets `CONFIG`, as `CONFIG = Pretrain(method="lowrank_adam", blocks=16, steps=1500)`; those in
`experiments/configs` say what they cost and which result to expect. `python -m experiments sweep` takes several.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments import trainer
from experiments.config import first_word


def main(argv: Sequence[str] | None = None) -> None:
    file, flags = first_word(argv, __doc__ or "")
    trainer.main(Path(file), flags)


if __name__ == "__main__":
    main()
