"""Errors of lowrank_optax.linen name the layer, the two splits and the remedy; errors of a user's module pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import errors

import lowrank_optax as lro


class Stack(nn.Module):
    layer: Callable[[str], nn.Module]
    lift: str = "scan"
    name_of: str = "query"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.lift == "scan":
            layers = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return layers(self.layer, self.name_of, name="layers")(x, None)[0]
        layers = nn.vmap(
            Step, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(None, None), axis_size=3
        )
        return layers(self.layer, self.name_of, name="layers")(x, None)[0]


class Step(nn.Module):
    layer: Callable[[str], nn.Module]
    name_of: str

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return self.layer(self.name_of)(x), None


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.DenseGeneral((3, 2, 4), name="qkv")(x)


# model, input, path of the kernel, where it is factored wrongly (None: the default), the words of both splits
MISFITS: dict[str, tuple[nn.Module, tuple[int, ...], str, Any, str]] = {
    "DenseGeneral taken for a convolution": (
        Heads(),
        (2, 8),
        "qkv/kernel",
        None,
        r"'qkv/kernel' of shape \(8, 3, 2, 4\) .* inputs \(8, 3, 2\) and outputs \(4,\), but its layer DenseGeneral "
        r"declares batch \(\), inputs \(8,\) and outputs \(3, 2, 4\)",
    ),
    "scanned Dense taken for heads": (
        Stack(lambda name: nn.Dense(8, name=name)),
        (2, 8),
        "layers/query/kernel",
        None,
        r"'layers/query/kernel' of shape \(3, 8, 8\) .* batch \(\), inputs \(3,\) and outputs \(8, 8\), but its layer "
        r"Dense declares batch \(3,\), inputs \(8,\) and outputs \(8,\)",
    ),
    "vmapped Dense taken for heads": (
        Stack(lambda name: nn.Dense(8, name=name), "vmap"),
        (2, 8),
        "layers/query/kernel",
        None,
        r"batch \(\), inputs \(3,\) and outputs \(8, 8\), but its layer Dense declares batch \(3,\), inputs \(8,\)",
    ),
    "scanned convolution taken for one of more axes": (
        Stack(lambda name: nn.Conv(4, (3, 3), name=name), name_of="conv"),
        (2, 5, 5, 4),
        "layers/conv/kernel",
        None,
        r"inputs \(3, 3, 3, 4\) and outputs \(4,\), but its layer Conv declares batch \(3,\), inputs \(3, 3, 4\)",
    ),
    "as many layers as features": (
        Stack(lambda name: nn.Dense(3, name=name)),
        (2, 3),
        "layers/query/kernel",
        None,
        r"batch \(\), inputs \(3,\) and outputs \(3, 3\), but its layer Dense declares batch \(3,\), inputs \(3,\)",
    ),
    "a given split": (
        nn.DenseGeneral(5, axis=(-2, -1)),
        (2, 3, 4),
        "kernel",
        lro.Axes(1, 1),
        r"batch \(3,\), inputs \(4,\) and outputs \(5,\), but its layer DenseGeneral declares batch \(\), "
        r"inputs \(3, 4\)",
    ),
    "an equation": (
        nn.Einsum((2, 6, 4), "BTD,NDH->BTNH"),
        (2, 3, 6),
        "kernel",
        lro.Axes(0, 2),
        r"inputs \(2, 6\) and outputs \(4,\), but its layer Einsum declares batch \(2,\), inputs \(6,\)",
    ),
}


@pytest.mark.parametrize("route", ["apply", "factored"])
@pytest.mark.parametrize("name", MISFITS)
def test_a_wrong_split_is_named_with_the_right_one(name: str, route: str) -> None:
    model, shape, kernel, axes, words = MISFITS[name]
    x = jnp.ones(shape)
    params = model.init(jax.random.key(0), x)["params"]
    rank = 3 if "as many" in name else 2
    where = None if axes is None else lambda path, shape: path == kernel and axes
    params = lro.factorize(params, rank, where=where)
    with pytest.raises(TypeError, match=words) as caught:
        if route == "apply":
            jax.jit(lro.linen.apply(model))({"params": params}, x)
        else:
            with lro.linen.factored():
                jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x))))(params)
    assert "where=lowrank_optax.linen.kernels(model, *inputs)" in str(caught.value)
    right = lro.factorize(lro.densify(params), rank, where=lro.linen.kernels(model, x))
    lro.linen.apply(model)({"params": right}, x)


@pytest.mark.parametrize(
    ("trained", "run", "shape"),
    [
        (nn.Dense(6), nn.Dense(5), (2, 8)),
        (nn.DenseGeneral((2, 3)), nn.DenseGeneral((3, 2)), (2, 8)),
        (nn.Conv(6, (3,)), nn.Conv(6, (5,)), (2, 7, 4)),
        (nn.Einsum((8, 6), "...D,DF->...F"), nn.Einsum((8, 5), "...D,DF->...F"), (2, 8)),
    ],
    ids=["Dense", "DenseGeneral", "Conv", "Einsum"],
)
def test_a_kernel_of_another_model_is_an_error_of_shapes_as_for_a_dense_one(
    trained: nn.Module, run: nn.Module, shape: tuple[int, ...]
) -> None:
    x = jnp.ones(shape)
    params = trained.init(jax.random.key(0), x)["params"]
    params = lro.factorize(params, 2, where=lro.linen.kernels(trained, x))
    with pytest.raises(errors.ScopeParamShapeError, match='"kernel"'):
        run.apply({"params": lro.densify(params)}, x)
    with pytest.raises(errors.ScopeParamShapeError, match='"kernel"'):
        lro.linen.apply(run)({"params": params}, x)
    params["bias"] = jnp.ones(1)
    with pytest.raises(errors.ScopeParamShapeError, match='"bias"'):
        lro.linen.apply(trained)({"params": params}, x)
    del params["bias"]
    with pytest.raises(errors.ScopeParamNotFoundError, match="bias"):
        lro.linen.apply(trained)({"params": params}, x)


class MyError(TypeError):
    pass


def _raise(error: Exception) -> None:
    raise error


MISTAKES: dict[str, tuple[Callable[[Any, Any, Any], Any], type[Exception], str]] = {
    "a TypeError": (lambda m, x, W: _raise(TypeError("mine")), TypeError, "^mine"),
    "a TypeError of a class": (lambda m, x, W: _raise(MyError("mine")), MyError, "^mine"),
    "a ValueError": (lambda m, x, W: _raise(ValueError("mine")), ValueError, "^mine"),
    "an AttributeError": (lambda m, x, W: m.feature, AttributeError, "feature"),
    "Python's TypeError": (lambda m, x, W: 1 + "a", TypeError, "unsupported operand"),
    "JAX's TypeError": (lambda m, x, W: jnp.dot(x, "a"), TypeError, "^(dot requires|Error interpreting argument)"),
    "JAX's ValueError": (lambda m, x, W: x + jnp.ones((3, 5)), (TypeError, ValueError), "^(add got|Incompatible)"),
    "another parameter's shape": (
        lambda m, x, W: m.param("scale", nn.initializers.ones, (7,)),
        errors.ScopeParamShapeError,
        "scale",
    ),
    "a missing parameter": (
        lambda m, x, W: m.param("absent", nn.initializers.ones, (7,)),
        errors.ScopeParamNotFoundError,
        "absent",
    ),
    "an activation of the wrong shape": (lambda m, x, W: x[:, :3] @ W, TypeError, "^x @ W needs x of shape"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("nested", [False, True], ids=["model", "child"])
def test_errors_of_a_module_that_owns_a_factored_parameter_pass_unchanged(name: str, nested: bool) -> None:
    mistake, kind, words = MISTAKES[name]

    class Native(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            W = self.param("kernel", lro.lowrank_init(2), (8, 6))
            mistake(self, x, W)
            return x @ W

    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Native(name="child")(x)

    own = {"kernel": lro.lowrank_init(2)(jax.random.key(0), (8, 6), float), "scale": jnp.ones(3)}
    model, params = (Parent(), {"child": own}) if nested else (Native(), own)
    with pytest.raises(kind, match=words) as caught:
        lro.linen.apply(model)({"params": params}, jnp.ones((2, 8)))
    assert "cannot run with a LowRank" not in str(caught.value)


DENSE_USES: dict[str, Callable[[Any, Any], Any]] = {
    "jnp.dot": lambda x, W: jnp.dot(x, W),
    "jnp.einsum": lambda x, W: jnp.einsum("ab,bc->ac", x, W),
    "lax.dot_general": lambda x, W: jax.lax.dot_general(x, W, (((1,), (0,)), ((), ()))),
    "jnp.asarray": lambda x, W: x @ jnp.asarray(W),
    "a method of arrays": lambda x, W: x @ W.reshape(8, 8),
    "arithmetic": lambda x, W: x @ (2.0 * W),
    "an index": lambda x, W: x @ W[:, 0],
    "a function of one array": lambda x, W: x @ jnp.tanh(W),
    "a transposed product": lambda x, W: W @ x.T,
}


@pytest.mark.parametrize("rank", [2, 8], ids=["rank 2", "rank 8, factors of the shape of the kernel"])
@pytest.mark.parametrize("name", DENSE_USES)
def test_a_module_that_takes_its_kernel_for_an_array_is_named(name: str, rank: int) -> None:
    class Custom(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return DENSE_USES[name](x, self.param("kernel", nn.initializers.lecun_normal(), (8, 8)))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Custom(name="custom")(x)

    params = {"custom": lro.factorize({"kernel": jnp.eye(8)}, rank)}
    with pytest.raises(TypeError, match=r"Custom cannot run with .*'custom/kernel'.*register.*where="):
        lro.linen.apply(Model())({"params": params}, jnp.ones((2, 8)))


def test_a_layer_with_a_reason_to_stay_dense_gives_it() -> None:
    model, x = nn.Conv(4, (3,), feature_group_count=2), jnp.ones((1, 5, 8))
    params = lro.factorize(
        model.init(jax.random.key(0), x)["params"], 2, where=lambda path, shape: len(shape) == 3 and (0, 2)
    )
    with pytest.raises(TypeError, match=r"'kernel': its convolution has 2 groups\. Leave it dense.*where="):
        lro.linen.apply(model)({"params": params}, x)


class OwnDense(nn.Module):
    """Nothing is registered for it."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.dot(x, self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features)))


