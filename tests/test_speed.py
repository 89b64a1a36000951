"""What keeps a step fast: no decomposition of tall arrays, one program for all depths, benchmarks that run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lowrank_optax as lro
from benchmarks import cases, measure, report

ROWS, COLUMNS, RANK = 40, 48, 4


def tree(kernels: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), kernels)
    return {f"layer_{i}": lro.lowrank_init(RANK)(key, (ROWS, COLUMNS), jnp.float32) for i, key in enumerate(keys)}


def lowered(params: Any, make: Any = lro.lowrank_adam, **geometry: Any) -> str:
    tx = make(1e-2, **geometry)
    return jax.jit(tx.update).lower(params, tx.init(params), params).as_text()


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": "tangent"}, {"rank": lro.tolerance(0.1)}, {"make": lro.lowrank_muon, "momentum": "tangent"}],
    ids=["default", "tangent", "tolerance", "muon"],
)
def test_nothing_with_m_rows_is_decomposed(options: dict[str, Any]) -> None:
    """Over sharded rows a decomposition would gather them, and on accelerators it is slow."""
    calls = re.findall(r"lapack_\w+.*", lowered(tree(1), **options))
    assert any("gesdd" in call for call in calls) and any("potrf" in call for call in calls)
    sizes = {int(n) for call in calls for shape in re.findall(r"tensor<([\dx]+)xf32>", call) for n in shape.split("x")}
    assert max(sizes) <= 2 * RANK


@pytest.mark.parametrize(
    "geometry", [{}, {"momentum": "tangent"}, {"retraction": "bug"}], ids=["default", "tangent", "bug"]
)
def test_all_products_are_in_full_precision(geometry: dict[str, Any]) -> None:
    """By default accelerators round the factors of a product to 8 or 11 bits, and W with them."""
    products = re.findall(r"stablehlo.dot_general.*", lowered(tree(1), **geometry))
    assert products and all("precision = [HIGHEST, HIGHEST]" in product for product in products)


@pytest.mark.parametrize("momentum", ["coefficient", "tangent"])
def test_a_step_of_many_kernels_has_the_products_and_decompositions_of_one(momentum: str) -> None:
    def counts(kernels: int) -> dict[str, int]:
        text = lowered(tree(kernels), momentum=momentum)
        return {name: len(re.findall(name, text)) for name in ("dot_general", "lapack_", "stablehlo.while")}

    assert counts(2) == counts(5)


@pytest.mark.parametrize("momentum", ["balanced", "coefficient", "tangent"])
def test_kernels_share_their_compiled_code(momentum: str) -> None:
    """A slice at a fixed position inside of fused code makes that code another for every kernel of a stack."""
    params, tx = tree(3), lro.lowrank_adam(1e-2, momentum=momentum)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    stacked = rf"f32\[1,(?:{ROWS}|{COLUMNS}),{RANK}\]\S* "
    assert re.search(stacked + r"dynamic-slice\(", text) and not re.search(stacked + r"slice\(", text)


@pytest.mark.slow
@pytest.mark.usefixtures("settings_of_a_user")
def test_benchmarks_run(tmp_path: Path) -> None:
    record = json.loads(json.dumps(cases.run(cases.smoke("cpu")[0])))
    low = record["methods"]["lowrank_adam"]
    # Two moments of r x r for each of the six kernels, against two of every ordinary parameter.
    assert low["state_bytes"] < record["methods"]["full"]["state_bytes"]
    assert low["share"]["median"] > 0 and low["ratio"]["full"]["low"] <= low["ratio"]["full"]["high"]
    result = {"machine": measure.machine(), "seconds": 1, "cases": [record]}
    (tmp_path / "bench.json").write_text(json.dumps(result))
    report.write(tmp_path)
    text = (tmp_path / "bench.md").read_text()
    assert "low-rank Adam" in text and (tmp_path / "bench.png").stat().st_size > 0
