"""What docstrings say is so: arguments that the signature has, exceptions that the code raises, names that there are."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import peftc
from peftc import driver, runtime
from peftc.interchange import read, write
from peftc.language import reader
from peftc.model.compiled import CompiledModel
from peftc.runtime.runner import Runner
from peftc.training import checkpoints, recipe, run

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("peftc/**/*.py"), *ROOT.glob("passes/*.py")])
_VERBS = (
    *(getattr(peftc, name) for name in peftc.__all__ if name != "runtime"),
    *(driver.plans, driver.survey, driver.within, driver.outputs),
    *(runtime.load, reader.parse_spec, read.import_peft, read.add_peft, write.export_peft),
    *(run.train, run.evaluate, run.dry_run, recipe.load_recipe, recipe.recipe_of),
    checkpoints.last_whole,
)
VERBS: dict[str, Callable[..., Any]] = {
    f"{one.__module__}.{one.__name__}": inspect.unwrap(one)
    for one in _VERBS
    if not isinstance(one, type)
}
CLASSES = (peftc.CompiledModel, peftc.Spec, peftc.PeftcError, CompiledModel, Runner)
# Names of torch, transformers and PEFT that docstrings tell of.
FOREIGN = {"c_attn", "device_map", "get_pattern_key"}
RAISED = re.compile(r"\b[A-Z]\w*(?:Error|Fault)\b")


def words(docstring: str) -> set[str]:
    """Every name in backticks."""
    return {
        name for code in re.findall(r"`([^`]+)`", docstring) for name in re.findall(r"\w+", code)
    }


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_says_what_it_takes_and_raises(name: str) -> None:
    verb = VERBS[name]
    said = inspect.getdoc(verb) or ""
    named = words(said)
    for one in inspect.signature(verb).parameters:
        assert one in named, f"{name} says nothing of '{one}'"
    tree = ast.parse(inspect.getsource(verb).lstrip())
    for one in _raises(tree):
        assert one in said, f"{name} raises {one} and does not say so"


def _raises(tree: ast.AST) -> Iterator[str]:
    """The names of exceptions that this code itself raises."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if RAISED.fullmatch(name := ast.unparse(node.exc.func)):
                yield name


@pytest.mark.parametrize("one", CLASSES)
def test_public_methods_say_something(one: type) -> None:
    assert inspect.getdoc(one)
    for name, method in vars(one).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            assert method.__doc__, f"{one.__name__}.{name}"


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def made() -> dict[str, set[str]]:
    """Per module the exceptions that its code makes."""
    found: dict[str, set[str]] = {}
    for file in FILES:
        calls = (node.func for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call))
        names = {ast.unparse(one).rpartition(".")[2] for one in calls}
        found[module_of(file)] = {name for name in names if RAISED.fullmatch(name)}
    return found


@cache
def imported() -> dict[str, set[str]]:
    """Per module the modules of ours that it imports."""
    known = {module_of(file) for file in FILES}
    found: dict[str, set[str]] = {}
    for file in FILES:
        names: set[str] = set()
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Import):
                names |= {one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
        found[module_of(file)] = names & known
    return found


@cache
def reachable(module: str) -> frozenset[str]:
    """The exceptions that the code of a module, and of what it imports, makes."""
    seen, stack = set(), [module]
    while stack:
        one = stack.pop()
        if one not in seen:
            seen.add(one)
            stack += imported()[one]
    return frozenset(name for one in seen for name in made()[one])


def documented(file: Path) -> Iterator[tuple[str, str]]:
    """(name, docstring) of all that a file says of itself."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if said := ast.get_docstring(node):
                yield getattr(node, "name", file.name), said


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_name_what_is_there(file: Path) -> None:
    """An exception that is named can come from there; a name in backticks stands somewhere in the code."""
    can, known = reachable(module_of(file)), identifiers()
    for name, said in documented(file):
        if name.startswith("_"):
            continue
        for sentence in re.findall(r"[Rr]aises? [^.]*", said):
            for one in RAISED.findall(sentence):
                assert one in {*can, "PeftcError"} or hasattr(builtins, one), (
                    f"{file.name}: {name}: {one}"
                )
        for code in re.findall(r"`([a-z_]\w*)(?:\(\))?`", said):
            assert code in known | FOREIGN, f"{file.name}: {name}: `{code}`"


@cache
def identifiers() -> frozenset[str]:
    """Every name, attribute, argument, keyword and word of a string in the code, and keys of specs."""
    found: set[str] = set()
    for file in FILES:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
                found.add(node.arg)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.alias):
                found |= set(node.name.split("."))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if len(node.value) < 60:  # a word of the language, no prose
                    found |= set(re.findall(r"\w+", node.value))
    return frozenset(found)
