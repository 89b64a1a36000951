"""Unmodified nnx models with frozen kernels and changes in variables of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from tests.adapters.peft_numbers import CASES, IDS, Case
from tests.jaxprs import equations
from tests.models.linen_models import draw


class Model(nnx.Module):
    """Every stock layer that can run a change."""

    def __init__(self, rngs):
        options = dict(rngs=rngs, param_dtype=jnp.float64)
        self.conv = nnx.Conv(3, 8, (3,), **options)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, **options)
        self.einsum = nnx.Einsum("btd,dfe->btfe", (8, 3, 2), (3, 2), **options)
        self.general = nnx.LinearGeneral((3, 2), 7, axis=(-2, -1), **options)
        self.head = nnx.Linear(7, 5, **options)
        self.embed = nnx.Embed(4, 5, **options)

    def __call__(self, x):
        x = self.attention(self.conv(x))
        return self.head(nnx.tanh(self.general(self.einsum(x))))


KINDS = ("lowrank", "lora", "dora", "core", "vera", "loha", "hira", "hra")
X = draw((2, 5, 3))
ONLY = nnx.DiffState(0, lro.nnx.AdapterParam)


def perturb(model):
    """Other values in all trained arrays; the scale in `AdapterParam` is none of them."""
    state = nnx.state(model, lro.nnx.AdapterParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.1 * draw(x.shape, 3) if x.ndim else x, state))


@pytest.mark.parametrize("kind", ["core", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "core")])
def test_a_model_with_changes_is_the_model_with_merged_kernels(kind: str) -> None:
    model, plain = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    before = nnx.state(model, nnx.Param)
    lro.nnx.adapt(model, 2, kind=kind, alpha=3)
    np.testing.assert_allclose(model(X), plain(X), atol=1e-9)
    perturb(model)
    after = nnx.state(model, nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    y = nnx.jit(lambda model, x: model(x))(model, X)
    assert np.abs(y - plain(X)).max() > 1e-3
    graph, state = nnx.split(model)
    np.testing.assert_allclose(nnx.merge(graph, state)(X), y, atol=1e-9)
    delta = lro.nnx.adapters(model)
    again = Model(nnx.Rngs(0))
    lro.nnx.adapt(again, delta=delta)
    np.testing.assert_allclose(again(X), y, atol=1e-9)
    lro.nnx.merge_adapters(model)
    np.testing.assert_allclose(model(X), y, atol=1e-9)
    assert not jax.tree.leaves(nnx.state(model, lro.nnx.AdapterParam)) and lro.nnx.adapters(model) == {}
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(plain))


def fields(change):
    """The arrays of a change by name, as nnx orders them."""
    if not isinstance(change, lro.adapters.Change):
        return change
    return {field.name: fields(getattr(change, field.name)) for field in dataclasses.fields(change)}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_numbers_of_peft(case: Case) -> None:
    m, n = case.base.shape
    model = nnx.Linear(m, n, use_bias=False, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    model.kernel.set_value(jnp.asarray(case.base))
    lro.nnx.adapt(model, delta=case.delta())

    def loss(model):
        y = model(jnp.asarray(case.x))
        return jnp.sum((y - case.target) ** 2) / 2, y

    grads, y = nnx.grad(loss, argnums=ONLY, has_aux=True)(model)
    np.testing.assert_allclose(y, case.out, rtol=1e-12, atol=1e-12)
    got = [x for x in jax.tree.leaves(grads) if x.ndim]
    want = [x for x in jax.tree.leaves(fields(case.delta("grad")["kernel"])) if jnp.ndim(x)]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * np.abs(np.asarray(b)).max())


SLOW_RULES = ("plus", "precondition", "frozen_a")


@pytest.mark.parametrize("rule", ["plain", "pro", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_RULES)])
def test_only_changes_are_trained(rule: str) -> None:
    model = Model(nnx.Rngs(0))
    lro.nnx.adapt(model, 2, kind="lora", alpha=4)
    tx = lro.adapters.optimizer(optax.adamw(3e-3, weight_decay=0.1), rule=rule, ratio=2.0)
    optimizer = nnx.Optimizer(model, tx, wrt=lro.nnx.AdapterParam)
    before, y = nnx.state(model, nnx.Not(lro.nnx.AdapterParam)), draw((2, 5, 5), 2)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(X) - y) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss, argnums=ONLY)(model)
        optimizer.update(model, grads)
        return value

    values = [step(model, optimizer) for _ in range(20)]
    assert values[-1] < values[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Not(lro.nnx.AdapterParam)), before)
    assert float(lro.nnx.adapters(model)["head"]["kernel"].scale) == 2.0


def test_bare_optimizers_and_the_manifold() -> None:
    """`optax.adamw` alone decays the scale that rules read, and the function keeps the other one."""
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    lro.nnx.adapt(model, 2, kind="lora", alpha=4)
    optimizer = nnx.Optimizer(model, optax.adamw(0.1, weight_decay=1.0), wrt=lro.nnx.AdapterParam)
    x = draw((3, 8))
    for _ in range(3):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(x) ** 2), argnums=ONLY)(model))
    assert float(lro.nnx.adapters(model)["kernel"].scale) == 2.0

    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    lro.nnx.adapt(model, 2)
    optimizer = nnx.Optimizer(model, lro.lowrank_adam(0.1, geometry=lro.Tangent()), wrt=lro.nnx.AdapterParam)
    loss = lambda model: jnp.sum(model(x) ** 2)  # noqa: E731
    before = loss(model)
    for _ in range(5):
        optimizer.update(model, nnx.grad(loss, argnums=ONLY)(model))
    assert loss(model) < before
    U = lro.nnx.adapters(model)["kernel"].U
    np.testing.assert_allclose(U.T @ U, np.eye(2), atol=1e-10)


def test_kernels_get_no_gradient() -> None:
    model = nnx.Linear(30, 40, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    lro.nnx.adapt(model, 2, kind="lora")
    graph, delta, rest = nnx.split(model, lro.nnx.AdapterParam, ...)
    loss = lambda delta, rest, x: jnp.sum(nnx.merge(graph, delta, rest)(x) ** 2)  # noqa: E731
    program = jax.make_jaxpr(jax.grad(loss))(delta, rest, draw((3, 30))).jaxpr
    assert not [e for e in equations(program) if any(v.aval.shape == (30, 40) for v in e.outvars)]


def test_stacked_layers() -> None:
    """Layers of `nnx.vmap` that run in `nnx.scan`."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(8, 8, rngs=rngs, param_dtype=jnp.float64)

    layers = make(nnx.Rngs(0).split(3))
    lro.nnx.adapt(layers, 2, kind="dora", alpha=3)
    perturb(layers)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return nnx.tanh(layer(x))

    x = draw((2, 8))
    y = forward(layers, x)
    lro.nnx.merge_adapters(layers)
    np.testing.assert_allclose(forward(layers, x), y, atol=1e-9)


