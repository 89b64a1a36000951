"""Grids of blocks: products, approximation, sizes, and every function of trees, against NumPy on dense blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro

# shape, axes, grid: square, uneven on both sides, several inputs and outputs, stacked, one row of blocks
FORMS = {
    "square": ((8, 12), lro.Axes(0, 1), (4, 3)),
    "uneven": ((7, 10), lro.Axes(0, 1), (3, 4)),
    "axes": ((2, 6, 3, 4), lro.Axes(0, 2), (3, 2)),
    "batch": ((3, 6, 2, 5), lro.Axes(1, 1), (2, 3)),
    "one row": ((6, 9), lro.Axes(0, 1), (1, 3)),
}


def dense_kernel(name: str) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(FORMS[name][0])


def factored(name: str, rank: int = 4, **options: Any) -> Any:
    _, axes, grid = FORMS[name]
    return lro.factorize({"w": jnp.asarray(dense_kernel(name))}, rank, blocks=grid, where=lambda p, s: axes, **options)[
        "w"
    ]


def blocks_of(name: str, dense: np.ndarray) -> list[tuple[Any, np.ndarray]]:
    """The index and the value of every block as a matrix, by NumPy's own slices of the last axes."""
    shape, axes, (b, c) = FORMS[name]
    i = axes.batch + axes.inputs - 1
    p, q = -(-shape[i] // b), -(-shape[-1] // c)
    found = []
    for batch in np.ndindex(shape[: axes.batch]):
        for row in range(b):
            for column in range(c):
                index = [slice(k, k + 1) for k in batch] + [slice(None)] * (len(shape) - axes.batch)
                index[i], index[-1] = slice(row * p, row * p + p), slice(column * q, column * q + q)
                block = dense[tuple(index)]
                m = int(np.prod(block.shape[axes.batch : axes.batch + axes.inputs]))
                found.append((tuple(index), block.reshape(m, -1)))
    return found


@pytest.mark.parametrize("name", FORMS)
def test_every_block_is_its_best_approximation(name: str) -> None:
    dense, W = dense_kernel(name), factored(name)
    assert isinstance(W, lro.BlockLowRank) and W.shape == dense.shape and W.grid == FORMS[name][2]
    got = np.asarray(W.to_dense())
    for index, block in blocks_of(name, dense):
        u, sigma, vt = np.linalg.svd(block, full_matrices=False)
        best = (u[:, : W.width] * sigma[: W.width]) @ vt[: W.width]
        np.testing.assert_allclose(got[index].reshape(block.shape), best, atol=1e-12)


@pytest.mark.parametrize("rows", [(), (40,)], ids=["one", "many"])
@pytest.mark.parametrize("name", FORMS)
def test_products_and_derivatives_are_those_of_the_dense_kernel(name: str, rows: tuple[int, ...]) -> None:
    _, axes, _ = FORMS[name]
    W = factored(name)
    rng, letters = np.random.default_rng(1), "abcdefg"
    x = jnp.asarray(rng.standard_normal((*W.batch_shape, *rows, *W.in_shape)))
    k, i, o = axes.batch, axes.inputs, W.ndim - axes.batch - axes.inputs
    batch, ins, outs = letters[:k], letters[k : k + i], letters[k + i : k + i + o]
    equation = f"{batch}{'r' * len(rows)}{ins},{batch}{ins}{outs}->{batch}{'r' * len(rows)}{outs}"
    y, pull = jax.vjp(lambda x, W: x @ W, x, W)
    want, pull_dense = jax.vjp(lambda x, W: jnp.einsum(equation, x, W.to_dense()), x, W)
    np.testing.assert_allclose(y, want, atol=1e-12)
    cotangent = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    for got, expected in zip(*(jax.tree.leaves(f(cotangent)) for f in (pull, pull_dense)), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-11)


def test_many_small_blocks_are_multiplied_through_the_dense_kernel_and_few_rows_are_not() -> None:
    W = lro.factorize({"kernel": jnp.eye(64)}, 8, blocks=32)["kernel"]
    sizes = {
        rows: {v.aval.size for e in jax.make_jaxpr(lambda x: x @ W)(jnp.ones((rows, 64))).eqns for v in e.outvars}
        for rows in (1, 512)
    }
    between = 32 * 32  # entries a row between the stages
    assert 512 * between not in sizes[512] and between in sizes[1]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((512, 64)))
    np.testing.assert_allclose(x @ W, np.concatenate([x[i : i + 1] @ W for i in range(512)]), atol=1e-12)


def test_an_identity_has_full_rank_in_as_many_parameters_as_rank_r() -> None:
    d, r = 32, 4
    W = lro.factorize({"kernel": jnp.eye(d)}, r, blocks="auto")["kernel"]
    assert W.grid == (8, 8) and W.width == 1
    permutation = np.eye(d)[np.arange(d).reshape(8, 4).T.ravel()]  # one entry in every block
    assert (
        np.linalg.matrix_rank(lro.factorize({"kernel": jnp.asarray(permutation)}, r, blocks=8)["kernel"].to_dense())
        == d
    )


