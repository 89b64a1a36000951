"""`python -m experiments COMMAND ...`: the experiments by name, and tools for their runs."""

import importlib
import sys

COMMANDS = {
    "pretrain": "a small GPT on bytes of text, from scratch",
    "vision": "a transformer or convolutions on images",
    "finetune": "a pretrained MiniLM on short texts, or SmolLM2 on a text",
    "matrix": "ill-conditioned matrices with known answers",
    "run": "one configuration file, as those in experiments/configs",
    "footprint": "the memory of a training step",
    "sweep": "search the step sizes of methods, and repeat the best with more seeds",
    "report": "write the tables and pictures of RESULTS.md from results/",
    "faults": "kill runs and damage their checkpoints, and see whether they go on",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        importlib.import_module(f"experiments.{name}").main(sys.argv[2:])
        return
    lines = "\n".join(f"  {command:<10}{text}" for command, text in COMMANDS.items())
    help_text = f"usage: python -m experiments COMMAND [flags]\n\n{lines}\n\nCOMMAND --help says more."
    if name not in ("-h", "--help"):
        sys.exit(f"{name}: no such command, choose from {', '.join(COMMANDS)}")
    print(help_text)


if __name__ == "__main__":
    main()
