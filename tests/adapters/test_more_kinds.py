"""Kinds that PEFT does not have, and what the recorded numbers do not show: starts, stacks, gradients, refusals."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_optax as lro
from tests.adapters import every_kind
from tests.adapters.every_kind import moved
from tests.models.linen_models import close, draw, shapes_inside

KEY = jax.random.key(0)
ad = lro.adapters


def butterflies(d, W):
    """BOFT with two factors of two blocks of four: inputs 0 to 3 meet in a block, then 0, 1 and 4, 5."""
    for i, order in enumerate(([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 4, 5, 2, 3, 6, 7])):
        R = [np.asarray(x) for x in d.R[i]]
        Q = [(x - x.T) / 2 for x in R]
        blocks = [(np.eye(4) - q) @ np.linalg.inv(np.eye(4) + q) for q in Q]
        P = np.eye(8)[order]
        D = np.zeros((8, 8))
        D[:4, :4], D[4:, 4:] = blocks
        W = P @ D @ P.T @ W
    return W * np.asarray(d.s)


def sparse(d, W):
    S = np.zeros(W.shape)
    entries = getattr(d, "entries", d)
    for value, (i, j) in zip(np.asarray(entries.values), np.asarray(entries.positions, int), strict=True):
        S[i, j] += value
    return W + S + (float(d.pair.scale) * d.pair.A @ d.pair.B if entries is not d else 0.0)


def train(d, W):
    A = np.einsum("ia,akp->ikp", d.A1, d.A2).reshape(8, 2)
    return W + float(d.scale) * A @ np.einsum("pjb,bl->pjl", d.B1, d.B2).reshape(2, 6)


FORMULAS = {
    "svfit": lambda d, W: W + d.U @ np.diag(d.sigma) @ d.V.T,
    "rosa": sparse,
    "shira": sparse,
    "loretta": train,
    "boft": butterflies,
}
VARIANTS = {"boft": ad.variant("boft", factors=2), "rosa": ad.variant("rosa", density=0.1)}
RANKS = {"boft": 4}


@pytest.mark.parametrize("kind", FORMULAS)
def test_formulas(kind: str) -> None:
    W = draw((8, 6))
    params, start = ad.init(KEY, {"kernel": W}, RANKS.get(kind, 2), kind=VARIANTS.get(kind, kind), alpha=3)
    delta, x = moved(start), draw((3, 8), 2)

    def outputs(start, delta):
        dense = ad.merge(params, delta)
        y = x @ ad.attach(params, delta)["kernel"]
        return ad.merge(params, start)["kernel"], dense["kernel"], y, ad.unmerge(dense, delta)["kernel"]

    before, dense, y, back = jax.jit(outputs)(start, delta)
    expected = FORMULAS[kind](jax.tree.map(np.asarray, delta["kernel"]), np.asarray(params["kernel"]))
    close(before, W, 1e-12)
    close(dense, expected, 1e-12)
    close(y, x @ expected, 1e-11)
    close(back, params["kernel"], 1e-11)


def test_nola_shares_random_bases() -> None:
    params = {"a": {"kernel": draw((8, 6))}, "b": {"kernel": draw((6, 9))}}
    _, delta = ad.init(KEY, params, 2, kind=ad.variant("nola", bases=5), alpha=4)
    bank = delta["nola_bank"]
    assert bank.A.shape == (5, 8, 2) and bank.B.shape == (5, 9, 2) and ad.labels(delta)["nola_bank"].A == "frozen"
    close(ad.merge(params, delta), params, 0)
    delta = moved(delta)
    for name, W in ad.merge(params, delta).items():
        d, base = delta[name]["kernel"], np.asarray(params[name]["kernel"])
        A, B = (np.tensordot(np.asarray(c), np.asarray(x), 1) for c, x in ((d.alpha, bank.A), (d.beta, bank.B)))
        close(W["kernel"], base + 2 * A[: base.shape[0]] @ B[: base.shape[1]].T, 1e-12)
    pairs = ad.as_lora(params, delta)
    close(ad.merge(params, pairs), ad.merge(params, delta), 1e-12)


def test_the_gradients_of_allora() -> None:
    """The factors' gradients have the scaled gradient of the product, and inputs the plain one."""
    params, delta = ad.init(KEY, {"kernel": draw((8, 6))}, 2, kind="allora", alpha=3)
    delta, x, target = moved(delta), draw((5, 8), 2), draw((5, 6), 3)

    def loss(delta, x):
        return jnp.sum((x @ ad.attach(params, delta)["kernel"] - target) ** 2) / 2

    grads, of_x = jax.jit(jax.grad(loss, (0, 1)))(delta, x)
    d = jax.tree.map(np.asarray, delta["kernel"])
    W, s = np.asarray(params["kernel"]) + float(d.scale) * d.A @ d.B, float(d.scale)
    g = np.asarray(x @ W - target)
    G = np.asarray(x).T @ g / np.sqrt(np.linalg.norm(s * d.A @ d.B, axis=0) + 1 / 2)
    close(grads["kernel"].A, s * G @ d.B.T, 1e-11)
    close(grads["kernel"].B, s * d.A.T @ G, 1e-11)
    close(of_x, g @ W.T, 1e-11)