@pytest.mark.parametrize(
    ("shape", "rank", "blocks", "grid", "width"),
    [
        ((64, 64), 8, 4, (4, 4), 2),
        ((64, 64), 8, 8, (8, 8), 1),
        ((64, 64), 8, 16, (16, 16), 1),  # at least 1
        ((64, 256), 8, (4, 8), (4, 8), 2),  # s (8 * 64 + 4 * 256) is closest to 8 * 320 for s = 2
        ((64, 6), 4, 8, (8, 6), 1),  # six outputs make six columns
        ((64, 64), 8, "auto", (8, 8), 1),
        ((64, 64), 6, "rank", (6, 6), 1),
        ((10, 12), 4, 4, (4, 4), 1),  # 10 inputs in parts of 3, 3, 3 and 1
        ((9, 9), 3, 4, (3, 3), 1),  # parts of 3 leave no fourth
    ],
)
def test_grid_and_width_keep_the_number_of_parameters(
    shape: Any, rank: int, blocks: Any, grid: Any, width: int
) -> None:
    W = lro.factorize({"kernel": jnp.ones(shape)}, rank, blocks=blocks)["kernel"]
    assert (W.grid, W.width) == (grid, width)
    (m, n), (b, c) = shape, grid
    assert W.size == width * (c * m + b * n) + b * c * width**2


@pytest.mark.parametrize("blocks", [0, -1, 2.0, "half", (2, 0), (1, 2, 3), True])
def test_bad_grids_are_refused(blocks: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"block|grid"):
        lro.factorize({"kernel": jnp.eye(8)}, 2, blocks=blocks)


@pytest.mark.parametrize("budget", [0.5, 0.7])
@pytest.mark.parametrize("blocks", [4, (8, 2), "auto", "rank", lambda path, shape: 8 if "up" in path else None])
def test_a_budget_is_never_exceeded(blocks: Any, budget: float) -> None:
    shapes = {"embedding": (40, 48), "up/kernel": (48, 144), "down/kernel": (144, 48), "conv/kernel": (3, 3, 20, 50)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    dense = sum(x.size for x in params.values())
    out = jax.eval_shape(lambda p: lro.factorize(p, budget=budget, blocks=blocks), params)
    after = sum(x.size for x in jax.tree.leaves(out))
    # A kernel in 4 x 4 blocks has few sizes, one for each rank of its blocks.
    assert (0.75 if isinstance(blocks, int | tuple) else 0.95) * budget * dense <= after <= budget * dense
    assert isinstance(out["up/kernel"], lro.BlockLowRank)


def test_one_block_and_none_are_the_plain_form() -> None:
    def blocks(path: str, shape: Any) -> Any:
        return 2 if path.startswith("grid") else None

    params = {name: {"kernel": jnp.eye(8)} for name in ("grid", "plain")}
    out = lro.factorize(params, 2, blocks=blocks)
    assert isinstance(out["grid"]["kernel"], lro.BlockLowRank) and isinstance(out["plain"]["kernel"], lro.LowRank)
    assert isinstance(lro.factorize({"kernel": jnp.eye(8)}, 2, blocks=1)["kernel"], lro.LowRank)


def test_functions_of_trees_know_grids() -> None:
    W = factored("batch")
    params = {"block": {"kernel": W, "bias": jnp.zeros(5)}}
    np.testing.assert_allclose(lro.densify(params)["block"]["kernel"], W.to_dense())
    assert lro.ranks(params)["block/kernel"].shape == (3, 2, 3)
    table = lro.summary(params)
    assert table.after == sum(x.size for x in jax.tree.leaves(params)) and "2 x 3 of" in str(table)
    again = lro.orthonormalize({"kernel": lro.BlockLowRank(2 * W.U, W.S, W.V)})["kernel"]
    np.testing.assert_allclose(again.to_dense(), 2 * W.to_dense(), atol=1e-12)
    mean = lro.incremental_update(params, jax.tree.map(lambda x: x, params), 0.5)["block"]["kernel"]
    np.testing.assert_allclose(mean.to_dense(), W.to_dense(), atol=1e-12)
    np.testing.assert_allclose(W[1].to_dense(), W.to_dense()[1])
    np.testing.assert_allclose(W.T.to_dense(), np.moveaxis(W.to_dense(), 1, -1))
    assert len(list(W)) == 3 and (W + W).S.shape == W.S.shape
    with pytest.raises(TypeError):
        W + lro.LowRank(W.U, W.S, W.V)


def test_wider_and_narrower_blocks_keep_the_kernel() -> None:
    W = factored("square")
    wide, _ = lro.resize({"kernel": W}, None, 2)
    assert wide["kernel"].width == 2
    np.testing.assert_allclose(wide["kernel"].to_dense(), W.to_dense(), atol=1e-12)
    back, _ = lro.resize(wide)
    assert back["kernel"].width == W.width


@pytest.mark.parametrize("name", FORMS)
def test_draws_have_the_norm_of_the_dense_draw_in_every_block(name: str) -> None:
    shape, axes, grid = FORMS[name]
    base = jax.nn.initializers.normal(0.3)
    W = lro.lowrank_init(3, base, axes=axes, blocks=grid)(jax.random.key(0), shape, jnp.float64)
    assert W.shape == shape and W.grid == grid
    dense = np.asarray(base(jax.random.split(jax.random.key(0), 3)[0], shape, jnp.float64))
    for index, block in blocks_of(name, dense):
        np.testing.assert_allclose(np.linalg.norm(W.to_dense()[index]), np.linalg.norm(block), rtol=1e-6)


def test_symbolic_batches_and_bfloat16() -> None:
    W = factored("square").astype(jnp.bfloat16)
    assert (jnp.ones((3, 8), jnp.bfloat16) @ W).dtype == W.to_dense().dtype == jnp.bfloat16
    (n,) = jax.export.symbolic_shape("n")
    exported = jax.export.export(jax.jit(lambda x: x @ factored("square")))(jax.ShapeDtypeStruct((n, 8), jnp.float64))
    np.testing.assert_allclose(exported.call(jnp.ones((5, 8))), jnp.ones((5, 8)) @ factored("square"), atol=1e-12)


def test_an_adapter_file_has_no_place_for_a_grid(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="densify"):
        lro.export_lora(tmp_path, {"kernel": factored("square")})
