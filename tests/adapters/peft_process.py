"""The side of torch and PEFT in `test_with_peft.py`, in a process of its own: `peft_process.py read|lora|dora FOLDER`.

`read` loads the adapter in FOLDER and merges it, a kind trains a new one and saves it in FOLDER. The model, the inputs
and the outputs are in FOLDER/model.npz and FOLDER/outputs.npz.
"""

import pathlib
import sys

import numpy as np
import peft
import torch

folder = pathlib.Path(sys.argv[2])
given = np.load(folder / "model.npz")


class Model(torch.nn.Module):
    """A convolution of as many dimensions as the inputs have, and two layers."""

    def __init__(self):
        super().__init__()
        convolutions = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d}
        self.conv = convolutions[given["x"].ndim](3, 6, 3, padding=1)
        self.up = torch.nn.Linear(6, 16)
        self.down = torch.nn.Linear(16, 5)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).flatten(2).mean(2)
        return self.down(torch.tanh(self.up(x)))


torch.manual_seed(0)
model = Model()
model.load_state_dict({name: torch.tensor(given[name]) for name in model.state_dict()})
x = torch.tensor(given["x"])
if sys.argv[1] == "read":
    adapted = peft.PeftModel.from_pretrained(model, folder / "adapter")
    before = adapted(x).detach().numpy()
    merged = adapted.merge_and_unload()
    np.savez(folder / "outputs.npz", adapted=before, merged=merged(x).detach().numpy())
else:
    settings = dict(
        rank_pattern={"down": 2}, alpha_pattern={"down": 5}, use_rslora=True, use_dora=sys.argv[1] == "dora"
    )
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["conv", "up", "down"], **settings)
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        ((adapted(x) - 1.0) ** 2).mean().backward()
        optimizer.step()
    adapted.save_pretrained(folder / "adapter")
    np.savez(folder / "outputs.npz", adapted=adapted(x).detach().numpy())