def test_the_sign_step_of_core() -> None:
    W, G = draw((8, 6)), draw((8, 6), 3)
    params, delta = ad.init(KEY, {"kernel": W}, 2, kind="core", start=ad.sign_step({"kernel": G}, 0.1), alpha=3)
    u, s, vt = np.linalg.svd(-0.1 * np.sign(np.asarray(G)))
    close(params["kernel"], W, 0)
    close(ad.merge(params, delta)["kernel"], W + (u[:, :2] * s[:2]) @ vt[:2], 1e-12)
    with pytest.raises(ValueError, match="kind 'lora' starts at zero, start='sign_step' is for 'core'"):
        ad.init(KEY, {"kernel": W}, 2, kind="lora", start=ad.sign_step({"kernel": G}))


@pytest.mark.parametrize("kind", ["lora", "lowrank"])
def test_the_activation_start(kind: str) -> None:
    """The leading directions of the inputs, and W as it was."""
    W, X = draw((2, 6, 2, 4)), draw((2, 5, 4, 6), 3)
    where = lambda path, shape: lro.Axes(1, 1)  # noqa: E731
    params, delta = ad.init(KEY, {"kernel": W}, 2, kind=kind, start=ad.activation({"kernel": X}), where=where)
    close(ad.merge(params, delta)["kernel"], W, 0)
    for i in range(2):
        flat = np.asarray(X[i]).reshape(20, 6)
        _, _, vt = np.linalg.svd(flat - flat.mean(0))
        A = np.asarray(delta["kernel"].A[i] if kind == "lora" else delta["kernel"].U[i])
        close(A @ A.T, vt[:2].T @ vt[:2], 1e-10)
    for message, inputs in {
        "has no inputs of 'kernel'": {},
        r"have shape \(2, 5, 7\), and its kernel takes \(2, '...', 6\)": {"kernel": draw((2, 5, 7))},
        "2 inputs of 'kernel' less their mean have no 2 dir": {"kernel": draw((2, 2, 6))},
    }.items():
        with pytest.raises(ValueError, match=message):
            ad.init(KEY, {"kernel": W}, 2, kind=kind, start=ad.activation(inputs), where=where)


STACKED = {
    **{name: name for name in ("oft", "boft", "loretta", "miss", "gralora", "c3a", "delora", "rosa", "randlora")},
    "vblora": ad.variant("vblora", vectors=5, length=2),
}


@pytest.mark.parametrize("kind", STACKED)
def test_stacked_kernels_with_several_axes(kind: str) -> None:
    """A layer computes with the kernel that merge forms, and every kernel of the stack with its own arrays."""
    W = draw((2, 4, 2, 3, 2))
    where = lambda path, shape: lro.Axes(1, 2)  # noqa: E731
    params, delta = ad.init(KEY, {"kernel": W}, 2, kind=STACKED[kind], where=where)
    delta, x = moved(delta), draw((2, 5, *W.shape[1:-2]), 2)

    def outputs(delta):
        dense = ad.merge(params, delta)
        return x @ ad.attach(params, delta)["kernel"], dense["kernel"], ad.unmerge(dense, delta)["kernel"]

    y, dense, back = jax.jit(outputs)(delta)
    flat = np.asarray(dense).reshape(2, 8, 6)
    close(y.reshape(2, 5, 6), np.asarray(x).reshape(2, 5, 8) @ flat, 1e-11)
    close(back, params["kernel"], 1e-10)
    change = flat - np.asarray(params["kernel"]).reshape(2, 8, 6)
    assert np.abs(change[0] - change[1]).max() > 1e-3
    assert jax.eval_shape(lambda p: ad.init(KEY, p, 2, kind=STACKED[kind], where=where), {"kernel": W})


