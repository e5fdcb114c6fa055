"""The import graph of src/finchtune goes strictly downward, never sideways or up."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "finchtune"
LAYERS = [
    {"errors"},
    {"files", "methods"},
    {"config", "distributed", "tokenizer"},
    {"ops", "data"},
    {"adapters"},
    {"models"},
    {"model", "weights"},
    {"memory", "inference", "report"},
    {"training", "evaluation"},
    {"cli"},
    {"__main__"},
]
LAYER_OF = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, list[Path]]:
    """Top-level module or subpackage name -> its files."""
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


def imported_modules(path: Path) -> set[str]:
    """Top-level finchtune modules that a file imports, wherever in the file it does so."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it in full"
            dotted = [node.module or ""]
            if node.module == "finchtune":
                dotted = [f"finchtune.{alias.name}" for alias in node.names]
        else:
            continue
        names |= {d.split(".")[1] for d in dotted if d.startswith("finchtune.")}
    return names


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_strictly_downward(name):
    assert name in LAYER_OF, f"{name} has no layer; give it one here"
    for path in modules()[name]:
        for target in imported_modules(path) - {name}:
            assert LAYER_OF[target] < LAYER_OF[name], f"{path}: {name} must not import {target}"
