"""Kernels with axes of size 1, whose sizes alone do not tell inputs from outputs, under every kind and quantized."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_optax as lro
from tests.adapters.every_kind import NAMES, OF_MATRICES, moved, start
from tests.models.linen_models import close, draw

ad = lro.adapters
NAMES = [name for name in NAMES if name not in OF_MATRICES]
BITS = [{"bits": 8}, {"bits": 4, "group": 3}]

# Convolutions of one input channel, projections of one head into and out of an attention, one output axis of size 1.
SPLITS = {
    (3, 3, 1, 18): lro.Axes(0, 3),
    (9, 1, 18): lro.Axes(0, 2),
    (1, 9, 18): lro.Axes(0, 2),
    (9, 18, 1): lro.Axes(0, 1),
    (2, 9, 1, 18): lro.Axes(1, 2),
    (2, 9, 1, 1, 18): lro.Axes(1, 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_split_of_a_kernel_stays_that_of_its_layer(name: str) -> None:
    for shape, axes in [*SPLITS.items(), ((9, 1, 18), lro.Axes(0, 1))]:
        where = lambda path, shape, axes=axes: axes  # noqa: E731
        params, delta = start(name, {"kernel": draw(shape)}, where=where)
        assert ad.attach(params, delta)["kernel"].axes == axes, shape


@pytest.mark.parametrize("name", NAMES)
def test_convolutions_of_one_channel(name: str) -> None:
    """A layer computes with the kernel that merge forms."""
    model, x = nn.Conv(18, (3, 3), param_dtype=jnp.float64), draw((2, 4, 3, 1))
    params = model.init(jax.random.key(1), x)["params"]
    params, delta = start(name, params, where=lro.linen.kernels(model, x))
    delta = moved(delta)
    run = jax.jit(lambda d: (lro.linen.apply(model)({"params": params, "adapters": d}, x), ad.merge(params, d)))
    y, dense = run(delta)
    close(y, model.apply({"params": dense}, x), 1e-11)


@pytest.mark.parametrize("name", ["hra", "oft", "lokr", "randlora"])
def test_convolutions_of_one_channel_of_nnx(name: str) -> None:
    model, x = nnx.Conv(1, 18, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(0)), draw((2, 4, 3, 1))
    y = model(x)
    lro.nnx.adapt(model, 2 if name != "oft" else 3, kind=name)
    assert nnx.state(model, lro.nnx.AdapterParam)
    close(model(x), y, 1e-12)
    close(model(x), nnx.clone(model)(x), 0)


@pytest.mark.parametrize("options", BITS)
@pytest.mark.parametrize("shape", SPLITS)
def test_quantized_kernels(shape: tuple[int, ...], options: dict) -> None:
    where = lambda path, shape: SPLITS[shape]  # noqa: E731
    W = ad.quantize({"kernel": draw(shape)}, where=where, **options)["kernel"]
    assert W.axes == SPLITS[shape]
    b, inner = W.axes.batch, sum(W.axes)
    x = draw((*shape[:b], 5, *shape[b:inner]), 2)
    flat = (np.asarray(x).reshape(*shape[:b], 5, 9), np.asarray(W.to_dense()).reshape(*shape[:b], 9, 18))
    close((x @ W).reshape(*shape[:b], 5, 18), np.matmul(*flat), 1e-12)


@pytest.mark.parametrize("options", BITS)
@pytest.mark.parametrize("size", [(3, 3), (5,)])
def test_quantized_convolutions_of_one_channel(size: tuple[int, ...], options: dict) -> None:
    model, x = nn.Conv(6, size, param_dtype=jnp.float64), draw((2, *(7,) * len(size), 1))
    params = model.init(jax.random.key(1), x)["params"]
    base = ad.quantize(params, where=lro.linen.kernels(model, x), **options)
    dense = {**params, "kernel": base["kernel"].to_dense()}
    close(lro.linen.apply(model)({"params": base}, x), model.apply({"params": dense}, x), 1e-11)


@pytest.mark.parametrize("form", ["adapted", "flattened", *map(str, BITS)])
def test_other_axes_than_those_of_the_layer_are_told(form: str) -> None:
    """An axis of inputs that is taken for one of outputs."""
    model, x = nn.DenseGeneral(6, axis=(-2, -1)), jnp.ones((4, 3, 2))
    params = model.init(jax.random.key(1), x)["params"]
    where = lambda path, shape: lro.Axes(0, 1) if path == "kernel" else None  # noqa: E731
    variables = {"params": params}
    if form in ("adapted", "flattened"):
        kind = "lora" if form == "adapted" else "lokr"
        variables["params"], variables["adapters"] = ad.init(jax.random.key(0), params, 1, kind=kind, where=where)
    else:
        variables["params"] = ad.quantize(params, where=where, **BITS[form == str(BITS[1])])
    with pytest.raises(
        TypeError,
        match=r"(?s)'kernel' of shape \(3, 2, 6\) is split into batch \(\), inputs \(3,\) "
        r"and outputs \(2, 6\), but its layer DenseGeneral declares batch \(\), inputs \(3, 2\)",
    ):
        lro.linen.apply(model)(variables, x)
