"""The numbers of more parametrisations of PEFT: outputs, gradients and dense weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.adapters.peft_numbers import DATA

FILE = np.load(DATA / "kinds.npz")
NAMES = sorted({key.split(".")[0] for key in FILE})
# PEFT's circulants are Fourier transforms in float32.
TOLERANCE = {"c3a": dict(rtol=2e-6, atol=2e-6)}


class Numbers:
    """One recorded adapter, with arrays in the layout of Flax."""

    def __init__(self, name: str, shape: str, group: str = "param") -> None:
        self.start, self.group = f"{name}.{shape}.", group

    def __getitem__(self, key: str) -> jax.Array:
        return jnp.asarray(FILE[f"{self.start}{self.group}.{key}"])


def change(name: str, of: Numbers) -> tuple[lro.adapters.Change, dict]:
    """The change, and the bank beside it."""
    ad = lro.adapters
    if name in ("oft", "oft_neumann"):
        return (ad.OFT if name == "oft" else ad.NeumannOFT)(of["oft_R.weight"]), {}
    if name == "boft":
        return ad.BOFT(of["boft_R"], of["boft_s"][:, 0]), {}
    if name == "randlora":
        bank = {}
        if of.group == "param":
            bank = {"randlora_bank": ad.RandomPairs(of["randlora_A"][:, 0], of["randlora_B"])}
        return ad.RandLoRA(of["randlora_lambda"], of["randlora_gamma"], jnp.asarray(2.0)), bank
    if name == "vblora":
        bank = {"vblora_bank": ad.VectorBank(of["vblora_vector_bank"])}
        return ad.VBLoRA(of["vblora_logits_A"], of["vblora_logits_B"]), bank
    if name == "c3a":
        return ad.C3A(of["c3a_kernel"]), {}
    if name == "miss":
        return ad.MiSS(of["miss_block"], jnp.asarray(1.0)), {}
    if name == "gralora":
        return ad.GraLoRA(of["gralora_A"], of["gralora_B"], jnp.asarray(2.0)), {}
    if name == "delora":
        lengths = jnp.asarray(FILE[f"{of.start}param.delora_w_norm"])[:, None]
        return ad.DeLoRA(of["delora_A"].T, of["delora_B"].T, of["delora_lambda"][0], lengths), {}
    scale = jnp.asarray(6 / (3 + 1e-5))
    return ad.Components(of["lora_A"].T, of["lora_E"][:, 0], of["lora_B"].T, scale), {}


# Only randlora asks which side is longer.
@pytest.mark.parametrize(("name", "shape"), [*((name, "tall") for name in NAMES), ("randlora", "wide")])
def test_outputs_gradients_and_dense_weights(name: str, shape: str) -> None:
    of = Numbers(name, shape)
    x, target, out, base, merged = (FILE[of.start + key] for key in ("x", "target", "out", "base", "merged"))
    one, bank = change(name, of)
    params, delta = {"kernel": jnp.asarray(base.T)}, {"kernel": one, **bank}

    def loss(delta):
        y = jnp.asarray(x) @ lro.adapters.attach(params, delta)["kernel"]
        return jnp.sum((y - target) ** 2) / 2, (y, lro.adapters.merge(params, delta)["kernel"])

    tolerance = TOLERANCE.get(name, dict(rtol=1e-12, atol=1e-12))
    grads, (y, dense) = jax.jit(jax.grad(loss, has_aux=True))(delta)
    np.testing.assert_allclose(y, out, **tolerance)
    np.testing.assert_allclose(dense, merged.T, **tolerance)
    want, of_bank = change(name, Numbers(name, shape, "grad"))
    expected = {"kernel": want, **of_bank}

    def check(label, got, want):
        if label == "trained":
            np.testing.assert_allclose(got, want, rtol=0, atol=10 * tolerance["atol"] * np.abs(want).max())

    for key in expected:
        jax.tree.map(check, lro.adapters.labels(delta)[key], grads[key], expected[key])
