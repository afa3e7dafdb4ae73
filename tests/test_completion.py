"""What helps to type: a shell's completion, and specs that start from others."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import Run

from peftc.cli.main import COMMANDS
from peftc.language.reader import load_spec
from peftc.language.shelf import shipped


def completed(script: str, *words: str) -> set[str]:
    """What bash offers for the last of some words."""
    line = f'{script}\nCOMP_WORDS=({" ".join(words)} ""); COMP_CWORD={len(words)}\n_peftc; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_commands_options_and_specs(run: Run) -> None:
    code, script, _ = run("completion", "bash")
    assert code == 0 and completed(script, "peftc") == set(COMMANDS)
    assert {"--model", "--budget", *shipped()} <= completed(script, "peftc", "plan")
    assert {"--recipe", "sst2", "mam"} <= completed(script, "peftc", "train")
    assert completed(script, "peftc", "new") >= {"--from", "--output"}
    assert "lora" not in completed(script, "peftc", "doctor")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(run: Run, shell: str) -> None:
    code, script, _ = run("completion", shell)
    assert code == 0 and all(name in script for name in COMMANDS)
    assert run("completion", "tcsh")[0] == 1


@pytest.mark.parametrize("source", ["lora", "bitfit", "examples/lora_xs.yaml"])
def test_new_starts_from_another(run: Run, source: str, tmp_path: Path) -> None:
    path, root = tmp_path / "mine.yaml", Path(__file__).parents[1]
    given = root / source if source.endswith(".yaml") else source
    assert run("new", "mine", "--from", given, "-o", path)[0] == 0
    mine, theirs = load_spec(path), load_spec(given)
    assert (mine.name, mine.title) == ("mine", theirs.title)
    assert [one.assign for one in mine.entries] == [one.assign for one in theirs.entries]
    assert run("new", "other", "--from", "lorra", "-o", tmp_path / "o.yaml")[0] == 1
