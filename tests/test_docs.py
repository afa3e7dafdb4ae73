"""docs/habits.md: what works with what, as the tests that are marked with a habit say; `pytest --accept` writes it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import messages
import page_commands
import page_language
import pytest
from test_habits import ELSEWHERE, KEYS, LIMITED, REFUSED, UNTRIED

from peftc.language.reader import FOR_EDITORS, load_spec
from peftc.language.schema import json_schema
from peftc.language.shelf import SCHEMA, directory

TESTS = Path(__file__).parent
FILE = TESTS.parent / "docs" / "habits.md"
HEAD = """# What works, and with what it was compared

Each row is a test, and what its numbers (or its error) are compared with. `make test` runs those of CI (of some, each
n-th case), `make slow` all. `tests/test_docs.py` writes this page from the tests (`pytest --accept tests/test_docs.py`).
"""


@dataclass(frozen=True)
class Habit:
    """`area: words` of a mark, what the test compares with, the test, and where it runs."""

    area: str
    words: str
    against: str
    test: str
    runs: str


def habits() -> Iterator[Habit]:
    """Of each marked test, in the order of files and lines."""
    for path in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(path.read_text())
        slow = any(_is_slow(mark) for mark in _of_all(tree))
        for one in tree.body:
            if isinstance(one, ast.FunctionDef):
                marks = [mark for mark in one.decorator_list if _name(mark) == "habit"]
                runs = "slow" if slow or any(_is_slow(m) for m in one.decorator_list) else "CI"
                for mark in marks:
                    said, against = (ast.literal_eval(given) for given in mark.args)  # type: ignore[attr-defined]
                    area, _, words = said.partition(": ")
                    yield Habit(area, words, against, f"{path.stem}::{one.name}", runs)


def _of_all(tree: ast.Module) -> list[ast.expr]:
    """The marks of all tests of a file."""
    for one in tree.body:
        if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "pytestmark":
            return one.value.elts if isinstance(one.value, ast.List) else [one.value]
    return []


def _name(mark: ast.expr) -> str:
    func = mark.func if isinstance(mark, ast.Call) else mark
    return func.attr if isinstance(func, ast.Attribute) else ""


def _is_slow(mark: ast.expr) -> bool:
    return _name(mark) == "slow"


def page() -> str:
    lines, found = [HEAD], list(habits())
    for area in sorted({one.area for one in found}):
        rows = [one for one in found if one.area == area]
        lines += [f"## {area[0].upper()}{area[1:]}\n", "| | compared with | test | runs in |"]
        lines += ["|---|---|---|---|"]
        lines += [f"| {one.words} | {one.against} | `{one.test}` | {one.runs} |" for one in rows]
        lines += [""]
    lines += ["## Keys of TrainingArguments\n", "| | |", "|---|---|"]
    lines += [f"| as the backbone trained as it is | {_keys(KEYS)} |"]
    lines += [f"| refused in the backbone's words on a CPU | {_keys(REFUSED, KEYS)} |"]
    lines += [f"| limited, as `docs/limits.md` says | {_keys(LIMITED)} |"]
    lines += [f"| `{name}` | {', '.join(keys)} |" for name, keys in ELSEWHERE.items()]
    lines += [f"| not tried: torch's, accelerate's and the hub's | {', '.join(UNTRIED)} |"]
    return "\n".join([*lines, ""])


Rows = Mapping[str, Mapping[str, object]]


def _keys(rows: Rows, others: Rows = {}) -> str:  # noqa: B006
    """The keys of some rows, without those of others."""
    mine, theirs = ({key for row in some.values() for key in row} for some in (rows, others))
    return ", ".join(sorted(mine - theirs))


def test_the_page_is_what_the_tests_say(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--accept"):
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(page())
    assert FILE.read_text() == page()


def test_each_habit_is_told_once() -> None:
    said = [(one.area, one.words) for one in habits()]
    assert len(said) == len(set(said)) and len({area for area, _ in said}) <= 6


# Pages that follow from the code, and what writes each.
WRITTEN = {
    "commands": page_commands.page,
    "language": page_language.page,
    "messages": messages.page,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_page_is_what_the_code_says(name: str, request: pytest.FixtureRequest) -> None:
    file, text = FILE.parent / f"{name}.md", WRITTEN[name]()
    if request.config.getoption("--accept"):
        file.write_text(text)
    assert file.read_text() == text


def test_the_schema_beside_the_specs_is_the_languages(request: pytest.FixtureRequest) -> None:
    file, text = directory() / SCHEMA, json.dumps(json_schema(), indent=1) + "\n"
    if request.config.getoption("--accept"):
        file.write_text(text)
    assert file.read_text() == text


def test_every_spec_tells_editors_its_schema() -> None:
    for path in [*directory().rglob("*.yaml"), FILE.parents[1] / "examples" / "lora_xs.yaml"]:
        last = path.read_text().splitlines()[-1]
        mark, _, schema = last.partition(" $schema=")
        assert mark == f"# {FOR_EDITORS}" and (path.parent / schema).samefile(directory() / SCHEMA)
        assert FOR_EDITORS not in load_spec(path).title


def test_every_message_has_an_example() -> None:
    """Of a new one `pytest --messages` on its test takes it; none stands that peftc has no more."""
    known = json.loads(messages.EXAMPLES.read_text())
    assert set(known) == {one.key for one in messages.messages()}
