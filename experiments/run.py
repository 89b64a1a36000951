"""Run one configuration file: a copy of the settings of an experiment that one edits.

    python -m experiments run experiments/configs/gpt_blocks.py
    python -m experiments run my_config.py --seed 1 --out runs/mine     # flags win over the file
    python -m experiments run my_config.py --help

A file sets `CONFIG`, as `CONFIG = Pretrain(method="lowrank_adam", blocks=16, steps=1500)`; those in
`experiments/configs` say what they cost and which result to expect. `python -m experiments sweep` takes several.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import trainer


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("-"):
        print(__doc__)
        sys.exit(0 if argv and argv[0] in ("-h", "--help") else 2)
    trainer.main(Path(argv[0]), argv[1:])


if __name__ == "__main__":
    main()
