"""Training on grids of blocks: every block as a kernel of its own, Muon by stage, gauges, ranks, refusals."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests import problems

M, N, GRID, S = 8, 6, (2, 3), 2
TARGET = np.random.default_rng(5).standard_normal((M, N))


def grid_kernel(s: int = S, seed: int = 0) -> lro.BlockLowRank:
    dense = np.random.default_rng(seed).standard_normal((M, N))
    b, c = GRID
    rank = s * (c * M + b * N) // (M + N)
    W = lro.factorize({"kernel": jnp.asarray(dense)}, rank, blocks=GRID)["kernel"]
    assert W.grid == GRID and W.width == s
    return W


def blocks_of(x: Any) -> dict[str, Any]:
    """The blocks of a dense matrix, by NumPy's slices."""
    p, q = M // GRID[0], N // GRID[1]
    return {f"{i}{j}": x[i * p : i * p + p, j * q : j * q + q] for i in range(GRID[0]) for j in range(GRID[1])}


def loss(params: Any) -> jax.Array:
    return jnp.sum((params["kernel"].to_dense() - TARGET) ** 2) / 2


def loss_of_blocks(params: Any) -> jax.Array:
    return sum(jnp.sum((params[k].to_dense() - t) ** 2) / 2 for k, t in blocks_of(TARGET).items())


def run(tx: Any, params: Any, loss: Any, steps: int) -> tuple[Any, Any]:
    @jax.jit
    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]


TRANSFORMATIONS = {
    "balanced adam": lro.lowrank_adam(0.05),
    "balanced heavy ball": lro.lowrank_heavy_ball(0.02, geometry=lro.Balanced()),
    "tangent heavy ball": lro.lowrank_heavy_ball(0.02),
    "tangent adam, ranks": lro.lowrank_adam(0.02, geometry=lro.Tangent(rank=lro.tolerance(0.05))),
}


@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_grid_moves_like_its_blocks_one_by_one(name: str, s: int) -> None:
    tx, W = TRANSFORMATIONS[name], grid_kernel(s)
    separate = lro.factorize(blocks_of(W.to_dense()), s, where=lambda path, shape: True)
    grid, state = run(tx, {"kernel": W}, loss, 20)
    blocks, states = run(tx, separate, loss_of_blocks, 20)
    assert float(loss(grid)) < 0.9 * float(loss({"kernel": W}))
    for key, got in blocks_of(grid["kernel"].to_dense()).items():
        np.testing.assert_allclose(got, blocks[key].to_dense(), atol=1e-9)
    found, each = lro.diagnostics(state).kernels["kernel"], lro.diagnostics(states).kernels
    ranks = np.asarray([each[key].rank for key in blocks_of(TARGET)]).reshape(GRID)
    np.testing.assert_array_equal(found.rank, ranks)


@pytest.mark.parametrize("s", [1, 2])
def test_muon_orthogonalises_rows_and_columns_of_blocks(s: int) -> None:
    """One step from zero momentum, against stages that NumPy cuts out of the dense gradient."""
    h, W = 0.01, grid_kernel(s)
    tx = lro.lowrank_muon(h, ns_steps=5)
    params, _ = run(tx, {"kernel": W}, loss, 1)
    G = np.asarray(W.to_dense()) - TARGET
    gradients, dense = blocks_of(G), blocks_of(np.asarray(W.to_dense()))

    def factors(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, sigma, vt = np.linalg.svd(block, full_matrices=False)
        root = np.sqrt(sigma[:s])
        return u[:, :s] * root, vt[:s].T * root

    A, B = ({key: factors(block)[k] for key, block in dense.items()} for k in (0, 1))
    gA = {key: gradients[key] @ B[key] for key in dense}
    gB = {key: gradients[key].T @ A[key] for key in dense}

    def polar(x: np.ndarray) -> np.ndarray:
        """Five steps of the quintic iteration of Muon, written for the singular values."""
        u, sigma, vt = np.linalg.svd(x, full_matrices=False)
        sigma = sigma / np.linalg.norm(sigma)
        for _ in range(5):
            sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
        return (u * sigma) @ vt

    step = h * np.sqrt(max(1, N / M))
    b, c = GRID
    for i in range(b):
        row = polar(np.concatenate([gA[f"{i}{j}"] for j in range(c)], axis=1))
        A |= {f"{i}{j}": A[f"{i}{j}"] - step * row[:, j * s : j * s + s] for j in range(c)}
    for j in range(c):
        column = polar(np.concatenate([gB[f"{i}{j}"] for i in range(b)], axis=1))
        B |= {f"{i}{j}": B[f"{i}{j}"] - step * column[:, i * s : i * s + s] for i in range(b)}
    for key, got in blocks_of(params["kernel"].to_dense()).items():
        np.testing.assert_allclose(got, A[key] @ B[key].T, atol=1e-9)


def test_the_gauge_of_blocks_changes_nothing() -> None:
    W, rng = grid_kernel(), np.random.default_rng(1)
    P, Q = (
        jnp.asarray(np.stack([problems.orthonormal(rng, S, S) for _ in range(6)]).reshape(2, 3, S, S)) for _ in "ab"
    )
    flat = W.flatten()
    turned = W.unflatten(lro.LowRank(flat.U @ P, P.mT @ flat.S @ Q, flat.V @ Q))
    np.testing.assert_allclose(turned.to_dense(), W.to_dense(), atol=1e-12)
    ends = [run(lro.lowrank_adam(0.05), {"kernel": x}, loss, 10)[0]["kernel"].to_dense() for x in (W, turned)]
    np.testing.assert_allclose(*ends, atol=1e-9)


def test_ranks_of_blocks_follow_the_target() -> None:
    """Of a target with blocks of rank 1 and 2, a tolerance keeps these ranks."""
    rng, ranks = np.random.default_rng(2), np.array([[1, 2, 1], [2, 1, 2]])
    target = np.zeros((M, N))
    for (i, j), r in np.ndenumerate(ranks):
        u, v = problems.orthonormal(rng, 4, r), problems.orthonormal(rng, 2, r)
        target[4 * i : 4 * i + 4, 2 * j : 2 * j + 2] = u @ v.T
    params = {"kernel": grid_kernel()}
    tx = lro.lowrank_heavy_ball(0.3, 0.5, geometry=lro.Tangent(rank=lro.tolerance(1e-3)))
    params, _ = run(tx, params, lambda p: jnp.sum((p["kernel"].to_dense() - target) ** 2) / 2, 150)
    np.testing.assert_allclose(params["kernel"].to_dense(), target, atol=1e-2)
    np.testing.assert_array_equal(lro.ranks(params)["kernel"], ranks)


def test_stacked_and_mixed_kernels_with_padding_train_in_one_tree() -> None:
    rng = np.random.default_rng(3)
    shapes = {"uneven": (7, 5), "plain": (6, 6), "stack": (3, 6, 4), "bias": (5,)}
    dense = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    axes = {"uneven": lro.Axes(0, 1), "plain": lro.Axes(0, 1), "stack": lro.Axes(1, 1), "bias": None}
    blocks = {"uneven": (2, 2), "stack": (3, 2)}
    params = lro.factorize(dense, 2, where=lambda p, s: axes[p], blocks=lambda p, s: blocks.get(p))
    goal = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}

    def distance(params: Any) -> jax.Array:
        pairs = zip(jax.tree.leaves(lro.densify(params)), jax.tree.leaves(goal), strict=True)
        return sum(jnp.sum((x - y) ** 2) for x, y in pairs)

    for tx in (lro.lowrank_muon(0.02), optax.MultiSteps(lro.lowrank_adamw(0.02), 1)):
        end, _ = run(tx, params, distance, 30)
        assert float(distance(end)) < float(distance(params))
        again = lro.orthonormalize(end)
        for x, y in zip(*map(jax.tree.leaves, (lro.densify(end), lro.densify(again))), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-9)


