"""lowrank_optax.linen.factored: factored kernels run whatever calls the model, stock layers and layers of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta
from flax.training.train_state import TrainState

import lowrank_optax as lro
from lowrank_optax.paths import path_name
from tests.jaxprs import traced
from tests.models.own_layers import (
    AxesDense,
    Conv1D,
    Gated,
    SetupEinsum,
    Tied,
    WeightEinsum,
    register_all,
)


@pytest.fixture(autouse=True)
def own_layers() -> Iterator[None]:
    register_all()
    with jax.numpy_rank_promotion("allow"):  # other people's layers add biases as they are
        yield


def draw(shape: tuple[int, ...], seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def params_of(model: nn.Module, *inputs: Any, rank: int | None = 2, where: Any = None) -> tuple[Any, int]:
    """Parameters with factors that are not special wherever `kernels` finds a kernel, and the number of those."""
    where = where or lro.linen.kernels(model, *inputs)
    count = 0

    def one(path: Any, leaf: Any) -> Any:
        nonlocal count
        axes = where(path_name(path), leaf.shape)
        if not axes:
            return draw(leaf.shape) * 0.3 + 1.0
        count += 1
        batch, inner = leaf.shape[: axes.batch], axes.batch + axes.inputs
        first, last = leaf.shape[axes.batch : inner], leaf.shape[inner:]
        r = rank or min(math.prod(first), math.prod(last))
        return lro.LowRank(*(0.5 * draw(s) for s in ((*batch, *first, r), (*batch, r, r), (*batch, *last, r))))

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))["params"]
    return jax.tree_util.tree_map_with_path(one, shapes), count


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), a, b)


class Net(nn.Module):
    """A model of one layer of each style that a body of functions needs."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(8, name="dense")(x))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = WeightEinsum((2, 8, 4), name="heads")("BTD,NDH->BTNH", x)
        return Conv1D(5, name="out")(x.reshape(*x.shape[:-2], 8))


class Wrapper(nn.Module):
    """Runs a model that it holds as a field, by its own parameters."""

    module: nn.Module

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        return self.module.apply({"params": params}, x)


def scanned_losses(apply: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def run(params: Any, x: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (carry, apply(params, x)), 0.0, None, length=2)[1][1]

    return run


MODEL, INPUTS = Net(), (4, 3, 6)
PLAIN = lambda params, x: MODEL.apply({"params": params}, x)  # noqa: E731
ROUTES: dict[str, Callable[[Any, Any], Any]] = {
    "apply": PLAIN,
    "a model made in the step": lambda params, x: Net().apply({"params": params}, x),
    "jit": jax.jit(PLAIN),
    "jit of apply": lambda params, x: jax.jit(MODEL.apply)({"params": params}, x),
    "bind": lambda params, x: MODEL.bind({"params": params})(x),
    "nn.apply": lambda params, x: nn.apply(lambda model, x: model(x), MODEL)({"params": params}, x),
    "a wrapper": lambda params, x: Wrapper(MODEL).apply({}, params, x),
    "method": lambda params, x: MODEL.apply({"params": params}, x, method=lambda model, x: model(x)),
    "mutable": lambda params, x: MODEL.apply({"params": params}, x, mutable=["intermediates"])[0],
    "jax.checkpoint": jax.checkpoint(PLAIN),
    "scan": scanned_losses(PLAIN),
    "vmap": lambda params, x: jax.vmap(PLAIN, (None, 0))(params, x[None])[0],
    "jvp": lambda params, x: jax.jvp(lambda x: PLAIN(params, x), (x,), (x,))[0],
    "keywords": lambda params, x: MODEL.apply(variables={"params": params}, x=x),
    "factored twice": lro.linen.factored()(PLAIN) if hasattr(lro.linen, "factored") else PLAIN,
    "lro.linen.apply": lambda params, x: lro.linen.apply(MODEL)({"params": params}, x),
}


@pytest.mark.parametrize("name", ROUTES)
def test_every_route_runs_factors_and_its_gradient_is_that_of_the_dense_model(name: str) -> None:
    x = draw(INPUTS)
    params, count = params_of(MODEL, x)
    assert count == 7

    def loss(params: Any, route: Callable[..., Any]) -> tuple[jax.Array, jax.Array]:
        y = route(params, x)
        return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y), y

    with lro.linen.factored():
        factored = jax.value_and_grad(loss, has_aux=True)(params, ROUTES[name])
    dense = jax.value_and_grad(lambda p: loss(lro.densify(p), PLAIN), has_aux=True)(params)
    close(factored, dense)


