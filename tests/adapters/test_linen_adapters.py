"""Unmodified Linen models with frozen kernels and changes beside them."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.jaxprs import equations
from tests.models.linen_models import CASES, close, draw

KINDS = ("lowrank", "lora", "dora", "core", "vera", "loha", "hira", "lokr", "hra")


def moved(delta, by=0.1):
    """Other values in all trained arrays."""

    def one(label, x):
        return jax.tree.map(lambda y: y + by * draw(y.shape, 7), x) if label == "trained" else x

    return jax.tree.map(one, lro.adapters.labels(delta), delta)


def adapted(model, x, kind, rank=2, seed=0):
    """Random parameters of a model and random changes of all its kernels."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    leaves, treedef = jax.tree.flatten(shapes)
    variables = treedef.unflatten([0.3 * draw(leaf.shape, i) for i, leaf in enumerate(leaves)])
    where = lro.linen.kernels(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    params, delta = lro.adapters.init(
        jax.random.key(seed), variables["params"], rank, kind=kind, alpha=3, scale="alpha/sqrt(r)", where=where
    )
    return {**variables, "params": params}, moved(delta)


FAST = [("dense", kind) for kind in KINDS] + [(name, "lora") for name in ("general", "conv 2d same", "vmap")]
SLOW = {(name, "lora") for name in CASES} | {("vmap", kind) for kind in KINDS}
SLOW |= {("scan, attention, remat", "dora"), ("scan, attention, remat", "vera"), ("mixed", "hra"), ("mixed", "dora")}


@pytest.mark.parametrize(
    ("name", "kind"), FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in sorted(SLOW - {*FAST})]
)
def test_a_model_with_changes_is_the_model_with_merged_kernels(name: str, kind: str) -> None:
    model, shape, _ = CASES[name]
    x = draw(shape)
    variables, delta = adapted(model, x, kind)
    apply = lro.linen.apply(model)

    def loss(y):
        return jnp.sum(jnp.sin(y))

    def merged(delta):
        return loss(model.apply({**variables, "params": lro.adapters.merge(variables["params"], delta)}, x))

    got = jax.jit(jax.value_and_grad(lambda delta: loss(apply({**variables, "adapters": delta}, x))))(delta)
    want = jax.jit(jax.value_and_grad(merged))(delta)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-9)
    if kind != "dora":  # whose norms are constants of the gradient, which those of a merged kernel are not
        frozen = lro.adapters.labels(delta)
        keep = jax.tree.map(
            lambda label, g: g if label == "trained" else jax.tree.map(jnp.zeros_like, g), frozen, want[1]
        )
        close(got[1], keep)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_starts_at_the_base_and_comes_off_again(kind: str) -> None:
    model, x = nn.DenseGeneral((2, 3), axis=(-2, -1)), draw((4, 4, 5))
    params = model.init(jax.random.key(0), x)["params"]
    where = lro.linen.kernels(model, x)
    base, delta = lro.adapters.init(jax.random.key(1), params, rank=2, kind=kind, where=where)
    same = jax.tree.map(lambda a, b: a is b, base, params)
    assert all(jax.tree.leaves(same))
    y = lro.linen.apply(model)({"params": base, "adapters": delta}, x)
    np.testing.assert_allclose(y, model.apply({"params": params}, x), rtol=1e-5, atol=1e-5)  # parameters in float32
    variables, delta = adapted(model, x, kind)
    merged = lro.adapters.merge(variables["params"], delta)
    if kind in ("dora", "hira"):
        with pytest.raises(ValueError, match=f"merged kernel of kind '{kind}'.*: keep the base"):
            lro.adapters.unmerge(merged, delta)
    else:
        close(lro.adapters.unmerge(merged, delta), variables["params"], 1e-12)


def programs(model, variables, delta, x):
    """The program of a gradient with respect to the changes."""

    def loss(delta, params, x):
        return jnp.sum(lro.linen.apply(model)({"params": params, "adapters": delta}, x) ** 2)

    return jax.make_jaxpr(jax.grad(loss))(delta, variables["params"], x).jaxpr


@pytest.mark.parametrize("kind", ["lowrank", "lora", "core", "vera", "dora"])
def test_no_array_of_the_size_of_a_kernel_is_computed(kind: str) -> None:
    """Neither W0 + D nor a gradient of W0; DoRA squares W0 for its norms, and nothing else."""
    model, x = nn.Dense(40), draw((3, 30))
    variables, delta = adapted(model, x, kind)
    program = programs(model, variables, delta, x)
    of_size = [e for e in equations(program) if any(v.aval.shape in ((30, 40), (40, 30)) for v in e.outvars)]
    names = {e.primitive.name for e in of_size}
    assert names <= ({"integer_pow", "square", "mul", "transpose", "stop_gradient"} if kind == "dora" else set())


