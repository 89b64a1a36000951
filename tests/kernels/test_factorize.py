"""From dense kernels to factors and back: `factorize`, `densify`, `lowrank_init`, `orthonormalize`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.one_kernel import kernel
from tests.trees import EXACT, orthonormal

slow = pytest.mark.slow


# --- factorize, densify, initialisers -------------------------------------------------


@slow
def test_factorize_is_the_best_approximation_and_densify_its_inverse():
    W = jax.random.normal(jax.random.key(0), (6, 5), jnp.float64)
    P, sigma, Qt = np.linalg.svd(W)
    for rank, width in ((1, 1), (3, 3), (2, 4), (5, 5), (2, 50)):
        got = lro.factorize({"kernel": W}, rank, max_rank=width)["kernel"]
        assert got.width == min(width, 5) and int(lro.ranks(got)[""]) == rank
        np.testing.assert_allclose(got.to_dense(), (P[:, :rank] * sigma[:rank]) @ Qt[:rank], **EXACT)
        orthonormal(got)
    small = lro.factorize(W.astype(jnp.bfloat16), 2, scale=0.25, where=lambda path, shape: True)
    whole = lro.factorize(W.astype(jnp.bfloat16), 2, where=lambda path, shape: True)
    assert small.S.dtype == jnp.bfloat16
    np.testing.assert_array_equal(small.S, whole.S / 4)  # a power of two is exact
    full = {"a": {"kernel": W, "bias": jnp.ones(5)}, "b": [W]}
    np.testing.assert_allclose(lro.densify(lro.factorize(full, 5))["a"]["kernel"], W, **EXACT)
    again = lro.factorize(lro.factorize(full, 2), 4)
    assert again["a"]["kernel"].width == 2 and again["b"][0] is W and again["a"]["bias"] is full["a"]["bias"]


def test_factorize_chooses_ranks_and_leaves():
    params = {
        "x": {"kernel": jnp.ones((12, 10)), "scale": jnp.ones(10)},
        "y": {"kernel": jnp.ones((4, 4))},
        "z": jnp.ones((8, 8)),
    }
    half = lro.factorize(params, 0.5)
    assert half["x"]["kernel"].width == 5 and half["y"]["kernel"].width == 4 and half["z"].shape == (8, 8)
    # The default leaves kernels dense that are smaller than the rank.
    assert lro.factorize(params, 5)["y"]["kernel"].shape == (4, 4)
    assert not lro.is_lowrank(lro.factorize(params, 5)["y"]["kernel"])
    ranked = lro.factorize(
        params, lambda path, shape: {"x/kernel": 2, "y/kernel": 1.0}[path], max_rank=lambda path, shape: 4
    )
    assert ranked["x"]["kernel"].U.shape == (12, 4) and ranked["y"]["kernel"].width == 4
    chosen = lro.factorize(params, 2, where=lambda path, shape: path == "z")
    assert [lro.is_lowrank(chosen[k]) for k in "z"] == [True] and chosen["x"] is not None
    assert not lro.is_lowrank(chosen["x"]["kernel"])
    shapes = jax.eval_shape(lambda p: lro.factorize(p, 2), params)
    assert shapes["x"]["kernel"].U.shape == (12, 2)


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((6, 5), lro.Axes()),
        ((3, 6, 5), lro.Axes(1, 1)),
        pytest.param((4, 2, 5), lro.Axes(0, 2), marks=slow),
        pytest.param((2, 2, 3, 4, 6), lro.Axes(2, 2), marks=slow),
    ],
)
def test_factorize_splits_axes(shape, axes):
    W = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    got = lro.factorize({"w": W}, 2, where=lambda path, shape: axes)["w"]
    assert got.shape == shape and got.batch_shape == shape[: axes.batch]
    assert got.in_shape == shape[axes.batch : axes.batch + axes.inputs]
    batch, m = shape[: axes.batch], int(np.prod(got.in_shape))
    P, sigma, Qt = np.linalg.svd(W.reshape(*batch, m, -1), full_matrices=False)
    best = (P[..., :2] * sigma[..., None, :2]) @ Qt[..., :2, :]
    np.testing.assert_allclose(got.to_dense(), best.reshape(shape), **EXACT)
    x = jax.random.normal(jax.random.key(1), (*batch, 7, *got.in_shape), jnp.float64)
    dense = x.reshape(*batch, 7, m) @ best
    np.testing.assert_allclose(x @ got, dense.reshape(*batch, 7, *got.out_shape), **EXACT)


@slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowrank_init_has_the_norm_of_the_dense_draw(dtype):
    base = jax.nn.initializers.he_normal()
    init = lro.lowrank_init(4, base, max_rank=8)
    W = init(jax.random.key(0), (48, 32), dtype)
    assert W.dtype == dtype and W.width == 8 and int(lro.ranks(W)[""]) == 4
    # |W|_F^2 of he_normal is m n (2 / m) = 64 on average, with relative deviation sqrt(2 / (m n)) = 0.036, about half
    # of it in the norm: four deviations are 0.08.
    norm = float(jnp.sqrt(jnp.sum(jnp.square(jnp.diagonal(W.S.astype(jnp.float32))))))
    assert abs(norm / 8 - 1) < 0.08
    # Each entry is rounded by the QR, by a product over eight columns, and when it is cast: ten eps in all.
    gram = W.U.astype(jnp.float32).T @ W.U.astype(jnp.float32)
    np.testing.assert_allclose(gram, np.eye(8), atol=10 * float(jnp.finfo(dtype).eps))


@slow
def test_lowrank_init_draws_are_isotropic_and_differ_by_key():
    init = lro.lowrank_init(2)
    draws = jax.vmap(lambda key: init(key, (4, 3), jnp.float64).to_dense())(jax.random.split(jax.random.key(0), 500))
    # LeCun normal has variance 1 / 4 an entry; the mean over 500 draws of 12 entries has deviation
    # about sqrt(2 / 6000) = 2 %, entries of one draw being correlated somewhat more: 10 % is beyond four.
    np.testing.assert_allclose(jnp.mean(draws**2), 0.25, rtol=0.1)
    # The mean of an entry has deviation 0.5 / sqrt(500) = 0.022; twelve of them stay within four and a half.
    np.testing.assert_allclose(jnp.mean(draws, axis=0), np.zeros((4, 3)), atol=0.1)
    assert not np.allclose(draws[0], draws[1])


NOTHING = r"no kernel to factor.*`where` chose none\. .*\('kernel', \(4, 3\)\)"


@pytest.mark.parametrize("size", [{"rank": 2}, {"budget": 0.9}])
def test_a_where_that_chooses_nothing_is_refused(size: dict[str, Any]) -> None:
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    with pytest.raises(ValueError, match=NOTHING):
        lro.factorize(params, **size, where=lambda path, shape: False)
    with pytest.raises(ValueError, match="no kernel to factor"):
        lro.factorize({"table": params["kernel"]}, **size)


def test_a_where_that_leaves_kernels_for_which_the_rank_is_too_large_says_so() -> None:
    optional = lro.linen.kernels(nn.Dense(3), jnp.ones((2, 4)))
    params = {"kernel": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match="at rank 4: the rank fits no kernel that `where` chose"):
        lro.factorize(params, 4, where=lambda path, shape: optional(path, shape))


@pytest.mark.parametrize("tree", [{}, {"bias": jnp.ones(3)}, {"kernel": kernel(), "other": jnp.ones((4, 3))}])
def test_a_where_may_choose_nothing_of_a_tree_without_matrices_or_with_factored_ones(tree: Any) -> None:
    same = lro.factorize(tree, 2, where=lambda path, shape: False)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, same, tree))


def test_orthonormalize_keeps_the_kernel():
    W = lro.LowRank(
        *(jax.random.normal(jax.random.key(i), s, jnp.float64) for i, s in enumerate([(6, 2), (2, 2), (5, 2)]))
    )
    fixed = lro.orthonormalize({"kernel": W, "bias": jnp.ones(3)})["kernel"]
    np.testing.assert_allclose(fixed.to_dense(), W.to_dense(), **EXACT)
    orthonormal(fixed)
    lro.lowrank_adam(0.1).init(fixed)


# --- orthonormality --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("error", [0.15, 0.5])
def test_factors_that_are_far_from_orthonormal_are_refused_in_every_dtype(dtype: Any, error: float) -> None:
    W = kernel().astype(dtype)
    bad = lro.LowRank(W.U.at[:, 0].multiply((1 + error) ** 0.5), W.S, W.V)
    with pytest.raises(ValueError, match="not orthonormal"):
        lro.lowrank_adam(0.1).init({"kernel": bad})
    lro.lowrank_adam(0.1).init({"kernel": W})


def test_the_check_of_orthonormality_fetches_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {str(i): {"kernel": kernel(seed=i)} for i in range(5)}
    fetched: list[Any] = []
    array = type(jnp.ones(1))
    convert, number = array.__array__, array.__float__
    monkeypatch.setattr(array, "__array__", lambda x, *a, **k: fetched.append(x) or convert(x, *a, **k))
    monkeypatch.setattr(array, "__float__", lambda x: fetched.append(x) or number(x))
    lro.lowrank_adam(0.1).init(params)
    assert [x.shape for x in fetched] == [()]


@pytest.mark.slow
def test_orthonormalize_makes_noise_an_exact_zero() -> None:
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((9, 2)), rng.standard_normal((7, 2))
    # Five columns of rank 2: the other singular values are rounding.
    W = lro.LowRank(
        jnp.asarray(A @ rng.standard_normal((2, 5))), jnp.eye(5), jnp.asarray(B @ rng.standard_normal((2, 5)))
    )
    fixed = lro.orthonormalize(W)
    assert int(lro.ranks(fixed)[""]) == 2 and not np.any(np.diagonal(fixed.S)[2:])
    np.testing.assert_allclose(fixed.to_dense(), W.to_dense(), atol=1e-12)
