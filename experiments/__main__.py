"""`python -m experiments COMMAND ...`: the experiments by name, `sweep` and `report`."""

import importlib
import sys

COMMANDS = ("pretrain", "vision", "matrix", "finetune", "footprint", "sweep", "report", "faults")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m experiments {{{','.join(COMMANDS)}}} ... (--help after one of them says more)")
    importlib.import_module(f"experiments.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
