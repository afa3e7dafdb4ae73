"""One folder a phase: each imports those before it, never those after, and nothing inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each phase may import besides itself, in the order of DESIGN's table.
CORE = ("errors", "language", "graph", "sites", "plan", "rewrite")
ALL = (*CORE, "passes", "store", "model", "driver", "merging", "prune", "saved", "runtime")
ABOVE = (*ALL, "certificate")
ALLOWED = {
    "errors": (),
    "language": ("errors",),
    "graph": ("errors",),
    "sites": ("errors", "language", "graph"),
    "plan": CORE[:4],
    "rewrite": CORE[:5],
    "passes": CORE,
    "store": ("errors", "language"),
    "model": (*CORE, "store"),
    "driver": ALL[:9],
    "merging": ALL[:10],
    "prune": ALL[:11],
    "saved": ALL[:10],
    "runtime": ("errors", "store"),
    "certificate": ALL[:11],
    "export": ALL,
    "report": (*ALL, "export"),
    "interchange": ALL[:13],
    "training": ALL[:13],
    "cli": (*ABOVE, "export", "report", "interchange", "training"),
    "__init__": (),
}
FILES = sorted([*ROOT.glob("peftc/**/*.py"), *ROOT.glob("passes/*.py")])


def phase(module: str) -> str:
    """`sites` of `peftc.sites.view`; `passes` of all of it."""
    first, *rest = module.split(".")
    return first if first == "passes" or not rest else rest[0]


def imports(file: Path) -> Iterator[tuple[ast.AST, str, bool]]:
    """(statement, module, whether it stands inside a function) of our own packages."""
    tree = ast.parse(file.read_text())
    inside = {
        id(inner)
        for one in ast.walk(tree)
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(one)
    }
    for one in ast.walk(tree):
        names: list[str] = []
        if isinstance(one, ast.Import):
            names = [alias.name for alias in one.names]
        elif isinstance(one, ast.ImportFrom) and one.module:
            names = [f"{one.module}.{a.name}" for a in one.names]
        for name in names:
            if name.partition(".")[0] in ("peftc", "passes"):
                yield one, name, id(one) in inside


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows_point_one_way(file: Path) -> None:
    own = phase(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for statement, module, inside in imports(file):
        place = f"{file}:{statement.lineno}"
        assert not inside, f"{place}: '{module}' is imported inside a function"
        if own != "__init__":  # the face: names for type checkers, loaded when they are asked for
            assert phase(module) in (own, *ALLOWED[own]), f"{place}: {own} imports {module}"
