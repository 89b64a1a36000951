"""Averages of kernels: their dtype, rank and width, and the best approximation of the mean."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.one_kernel import kernel
from tests.trees import EXACT, orthonormal, tree


def test_an_average_keeps_its_dtype_and_does_not_freeze() -> None:
    """Steps of 1e-3 are below the rounding of bfloat16 weights, but not of a float32 average."""
    weights = {"kernel": kernel().astype(jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
    average = jax.tree.map(lambda x: x.astype(jnp.float32), {"kernel": kernel(seed=5), "bias": jnp.zeros(3)})
    mean = jax.jit(
        lambda old: jax.lax.scan(lambda a, _: (lro.incremental_update(weights, a, 1e-3), None), old, length=200)[0]
    )
    end = mean(average)
    chex.assert_trees_all_equal_shapes_and_dtypes(end, average)
    np.testing.assert_allclose(end["bias"], 1 - 0.999**200, rtol=1e-3)
    moved = np.linalg.norm(end["kernel"].to_dense() - average["kernel"].to_dense())
    whole = np.linalg.norm(weights["kernel"].to_dense().astype(jnp.float32) - average["kernel"].to_dense())
    assert 0.05 * whole < moved < 0.5 * whole


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("average", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_an_average_has_the_dtype_of_the_average(dtype: Any, average: Any) -> None:
    new, old = ({"kernel": kernel().astype(d), "bias": jnp.ones(2, d)} for d in (dtype, average))
    chex.assert_trees_all_equal_shapes_and_dtypes(lro.incremental_update(new, old, 0.1), old)


@pytest.mark.parametrize(
    ("new", "old", "rank"), [((0, 0, 0), (3, 2, 1), 3), ((3, 2, 1), (0, 0, 0), 3), ((3, 2, 0), (1, 0, 0), 2)]
)
def test_an_average_has_the_rank_of_the_wider(new: Any, old: Any, rank: int) -> None:
    mean = lro.incremental_update(kernel(new, seed=1), kernel(old, seed=2), 0.25)
    dense = 0.25 * kernel(new, seed=1).to_dense() + 0.75 * kernel(old, seed=2).to_dense()
    P, sigma, Qt = np.linalg.svd(dense)
    assert int(lro.ranks(mean)[""]) == rank
    np.testing.assert_allclose(mean.to_dense(), (P[:, :rank] * sigma[:rank]) @ Qt[:rank], atol=1e-13)


def test_an_average_of_other_widths_is_as_wide_as_the_wider() -> None:
    a, b = kernel((3, 2), width=2), kernel((2, 1, 1), width=5)
    assert lro.incremental_update(a, b, 0.5).width == lro.incremental_update(b, a, 0.5).width == 5


slow = pytest.mark.slow


@slow
def test_incremental_update_averages_kernels():
    a, b = tree(seed=1), tree(seed=2)
    mean = jax.jit(lambda a, b: lro.incremental_update(a, b, 0.25))(a, b)
    np.testing.assert_allclose(mean["bias"], 0.25 * a["bias"] + 0.75 * b["bias"], **EXACT)
    dense = 0.25 * a["kernel"].to_dense() + 0.75 * b["kernel"].to_dense()
    P, sigma, Qt = np.linalg.svd(dense)
    np.testing.assert_allclose(mean["kernel"].to_dense(), (P[:, :2] * sigma[:2]) @ Qt[:2], **EXACT)
    orthonormal(mean["kernel"])
    # Equal kernels in different bases average to themselves.
    W = a["kernel"]
    flipped = lro.LowRank(-W.U, W.S, -W.V)
    again = lro.incremental_update({"kernel": flipped}, {"kernel": W}, 0.5)
    np.testing.assert_allclose(again["kernel"].to_dense(), W.to_dense(), **EXACT)


def test_python_numbers_are_averaged_too():
    """A count or a scale that somebody keeps among the parameters."""
    mean = lro.incremental_update(
        {"scale": 3.0, "offset": np.float32(2)}, {"scale": 1.0, "offset": np.float32(4)}, 0.25
    )
    assert {name: float(x) for name, x in mean.items()} == {"scale": 1.5, "offset": 3.5}
