"""Every kind, start and scale against its formula, written by hand in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.models.linen_models import close, draw

KEY = jax.random.key(0)


def made(kind, W, rank, seed=7, **options):
    """A base and a change with other values in its trained arrays."""
    params, delta = lro.adapters.init(KEY, {"kernel": W}, rank, kind=kind, **options)

    def one(label, x):
        return jax.tree.map(lambda y: y + 0.3 * draw(y.shape, seed), x) if label == "trained" else x

    return params, jax.tree.map(one, lro.adapters.labels(delta), delta)


def householder(W, d):
    for u in np.asarray(d.U).T:
        W = W - 2 * np.outer(u, u @ W) / (u @ u)
    return W


def dora(W, d):
    V = W + float(d.change.scale) * d.change.A @ d.change.B
    return d.magnitude * V / np.linalg.norm(V, axis=0)


def fourier(W, d):
    m, n = W.shape
    i, j = np.mgrid[:m, :n]
    D = 0.0
    for F, (p, q) in zip(np.asarray(d.F), np.asarray(d.positions), strict=True):
        D = D + float(d.scale) * F * np.cos(2 * np.pi * (p * i / m + q * j / n)) / (m * n)
    return W + D


FORMULAS = {
    "lowrank": lambda W, d: W + float(d.scale) * d.kernel.U @ d.kernel.S @ d.kernel.V.T,
    "lora": lambda W, d: W + float(d.scale) * d.A @ d.B,
    "dora": dora,
    "core": lambda W, d: W + float(d.scale) * d.U @ d.C @ d.V.T,
    "loha": lambda W, d: W + float(d.scale) * (d.A1 @ d.B1) * (d.A2 @ d.B2),
    "hira": lambda W, d: W * (1 + float(d.scale) * d.A @ d.B),
    "lokr": lambda W, d: W + float(d.scale) * np.kron(d.C, d.A @ d.B),
    "fourier": fourier,
    "hra": householder,
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_formulas(kind: str) -> None:
    """The matrix is large enough for the components of LoHa and the pair of LoKr."""
    W = draw((36, 30))
    rank = 5 if kind == "fourier" else 2
    params, delta = made(kind, W, rank, alpha=3)
    d = delta["kernel"]
    expected = FORMULAS[kind](np.asarray(W), jax.tree.map(np.asarray, d) if kind != "lowrank" else d)
    close(lro.adapters.merge(params, delta)["kernel"], np.asarray(expected), 1e-10)
    x = draw((3, 36), 2)
    close(x @ lro.adapters.attach(params, delta)["kernel"], x @ expected, 1e-9)


def test_lokr_with_a_full_second_factor() -> None:
    params, delta = made("lokr", draw((12, 9)), 8)
    d = delta["kernel"]
    assert d.A is None and d.C.shape == (3, 3) and d.B.shape == (4, 3)
    close(lro.adapters.merge(params, delta)["kernel"], params["kernel"] + np.kron(d.C, d.B))


def test_vera_shares_one_bank() -> None:
    """Layers of other sizes use its first rows, and the tree holds it once."""
    params = {"a": {"kernel": draw((8, 6))}, "b": {"kernel": draw((2, 5, 3, 4))}}
    where = lambda path, shape: lro.Axes(1, 1) if path.startswith("b") else True  # noqa: E731
    params, delta = lro.adapters.init(KEY, params, 7, kind="vera", where=where)
    bank = delta["vera_bank"]
    assert bank.A.shape == (8, 7) and bank.B.shape == (12, 7)
    delta["a"]["kernel"] = lro.adapters.VeRA(draw((6,)), draw((7,)))
    delta["b"]["kernel"] = lro.adapters.VeRA(draw((2, 3, 4)), draw((2, 7)))
    merged, A, B = lro.adapters.merge(params, delta), np.asarray(bank.A), np.asarray(bank.B)
    d = jax.tree.map(np.asarray, delta["a"]["kernel"])
    close(merged["a"]["kernel"], params["a"]["kernel"] + (A * d.d) @ B[:6].T * d.b)
    for i in range(2):
        d = jax.tree.map(lambda x, at=i: np.asarray(x[at]), delta["b"]["kernel"])
        D = ((A[:5] * d.d) @ B.T * d.b.reshape(12)).reshape(5, 3, 4)
        close(merged["b"]["kernel"][i], params["b"]["kernel"][i] + D)


def test_magnitude_over_another_kind() -> None:
    params, delta = made(lro.adapters.magnitude("lowrank"), draw((8, 6)), 2)
    d = delta["kernel"]
    V = np.asarray(params["kernel"] + d.change.to_dense())
    close(lro.adapters.merge(params, delta)["kernel"], np.asarray(d.magnitude) * V / np.linalg.norm(V, axis=0))
    close(jnp.eye(8) @ lro.adapters.attach(params, delta)["kernel"], lro.adapters.merge(params, delta)["kernel"])


def test_dora_of_a_zero_column_is_zero() -> None:
    W = draw((8, 6)).at[:, 2].set(0.0)
    params, delta = lro.adapters.init(KEY, {"kernel": W}, 2, kind="dora")
    f = lambda delta: jnp.eye(8) @ lro.adapters.attach(params, delta)["kernel"]  # noqa: E731
    close(f(delta), W)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(jax.grad(lambda d: jnp.sum(f(d) ** 2))(delta)))


def test_the_frame_of_core() -> None:
    """U has the inputs' singular vectors times the singular values, V those of the outputs."""
    W = draw((8, 6))
    _, delta = lro.adapters.init(KEY, {"kernel": W}, 2, kind="core")
    u, s, vt = np.linalg.svd(np.asarray(W))
    close(delta["kernel"].U @ delta["kernel"].V.T, (u[:, :2] * s[:2]) @ vt[:2])
    close(delta["kernel"].V.T @ delta["kernel"].V, np.eye(2))
    assert not delta["kernel"].C.any()