class Mixed(nn.Module):
    own_only: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(16, 8, name="embed")(ids)
        x = OwnDense(8, name="own")(x)
        if self.own_only:
            return x
        x = nn.Einsum((8, 8), "BTD,DF->BFT", use_bias=False, name="mixer")(x)
        x = nn.Conv(8, (3,), feature_group_count=2, name="grouped")(x.swapaxes(1, 2))
        x = nn.DenseGeneral((2, 4), name="heads")(x)
        return nn.Dense(3, name="head")(x.reshape(*x.shape[:-2], 8))


def test_a_model_without_a_kernel_to_factor_is_an_error_that_lists_its_layers() -> None:
    words = r"Mixed has no kernel.*embed/embedding \(16, 8\): .*Embed.*own/kernel \(8, 8\): .*OwnDense.*register"
    with pytest.raises(ValueError, match=f"(?s){words}"):
        lro.linen.kernels(Mixed(own_only=True), jnp.zeros((2, 5), int))


def test_reasons_for_staying_dense() -> None:
    where = lro.linen.kernels(Mixed(), jnp.zeros((2, 5), int))
    assert where.reasons == {
        "embed/embedding": "nothing is registered for its layer, Embed",
        "own/kernel": "nothing is registered for its layer, OwnDense",
        "grouped/kernel": "its convolution has 2 groups",
        "heads/bias": "it is no kernel of its layer, DenseGeneral",
    }
    assert where("head/kernel", (8, 3)) == lro.Axes(0, 1) and where("mixer/kernel", (8, 8)) == lro.Axes(0, 1)


