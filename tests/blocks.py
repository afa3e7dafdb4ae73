"""The blocks of code in README and docs: what they say, and how they are run as they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Written by tests or programs, from what runs there.
WRITTEN = ("architectures", "commands", "habits", "language", "messages", "passes")
PAGES = {
    one.stem: one
    for one in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


@dataclass(frozen=True)
class Block:
    """`title` is the file that it is, where it is one."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> tuple[tuple[str, str], ...]:
        """Each line behind `$ `, and what is shown of its output."""
        parts = re.split(r"^\$ (.+)$", self.text, flags=re.M)[1:]
        return tuple((line.strip(), shown) for line, shown in zip(parts[::2], parts[1::2]))


def blocks(page: str, *languages: str) -> list[Block]:
    """Those of a page in their order, of some languages or all."""
    text = PAGES[page].read_text()
    found = (
        Block(page, text[: one.start()].count("\n") + 1, one[1], one[2] or "", one[3])
        for one in _FENCE.finditer(text)
    )
    return [one for one in found if not languages or one.language in languages]


def commands(page: str) -> Iterator[tuple[str, str]]:
    """Of a page's consoles: (line, output shown)."""
    for one in blocks(page, "console"):
        yield from one.commands


def script(page: str, without: tuple[str, ...] = ()) -> str:
    """A page as one run of bash: its files are written, its Python and its commands run, in order. A command whose
    shown output is an error must end with 1. Commands that start with one of `without` are left out."""
    lines: list[str] = []
    for block in blocks(page):
        if block.title:
            lines += [f"cat > {block.title} <<'END-OF-FILE'", f"{block.text}END-OF-FILE"]
        elif block.language == "python":
            lines += ["python - <<'END-OF-FILE'", f"{block.text}END-OF-FILE"]
        elif block.language == "console":
            for line, shown in block.commands:
                if not line.startswith(without or ("\0",)):
                    fails = re.search(r"^error: ", shown, re.M)
                    lines += [f"({line}) && exit 9 || test $? = 1" if fails else line]
    return "\n".join(lines)


def alike(shown: str, got: str) -> bool:
    """Whether an output is the one shown, whatever its numbers; `...` stands for any lines, or the rest of one."""
    have = [plain(line) for line in got.strip().splitlines()]
    parts = [""] if not shown.strip() else re.split(r"^\.\.\.$", shown.strip(), flags=re.M)
    start = 0
    for number, part in enumerate(parts):
        want = [plain(line) for line in part.strip("\n").splitlines()]
        places = range(start, len(have) - len(want) + 1)
        spans = [i for i in places if all(map(_begins, have[i : i + len(want)], want))]
        if number == 0:
            spans = [i for i in spans if i == 0]
        if number == len(parts) - 1 and want:
            spans = [i for i in spans if i + len(want) == len(have)]
        if not spans:
            return False
        start = spans[0] + len(want)
    return len(parts) > 1 or start == len(have)


def _begins(line: str, shown: str) -> bool:
    """A line that is shown may end in dots."""
    return line.startswith(shown[:-3]) if shown.endswith(" ...") else line == shown


def plain(line: str) -> str:
    """A line without its numbers and runs of spaces."""
    return re.sub(r"-?\d[\d,.]*(e[-+]\d+)?", "0", " ".join(line.split()))