def test_refusals() -> None:
    W = {"kernel": draw((9, 6))}
    for message, options in {
        "kind 'oft' cannot change .*: the rank is the size of its blocks": dict(rank=2, kind="oft"),
        "kind 'boft' cannot change .*: 2 factors need blocks of even size": dict(rank=3, kind=VARIANTS["boft"]),
        "kind 'vblora' cannot change .* length 256 cut both": dict(rank=2, kind="vblora"),
        "kind 'c3a' cannot change .* divides m and n, 9 and 6": dict(rank=2, kind="c3a"),
        "kind 'gralora' cannot change .*k = 2 divides": dict(rank=2, kind="gralora"),
        "a sparse change of 'kernel' has start='zero' or gradient": dict(rank=2, kind="rosa", start="pissa"),
        "kind 'shira' cannot change .* 54 entries, and r .* is 60": dict(rank=4, kind="shira"),
        "kind 'svfit' starts at zero": dict(rank=2, kind="svfit", start="pissa"),
        "start='activation' needs inputs": dict(rank=2, start="activation"),
    }.items():
        with pytest.raises(ValueError, match=message):
            ad.init(KEY, W, **options)
    with pytest.raises(ValueError, match="kind 'nola' cannot change"):
        ad.init(KEY, {"kernel": draw((4, 2, 3))}, 2, kind="nola", where=lambda path, shape: lro.Axes(0, 1))
    with pytest.raises(TypeError, match=r"kind 'boft' has the settings \['factors'\], got \['blocks'\]"):
        ad.variant("boft", blocks=2)
    _, delta = ad.init(KEY, W, 2, kind="randlora")
    with pytest.raises(ValueError, match="a change of kind 'randlora' needs the bank of its tree"):
        delta["kernel"].part(W["kernel"])
    params, delta = ad.init(KEY, {"kernel": draw((9, 6))}, 3, kind="oft")
    with pytest.raises(ValueError, match="is a OFT, which is no product of two factors: merge it"):
        ad.as_lora(params, delta)


def test_rosa_takes_the_largest_entries_of_a_gradient() -> None:
    G = draw((6, 5), 3)
    kind = ad.variant("rosa", density=0.2)
    _, delta = ad.init(KEY, {"kernel": draw((6, 5))}, 2, kind=kind, start=ad.gradient({"kernel": G}))
    at = np.asarray(delta["kernel"].entries.positions, int)
    want = np.argsort(-np.abs(np.asarray(G)).reshape(-1))[:6]
    assert sorted(at[:, 0] * 5 + at[:, 1]) == sorted(want)


FACTORED = {
    **{name: name for name in ("allora", "adalora", "delora", "svfit", "core", "randlora", "nola", "loretta")},
    **{name: name for name in ("gralora", "miss")},
    "vblora": ad.variant("vblora", vectors=5, length=4),
}


@pytest.mark.parametrize("kind", FACTORED)
def test_no_array_of_the_size_of_the_kernel(kind: str) -> None:
    """Neither in the output nor in the gradient."""
    params, delta = ad.init(KEY, {"kernel": draw((12, 8))}, 2, kind=FACTORED[kind])
    x = draw((3, 12))
    loss = lambda delta: jnp.sum((x @ ad.attach(params, delta)["kernel"]) ** 2)  # noqa: E731
    shapes = set(shapes_inside(jax.make_jaxpr(jax.grad(loss))(delta).jaxpr))
    # The factors of randlora have min(m, n) columns, so one of them is as large as the kernel.
    assert not shapes & {(12, 8), (8, 12)} or kind == "randlora"


@pytest.mark.parametrize("kind", ["oft", "rosa"])
def test_convolutions(kind: str) -> None:
    model, x = nn.Conv(4, (3, 2), param_dtype=jnp.float64), draw((2, 5, 4, 2))
    params = model.init(KEY, x)["params"]
    params, delta = ad.init(KEY, params, 2, kind=kind, where=lro.linen.kernels(model, x))
    delta = moved(delta)
    run = jax.jit(lambda d: (lro.linen.apply(model)({"params": params, "adapters": d}, x), ad.merge(params, d)))
    y, dense = run(delta)
    close(y, model.apply({"params": dense}, x), 1e-11)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda x: x.__name__)
