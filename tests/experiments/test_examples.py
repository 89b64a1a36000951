"""The scripts of `examples/`, which show a newcomer a whole task, do what they say."""

import pathlib
import re
import runpy

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("settings_of_a_user")]


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(FOLDER / f"{name}.py"))
    return capsys.readouterr().out


def numbers(pattern: str, text: str) -> list[float]:
    return [float(x) for x in re.findall(pattern, text)]


def test_pretraining_under_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("pretrain_under_a_budget", capsys)
    losses = numbers(r"step \d+: ([\d.]+)", out)
    assert losses[0] > 5.0 and losses[-1] < 2.5
    (share,) = numbers(r"factored .* ([\d.]+)%", out)
    assert 48 < share <= 50


def test_an_adapter_and_its_export(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("adapter_with_export", capsys)
    losses = numbers(r"step \d+: ([\d.]+)", out)
    assert losses[0] > 1.0 and losses[-1] < 0.01
    assert numbers(r"differs by (\S+)", out)[0] < 1e-3


def test_an_nnx_model_is_converted_and_shrinks(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("nnx_convert_and_shrink", capsys)
    first, cut, last = numbers(r"error ([\d.]+)", out)
    assert first < 0.01 and last < 0.01 < cut
    wide, narrow = numbers(r"([\d,]+) numbers", out.replace(",", ""))
    # Two kernels, 32 x 64 and 64 x 32, of rank r: 2 r (96 + r) numbers, and 96 in the biases.
    assert (wide, narrow) == (2 * 12 * 108 + 96, 2 * 4 * 100 + 96)
