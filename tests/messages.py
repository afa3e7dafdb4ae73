"""Every message that peftc has for a user, read off its code, and an example of each that a test triggered.

`pytest --messages` remembers examples in tests/golden/messages.json while it runs; docs/messages.md is written from both.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from peftc.errors import PeftcError, Problem, SpecError
from peftc.language.expr import ExprError
from peftc.language.shapes import ShapeError
from peftc.language.source import Source

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "tests" / "golden" / "messages.json"
FILES = sorted([*ROOT.glob("peftc/**/*.py"), *ROOT.glob("passes/*.py")])
# What becomes a problem of a spec.
ALSO = ("ExprError", "ShapeError")
HEAD = """# Messages

All that peftc tells a user who has to mend something, as the code has it, and an example of each that a test triggered.
`tests/messages.py` writes this page (`pytest --accept tests/test_docs.py`), and `pytest --messages` takes the examples while
the tests run. What stands in braces is filled in. On the command line a message has `error: ` in front and the exit code 1.
"""


@dataclass(frozen=True)
class Message:
    """A place in the code that makes a message: its file, lines, the class that it is raised as, and its text."""

    file: str
    lines: range
    kind: str
    text: str

    @property
    def key(self) -> str:
        return f"{self.file}: {self.text}"


@cache
def messages() -> tuple[Message, ...]:
    """In the order of the files and lines."""
    return tuple(one for file in FILES for one in sorted(_of(file), key=lambda m: m.lines.start))


def _of(file: Path) -> Iterator[Message]:
    tree, name = ast.parse(file.read_text()), str(file.relative_to(ROOT))
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        said = _assigned(owner)
        for node in _own(owner):
            if isinstance(node, ast.Call) and (found := _message(node, said)):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                yield Message(name, lines, *found)


def _own(owner: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function that are of no function inside it."""
    for node in ast.iter_child_nodes(owner):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _own(node)