@pytest.mark.parametrize("kind", every_kind.NAMES)
def test_starts_in_half_precision(kind: str, dtype) -> None:
    """The output of the base, and finite gradients."""
    model, x = nn.Dense(18, dtype=dtype, param_dtype=dtype), jnp.ones((3, 9), dtype)
    before = model.init(KEY, x)["params"]
    params, delta = every_kind.start(kind, before)

    def loss(delta):
        y = lro.linen.apply(model)({"params": params, "adapters": delta}, x)
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    grads, y = jax.grad(loss, has_aux=True)(delta)
    # Nine products of numbers up to 2; kinds that replace a part of the base round it and the rest.
    np.testing.assert_allclose(y, model.apply({"params": before}, x), atol=20 * float(jnp.finfo(dtype).eps))
    assert y.dtype == dtype and all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-3, 1.0, 1e3], ids=str)
def test_delora_in_half_precision(size: float, rank: int) -> None:
    """By its formula, with norms from 1e-4, at all sizes of B."""
    model, x = nn.Dense(6, dtype=jnp.float16, param_dtype=jnp.float16), jnp.ones((3, 8), jnp.float16)
    params, delta = ad.init(KEY, model.init(KEY, x)["params"], rank, kind="delora")
    d = delta["kernel"]
    delta["kernel"] = d = dataclasses.replace(d, B=size * draw(d.B.shape).astype(d.B.dtype))

    def outputs(delta):
        return lro.linen.apply(model)({"params": params, "adapters": delta}, x)

    A, B, W = (np.asarray(x, np.float64) for x in (d.A, d.B, params["kernel"]))
    norms = [np.maximum(np.linalg.norm(y, axis=axis), 1e-4) for y, axis in ((A, 0), (B, 1))]
    D = np.linalg.norm(W, axis=1)[:, None] * (A @ np.diag(15 / (rank * norms[0] * norms[1])) @ B)
    np.testing.assert_allclose(outputs(delta), np.ones((3, 8)) @ (W + D), rtol=0.01, atol=0.1)
    grads = jax.grad(lambda delta: jnp.sum(outputs(delta).astype(jnp.float32)))(delta)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


LAYERS = {
    "dense": (nn.Dense, dict(features=4), (2, 512)),
    "heads": (nn.DenseGeneral, dict(features=(2, 2)), (2, 512)),
    "heads out": (nn.DenseGeneral, dict(features=4, axis=(-2, -1)), (2, 8, 64)),
    "einsum": (nn.Einsum, dict(shape=(512, 4), einsum_str="bi,io->bo"), (2, 512)),
    "convolution": (nn.Conv, dict(features=4, kernel_size=(3,), padding="VALID"), (2, 4, 256)),
}


@pytest.mark.parametrize("options", [dict(), dict(bits=4), dict(group=64), dict(bits=4, group=32)], ids=str)
@pytest.mark.parametrize("size", [0.01, 10.0, 1000.0], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_integers_in_half_precision(name: str, size: float, options: dict) -> None:
    """Sums of integers times inputs are above 65504, the outputs are not."""
    make, settings, shape = LAYERS[name]
    model = make(**settings, use_bias=False, dtype=jnp.float16, param_dtype=jnp.float16)
    x = jax.random.uniform(KEY, shape, jnp.float16, 0, size)
    shapes = jax.eval_shape(model.init, KEY, x)["params"]
    W = jax.random.uniform(jax.random.key(1), shapes["kernel"].shape, jnp.float16, 0, 0.02)
    params = ad.quantize({"kernel": W}, where=lro.linen.kernels(model, x), **options)
    y = jax.jit(lro.linen.apply(model))({"params": params}, x)
    dense = params["kernel"].to_dense().astype(jnp.float64)
    wide = make(**settings, use_bias=False, dtype=jnp.float64, param_dtype=jnp.float64)
    want = wide.apply({"params": {"kernel": dense}}, x.astype(jnp.float64))
    assert y.dtype == jnp.float16 and jnp.all(want < 6e4)
    np.testing.assert_allclose(y, want, rtol=0.01)
    exact = wide.apply({"params": {"kernel": W.astype(jnp.float64)}}, x.astype(jnp.float64))
    np.testing.assert_allclose(y, exact, rtol=0.01 if options.get("bits", 8) == 8 else 0.1)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.int32], ids=str)
