"""A share of a model's parameters in place of a rank, and the table that shows what was factored."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lowrank_optax as lro


class Block(nn.Module):
    d: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(self.d, name="down")(nn.gelu(nn.Dense(4 * self.d, name="up")(nn.LayerNorm()(x))))


class GPT(nn.Module):
    d: int = 384
    layers: int = 6

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(8192, self.d, name="embed")(tokens)
        for i in range(self.layers):
            x = Block(self.d, 6, name=f"block_{i}")(x)
        return nn.Dense(8192, name="head")(x)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = nn.Conv(192, (16, 16), strides=16, name="patches")(image).reshape(image.shape[0], -1, 192)
        for i in range(12):
            x = Block(192, 3, name=f"block_{i}")(x)
        return nn.Dense(1000, name="head")(x.mean(1))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(64, (7, 7), strides=2, name="stem")(x)
        for stage, channels in enumerate((64, 128, 256, 512)):
            for block in range(2):
                strides = 2 if stage and not block else 1
                y = nn.relu(nn.Conv(channels, (3, 3), strides=strides)(x))
                y = nn.Conv(channels, (3, 3))(y)
                x = nn.relu(y + (nn.Conv(channels, (1, 1), strides=strides)(x) if y.shape != x.shape else x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


TOKENS, IMAGE = jax.ShapeDtypeStruct((1, 16), jnp.int32), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
MODELS = {"GPT": (GPT(), TOKENS), "ViT": (ViT(), IMAGE), "ResNet": (ResNet(), IMAGE)}


def size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("budget", [0.3, 0.45, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_the_budget_is_met_to_a_hundredth_and_never_exceeded(name: str, budget: float) -> None:
    model, x = MODELS[name]
    where = lro.linen.kernels(model, x)
    dense = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype)))["params"]
    factored = jax.eval_shape(lambda p: lro.factorize(p, budget=budget, where=where), dense)
    share = size(factored) / size(dense)
    assert 0.99 * budget <= share <= budget
    table = lro.summary(factored, where)
    assert (table.before, table.after) == (size(dense), size(factored))
    assert table.share == pytest.approx(share)
    kernels = [row for row in table.rows if row.width is not None]
    assert all(row.after < row.before for row in kernels)
    widths: dict[Any, set[int | None]] = {}
    for row in kernels:
        widths.setdefault(row.shape, set()).add(row.width)
    assert {len(found) for found in widths.values()} == {1}  # kernels of one shape are computed together


def test_a_kernel_stays_dense_where_factors_are_not_smaller() -> None:
    params = {"big": {"kernel": jnp.ones((96, 96))}, "thin": {"kernel": jnp.ones((40, 4))}}
    factored = lro.factorize(params, budget=0.6)
    assert [path for path in lro.ranks(factored)] == ["big/kernel"]  # rank 4 of the thin one takes 192 of 160 numbers
    assert size(factored) <= 0.6 * size(params)


@pytest.mark.parametrize("budget", [0.001, 0.2])
def test_a_budget_out_of_reach_is_refused_with_the_least_share(budget: float) -> None:
    params = {"embedding": jnp.ones((100, 8)), "kernel": jnp.ones((32, 32))}  # 800 numbers that stay, and 1,024
    least = (800 + 4 * (64 + 4)) / 1824
    with pytest.raises(ValueError, match=rf"cannot be reached.*least rank, 4 or .*keeps {least:.3f}"):
        lro.factorize(params, budget=budget)


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, TypeError, "either rank or budget, got neither"),
    ({"rank": 2, "budget": 0.5}, TypeError, "either rank or budget, got both"),
    ({"budget": 0.5, "max_rank": 4}, TypeError, "pass max_rank with rank"),
    ({"budget": 30}, ValueError, r"share of the model's parameters in \(0, 1\), got 30"),
    ({"budget": 1.0}, ValueError, r"in \(0, 1\)"),
    ({"budget": 0}, ValueError, r"in \(0, 1\)"),
    ({"budget": "30%"}, TypeError, "budget is a number"),
    ({"budget": True}, TypeError, "budget is a number"),
]


@pytest.mark.parametrize("arguments,kind,message", MISTAKES)
def test_a_wrong_budget_is_refused_by_trees_and_modules_alike(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    for call in (
        lambda: lro.factorize({"kernel": jnp.eye(16)}, **arguments),
        lambda: lro.nnx.factorize(model, **arguments),
    ):
        with pytest.raises(kind, match=message):
            call()


def _mlp() -> nnx.Module:
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Embed(50, 64, rngs=rngs),
        nnx.Linear(64, 256, rngs=rngs),
        nnx.BatchNorm(256, rngs=rngs),
        nnx.Linear(256, 64, rngs=rngs),
        nnx.Linear(64, 10, rngs=rngs),
    )


def test_the_budget_of_an_nnx_model_counts_its_parameters() -> None:
    model = _mlp()
    before = size(nnx.state(model, nnx.Param))
    lro.nnx.factorize(model, budget=0.5)
    share = size(nnx.state(model, nnx.Param)) / before
    assert 0.49 <= share <= 0.5
    table = lro.summary(model)
    assert (table.before, table.share) == (before, pytest.approx(share))
    reasons = {row.path: row.reason for row in table.rows if row.width is None}
    assert "Embed" in reasons["layers/0/embedding"]
    assert {row.path for row in table.rows if row.width is not None} == set(lro.ranks(model))


def test_the_summary_tells_rank_width_and_reason() -> None:
    params = {
        "a": {"kernel": jax.random.normal(jax.random.key(0), (3, 12, 8)), "bias": jnp.ones(8)},
        "b": {"w": jnp.ones((5, 6))},
        "c": jnp.ones(()),
    }
    where: Callable[..., Any] = lambda path, shape: lro.Axes(1, 1) if path == "a/kernel" else False  # noqa: E731
    table = lro.summary(lro.factorize(params, 2, max_rank=5, where=where), where)
    kernel, w, rest = table.rows
    assert kernel[:6] == ("a/kernel", (3, 12, 8), (2, 2), 5, 288, 3 * 5 * (12 + 8 + 5))
    assert (w.path, w.reason, w.after) == ("b/w", "not chosen by its rank or by `where`", 30)
    assert (rest.path, rest.before) == ("2 parameters with fewer than two axes", 9)
    assert "a/kernel" in str(table) and "3 x 12 x 8" in str(table) and f"{table.share:.1%}" in str(table)
    assert "1 factored" in repr(table)


@pytest.mark.parametrize("tree", [{}, {"bias": jnp.ones(3)}], ids=["empty", "no matrix"])
def test_the_summary_of_a_model_without_matrices(tree: dict[str, Any]) -> None:
    table = lro.summary(tree)
    assert table.share == (1.0 if tree else 0.0)
    assert "0 factored" in str(table)


@pytest.mark.parametrize("limit,fraction,rank", [(10, 0.1, 4), (3, 0.1, 3), (100, 0.1, 10), (100, 0.02, 4)])
def test_a_fraction_gives_rank_four_at_least(limit: int, fraction: float, rank: int) -> None:
    kernel = jax.random.normal(jax.random.key(0), (120, limit))
    assert int(lro.ranks(lro.factorize(kernel, fraction))[""]) == rank
    model = nnx.Linear(120, limit, rngs=nnx.Rngs(0))
    lro.nnx.factorize(model, fraction)
    assert int(lro.ranks(model)["kernel"]) == rank


def test_boxes_change_no_number_of_a_summary() -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    x = jnp.zeros((1, 48))
    boxed, plain = (
        jax.eval_shape(nn.Sequential([nn.Dense(96, kernel_init=k), nn.Dense(8)]).init, jax.random.key(0), x)["params"]
        for k in (init, nn.initializers.lecun_normal())
    )
    tables = [lro.summary(jax.eval_shape(lambda p: lro.factorize(p, budget=0.5), p)) for p in (boxed, plain)]
    assert tables[0] == tables[1] and tables[0].share <= 0.5