def _assigned(owner: ast.AST) -> dict[str, ast.expr]:
    """What names of a function were last said to be."""
    return {
        node.targets[0].id: node.value
        for node in _own(owner)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def _message(call: ast.Call, said: dict[str, ast.expr]) -> tuple[str, str] | None:
    """(class, text) of a call that makes a message of words of its own."""
    found = _made(call, said)
    own = "" if found is None else re.sub(r"\{.*?\}", "", found[1])
    return found if re.search("[a-z]{3}", own) else None


def _made(call: ast.Call, said: dict[str, ast.expr]) -> tuple[str, str] | None:
    name = ast.unparse(call.func).rpartition(".")[2]
    if name in ("fail", "Problem") and len(call.args) > 1:
        fix = f" ({_text(call.args[2], said)})" if len(call.args) > 2 else ""
        return "SpecError", _text(call.args[1], said) + fix
    if name == "warn" and call.args:
        return "warning", _text(call.args[0], said)
    if name in kinds() and call.args:
        place = 1 if name == "ExprError" else 0
        if len(call.args) > place:
            return name, _text(call.args[place], said)
    return None


@cache
def kinds() -> frozenset[str]:
    """The classes of errors that are a user's, by what the files say."""
    classes = [
        (node.name, {ast.unparse(base) for base in node.bases})
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    found = {"PeftcError"}
    while more := {name for name, bases in classes if bases & found} - found:
        found |= more
    return frozenset({*found, *ALSO}) - {"SpecError"}


def _text(node: ast.expr, said: dict[str, ast.expr], depth: int = 4) -> str:
    """What an expression says, with braces for what is filled in."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, said, depth) for part in parts)
        case ast.FormattedValue(value=inner):
            return f"{{{_name(inner)}}}"
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _text(left, said, depth) + _text(right, said, depth)
        case ast.IfExp(body=body, orelse=other):
            one, two = _text(body, said, depth), _text(other, said, depth)
            return f"[{one or two}]" if not (one and two) else f"{one} | {two}"
        case ast.Name(id=name) if name in said and depth:
            return _text(said[name], said, depth - 1)
    return f"{{{_name(node)}}}"


def _name(node: ast.expr) -> str:
    """A short word for what is filled in."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(attr=name):
            return name
        case ast.Call(func=ast.Name(id="len")):
            return "number"
        case ast.Call(func=ast.Attribute(attr="join")):
            return "names"
        case ast.Call(func=ast.Name(id="suggest")):
            return "did you mean"
    return "..."


def page() -> str:
    """A table an area; of equal messages of a file one row."""
    known = json.loads(EXAMPLES.read_text()) if EXAMPLES.is_file() else {}
    rows = {one.key: one for one in messages()}
    lines = [
        HEAD,
        f"{len(rows)} messages.\n",
    ]
    area = ""
    for key, one in rows.items():
        if (mine := _area(one.file)) != area:
            area = mine
            lines += [f"\n## {area}\n", "| message | an example | |", "|---|---|---|"]
        example = _cell(known[key]) if key in known else "*none yet*"
        lines.append(f"| {_cell(one.text)} | {example} | {one.kind} |")
    return "\n".join([*lines, ""])


def _area(file: str) -> str:
    return "/".join(file.split("/")[:2])


def _cell(text: str) -> str:
    """Text in a cell of a table, as it stands."""
    clean = " ".join(text.split()).replace("|", "¦").replace("`", "'")
    return f"`{clean[:300]}{'...' if len(clean) > 300 else ''}`"


class Recorder:
    """Remembers what is made where while tests run."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.places: dict[tuple[str, int], str] = {
            (one.file, line): one.key for one in messages() for line in one.lines
        }

    def note(self, text: str, depth: int = 2) -> None:
        """A message that the caller's caller makes."""
        frame = sys._getframe(depth)
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)):
            key = self.places.get((file[len(str(ROOT)) + 1 :], frame.f_lineno))
            if key:
                self.add({key: _anonymous(text)})

    def add(self, found: Mapping[str, str]) -> None:
        """Keep the shortest example of each message."""
        for key, text in found.items():
            self.found[key] = min(self.found.get(key, text), text, key=len)

    def start(self) -> None:
        """Have errors, problems and warnings tell."""
        for cls in (PeftcError, ShapeError, ExprError, Problem):
            self._watch(cls)
        fail, warn = Source.fail, warnings.warn

        def failing(source: Source, node: Any, fact: str, fix: str = "", offset: int = 0) -> None:
            self.note(fact + (f" ({fix})" if fix else ""))
            fail(source, node, fact, fix, offset)

        def warning(message: Any, *args: Any, **more: Any) -> None:
            self.note(str(message))
            warn(message, *args, **more)

        Source.fail = failing  # type: ignore[method-assign]
        warnings.warn = warning  # type: ignore[assignment]

    def _watch(self, cls: type[Any]) -> None:
        made: Callable[..., None] = cls.__init__

        def init(error: Any, *args: Any, **more: Any) -> None:
            if args and not isinstance(error, SpecError):
                self.note(str(args[1] if isinstance(error, ExprError | Problem) else args[0]))
            made(error, *args, **more)

        cls.__init__ = init

    def write(self) -> None:
        """Add what was found to what is known; what the code has no more is left out."""
        known = json.loads(EXAMPLES.read_text()) if EXAMPLES.is_file() else {}
        keys = {one.key for one in messages()}
        every = {**known, **self.found}
        kept = {key: every[key] for key in sorted(every) if key in keys}
        EXAMPLES.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _anonymous(text: str) -> str:
    """Without the folders of the machine and the tests."""
    words = []
    for word in text.split(" "):
        start = word.find("/")
        folder = word[start:].rpartition("/")[0] if start >= 0 else ""
        words.append(
            word.replace(f"{folder}/", "")
            if folder and Path(folder.strip("'\"(")).is_absolute()
            else word
        )
    return " ".join(words)