@pytest.mark.parametrize("kind", ["lora", "lowrank", "dora"])
@pytest.mark.parametrize("start", ["pissa", "olora", "gradient"])
def test_starts_keep_the_function(kind: str, start: str) -> None:
    """Of stacked kernels with several axes; the change is a matrix of its rank that the base gave way to."""
    W = draw((2, 6, 2, 4))
    where = lambda path, shape: lro.Axes(1, 1)  # noqa: E731
    how = lro.adapters.gradient({"kernel": draw(W.shape, 3)}) if start == "gradient" else start
    params, delta = lro.adapters.init(KEY, {"kernel": W}, 2, kind=kind, start=how, alpha=3, where=where)
    close(lro.adapters.merge(params, delta)["kernel"], W, 1e-12)
    moved = bool(jnp.abs(params["kernel"] - W).max() > 1e-3)
    assert moved == (kind != "lowrank" or start != "gradient")
    D = (W - params["kernel"]).reshape(2, 6, 8)
    assert moved == all(np.linalg.matrix_rank(np.asarray(D[i]), 1e-8) == 2 for i in range(2))
    if start == "pissa":
        u, s, vt = np.linalg.svd(np.asarray(W).reshape(2, 6, 8))
        close(D, (u[:, :, :2] * s[:, None, :2]) @ vt[:, :2], 1e-10)


