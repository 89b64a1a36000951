"""Adapters compute what PEFT's adapters compute, from recorded numbers in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.adapters.peft_numbers import CASES, DATA, IDS, SHAPES, Case

# Sums of 20 products in float64, and one division by norms.
TOLERANCE = dict(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_outputs_gradients_and_dense_weights(case: Case) -> None:
    model = nn.Dense(case.out.shape[1], use_bias=False, param_dtype=jnp.float64)
    params, delta = {"kernel": jnp.asarray(case.base)}, case.delta()

    def loss(delta):
        y = lro.linen.apply(model)({"params": params, "adapters": delta}, jnp.asarray(case.x))
        return jnp.sum((y - case.target) ** 2) / 2, y

    grads, y = jax.grad(loss, has_aux=True)(delta)
    np.testing.assert_allclose(y, case.out, **TOLERANCE)
    expected = case.delta("grad")
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11 * np.abs(np.asarray(want)).max())
    merged = lro.adapters.merge(params, delta)["kernel"]
    np.testing.assert_allclose(merged, case.merged, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts(start: str, shape: str) -> None:
    """Factors up to the signs of singular vectors, products and residual bases exactly."""
    case = Case(f"{start}_init", shape)
    before = {"kernel": jnp.asarray(case["original_weight"].T)}
    params, delta = lro.adapters.init(jax.random.key(0), before, rank=4, kind="lora", alpha=4, start=start)
    A, B = (case[f"init.lora_{letter}.default.weight"].T for letter in "AB")
    # PEFT decomposes in float32: 20 roundings of 6e-8, of entries up to about 5.
    tolerance = dict(rtol=5e-6, atol=5e-6)
    np.testing.assert_allclose(params["kernel"], case["init.base_layer.weight"].T, **tolerance)
    np.testing.assert_allclose(np.abs(delta["kernel"].A), np.abs(A), **tolerance)
    np.testing.assert_allclose(np.abs(delta["kernel"].B), np.abs(B), **tolerance)
    np.testing.assert_allclose(delta["kernel"].A @ delta["kernel"].B, A @ B, **tolerance)
    merged = lro.adapters.merge(params, delta)
    np.testing.assert_allclose(merged["kernel"], before["kernel"], **tolerance)


MORE = np.load(DATA / "more.npz")


def more(name: str) -> lro.adapters.Change:
    take = lambda key: jnp.asarray(MORE[f"{name}.{key}.default"]).T  # noqa: E731
    if name == "fourierft":
        positions = jnp.asarray(MORE["fourierft.indices"][::-1].T, jnp.float64)
        return lro.adapters.Fourier(take("param.fourierft_spectrum"), positions, jnp.asarray(20.0))
    if name == "hira":
        return lro.adapters.HiRA(take("param.hira_A"), take("param.hira_B"), jnp.asarray(1.0))
    C = take("param.lokr_w1")
    if name == "lokr":
        return lro.adapters.LoKr(C, take("param.lokr_w2_b"), take("param.lokr_w2_a"), jnp.asarray(3.0))
    return lro.adapters.LoKr(C, None, take("param.lokr_w2"), jnp.asarray(0.75))


@pytest.mark.parametrize("name", ["lokr", "lokr_full", "fourierft", "hira"])
def test_structured_changes(name: str) -> None:
    change, base = more(name), jnp.asarray(MORE[f"{name}.base_weight"].T)
    x, target = MORE[f"{name}.x"], MORE[f"{name}.y_target"]
    # PEFT's Fourier transform is in float32.
    tolerance = dict(rtol=2e-6, atol=2e-6) if name == "fourierft" else TOLERANCE

    def loss(change):
        y = jnp.asarray(x) @ lro.adapters.attach({"kernel": base}, {"kernel": change})["kernel"]
        return jnp.sum((y - target) ** 2) / 2, y

    grads, y = jax.grad(loss, has_aux=True)(change)
    np.testing.assert_allclose(y, MORE[f"{name}.out"], **tolerance)
    merged = lro.adapters.merge({"kernel": base}, {"kernel": change})["kernel"]
    np.testing.assert_allclose(merged, MORE[f"{name}.merged_weight"].T, **tolerance)
    pairs = {
        "fourierft_spectrum": "F",
        "lokr_w1": "C",
        "lokr_w2_b": "A",
        "lokr_w2_a": "B",
        "lokr_w2": "B",
        "hira_A": "A",
        "hira_B": "B",
    }
    for key, field in pairs.items():
        if f"{name}.grad.{key}.default" in MORE:
            want = MORE[f"{name}.grad.{key}.default"].T
            scale = np.abs(want).max()
            np.testing.assert_allclose(getattr(grads, field), want, rtol=0, atol=tolerance["atol"] * 10 * scale)
