"""LoRA of rank 8 on MiniLM, to sort glosses of WordNet.

    python -m experiments run experiments/configs/minilm_lora.py

Two minutes on two cores; needs the packages that `python -m experiments finetune --help` names.
 Expect a validation loss of 0.870 nats.
"""

from experiments.finetune import Finetune

CONFIG = Finetune(
    method="lora",
    rank=8,
    steps=60,
    lr=6e-3,
)
