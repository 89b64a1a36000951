"""The experiment `matrix`: its target, and heavy ball in every form."""

from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import matrix, metrics
from experiments.names import DEFAULT_GEOMETRY, GEOMETRIES

pytestmark = pytest.mark.usefixtures("settings_of_a_user")


@pytest.mark.slow
def test_heavy_ball_in_every_form(tmp_path: Path) -> None:
    matrix.main(["--smoke", "--out", str(tmp_path)])
    for name in matrix.CONFIG().methods:
        header, records = metrics.read(tmp_path / f"{name}.jsonl")
        assert header["condition"] == 1e4 and header["weight_decay"] == 0.0
        checks = [r for r in records if "validation_loss" in r]
        assert [r["step"] for r in checks] == [0, 3, 6]
        assert checks[-1]["validation_loss"] < checks[0]["validation_loss"]
        assert checks[-1]["validation_error"] < checks[0]["validation_error"]


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_method_on_the_manifold_trains_in_every_geometry(geometry: str, tmp_path: Path) -> None:
    names = [name for name in DEFAULT_GEOMETRY if name != "adapter"]  # which is a change of pretrained kernels
    flags = ["--method", ",".join(names), "--geometry", geometry, "--max-rank", "6"]
    matrix.main(["--smoke", *flags, "--out", str(tmp_path)])
    for name in names:
        _, records = metrics.read(tmp_path / f"{name}.jsonl")
        losses = [r["validation_loss"] for r in records if "validation_loss" in r]
        assert len(losses) == 3 and losses[-1] < losses[0]
        assert {r["rank"] for r in records if "rank" in r} == {3.0}


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_the_target_has_the_spectrum_asked_for(condition: float) -> None:
    data = matrix.problem(matrix.Matrix(condition=condition, columns=20, target_rank=4))
    sigma = np.linalg.svd(data["target"].astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(sigma[:4], condition ** (-np.arange(4) / 3), rtol=1e-3)
    assert sigma[4] < 1e-6
    assert data["target"].shape == data["weight"].shape == (40, 20)
    assert data["weight"].min() >= 0.5 and data["weight"].max() <= 1.0


def test_the_problem_depends_on_the_seed_and_not_on_the_method() -> None:
    one, same, other = (
        matrix.Matrix(method=method, seed=seed).task()
        for method, seed in (("full_heavy_ball", 0), ("lowrank_heavy_ball", 0), ("lowrank_heavy_ball", 1))
    )
    jax.tree.map(np.testing.assert_array_equal, one.batch(0, 1), same.batch(0, 2))
    jax.tree.map(np.testing.assert_array_equal, one.validation[0], same.validation[0])
    jax.tree.map(np.testing.assert_array_equal, one.init(jax.random.key(0)), same.init(jax.random.key(0)))
    for name in ("target", "weight"):
        assert not np.array_equal(one.batch(0, 1)[name], other.batch(0, 1)[name])


def test_all_methods_start_from_norm_one() -> None:
    kernel = matrix.Matrix().task().init(jax.random.key(0))["kernel"]
    assert kernel.shape == (40, 30)
    assert np.linalg.norm(kernel) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "31"], "--rank 31: at most the smaller of --batch and --columns, 30"),
        (["--target-rank", "31"], "--target-rank 31: at most the smaller of --batch and --columns, 30"),
        (["--condition", "0.5"], "--condition 0.5: at least 1"),
    ],
)
def test_misuse_is_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        matrix.main(["--out", str(tmp_path / "run"), *flags])
    assert stop.value.code == message