def test_scanned_bases_get_no_gradient() -> None:
    model, shape, _ = CASES["scan, attention, remat"]
    x = draw(shape)
    variables, delta = adapted(model, x, "lora")
    program = programs(model, variables, delta, x)
    bases = {leaf.shape for leaf in jax.tree.leaves(variables["params"]["blocks"]) if leaf.ndim > 2}
    out = [v.aval.shape for e in equations(program) if e.primitive.name == "scan" for v in e.outvars]
    assert out and not bases & set(out)


def test_the_dtype_of_an_output_is_that_of_the_layer_without_a_change() -> None:
    x = jnp.ones((2, 8), jnp.bfloat16)
    for dtype in (None, jnp.float32):
        model = nn.Dense(6, param_dtype=jnp.bfloat16, dtype=dtype)
        params = model.init(jax.random.key(0), x)["params"]
        base, delta = lro.adapters.init(jax.random.key(1), params, rank=2, kind="dora", alpha=1)
        assert base["kernel"].dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype(jnp.float32)}
        y = lro.linen.apply(model)({"params": base, "adapters": delta}, x)
        assert y.dtype == model.apply({"params": params}, x).dtype
        assert lro.adapters.merge(base, delta)["kernel"].dtype == jnp.bfloat16


def test_every_route_to_the_model() -> None:
    """`factored` with `apply`, `bind`, `nn.apply` and jit; the dicts of the user stay as they are."""
    model, x = CASES["scan, attention, remat"][0], draw((2, 5, 8))
    variables, delta = adapted(model, x, "lora")
    variables = {**variables, "adapters": delta}
    expected = lro.linen.apply(model)(variables, x)
    with lro.linen.factored():
        for y in (
            model.apply(variables, x),
            jax.jit(model.apply)(variables, x),
            model.bind(variables)(x),
            nn.apply(lambda module, x: module(x), model)(variables, x),
            model.apply(flax.core.freeze(variables), x),
        ):
            close(y, expected)
    assert set(variables) == {"params", "adapters"} and variables["adapters"] is delta


def test_mutable_collections_come_back() -> None:
    model, shape, _ = CASES["mixed"]
    x = draw(shape)
    variables, delta = adapted(model, x, "lora")
    rngs = {"dropout": jax.random.key(1)}
    y, updates = lro.linen.apply(model)(
        {**variables, "adapters": delta}, x, train=True, rngs=rngs, mutable=["batch_stats"]
    )
    assert y.shape == (2, 5) and set(updates) == {"batch_stats"}


def test_einsum_and_layers_of_ones_own() -> None:
    model, x = nn.Einsum((2, 8, 4), "btd,ndh->btnh", True), draw((2, 5, 8))
    for kind in ("lora", "dora", "hra"):
        variables, delta = adapted(model, x, kind)
        y = lro.linen.apply(model)({**variables, "adapters": delta}, x)
        merged = lro.adapters.merge(variables["params"], delta)
        close(y, model.apply({"params": merged}, x))


def test_functions_of_arrays() -> None:
    W = draw((3, 6, 2, 4))
    where = lambda path, shape: lro.Axes(1, 1)  # noqa: E731
    for kind in ("lowrank", "dora", "loha", "hra"):
        params, delta = lro.adapters.init(jax.random.key(0), {"kernel": W}, 2, kind=kind, where=where)
        delta = moved(delta)
        adapted = lro.adapters.attach(params, delta)["kernel"]
        x = draw((3, 5, 6))
        close(x @ adapted, jnp.einsum("ebi,eino->ebno", x, adapted.to_dense()))


