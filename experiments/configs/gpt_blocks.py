"""Grids of 16 x 16 blocks of rank 1 under low-rank Adam: a better use of 191k parameters than half the width.

    python -m experiments run experiments/configs/gpt_blocks.py

Six minutes on two cores. Expect a validation loss of 1.450 nats/byte.
"""

from experiments.pretrain import Pretrain

CONFIG = Pretrain(
    method="lowrank_adam",
    rank=16,
    blocks=16,
    steps=1500,
    lr=1.2e-2,
    init_scale=0.5,
)
