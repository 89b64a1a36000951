"""Dense AdamW, the yardstick of the small GPT.

    python -m experiments run experiments/configs/gpt_dense.py

Five minutes on two cores. Expect a validation loss of 1.362 nats/byte.
"""

from experiments.pretrain import Pretrain

CONFIG = Pretrain(
    method="full",
    steps=1500,
    lr=3e-3,
)
