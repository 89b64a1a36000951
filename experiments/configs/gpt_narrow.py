"""Dense AdamW of half the width: as many parameters as rank 16.

    python -m experiments run experiments/configs/gpt_narrow.py

Three minutes on two cores. Expect a validation loss of 1.491 nats/byte.
"""

from experiments.pretrain import Pretrain

CONFIG = Pretrain(
    method="full",
    d=64,
    steps=1500,
    lr=6e-3,
)
