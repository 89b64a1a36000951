"""The node `LowRank`: a stack of kernels, its indices, equality, and operations that it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from tests.one_kernel import RANK, M, N, kernel

KERNELS = [kernel(seed=s) for s in range(6)]
STACK = jax.tree.map(lambda *x: jnp.asarray(np.stack(x).reshape(2, 3, *x[0].shape)), *KERNELS)


def test_a_stack_is_iterated_over_its_batch() -> None:
    rows = list(STACK)
    assert len(STACK) == len(rows) == 2 and [len(row) for row in rows] == [3, 3]
    each = [W for row in STACK for W in row]
    assert [W.batch_shape for W in each] == [()] * 6
    np.testing.assert_array_equal(jnp.stack([W.to_dense() for W in each]).reshape(2, 3, M, N), STACK.to_dense())
    for lonely in (each[0],):
        with pytest.raises(TypeError, match="no length"):
            len(lonely)
        with pytest.raises(TypeError, match="no length"):
            list(lonely)


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1),
        (0, 1),
        (slice(None), 2),
        (Ellipsis, 0),
        (1, Ellipsis),
        (None, 0),
        np.array([1, 0]),
        jnp.int32(1),
    ],
)
def test_an_index_selects_along_batch_axes(index: Any) -> None:
    dense = STACK.to_dense()
    items = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [i for i in items if i is Ellipsis]:  # stands for batch axes, and not for those of the matrix
        items = tuple(slice(None) if i is Ellipsis else i for i in items)
    np.testing.assert_array_equal(STACK[index].to_dense(), dense[items])


@pytest.mark.parametrize("index", [(0, 1, 2), (0, 1, 0, 0), (slice(None), 0, slice(None)), (np.ones((2, 3), bool), 0)])
def test_an_index_that_is_too_long_is_an_error(index: Any) -> None:
    with pytest.raises(IndexError, match="indices for a LowRank kernel with batch axes"):
        STACK[index]


def test_a_mask_over_the_batch_selects() -> None:
    mask = np.array([[True, False, True], [False, True, False]])
    np.testing.assert_array_equal(STACK[mask].to_dense(), STACK.to_dense()[mask])


def test_kernels_are_equal_by_identity_and_hash() -> None:
    W, other = kernel(), kernel()
    same = W
    assert same == W and other != W
    assert len({W, other, same}) == 2 and other not in [W]


@pytest.mark.parametrize(
    "operation",
    [
        lambda W: np.asarray(W),
        lambda W: np.ones((M, N)) + W,
        lambda W: jnp.ones((M, N)) + W,
        lambda W: W - jnp.ones((M, N)),
        lambda W: W - 1.0,
        lambda W: 0.0 + W,
        lambda W: W + kernel(width=RANK + 1),
        lambda W: W - W.T,
        lambda W: W + jax.tree.map(lambda x: None, W),
        lambda W: W * W,
        lambda W: W / W,
        lambda W: W * jnp.ones(3),
        lambda W: True * W,
        lambda W: 1j * W,
        lambda W: W * "2",
        lambda W: 1 / W,
        lambda W: 2**W,
        lambda W: W**2,
        lambda W: -W,
        lambda W: abs(W),
        lambda W: float(W),
        lambda W: W @ jnp.ones((N, 2)),
    ],
)
def test_arithmetic_names_the_way_out(operation: Any) -> None:
    with pytest.raises(TypeError, match=r"to_dense\(\)"):
        operation(kernel())


SCALARS = {"int": 2, "float": 0.5, "numpy": np.float32(0.5), "array": jnp.float32(0.5), "zero axes": np.array(3.0)}
GRADIENT_ARITHMETIC = {
    "sum": (lambda g, h, c: g + h, lambda x, y, c: x + y),
    "difference": (lambda g, h, c: g - h, lambda x, y, c: x - y),
    "scalar first": (lambda g, h, c: c * g, lambda x, y, c: c * x),
    "scalar last": (lambda g, h, c: g * c, lambda x, y, c: c * x),
    "quotient": (lambda g, h, c: g / c, lambda x, y, c: x / c),
    "mean": (lambda g, h, c: sum([g, h, g]) / 3, lambda x, y, c: (x + y + x) / 3),
    "moving average": (lambda g, h, c: g + (h - g) / c, lambda x, y, c: x + (y - x) / c),
}


@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("name", GRADIENT_ARITHMETIC)
def test_gradients_of_factors_are_added_and_scaled_leaf_by_leaf(name: str, scalar: str) -> None:
    of_nodes, of_leaves = GRADIENT_ARITHMETIC[name]
    c = SCALARS[scalar]
    for g, h in ((kernel(seed=1), kernel(seed=2)), (STACK, STACK)):
        found, expected = of_nodes(g, h, c), jax.tree.map(lambda x, y: of_leaves(x, y, c), g, h)
        assert isinstance(found, lro.LowRank)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        jitted = jax.jit(of_nodes)(g, h, c)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), jitted, expected)


def test_sums_of_unequal_factors_say_their_shapes() -> None:
    with pytest.raises(TypeError, match=r"\(2, 2\).*and.*\(3, 3\).*to_dense\(\)"):
        kernel((2.0, 1.0)) + kernel()


def test_a_flattened_tree_is_no_tree_of_objects() -> None:
    """Safetensors and others fail on leaves that are no arrays, and the error ends with the advice."""
    with pytest.raises(TypeError, match=r"to_dense\(\)"):
        {name: np.array(x) for name, x in {"kernel": kernel()}.items()}