def test_refusals() -> None:
    key, params = jax.random.key(0), {"a": {"kernel": draw((8, 6))}, "b": {"kernel": draw((8, 2, 3))}}
    where = lambda path, shape: True if len(shape) == 2 else lro.Axes(0, 1)  # noqa: E731
    cases = {
        "kind is one of": dict(rank=2, kind="loro"),
        "start is one of": dict(rank=2, start="svd"),
        r"start='gradient' needs gradients: pass start=lro\.adapters\.gradient": dict(rank=2, start="gradient"),
        r"scale is one of \['alpha/r', 'alpha/sqrt\(r\)', 'none'\]": dict(rank=2, scale="r"),
        r"kind 'vera' starts at zero, start='pissa' is for": dict(rank=2, kind="vera", start="pissa", where=where),
        r"kind 'fourier' cannot change 'b/kernel' of shape \(8, 2, 3\): it needs one input and one output axis": dict(
            rank=2, kind="fourier", where=where
        ),
        r"kind 'hra' cannot change 'a/kernel' .* its rank is even": dict(rank=3, kind="hra", where=where),
        r"rank 7 is larger than min\(m, n\) = 6": dict(rank=7, kind="lora", where=where),
        "no kernel to change at rank 2": dict(rank=2, where=lambda path, shape: False),
        r"cannot tell batch, input and output axes of the kernel 'b/kernel'": dict(rank=2),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            lro.adapters.init(key, params, **arguments)
    base, delta = lro.adapters.init(key, {"kernel": draw((8, 6))}, 2, kind="lora")
    with pytest.raises(ValueError, match="for a kernel of another shape than"):
        lro.adapters.merge({"kernel": draw((6, 8))}, delta)
    with pytest.raises(ValueError, match="no kernel for the changes of\n  kernel"):
        lro.adapters.merge({"other": draw((8, 6))}, delta)
    with pytest.raises(TypeError, match=r"changes made by lro\.adapters\.init as leaves, got 'kernel'"):
        lro.adapters.merge(base, {"kernel": draw((8, 6))})
    embed, tokens = nn.Embed(9, 4), jnp.zeros((2,), jnp.int32)
    variables = embed.init(key, tokens)
    base, delta = lro.adapters.init(key, variables["params"], 2, where=lambda path, shape: lro.Axes(0, 1))
    with pytest.raises(TypeError, match="Embed cannot run with a changed kernel at"):
        lro.linen.apply(embed)({"params": base, "adapters": delta}, tokens)
    grouped, x = nn.Conv(6, (3,), feature_group_count=2), draw((2, 5, 4))
    variables = grouped.init(key, x)
    base, delta = lro.adapters.init(
        key, variables["params"], 2, where=lambda path, shape: lro.Axes(0, 2) if len(shape) == 3 else False
    )
    with pytest.raises(TypeError, match="its convolution has 2 groups"):
        lro.linen.apply(grouped)({"params": base, "adapters": delta}, x)


def test_sums_of_several_changes_of_one_base() -> None:
    params = {"kernel": draw((8, 6))}
    deltas = []
    for seed, kind in enumerate(("lora", "lowrank", "core")):
        _, delta = lro.adapters.init(jax.random.key(seed), params, 2 + seed, kind=kind, alpha=3)
        trained = lro.adapters.labels(delta)
        deltas.append(
            jax.tree.map(
                lambda label, x: jax.tree.map(lambda y: y + 0.2, x) if label == "trained" else x, trained, delta
            )
        )
    weights = (0.5, -1.0, 2.0)
    total = lro.adapters.merge(params, lro.adapters.add(*deltas, weights=weights))["kernel"]
    parts = [
        w * (lro.adapters.merge(params, d)["kernel"] - params["kernel"]) for w, d in zip(weights, deltas, strict=True)
    ]
    close(total, params["kernel"] + sum(parts), 1e-12)
    _, dora = lro.adapters.init(jax.random.key(0), params, 2, kind="dora")
    with pytest.raises(ValueError, match="the change of 'kernel' is a Magnitude"):
        lro.adapters.add(dora)
    with pytest.raises(ValueError, match="one weight for each tree, got 1 for 2"):
        lro.adapters.add(deltas[0], deltas[1], weights=(1.0,))


@pytest.mark.slow
def test_bases_of_eight_bits() -> None:
    """They run in every layer with and without a change, as the kernels that they stand for, and stay integers."""
    model, shape, _ = CASES["scan, attention, remat"]
    x = draw(shape)
    variables, delta = adapted(model, x, "dora")
    where = lro.linen.kernels(model, x)
    small = lro.adapters.quantize(variables["params"], where=where)
    kernels = [k for k in jax.tree.leaves(small, is_leaf=is_quantized) if is_quantized(k)]
    assert len(kernels) == 6 and all(k.values.dtype == jnp.int8 for k in kernels)
    dense = jax.tree.map(lambda k: k.to_dense() if is_quantized(k) else k, small, is_leaf=is_quantized)
    worst = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), dense, variables["params"])
    assert max(jax.tree.leaves(worst)) < 1 / 250
    apply = jax.jit(lro.linen.apply(model))
    close(apply({"params": small}, x), model.apply({"params": dense}, x))
    close(apply({"params": small, "adapters": delta}, x), apply({"params": dense, "adapters": delta}, x))
    with pytest.raises(ValueError, match=r"start=.pissa. corrects .*, which is quantized: quantize after init"):
        lro.adapters.init(jax.random.key(0), small, 2, kind="lora", start="pissa", where=where)


def is_quantized(x) -> bool:
    return isinstance(x, lro.adapters.Quantized)