def test_a_run_goes_on_after_resize() -> None:
    tx, params = lro.lowrank_adam(0.05), {"kernel": grid_kernel(1)}
    params, state = run(tx, params, loss, 10)
    wide, wide_state = lro.resize(params, state, 2)
    back, back_state = lro.resize(wide, wide_state, 1)
    for x, y in zip(*map(jax.tree.leaves, ((params, state), (back, back_state))), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-10)


@pytest.mark.parametrize(
    ("tx", "words"),
    [
        (lro.lowrank_adam(0.1, geometry=lro.Coefficient()), "Balanced"),
        (lro.galerkin(optax.adam(0.1), 2), "grid of blocks"),
    ],
    ids=["coefficient", "galerkin"],
)
def test_what_has_no_coordinates_of_grids_is_refused_at_init(tx: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tx.init({"kernel": grid_kernel()})


def test_muon_on_tangents_of_grids_is_refused() -> None:
    tx = lro.lowrank_muon(0.1, geometry=lro.Tangent())
    params = {"kernel": grid_kernel()}
    with pytest.raises(ValueError, match="Balanced"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("m", "n", "rank", "dtype"), [(12, 9, 2, jnp.float64), (9, 7, 4, jnp.float64), (11, 9, 2, jnp.float32)]
)
@pytest.mark.parametrize("geometry", [lro.Balanced(), lro.Tangent()], ids=["balanced", "tangent"])
def test_blocks_at_the_edge_move_like_kernels_of_their_own(
    geometry: Any, m: int, n: int, rank: int, dtype: Any
) -> None:
    """Where the last blocks are smaller, nothing comes back from the rows that fill them up."""
    rng = np.random.default_rng(7)
    dense, target = (jnp.asarray(rng.standard_normal((m, n)), dtype) for _ in "ab")
    rows, columns = -(-m // 2), -(-n // 2)
    cut = {
        f"{i}{j}": np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] for i in range(2) for j in range(2)
    }
    apart = {key: lro.factorize({"kernel": dense[at]}, rank // 2) for key, at in cut.items()}
    tx, steps = lro.lowrank_adam(0.03, geometry=geometry), 6 if dtype == jnp.float64 else 12

    grid, _ = run(
        tx,
        {"kernel": lro.factorize(dense, rank, blocks=2)},
        lambda p: jnp.sum((p["kernel"].to_dense() - target) ** 2) / 2,
        steps,
    )
    apart, _ = run(
        tx,
        apart,
        lambda p: sum(jnp.sum((p[key]["kernel"].to_dense() - target[at]) ** 2) for key, at in cut.items()) / 2,
        steps,
    )
    tolerance = 1e-8 if dtype == jnp.float64 else 1e-3
    for key, at in cut.items():
        np.testing.assert_allclose(
            grid["kernel"].to_dense()[at], apart[key]["kernel"].to_dense(), atol=tolerance, rtol=0
        )
    tx.init(grid)  # which refuses bases that are not orthonormal
