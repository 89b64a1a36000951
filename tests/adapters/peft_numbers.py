"""The recorded numbers of PEFT, in the layout of Flax: kernels and factors transposed."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro

DATA = pathlib.Path(__file__).parents[1] / "data" / "peft"
FILE = np.load(DATA / "adapters.npz")
SETTINGS = json.loads(str(FILE["meta"]))["cases"]
SHAPES = ("wide", "tall")


class Case:
    """One recorded adapter at one shape."""

    def __init__(self, name: str, shape: str) -> None:
        self.name, self.shape, self.settings = name, shape, SETTINGS[name]
        self.x, self.target, self.out = self["x"], self["y_target"], self["out"]
        self.base, self.merged = self["base_weight"].T, self["merged_weight"].T

    def __getitem__(self, key: str) -> np.ndarray:
        return np.asarray(FILE[f"{self.name}.{self.shape}.{key}"])

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        r = self.settings["r"]
        alpha = self.settings.get("lora_alpha", self.settings.get("alpha", r))
        return alpha / np.sqrt(r) if self.settings.get("use_rslora") else alpha / r

    def delta(self, group: str = "param") -> dict[str, Any]:
        """The adapter of the kernel, or the gradients of its trained arrays in the same nodes."""

        def take(name: str, suffix: str = ".weight") -> Any:
            return jnp.asarray(self[f"{group}.{name}.default{suffix}"]).T

        scale = jnp.asarray(self.scale if group == "param" else 0.0)
        if self.name == "vera":
            b, d = take("vera_lambda_b", ""), take("vera_lambda_d", "")
            A, B = (jnp.asarray(self[f"shared.vera_{letter}.default"]) for letter in "AB")
            zero = group != "param"
            bank = lro.adapters.Bank(0 * A.T if zero else A.T, 0 * B if zero else B)
            return {"kernel": lro.adapters.VeRA(b, d), "vera_bank": bank}
        if self.name == "loha":
            B1, A1, B2, A2 = (take(f"hada_{name}", "") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
            return {"kernel": lro.adapters.LoHa(A1, B1, A2, B2, scale)}
        if self.name == "hra":
            return {"kernel": lro.adapters.Householder(take("hra_u", "").T)}
        change: Any = lro.adapters.LoRA(take("lora_A"), take("lora_B"), scale)
        if self.name == "dora":
            change = lro.adapters.Magnitude(change, take("lora_magnitude_vector"))
        return {"kernel": change}


CASES = [Case(name, shape) for name in SETTINGS for shape in SHAPES]
IDS = [f"{case.name}-{case.shape}" for case in CASES]