def test_the_context_ends_and_as_a_decorator_below_jit_it_is_there_at_every_trace() -> None:
    params, _ = params_of(nn.Dense(5), jnp.ones((1, 6)))
    forward = jax.jit(lro.linen.factored()(lambda params, x: nn.Dense(5).apply({"params": params}, x)))
    for rows in (1, 2):
        assert forward(params, jnp.ones((rows, 6))).shape == (rows, 5)
    with pytest.raises(RuntimeError, match="mine"), lro.linen.factored():
        raise RuntimeError("mine")
    with pytest.raises((nn.module.errors.ScopeParamShapeError, TypeError)):
        nn.Dense(5).apply({"params": params}, jnp.ones((1, 6)))


class Block(nn.Module):
    """A body for lifted transformations."""

    lift: Callable[[type[nn.Module]], Any] = lambda layer: layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.lift(AxesDense)((2, 4), use_bias=True, name="up")(x)
        x = self.lift(AxesDense)(8, axis=(-2, -1), name="down")(nn.relu(x))
        x = self.lift(SetupEinsum)("...D,DF->...F", (8, 8), name="setup")(x)
        x = self.lift(Conv1D)(8, name="conv1d")(nn.relu(x))
        x = self.lift(nn.Einsum)((8, 2, 4), "...D,DNH->...NH", name="einsum")(x)
        return self.lift(nn.DenseGeneral)(8, axis=(-2, -1), name="general")(x)


class Decorated(nn.Module):
    @nn.remat
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Block(name="block")(x)


class Lifted(nn.Module):
    transform: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.transform()(x)
        return y[0] if isinstance(y, tuple) else y


LIFTED: dict[str, Callable[[], nn.Module]] = {
    "none": lambda: Block(name="inner"),
    "remat of layers": lambda: Block(nn.remat, name="inner"),
    "jit of layers": lambda: Block(nn.jit, name="inner"),
    "remat of a block": lambda: nn.remat(Block)(name="inner"),
    "jit of a block": lambda: nn.jit(Block)(name="inner"),
    "remat as a decorator": lambda: Decorated(name="inner"),
    "scan": lambda: _Scanned(name="inner"),
    "scan of remat": lambda: _Scanned(nn.remat, name="inner"),
    "vmap": lambda: _Vmapped(name="inner"),
}


class _Scanned(nn.Module):
    lift: Callable[[type[nn.Module]], Any] = lambda layer: layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.scan(self.lift(Plain), **SCAN)(name="layers")(x, None)[0]


class _Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.stack([x, 2 * x, -x])
        return nn.vmap(Plain, **VMAP)(name="layers")(x, None)[0]


