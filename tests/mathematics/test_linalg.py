"""Decompositions that stay sound in every dtype, at every rank and in every batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import linalg
from lowrank_optax.layout import map_matrices


def random(*shape: int, dtype: Any = np.float64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def T(x: Any) -> Any:
    return np.swapaxes(x, -1, -2)


def with_columns(m: int, *columns: int) -> np.ndarray:
    """Column j is column `columns[j]` of a fixed random matrix, zero for -1."""
    x = random(m, 8)
    return np.stack([x[:, j] if j >= 0 else np.zeros(m) for j in columns], axis=-1)


MATRICES = {
    "full rank": with_columns(7, 0, 1, 2),
    "zero": np.zeros((7, 3)),
    "zero column first": with_columns(7, -1, 0, 1),
    "zero columns between": with_columns(7, 0, -1, -1, 1),
    "duplicate": with_columns(7, 0, 0, 1, 0),
    "all equal": with_columns(7, 0, 0, 0),
    "rank one": np.outer(np.arange(7.0), np.arange(1.0, 5.0)),
    "scaled duplicates": with_columns(7, 0, 0, 0) * np.array([[1.0, 1e-8, 1e8]]),
    "nearly dependent": with_columns(7, 0, 0, 1) + 1e-12 * random(7, 3, seed=1),
    "graded": with_columns(7, 0, 1, 2, 3) * np.array([[1.0, 1e-5, 1e-10, 1e-15]]),
    "huge": 1e25 * with_columns(7, 0, 1, 1),
    "tiny": 1e-25 * with_columns(7, 0, 1, 1),
    "m < k": with_columns(3, 0, 1, 2, 3, 4),
    "m < k, deficient": with_columns(3, 0, 0, -1, 0, 0),
    "one row": with_columns(1, 0, 1, 2),
    "one row of zeros": np.zeros((1, 3)),
    "one column": with_columns(7, 0),
    "one column of zeros": np.zeros((7, 1)),
    "batch": np.stack([with_columns(7, 0, 1, 2), np.zeros((7, 3)), with_columns(7, 3, 3, -1)]),
    "two batch axes, m < k": random(2, 3, 2, 4) * np.array([1.0, 0.0, 1.0])[:, None, None],
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MATRICES)
def test_orthonormalize_whatever_the_rank(name: str, dtype: Any) -> None:
    x = MATRICES[name].astype(dtype)
    q, r = map_matrices(linalg.orthonormalize, jnp.asarray(x))
    m, k = x.shape[-2:]
    p = min(m, k)
    assert q.shape == (*x.shape[:-1], p) and r.shape == (*x.shape[:-2], p, k)
    assert q.dtype == r.dtype == dtype
    q, r = (np.asarray(y, np.float64) for y in (q, r))
    # Householder QR: |Q^T Q - I| and |QR - X| / |X| are at most a small multiple of m k u, here below 35 u each.
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(T(q) @ q, np.broadcast_to(np.eye(p), (*x.shape[:-2], p, p)), atol=35 * eps)
    size = np.max(np.abs(x), initial=0)
    np.testing.assert_allclose(q @ r, x, rtol=0, atol=35 * eps * float(size))
    # Exact zeros below the diagonal, on which the zero block of the coefficient matrices rests.
    np.testing.assert_array_equal(r, np.triu(r))


def test_orthonormalize_does_not_differ_in_a_batch_or_under_jit() -> None:
    x = jnp.asarray(MATRICES["batch"])
    q, r = map_matrices(linalg.orthonormalize, x)
    jitted_q, jitted_r = jax.jit(lambda x: map_matrices(linalg.orthonormalize, x))(x)
    for i in range(len(x)):
        one_q, one_r = linalg.orthonormalize(x[i])
        for a, b in ((q[i], one_q), (r[i], one_r), (jitted_q[i], one_q), (jitted_r[i], one_r)):
            np.testing.assert_allclose(a, b, atol=1e-14)  # Rounding of seven operations on numbers of size 1.


# --- the QR of [U, X] by Gram matrices ----------------------------------------------------------------------------

ROWS, WIDTH = 16, 4


def with_condition(condition: float) -> np.ndarray:
    p, q = np.linalg.qr(random(ROWS, WIDTH, seed=2))[0], np.linalg.qr(random(WIDTH, WIDTH, seed=3))[0]
    return p * np.geomspace(1, 1 / condition, WIDTH) @ q


def blocks() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An orthonormal U, and matrices X to complete it with."""
    U = np.linalg.qr(random(ROWS, WIDTH))[0]
    x = random(ROWS, WIDTH, seed=1)
    x -= U @ (U.T @ x)
    some = np.arange(WIDTH) % 2
    return U, {
        "horizontal": x,
        "not horizontal": random(ROWS, WIDTH, seed=1),
        "graded": x * np.geomspace(1, 1e-12, WIDTH),
        "huge": 1e25 * x,
        "tiny": 1e-25 * x,
        "condition 1e2": with_condition(1e2),
        "condition 1e4": with_condition(1e4),
        "condition 1e7": with_condition(1e7),
        "condition 1e12": with_condition(1e12),
        "zero": 0 * x,
        "zero columns": x * some,
        "equal columns": x[:, 0 * some],
        "equal entries": np.ones_like(x),
        "rank one": np.outer(x[:, 0], x[0]),
        "three rows": np.where(np.arange(ROWS)[:, None] < 3, x, 0.0),
        "inside the basis": U @ x[:WIDTH],
        "nearly inside the basis": U @ x[:WIDTH] + 1e-9 * x,
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [ROWS, 2 * WIDTH], ids=["tall", "square"])
def test_an_extended_basis_is_orthonormal_and_holds_u_and_x_whatever_the_rank(rows: int, dtype: Any) -> None:
    U, cases = blocks()
    if rows < ROWS:
        U, cases = np.linalg.qr(U[:rows])[0], {name: x[:rows] for name, x in cases.items()}
    u = np.stack([U] * len(cases)).astype(dtype)
    x = np.stack(list(cases.values())).astype(dtype)
    e = map_matrices(linalg.extend_basis, u, x)
    assert all(y.dtype == dtype for y in e)
    block, mix, basis_part, x_part = (np.asarray(y, np.float64) for y in e)
    q = np.concatenate([u, block], axis=-1) @ mix
    eps = float(jnp.finfo(dtype).eps)
    # As for Householder QR a small multiple of the rounding of sums of 16 and 8 terms; here below 10 u each.
    np.testing.assert_allclose(
        T(q) @ q, np.broadcast_to(np.eye(2 * WIDTH), (len(x), 2 * WIDTH, 2 * WIDTH)), atol=20 * eps
    )
    np.testing.assert_allclose(q @ basis_part, u, atol=20 * eps)
    size = np.abs(x).max(axis=-2, keepdims=True)
    np.testing.assert_allclose((q @ x_part - x) / np.where(size > 0, size, 1), 0, atol=40 * eps)
    # Exact zeros, on which the zero block of the coefficient matrices rests, and exact zeros of X.
    np.testing.assert_array_equal(basis_part[:, WIDTH:], 0)
    np.testing.assert_array_equal(basis_part, np.triu(basis_part))
    np.testing.assert_array_equal(x_part[:, WIDTH:], np.triu(x_part[:, WIDTH:]))
    np.testing.assert_array_equal(np.where(np.all(x == 0, axis=-2, keepdims=True), x_part, 0), 0)