@pytest.mark.parametrize("options", [dict(), dict(bits=4), dict(group=3)], ids=str)
def test_integers_keep_the_dtype_of_inputs(dtype, options: dict) -> None:
    W = ad.quantize({"kernel": draw((8, 6)).astype(jnp.float32)}, **options)["kernel"]
    x = (8 * draw((3, 8), 2)).astype(dtype)
    y = x @ W
    assert y.dtype == (dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float64)  # of JAX, for integers
    want = np.asarray(x, np.float64) @ np.asarray(W.to_dense(), np.float64)
    np.testing.assert_allclose(y, want, atol=100 * float(jnp.finfo(y.dtype).eps))


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({"kernel": draw((8, 6))}, dict(where=lambda path, shape: False)),
        ({"w": draw((8, 6))}, dict()),
        ({"bias": draw((6,))}, dict()),
        ({}, dict()),
        (ad.quantize({"kernel": draw((8, 6))}), dict(bits=4)),
    ],
    ids=["where", "another name", "no matrix", "empty", "quantized"],
)
def test_nothing_to_quantize(params, options: dict) -> None:
    """As in `init`, with the parameters that there are."""
    found = "none" if set(params) <= {"bias"} else rf"{next(iter(params))} \(8, 6\)"
    with pytest.raises(ValueError, match=rf"^no kernel to quantize\. Parameters with two axes or more:\n  {found}$"):
        ad.quantize(params, **options)


def test_models_of_nnx() -> None:
    """A bank that is trained is one variable for all layers."""
    net = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i), param_dtype=jnp.float64) for i in range(2)))
    params = {"layers": {str(i): {"kernel": net.layers[i].kernel[...]} for i in range(2)}}
    lro.nnx.adapt(net, rank=2, kind=FACTORED["vblora"])
    x, tree = draw((3, 8)), lro.nnx.adapters(net)
    assert set(tree) == {"layers", "vblora_bank"}

    @jax.jit
    @jax.value_and_grad
    def by_hand(tree):
        layers = ad.attach(params, tree)["layers"]
        return jnp.sum((x @ layers["0"]["kernel"] @ layers["1"]["kernel"]) ** 2)

    @nnx.jit
    def in_nnx(net):
        return nnx.value_and_grad(lambda net: jnp.sum(net(x) ** 2), argnums=nnx.DiffState(0, lro.nnx.AdapterParam))(net)

    (value, grads), (expected, of_tree) = in_nnx(net), by_hand(tree)
    close(value, expected, 1e-11)
    norms = lambda tree: sorted(float(jnp.sum(g**2)) for g in jax.tree.leaves(tree))  # noqa: E731
    assert len(norms(grads)) == 5
    close(norms(grads), norms(of_tree), 1e-9)


def test_the_orthogonal_start_and_the_penalty_of_adalora() -> None:
    """Neither factor is zero and the product is; the penalty is the mean of the norms."""
    W = {"kernel": draw((2, 8, 6))}
    where = lambda path, shape: lro.Axes(1, 1)  # noqa: E731
    params, delta = ad.init(KEY, W, 4, kind="lora", start="orthogonal", where=where)
    close(ad.merge(params, delta), W, 1e-14)
    assert jnp.abs(delta["kernel"].A).max() > 0.1 and jnp.abs(delta["kernel"].B).max() > 0.1
    for kind, rank, message in (("lora", 3, "needs an even rank"), ("lowrank", 4, "is for pairs")):
        with pytest.raises(ValueError, match=message):
            ad.init(KEY, W, rank, kind=kind, start="orthogonal", where=where)
    _, delta = ad.init(KEY, W, 3, kind="adalora", where=where)
    d = moved(delta)["kernel"]
    grams = [x.T @ x for x in map(np.asarray, (*d.A, *jnp.swapaxes(d.B, 1, 2)))]
    expected = np.mean([np.linalg.norm(x - np.eye(3)) for x in grams])
    np.testing.assert_allclose(ad.orthogonality({"kernel": d}), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="and the tree has none"):
        ad.orthogonality({})