class Plain(nn.Module):
    """Layers without a second collection, whose stacking is a matter of Flax alone."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        x = SetupEinsum("...D,DF->...F", (8, 8), name="setup")(x)
        x = Conv1D(8, name="conv1d")(nn.relu(x))
        x = nn.Einsum((8, 2, 4), "...D,DNH->...NH", name="einsum")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="general")(x)
        x = Gated(6, name="gated")(x)
        return nn.Dense(8, name="query")(x), None


STACKED = dict(variable_axes={"params": 0}, split_rngs={"params": True}, metadata_params={nn.PARTITION_NAME: "layers"})
SCAN = dict(STACKED, length=3)
VMAP = dict(STACKED, in_axes=(0, None))


@pytest.mark.parametrize("name", LIFTED)
def test_lifted_transformations_keep_factors(name: str) -> None:
    model, x = Lifted(LIFTED[name]), draw((2, 8))
    params, count = params_of(model, x)
    assert count == (7 if "layers" in params["inner"] else 6)

    def loss(params: Any, apply: Any, convert: Any) -> tuple[jax.Array, jax.Array]:
        y = apply({"params": convert(params)}, x)
        return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y), y

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    with lro.linen.factored():
        factored = jax.jit(lambda p: value_and_grad(p, model.apply, lambda p: p))(params)
    close(factored, jax.jit(lambda p: value_and_grad(p, model.apply, lro.densify))(params))


class Equation(nn.Module):
    """`nn.Einsum` with the equation given at the call, and a bias."""

    equation: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Einsum(self.shape, name="einsum")(x, self.equation)


class Kernel(nn.Module):
    """A kernel used with an equation of the caller."""

    equation: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return WeightEinsum(self.shape, name="weight")(self.equation, x)


# model, shapes of the inputs, number of kernels
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "nn.Einsum": (nn.Einsum((6, 2, 4), "BTD,DNH->BTNH"), (2, 3, 6), 1),
    "nn.Einsum, stacked": (nn.Einsum((2, 3, 6, 4), "BTD,CKDH->CBTKH"), (2, 3, 6), 1),
    "nn.Einsum, experts": (nn.Einsum((3, 6, 4), "BED,EDF->BEF"), (2, 3, 6), 1),
    "nn.Einsum, grouped inputs": (nn.Einsum((2, 4, 5), "...NH,NHD->...D"), (2, 3, 2, 4), 1),
    "nn.Einsum, outputs first": (nn.Einsum((2, 4, 6), "...D,NHD->...NH"), (2, 3, 6), 1),
    "nn.Einsum, scattered outputs": (nn.Einsum((6, 2, 4), "BTD,DNH->NBHT"), (2, 3, 6), 1),
    "nn.Einsum, no bias": (nn.Einsum((6, 4), "...D,DF->...F", use_bias=False), (6,), 1),
    "nn.Einsum, equation of the call": (Equation("BTD,NDH->BTNH", (2, 6, 4)), (2, 3, 6), 1),
    "own: several axes": (AxesDense((2, 4), use_bias=True), (2, 3, 6), 1),
    "own: several input axes": (AxesDense((5,), axis=(-2, 1)), (2, 3, 2, 4), 1),
    "own: equation of the call": (Kernel("BTD,NDH->BTNH", (2, 6, 4)), (2, 3, 6), 1),
    "own: setup": (SetupEinsum("BTNH,NHD->BTD", (2, 4, 5)), (2, 3, 2, 4), 1),
    "own: outputs first": (Conv1D(5), (2, 3, 6), 1),
    "own: two kernels, boxed": (Gated(5), (2, 3, 6), 2),
}


@pytest.mark.parametrize("rank", [2, None], ids=["rank 2", "full rank"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_the_dense_layer(name: str, rank: int | None) -> None:
    model, shape, kernels = LAYERS[name]
    x = draw(shape)
    params, count = params_of(model, x, rank=rank)
    assert count == kernels
    with lro.linen.factored():
        y = model.apply({"params": params}, x)
        traces = jax.make_jaxpr(lambda p: model.apply({"params": p}, x))(params)
    close(y, model.apply({"params": lro.densify(params)}, x))
    # Factors of width 2 do what the dense kernel does in at least two products.
    assert sum(e.primitive.name == "dot_general" for e in traces.eqns) >= 2


def test_a_table_with_two_methods() -> None:
    model, ids = Tied(), jnp.arange(6).reshape(2, 3)
    params, count = params_of(model, ids)
    assert count == 1
    with lro.linen.factored():
        y = model.apply({"params": params}, ids)
        h = model.apply({"params": params}, ids, method="encode")
    close(y, model.apply({"params": lro.densify(params)}, ids))
    close(h, model.apply({"params": lro.densify(params)}, ids, method="encode"))


def test_one_of_two_kernels_may_stay_dense() -> None:
    model, x = Gated(5), draw((2, 6))
    params, _ = params_of(model, x, where=lambda path, shape: path == "linear" and lro.Axes(0, 1))
    assert not lro.is_lowrank(meta.unbox(params)["gating"]) and lro.is_lowrank(params["linear"])
    with lro.linen.factored():
        close(model.apply({"params": params}, x), model.apply({"params": lro.densify(params)}, x))


class Wide(nn.Module):
    """Kernels far larger than activations."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Einsum((128, 2, 64), "BD,DNH->BNH", name="a")(x)
        x = SetupEinsum("BNH,NHD->BD", (2, 64, 128), name="b")(nn.relu(x))
        x = AxesDense((2, 64), name="c")(nn.relu(x))
        return Conv1D(128, name="d")(x.reshape(-1, 128))


