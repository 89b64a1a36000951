"""Every notebook runs from top to bottom, as in a fresh kernel."""

import json
import pathlib

import jax
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(path, monkeypatch):
    monkeypatch.setenv("SMOKE", "1")  # where a notebook has a quick way
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert "".join(cells[0]["source"]).startswith("%pip install"), "the first cell installs, for Colab"
    namespace: dict = {}
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        for i, cell in enumerate(cells[1:], start=1):
            exec(compile("".join(cell["source"]), f"{path.name} cell {i}", "exec"), namespace)
