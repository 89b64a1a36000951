"""Changes that go into their base, names of layers of other models, and bases of few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.models.linen_models import close, draw

ad = lro.adapters
KEY = jax.random.key(0)


def moved(delta, seed=7):
    one = lambda label, x: jax.tree.map(lambda y: y + 0.3 * draw(y.shape, seed), x) if label == "trained" else x  # noqa: E731
    return jax.tree.map(one, ad.labels(delta), delta)


@pytest.mark.parametrize("kind", ["lora", "dora", "lowrank"])
def test_restarts_keep_the_function(kind: str) -> None:
    """Ranks, scales and axes stay; the new changes are zero and other draws."""
    params = {"a": {"kernel": draw((2, 6, 2, 3))}, "b": {"kernel": draw((5, 4))}}
    where = lambda path, shape: lro.Axes(len(shape) // 4, 1)  # noqa: E731
    params, delta = ad.init(KEY, params, lambda path, shape: 3 if "a" in path else 2, kind=kind, alpha=6, where=where)
    old = moved(delta)
    before = ad.merge(params, old)
    base, new = ad.restart(jax.random.key(1), params, old)
    close(base, before, 0)
    close(ad.merge(base, new), before, 1e-12)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    assert [x.shape for x in jax.tree.leaves(new)] == [x.shape for x in jax.tree.leaves(old)]
    scales = lambda tree: [x for x in jax.tree.leaves(tree) if x.shape in ((), (2,)) and x.ndim < 2]  # noqa: E731
    close(scales(new), scales(old), 0)
    assert any(jnp.abs(x - y).max() > 1e-3 for x, y in zip(*map(jax.tree.leaves, (new, delta)), strict=True))


def test_moments_are_forgotten() -> None:
    """All of them; the count stays."""
    _, delta = ad.init(KEY, {"kernel": draw((8, 6))}, 2, kind="lora")
    tx = ad.optimizer(optax.adam(1e-2))
    _, state = tx.update(jax.tree.map(jnp.ones_like, delta), tx.init(delta), delta)
    after = ad.forget(tx, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [float(jnp.abs(x).max()) for x in jax.tree.leaves(after)].count(0.0) == 4
    assert [int(x) for x in jax.tree.leaves(after) if not x.ndim] == [1]


def test_the_schedule_of_restarts() -> None:
    rate = ad.restarts(optax.linear_schedule(1.0, 0.0, 40), every=10, warmup=4)
    expected = [(1 - t / 40) * (1.0 if t < 10 else min(1.0, (t % 10) / 4)) for t in range(40)]
    np.testing.assert_allclose([float(rate(t)) for t in range(40)], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="every and warmup"):
        ad.restarts(1.0, every=10, warmup=0)


def test_components_are_exchanged() -> None:
    W = draw((2, 6, 2, 3))
    params, delta = ad.init(KEY, {"kernel": W}, 4, kind="lora", alpha=6, where=lambda path, shape: lro.Axes(1, 1))
    delta = moved(delta)
    base, new, kept = ad.switch(jax.random.key(5), params, delta, share=0.5)
    close(ad.merge(base, new), ad.merge(params, delta), 1e-12)
    assert 0 < kept["kernel"].A.sum() < kept["kernel"].A.size
    same = kept["kernel"].A * jnp.abs(new["kernel"].A - delta["kernel"].A)
    other = (1 - kept["kernel"].A) * jnp.where(new["kernel"].A == delta["kernel"].A, 1.0, 0.0)
    assert not same.any() and not other.any()
    close(new["kernel"].B, delta["kernel"].B, 0)
    close(kept["kernel"].B[:, :, 0, 0], kept["kernel"].A[:, 0, :], 0)
    tx = ad.optimizer(optax.adam(1e-2))
    state = tx.init(delta)
    _, state = tx.update(jax.tree.map(jnp.ones_like, delta), state, delta)
    after = optax.tree.map_params(tx, lambda x, k: x * k, state, kept)
    moments = [x for x in jax.tree.leaves(after) if x.ndim]
    for x, k in zip(moments, [*jax.tree.leaves(kept)] * 2, strict=True):
        np.testing.assert_array_equal(np.asarray(x) != 0, np.asarray(k) != 0)


def test_refusals_of_restarts() -> None:
    params, delta = ad.init(KEY, {"kernel": draw((8, 6))}, 2, kind="hra")
    with pytest.raises(ValueError, match=r"restart takes kinds 'lora', .* and 'kernel' has a Householder"):
        ad.restart(KEY, params, delta)
    with pytest.raises(ValueError, match="switch takes pairs of kind 'lora', and the change of 'kernel' is a House"):
        ad.switch(KEY, params, delta, 0.5)
    params, delta = ad.init(KEY, ad.quantize({"kernel": draw((8, 6))}), 2, kind="lora")
    for run in (lambda: ad.restart(KEY, params, delta), lambda: ad.switch(KEY, params, delta, 0.5)):
        with pytest.raises(ValueError, match="'kernel' is quantized"):
            run()


NAMES = {
    ("bert", "encoder/layer_3/query/kernel", ()): "bert.encoder.layer.3.attention.self.query",
    ("bert", "bert/encoder/layer/3/attention/output/dense/kernel", ()): "bert.encoder.layer.3.attention.output.dense",
    ("bert", "bert/encoder/layer/3/output/dense/kernel", ()): "bert.encoder.layer.3.output.dense",
    ("bert", "layers/MultiHeadDotProductAttention_0/out/kernel", (1,)): None,
    ("bert", "encoder/layer_3/up/kernel", ()): "bert.encoder.layer.3.intermediate.dense",
    ("llama", "model/layers/11/self_attn/q_proj/kernel", ()): "model.layers.11.self_attn.q_proj",
    ("llama", "layers/o/kernel", (4,)): "model.layers.4.self_attn.o_proj",
    ("llama", "block_2/gate/kernel", ()): "model.layers.2.mlp.gate_proj",
    ("llama", "head/kernel", ()): None,
    ("gpt2", "transformer/h/5/attn/c_proj/kernel", ()): "transformer.h.5.attn.c_proj",
    ("gpt2", "transformer/h/5/mlp/c_proj/kernel", ()): "transformer.h.5.mlp.c_proj",
    ("gpt2", "block_5/query/kernel", ()): None,
    ("vit", "block_0/key/kernel", ()): "vit.layers.0.attention.k_proj",
    ("vit", "vit/encoder/layer/2/intermediate/dense/kernel", ()): "vit.layers.2.mlp.fc1",
    ("vit_4", "block_0/key/kernel", ()): "vit.encoder.layer.0.attention.attention.key",
}


@pytest.mark.parametrize("case", NAMES, ids=lambda case: case[0] + " " + case[1])
def test_names(case: tuple) -> None:
    """The names of the modules of transformers 5.24 (and 4 for `vit_4`); other paths are refused."""
    model, path, index = case
    names, expected = getattr(ad.names, model), NAMES[case]
    if expected is None:
        with pytest.raises(ValueError, match=r"is no layer of|numbers; one is needed"):
            names(path, index)
    else:
        assert names(path, index) == expected
        assert names.below("x")(path, index) == "x" + expected.removeprefix(names.prefix)


@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 4), (8, 3)])
def test_bases_of_few_bits(bits: int, group: int | None) -> None:
    """Values and scales by the formula, for stacked kernels with several axes and a last group that is smaller."""
    W, x = draw((2, 10, 2, 3)), draw((2, 5, 10), 2)
    where = lambda path, shape: lro.Axes(1, 1)  # noqa: E731
    params = ad.quantize({"kernel": W}, bits=bits, group=group, where=where)
    K, most = params["kernel"], 2 ** (bits - 1) - 1
    assert K.values.dtype == (jnp.int8 if bits == 8 else jnp.int4) and K.axes == lro.Axes(1, 1)
    expected = np.empty((2, 10, 6))
    for rows in np.array_split(np.arange(10), np.arange(group or 10, 10, group or 10)):
        part = np.asarray(W).reshape(2, 10, 6)[:, rows]
        scale = np.abs(part).max(1, keepdims=True) / most
        expected[:, rows] = np.round(part / scale) * scale
    close(K.to_dense().reshape(2, 10, 6), expected, 1e-12)
    params, delta = ad.init(KEY, params, 2, kind="dora", where=where)
    delta = moved(delta)
    y = jax.jit(lambda delta: x @ ad.attach(params, delta)["kernel"])(delta)
    close(y, jnp.einsum("bni,bijk->bnjk", x, ad.merge({"kernel": K.to_dense()}, delta)["kernel"]), 1e-10)
    for message, options in {"bits is 8 or 4": dict(bits=3), "group is the number": dict(group=0)}.items():
        with pytest.raises(ValueError, match=message):
            ad.quantize({"kernel": W}, **options)