def test_starts_that_correct_the_base() -> None:
    model, plain = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    lro.nnx.adapt(model, 2, kind="lora", start="pissa", where=lambda path, shape: "attention" not in path)
    np.testing.assert_allclose(model(X), plain(X), atol=1e-9)
    assert float(jnp.abs(model.head.kernel[...] - plain.head.kernel[...]).max()) > 1e-3
    assert set(lro.nnx.adapters(model)) == {"conv", "einsum", "general", "head"}


def test_refusals() -> None:
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="either rank or delta, got neither"):
        lro.nnx.adapt(model)
    with pytest.raises(TypeError, match="changes an nnx module in place, got dict"):
        lro.nnx.adapt({}, 2)
    with pytest.raises(TypeError, match=r"call lowrank_optax\.nnx\.adapt\(model, rank\)"):
        lro.adapters.init(jax.random.key(0), nnx.state(model), 2)
    with pytest.raises(ValueError, match=r"no kernel to change at rank 9\.(.|\n)*rank 9 is above min\(m, n\) = 6"):
        lro.nnx.adapt(model, 9, kind="lora")
    _, delta = lro.adapters.init(jax.random.key(0), {"other": {"kernel": draw((8, 6))}}, 2)
    with pytest.raises(
        ValueError, match=r"no layer can run the change of 'other/kernel': the model has no such kernel"
    ):
        lro.nnx.adapt(model, delta=delta)
    lro.nnx.adapt(model, 2)
    with pytest.raises(ValueError, match="its layer has a product of its own, dot_general=Adapter"):
        lro.nnx.adapt(model, 2)