@pytest.mark.slow
def test_training_by_a_step_that_calls_model_apply_compiles_once_and_makes_no_array_of_the_size_of_a_kernel() -> None:
    model, x = Wide(), draw((2, 128))
    params = model.init(jax.random.key(0), x)["params"]
    params = lro.factorize(params, rank=2, where=lro.linen.kernels(model, x))
    assert sum(map(lro.is_lowrank, jax.tree.leaves(params, is_leaf=lro.is_lowrank))) == 4
    state = TrainState.create(apply_fn=None, params=params, tx=lro.lowrank_adam(0.02))
    traces = []

    def loss(params: Any) -> jax.Array:
        return jnp.mean((model.apply({"params": params}, x) - x) ** 2)

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        traces.append(None)
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    with lro.linen.factored():
        sizes = [v.aval.size for e in traced(jax.grad(loss), params) for v in e.outvars]
        state, first = step(state)
        for _ in range(40):
            state, last = step(state)
    assert last < first / 2 and len(traces) == 1
    assert max(sizes) <= 128 * 2


def test_register_says_what_it_cannot_do() -> None:
    class Hidden(nn.Module):
        @nn.nowrap
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    with pytest.raises(TypeError, match=r"class of flax\.linen modules"):
        lro.linen.register(nn.Dense(3), axes=lro.Axes(), forward=lambda module, W, x: x @ W)
    for layer, method in ((Hidden, "__call__"), (nn.Dense, "decode"), (nn.Dense, "features")):
        with pytest.raises(ValueError, match="no method that Flax intercepts"):
            lro.linen.register(layer, axes=lro.Axes(), forward=lambda module, W, x: x @ W, method=method)


def test_a_subclass_and_a_layer_registered_again() -> None:
    class Base(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.param("kernel", nn.initializers.ones, (x.shape[-1], 4))

    class Doubled(Base):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return 2 * super().__call__(x)

    class Inherits(Base):
        pass

    lro.linen.register(Base, axes=lro.Axes(0, 1), forward=lambda module, W, x: x @ W)
    x = draw((3, 6))
    for model, factor in ((Base(), 1), (Doubled(), 2), (Inherits(), 1)):
        params, count = params_of(model, x)
        with lro.linen.factored():
            close(model.apply({"params": params}, x), factor * (x @ params["kernel"].to_dense()))
        assert count == 1
    lro.linen.register(Inherits, axes=lro.Axes(0, 1), forward=lambda module, W, x: -(x @ W))
    for model, factor in ((Base(), 1), (Inherits(), -1)):  # the class itself, not the one it inherits from
        with lro.linen.factored():
            close(model.apply({"params": params}, x), factor * (x @ params["kernel"].to_dense()))


@pytest.mark.slow
def test_an_optimizer_step_on_parameters_of_own_layers() -> None:
    model, x = Net(), draw(INPUTS)
    params = lro.factorize(model.init(jax.random.key(0), x)["params"], 2, where=lro.linen.kernels(model, x))
    tx = optax.chain(optax.clip(1.0), lro.lowrank_adamw(0.01))

    def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        loss = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    with lro.linen.factored():
        values = jax.lax.scan(step, (params, tx.init(params)), None, length=20)[1]
    assert values[-1] < values[0]