def test_the_gradient_start() -> None:
    """LoRA-GA's directions and stable scale; a change of kind lowrank descends along the best first step."""
    W, G = draw((12, 10)), draw((12, 10), 3)
    start = lro.adapters.gradient({"kernel": G}, gamma=4.0)
    _, delta = lro.adapters.init(KEY, {"kernel": W}, 2, kind="lora", start=start)
    u, _, vt = np.linalg.svd(np.asarray(G))
    c = 10**0.25 / 2
    close(np.abs(delta["kernel"].A), c * np.abs(u[:, :2]))
    close(np.abs(delta["kernel"].B), c * np.abs(vt[2:4]))
    _, delta = lro.adapters.init(KEY, {"kernel": W}, 2, start=start)
    d = delta["kernel"]
    u, s, vt = np.linalg.svd(np.asarray(G))
    assert not d.S.any()
    close(d.U @ (d.U.T @ G @ d.V) @ d.V.T, (u[:, :2] * s[:2]) @ vt[:2])
    for message, options in {
        "uses 2 rank singular vectors": dict(rank=6, start=start, kind="lora"),
        "has no gradient of 'kernel'": dict(rank=2, start=lro.adapters.gradient({}), kind="lora"),
        r"has shape \(2, 2\), the kernel \(12, 10\)": dict(
            rank=2, start=lro.adapters.gradient({"kernel": draw((2, 2))}), kind="lora"
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            lro.adapters.init(KEY, {"kernel": W}, **options)


def test_scales() -> None:
    W = {"kernel": draw((8, 6))}
    cases = {("alpha/r", 6): 1.5, ("alpha/sqrt(r)", 6): 3.0, ("none", 6): 1.0, ("alpha/r", None): 1.0}
    for (scale, alpha), expected in cases.items():
        _, delta = lro.adapters.init(KEY, W, 4, kind="lora", scale=scale, alpha=alpha)
        assert float(delta["kernel"].scale) == expected
    _, delta = lro.adapters.init(KEY, W, 2, kind="fourier")
    assert float(delta["kernel"].scale) == 150
    # A wider pair with zero columns is the same function: the scale is an array beside the factors, and stays.
    params, delta = made("lora", draw((8, 6)), 2, alpha=6)
    d = delta["kernel"]
    wider = lro.adapters.LoRA(jnp.pad(d.A, ((0, 0), (0, 3))), jnp.pad(d.B, ((0, 3), (0, 0))), d.scale)
    close(lro.adapters.merge(params, {"kernel": wider}), lro.adapters.merge(params, delta))


def test_draws() -> None:
    """A kernel draws by its path; the outputs of A have about the size of the inputs; no value is trained twice."""
    params = {"a": {"kernel": draw((64, 48))}, "b": {"kernel": draw((64, 48))}}
    _, delta = lro.adapters.init(KEY, params, 8, kind="lora")
    _, alone = lro.adapters.init(KEY, {"b": params["b"]}, 8, kind="lora")
    close(delta["b"]["kernel"].A, alone["b"]["kernel"].A)
    A = delta["a"]["kernel"].A
    assert jnp.abs(A - delta["b"]["kernel"].A).max() > 0.01
    assert jnp.abs(A).max() <= 64**-0.5 and np.isclose(jnp.std(A), 64**-0.5 / 3**0.5, rtol=0.1)
    shapes = jax.eval_shape(lambda p: lro.adapters.init(KEY, p, 8, kind="dora"), params)[1]
    assert shapes["a"]["kernel"].magnitude.shape == (48,)


def test_a_kind_of_ones_own() -> None:
    """A class with the four functions is a kind: here a trained diagonal on the outputs."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Diagonal(lro.adapters.Change):
        kind = "diagonal"
        d: jax.Array

        @classmethod
        def make(cls, request):
            return cls(jnp.zeros((request.n,), request.W.dtype)), None

        batch = 0

        def axes(self, shape):
            return lro.Axes(0, 1)

        def fits(self, shape):
            return shape[1:] == self.d.shape

        def part(self, base):
            return base * self.d[None]

    params, delta = made(Diagonal, draw((8, 6)), 1)
    close(lro.adapters.merge(params, delta)["kernel"], params["kernel"] * (1 + delta["kernel"].d[None]))
    x = draw((3, 8), 2)
    close(x @ lro.adapters.attach(params, delta)["kernel"], x @ lro.adapters.merge(params, delta)["kernel"])
    with pytest.raises(TypeError, match="kind is a name"):
        lro.adapters.init(KEY, {"kernel": draw((8, 6))}, 1, kind=3)
