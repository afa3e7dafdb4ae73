"""What peftc writes: each artefact says what it was made of, and a disk without room leaves what was there."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import Run

from peftc import cli
from peftc.store.directory import MANIFEST

pytestmark = pytest.mark.xdist_group("test_artefacts")


@pytest.fixture(scope="module")
def made(body: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deltas, a bundle, a merged model and an adapter of PEFT, of one short training."""
    out = tmp_path_factory.mktemp("made")
    for given in (
        ("train", "lora", "-m", body, "--data", rows, "--steps", 2, "-o", out / "d"),
        ("merge", out / "d", "-o", out / "merged"),
        ("export", out / "d", "-o", out / "bundle"),
    ):
        assert cli.main([str(one) for one in given]) == 0
    return out


def test_every_artefact_says_what_it_was_made_of(made: Path) -> None:
    told = [
        json.loads((made / name).read_text())
        for name in (
            f"d/{MANIFEST}",
            "d/train_report.json",
            f"bundle/{MANIFEST}",
            "merged/merge_report.json",
        )
    ]
    deltas, report, bundle, merged = told
    spec = deltas["spec_digest"]
    assert len(spec) == 64 and report["specs"]["default"] == spec
    assert bundle["spec"]["digest"] == merged["specs"]["default"] == spec
    assert report["seed"] == 0
    for one in told:
        assert one["backbone"]["fingerprint"] == deltas["backbone"]["fingerprint"]
        assert one["versions"]["torch"] == torch.__version__
        assert {"python", "peftc", "transformers"} <= one["versions"].keys()


# What is written, and the bytes after which a file finds no room: in its first file, or in a later one.
WRITES: dict[str, tuple[Sequence[str], Sequence[int]]] = {
    "deltas": (("compile", "rslora", "-m", "{model}", "-o", "{old}"), (0, 3_000)),
    "trained": (("train", "{d}", "--data", "{rows}", "--steps", "2", "-o", "{old}"), (0, 3_000)),
    "checkpoints": (
        ("train", "{d}", "--data", "{rows}", "--steps", "2", "-o", "{old}", "--checkpoints", "{new}"),
        (0, 3_000, 18_000),
    ),
    "merged": (("merge", "{d}", "-o", "{new}"), (0, 3_000, 60_000)),
    "bundle": (("export", "{d}", "-o", "{new}"), (0, 3_000, 60_000)),
    "adapter": (("export-peft", "{d}", "-o", "{new}"), (0, 3_000)),
    "pruned": (("prune", "{d}", "--keep", "100", "-o", "{new}"), (0,)),
}  # fmt: skip
CASES = [(name, limit) for name, (_, limits) in WRITES.items() for limit in limits]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "limit"), CASES)
def test_a_full_disk_is_one_message(
    name: str, limit: int, made: Path, folder: Path, rows: Path, tmp_path: Path
) -> None:
    places = {"model": folder, "d": made / "d", "rows": rows}
    places |= {"old": tmp_path / "old", "new": tmp_path / "new"}
    first = ["compile", "bitfit", "-m", str(folder), "-o", str(tmp_path / "old")]
    assert cli.main(first) == 0
    before = tree(tmp_path)
    code, err = confined([one.format(**places) for one in WRITES[name][0]], limit)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and "Traceback" not in err, err
    assert len(said) == 1 and said[0].endswith("no room on the disk; make some and run it again")
    after = tree(tmp_path)
    for one in set(after) - set(before):
        assert name == "checkpoints" and one == Path("new/training.json")
    assert {one: after[one] for one in before} == before


def tree(path: Path) -> dict[Path, bytes]:
    return {one.relative_to(path): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def confined(given: list[str], limit: int) -> tuple[int, str]:
    """(exit code, stderr) of a command in a process whose files hold no more than so many bytes."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the others stayed in the parent
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        code = 99
        try:
            code = cli.main(given)
        finally:
            os.write(writes, sys.stderr.getvalue().encode()[-60_000:])
            os._exit(code)
    os.close(writes)
    with open(reads) as told:
        err = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), err


def test_deltas_and_their_report_are_written_together(
    run: Run, body: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["train", "lora", "-m", body, "--data", rows, "--steps", 1, "-o", tmp_path / "d"]
    assert run(*given)[0] == 0
    before = tree(tmp_path)

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peftc.training.report.curve", full)
    given[given.index(1)] = 2
    code, _, err = run(*given)
    said = (
        f"error: {tmp_path / 'd'} is not written: no room on the disk; make some and run it again\n"
    )
    assert code == 1 and said in err
    assert tree(tmp_path) == before
