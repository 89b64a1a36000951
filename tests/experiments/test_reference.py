"""The reference has every public name, and every file that tells the version tells the same one."""

import functools
import importlib
import pathlib
import re
import types

import lowrank_optax as lro

ROOT = pathlib.Path(__file__).parents[2]
NAMESPACES = (
    "lowrank_optax",
    *(f"lowrank_optax.{name}" for name in ("adapters", "checkpoint", "geometry", "linen", "manifold", "nnx")),
    "lowrank_optax.projected",
    *(f"lowrank_optax.projected.{name}" for name in ("carry", "projectors", "refresh", "residuals")),
)


def public(module: types.ModuleType) -> dict[str, object]:
    """The names that a user may write after the module: those of `__all__`, else what the package defines there."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    values = {name: getattr(module, name) for name in names}
    package = module.__name__ if module.__name__ == "lowrank_optax.manifold" else "lowrank_optax"
    return {
        name: value
        for name, value in values.items()
        if not isinstance(value, types.ModuleType) and getattr(value, "__module__", "").startswith(package)
    }


def documented() -> list[tuple[str, str]]:
    """(module, name) of every directive of the reference."""
    found = []
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        module = ""
        for line in page.read_text().splitlines():
            if directive := re.match(r"\.\. (\w+):: ([\w.]+)$", line):
                if directive[1] == "currentmodule":
                    module = directive[2]
                elif directive[1].startswith("auto") and directive[1] != "automodule":
                    found.append((module, directive[2]))
    return found


def named(module: str, name: str) -> object:
    """The value of `lowrank_optax.module.name`."""
    return functools.reduce(getattr, [*module.split(".")[1:], name], lro)


def test_every_public_name_is_in_the_reference_once():
    found = documented()
    assert len(found) == len(set(found))
    known = {id(named(*pair)) for pair in found}
    missing = {
        f"{module}.{name}"
        for module in NAMESPACES
        for name, value in public(importlib.import_module(module)).items()
        if id(value) not in known
    }
    assert not missing


def test_every_page_of_the_reference_is_in_its_index():
    folder = ROOT / "docs" / "reference"
    index = (folder / "index.md").read_text()
    for page in folder.glob("*.md"):
        assert page.stem == "index" or (f"({page.name})" in index and f"\n{page.stem}\n" in index)


def test_one_version():
    citation = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    cited = re.search(r"version = \{(.*)\}", (ROOT / "docs" / "citing.md").read_text())
    assert citation and cited
    assert lro.__version__ == citation[1] == cited[1]