@pytest.mark.slow
def test_where_passes_do_not_end_there_is_no_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """With factorisations that improve nothing the columns stay dependent: NaN, not columns that are no basis."""
    monkeypatch.setattr(linalg, "_cholesky", lambda x: (0 * x + linalg.diagonal(jnp.ones(len(x))),) * 2)
    e = linalg.extend_basis(jnp.eye(8)[:, :2], jnp.ones((8, 2)))
    assert np.all(np.isnan(e.mix)) and np.all(np.isnan(e.of_x))


def gram_q(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, k, r = map_matrices(linalg.gram_qr, x)
    return y @ k, r


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_small_bases_are_completed_from_nothing(size: int) -> None:
    """The columns put in the place of zeros are independent, of each other and of what is there, in few rows too."""
    x = np.zeros((50, size, size), np.float32)
    x[1:, :, 0] = random(49, size, seed=6)
    q = gram_q(jnp.asarray(x))[0]
    np.testing.assert_allclose(T(q) @ q, np.broadcast_to(np.eye(size), q.shape), atol=1e-5)


def test_an_extended_basis_is_householder_qr_where_that_is_determined() -> None:
    U, cases = blocks()
    U = U * (1 + 1e-3 * random(1, WIDTH, seed=5))  # as far from orthonormal as rounding to bfloat16 leaves it
    names = ["horizontal", "not horizontal", "graded", "huge", "condition 1e4"]
    u, x = np.stack([U] * len(names)), np.stack([cases[name] for name in names])
    block, mix, basis_part, x_part = (np.asarray(y) for y in map_matrices(linalg.extend_basis, u, x))
    both = jnp.asarray(np.concatenate([u, x], axis=-1))
    q, r = (np.asarray(y) for y in map_matrices(linalg.orthonormalize, both))
    # Q and R depend on [U, X] with the condition of X, at most 1e4, times rounding, 2e-16, times a small constant.
    np.testing.assert_allclose(np.concatenate([u, block], axis=-1) @ mix, q, atol=1e-10)
    size = np.abs(r).max(axis=-2, keepdims=True)
    np.testing.assert_allclose(np.concatenate([basis_part, x_part], axis=-1) / size, r / size, atol=1e-10)


def test_gram_qr_is_householder_qr() -> None:
    x = random(2, 7, 3) * np.geomspace(1, 1e-6, 3)
    for a, b in zip(gram_q(jnp.asarray(x)), map_matrices(linalg.orthonormalize, jnp.asarray(x)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)  # well conditioned but for the scale of the columns


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5), (1, 4), (4, 1), (2, 5, 3), (2, 1, 3, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_svd_returns_q_and_not_its_transpose(shape: tuple[int, ...], dtype: Any) -> None:
    x = random(*shape, dtype=dtype)
    p, sigma, q = map_matrices(linalg.svd, jnp.asarray(x))
    k = min(shape[-2:])
    assert p.shape == (*shape[:-1], k) and sigma.shape == (*shape[:-2], k)
    assert q.shape == (*shape[:-2], shape[-1], k)
    assert p.dtype == sigma.dtype == q.dtype == dtype
    atol = 50 * float(jnp.finfo(dtype).eps)  # Backward error of an SVD of this size: a multiple of u |x|, |x| < 5.
    np.testing.assert_allclose((np.asarray(p) * np.asarray(sigma)[..., None, :]) @ T(q), x, atol=atol)
    # Columns of q are right singular vectors: x^T p = q sigma.
    np.testing.assert_allclose(T(x) @ p, np.asarray(q) * np.asarray(sigma)[..., None, :], atol=atol)
    assert np.all(np.diff(sigma, axis=-1) <= 0) and np.all(np.asarray(sigma) >= 0)


@pytest.mark.parametrize("x", [np.zeros((3, 4)), np.eye(3), np.diag([2.0, 2.0, 0.0]), np.ones((4, 3))])
def test_svd_of_deficient_and_repeated(x: np.ndarray) -> None:
    p, sigma, q = (np.asarray(y) for y in linalg.svd(jnp.asarray(x)))
    for y in (p, q):
        np.testing.assert_allclose(y.T @ y, np.eye(3), atol=1e-14)  # Orthonormal to a multiple of 1.1e-16.
    np.testing.assert_allclose((p * sigma) @ q.T, x, atol=1e-14)


@pytest.mark.parametrize("k", [1, 2, 8, 64])
@pytest.mark.parametrize("name", ["equal", "graded", "half zero", "zero", "two clusters", "tiny", "huge", "padded"])
def test_the_svd_of_accelerators_is_that_of_lapack(name: str, k: int) -> None:
    half = k - k // 2
    spectra = {
        "equal": np.ones(k),
        "graded": np.logspace(0, -12, k),
        "half zero": np.r_[np.ones(half), np.zeros(k // 2)],
        "zero": np.zeros(k),
        "two clusters": np.r_[np.ones(half), 1e-5 * np.ones(k // 2)],
        "tiny": np.full(k, 1e-30),
        "huge": np.full(k, 1e30),
        "padded": np.r_[np.geomspace(1, 0.1, half), np.zeros(k // 2)],
    }
    left, right = (np.linalg.qr(random(k, k, seed=seed))[0] for seed in (0, 1))
    if name == "padded":  # rows and columns of zeros
        left = right = np.eye(k)
    x = ((left * spectra[name]) @ right.T).astype(np.float32)
    p, sigma, qt = (np.asarray(y, np.float64) for y in jax.jit(linalg.svd_by_eigh)(x))
    expected = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    top = max(expected[0], np.finfo(np.float32).tiny)
    # The backward error of an eigenvalue solver of size 2k, relative to the largest singular value.
    atol = (4 + 2 * k) * float(np.finfo(np.float32).eps)
    for y in (p, qt.T):
        np.testing.assert_allclose(y.T @ y, np.eye(k), atol=atol)
    np.testing.assert_allclose((p * sigma) @ qt / top, x / top, atol=atol)
    np.testing.assert_allclose(sigma / top, expected / top, atol=atol)
    assert np.all(np.diff(sigma) <= 0)


# --- Newton-Schulz -----------------------------------------------------------------------------------------------


def with_spectrum(sigma: np.ndarray, m: int, n: int, dtype: Any = np.float32) -> np.ndarray:
    """An m x n matrix of Frobenius norm 1 whose singular values are proportional to sigma."""
    U, V = np.linalg.qr(random(m, sigma.size))[0], np.linalg.qr(random(n, sigma.size, seed=1))[0]
    return ((U * (sigma / np.linalg.norm(sigma))) @ V.T).astype(dtype)


@pytest.mark.parametrize(("m", "n"), [(12, 12), (20, 12), (12, 20)])
@pytest.mark.parametrize("least", [0.02, *(pytest.param(x, marks=pytest.mark.slow) for x in (1.0, 0.1))])
def test_newton_schulz_band(m: int, n: int, least: float) -> None:
    x = with_spectrum(np.geomspace(1, least, 12), m, n)
    y = np.asarray(linalg.newton_schulz(jnp.asarray(x), 5))
    sigma = np.linalg.svd(y, compute_uv=False)
    # The docstring: between about 0.7 and 1.2. The scalar map applied five times has its extrema on [0.005, 1] at
    # 0.68 and 1.13.
    assert np.all(sigma > 0.67) and np.all(sigma < 1.2)
    # The singular vectors are those of x: U^T y V is diagonal up to the rounding of fifteen float32 products.
    U, _, Vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    polar = U @ Vt
    assert np.linalg.norm(y - polar, 2) < 0.33 + 1e-3


def test_newton_schulz_leaves_small_singular_values_small() -> None:
    # a^5 = 3.4445^5 = 485: a singular value of 1e-5 of the norm grows at most to 5e-3.
    x = with_spectrum(np.array([1.0, 1.0, 1e-5]), 8, 6, np.float64)
    sigma = np.linalg.svd(np.asarray(linalg.newton_schulz(jnp.asarray(x), 5)), compute_uv=False)
    assert np.all(sigma[:2] > 0.67) and 1e-3 < sigma[2] < 5e-3 and np.all(sigma[3:] < 1e-12)


@pytest.mark.slow
def test_newton_schulz_of_zero_batch_and_transpose() -> None:
    x = np.stack([random(3, 5), np.zeros((3, 5)), 7 * random(3, 5, seed=2)])
    y = np.asarray(map_matrices(linalg.newton_schulz, jnp.asarray(x), steps=5))
    assert y.shape == x.shape
    np.testing.assert_array_equal(y[1], 0)
    for i in (0, 2):
        # Rounding of float64, in a batch and alone, and of the transpose, which runs through the other Gram matrix.
        np.testing.assert_allclose(linalg.newton_schulz(jnp.asarray(x[i]), 5), y[i], atol=1e-13)
        np.testing.assert_allclose(linalg.newton_schulz(jnp.asarray(x[i].T), 5).T, y[i], atol=1e-13)


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-10, 1e10, 1e18, 1e20, 1e30])
def test_newton_schulz_does_not_depend_on_the_scale(scale: float) -> None:
    x = random(4, 6, dtype=np.float32)
    y = linalg.newton_schulz(jnp.asarray(x * np.float32(scale)), 5)
    # Rounding of the scaled input, 6e-8, grown at most by the slopes of the map, 3.4445^5 = 485.
    np.testing.assert_allclose(y, linalg.newton_schulz(jnp.asarray(x), 5), atol=485 * 2e-7)


# --- small things ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["bfloat16"], "float32"),
        (["float16"], "float32"),
        (["bfloat16", "float16"], "float32"),
        (["float32"], "float32"),
        (["float32", "bfloat16"], "float32"),
        (["float64"], "float64"),
        (["bfloat16", "float64"], "float64"),
    ],
)
def test_working_dtype(dtypes: list[str], expected: str) -> None:
    assert linalg.working_dtype(*(jnp.zeros((2, 2), d) for d in dtypes)) == expected
    assert linalg.working_dtype(*(jax.ShapeDtypeStruct((2, 2), jnp.dtype(d)) for d in dtypes)) == expected


def test_working_dtype_without_x64() -> None:
    with jax.enable_x64(False):
        assert linalg.working_dtype(jnp.zeros(2, jnp.bfloat16)) == jnp.float32


@pytest.mark.parametrize("rank", [0, 1, 3, 7])
def test_masks_of_a_rank(rank: int) -> None:
    expected = np.arange(3) < rank
    for mask in (linalg.rank_mask(rank, 3), jax.jit(linalg.rank_mask, static_argnums=1)(jnp.int32(rank), 3)):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)
    x = jnp.asarray(random(4, 3))
    np.testing.assert_array_equal(linalg.first_columns(x, rank), np.where(expected, x, 0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_diagonal(dtype: Any) -> None:
    sigma = jnp.asarray(random(4), dtype)
    d = linalg.diagonal(sigma)
    assert d.shape == (4, 4) and d.dtype == dtype
    np.testing.assert_array_equal(linalg.diag_part(d), sigma)
    np.testing.assert_array_equal(jnp.diagonal(d), sigma)
    assert int(jnp.sum(d != 0)) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_all_finite(bad: float, dtype: Any) -> None:
    big = jnp.full((40, 70), jnp.finfo(dtype).max, dtype)
    good = {"big": -big, "count": jnp.arange(3), "none": jnp.zeros((0, 4), dtype), "scalar": 1.5}
    assert bool(linalg.all_finite(good)) and bool(linalg.all_finite({}))
    assert not bool(linalg.all_finite({**good, "bad": big.at[13, 69].set(bad)}))


# --- signs of singular pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("toward", ["nothing", "no columns", "some columns", "orthogonal columns"])
def test_signs_of_singular_pairs_do_not_depend_on_lapack(toward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever signs a decomposition returns: along the columns given, else the largest entry is positive."""
    x = jnp.asarray(random(6, 5))
    columns = {
        "nothing": None,
        "no columns": jnp.zeros((6, 0)),
        "some columns": jnp.asarray(random(6, 3, seed=1)),
        "orthogonal columns": jnp.zeros((6, 2)),
    }[toward]
    p, sigma, q = linalg.svd(x, columns)
    lapack = linalg._svd

    def flipped(x: Any) -> Any:
        u, s, vt = lapack(x)
        sign = jnp.asarray([-1.0, 1.0, -1.0, -1.0, 1.0])
        return u * sign[None], s, vt * sign[:, None]

    monkeypatch.setattr(linalg, "_svd", flipped)
    for a, b in zip(linalg.svd(x, columns), (p, sigma, q), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose((p * sigma[None]) @ q.T, x, atol=1e-13)
    along = np.zeros(5)
    if toward == "some columns":
        along[:3] = np.sum(np.asarray(p)[:, :3] * np.asarray(columns), axis=0)
    first = np.argmax(np.abs(p) >= 0.99 * np.max(np.abs(p), axis=0), axis=0)
    largest = np.take_along_axis(np.asarray(p), first[None], axis=0)[0]
    assert np.all(np.where(along == 0, largest, along) > 0)


def test_the_first_of_equal_entries_is_positive() -> None:
    p, _, _ = linalg.svd(jnp.asarray([[-1.0, 1.0], [1.0, 1.0]]))
    assert np.all(np.asarray(p)[0] > 0)


# --- branches without copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [False, True])
def test_cond_without_copy(when: bool) -> None:
    x = {"a": jnp.arange(3.0), "b": jnp.ones((), jnp.int32)}
    double = lambda x: jax.tree.map(lambda y: 2 * y, x)  # noqa: E731
    result = jax.jit(lambda when, x: linalg.cond_without_copy(when, double, x))(when, x)
    jax.tree.map(lambda y, z: np.testing.assert_array_equal((1 + when) * y, z), x, result)


def test_cond_without_copy_in_a_batch_applies_to_the_members_that_ask() -> None:
    when, x = jnp.array([True, False, True]), jnp.arange(3.0)
    result = jax.vmap(lambda w, x: linalg.cond_without_copy(w, lambda y: 10 * y, x))(when, x)
    np.testing.assert_array_equal(result, [0, 1, 20])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_svd_of_what_is_not_finite_ends_and_says_so(bad: float) -> None:
    """LAPACK's iteration is not known to end on infinities: a step with one has hung for minutes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 6, 6)).astype(np.float32)
    x[1, 2, 3] = bad
    p, sigma, q = (np.asarray(y) for y in map_matrices(linalg.svd, jnp.asarray(x)))
    assert np.all(np.isnan(sigma[1])) and np.all(np.isfinite(sigma[[0, 2]]))
    np.testing.assert_allclose(p[0] * sigma[0] @ q[0].T, x[0], atol=1e-5)