class Square(nn.Module):
    equation: str = "BD,DB->BD"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(4, name="dense")(x)
        return nn.Einsum((4, 2), self.equation, use_bias=False, name="einsum")(x)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.Einsum((4, 4, 4), name="einsum", use_bias=False)
        return nn.Dense(4, name="dense")(layer(layer(x, "AB,BCD->ACD"), "ACD,CDB->AB"))


def test_a_reason_names_the_module_that_owns_a_parameter_beside_scanned_layers() -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return nn.Dense(8, use_bias=False)(x), None

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = x @ self.param("table", nn.initializers.ones, (8, 8))
            layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return layers(name="layers")(x, None)[0]

    for model in (Tied(), Tied(name="model")):
        reasons = lro.linen.kernels(model, jax.ShapeDtypeStruct((2, 8), jnp.float32)).reasons
        assert reasons == {"table": "nothing is registered for its layer, Tied"}


def test_reasons_of_equations_and_of_stacked_kernels() -> None:
    where = lro.linen.kernels(Square(), jnp.ones((2, 8)))
    assert "no matrix" in where.reasons["einsum/kernel"] and not where("einsum/kernel", (4, 2))
    where = lro.linen.kernels(Twice(), jnp.ones((2, 4)))
    assert "runs with Axes(batch=0, inputs=1) and with Axes(batch=0, inputs=2)" in where.reasons["einsum/kernel"]

    class Behind(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            dense = nn.vmap(
                nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, axis_size=2, in_axes=None
            )
            return nn.Dense(5, name="dense")(dense(6, name="stacked")(x))

    where = lro.linen.kernels(Behind(), jnp.ones((3, 8)))
    assert "another axis than the first" in where.reasons["stacked/kernel"]


class Across(nn.Module):
    """Layers whose kernels are stacked along the second axis."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = nn.scan(Step, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return layers(lambda name: nn.Dense(8, name=name), "query", name="layers")(x, None)[0]


@pytest.mark.parametrize("kind", [None, "lowrank", "lora", "dora", "loha", "fourier", "vera"])
def test_kernels_stacked_along_another_axis_than_they_are_split_are_named(kind: str | None) -> None:
    """Whatever form the kernel has, and whatever JAX or Flax say about its slices."""
    model, x = Across(), jnp.ones((2, 8))
    variables = {"params": model.init(jax.random.key(0), x)["params"]}
    where = lambda path, shape: path.endswith("kernel") and lro.Axes(1, 1)  # noqa: E731
    if kind is None:
        variables["params"] = lro.factorize(variables["params"], 2, where=where)
    else:
        key, base = jax.random.key(1), variables["params"]
        variables["params"], variables["adapters"] = lro.adapters.init(key, base, 2, kind=kind, where=where)
    with pytest.raises(TypeError, match=r"'layers/query/kernel' of shape \(8, 3, 8\) .*another axis than the first"):
        lro.linen.apply(model)(variables, x)


class Normalized(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = dict(update_stats=False) if self.norm is nn.SpectralNorm else {}
        return nn.Dense(5, name="last")(self.norm(nn.Dense(6, name="dense"))(x, **options))


@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_layers_whose_arrays_are_normalised_stay_dense(norm: type[nn.Module]) -> None:
    model, x = Normalized(norm), jnp.ones((2, 8))
    variables = model.init(jax.random.key(0), x)
    where = lro.linen.kernels(model, x)
    assert where("last/kernel", (6, 5)) and norm.__name__ in where.reasons["dense/kernel"]
    params = lro.factorize(variables["params"], 2)
    with pytest.raises(TypeError, match=rf"{norm.__name__} normalises.*'dense/kernel'"):
        lro.linen.apply(model)({**variables, "params": params}, x)
    params = lro.factorize(variables["params"], 2, where=where)
    lro.linen.apply(model)({**variables, "params": params}, x)


def test_layers_that_are_low_rank_from_the_start_need_no_reason() -> None:
    model, x = lro.linen.LowRankDense(6, 3), jnp.ones((2, 8))
    where = lro.linen.kernels(model, x)
    assert where.reasons == {} and where("kernel", (8, 6)) is False
    params = model.init(jax.random.key(0), x)["params"]
    assert lro.factorize(params, 2, where=where)["kernel"] is params["kernel"]


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="head")(nn.Dense(16, name="body")(x))


def test_a_head_below_the_rank_stays_dense_with_kernels_as_without() -> None:
    model, x = Classifier(), jnp.ones((2, 8))
    dense = model.init(jax.random.key(0), x)["params"]
    for where in (None, lro.linen.kernels(model, x)):
        params = lro.factorize(dense, 5, where=where)
        assert lro.is_lowrank(params["body"]["kernel"]) and not lro.is_lowrank(params["head"]["kernel"])
        with pytest.raises(ValueError, match="no kernel"):
            lro.factorize(dense, 9, where=where)
    with pytest.raises(ValueError, match=r"rank 5 is larger than min\(m, n\) = 3"):
        lro.factorize(dense, 5, where=lambda path, shape: path.endswith("kernel"))


def test_kernels_returns_axes_that_a_where_may_pass_on() -> None:
    model, x = Classifier(), jnp.ones((2, 8))
    where = lro.linen.kernels(model, x)
    found = where("body/kernel", (8, 16))
    assert found == lro.Axes(0, 1) and found.optional and isinstance(found, lro.Axes)
    params = lro.factorize(
        model.init(jax.random.key(0), x)["params"], 3, where=lambda p, s: "head" in p and where(p, s)
    )
    assert lro.is_lowrank(params["head"]["kernel"]) and not lro.is_lowrank(params["body"]["kernel"])
