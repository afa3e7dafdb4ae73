"""What lies on disk: an interrupted write is the old artefact, the new one, or refused; never a mix."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run, stir, tiny

import peftc
from peftc.errors import PeftcError
from peftc.export.bundle import verified
from peftc.store import directory
from peftc.store.deltas import WEIGHTS
from peftc.store.directory import (
    FORMAT,
    MANIFEST,
    DeltaError,
    check_files,
    read_manifest,
    write_directory,
)

# What a write over another asks of the system, with a call that exchanges two directories and without; a kill may come
# before or after each.
EXCHANGED, ONE_BY_ONE = ("link", "fsync", "chmod", "exchange"), ("replace", "fsync", "chmod")


def killed(work: Callable[[], object], call: str, number: int, after: bool) -> bool:
    """Run `work` in a process of its own that dies at one of its calls; False where it has fewer."""
    child = os.fork()
    if child == 0:
        where = directory if call == "exchange" else os
        real, seen = getattr(where, call), 0

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal seen
            seen += 1
            if seen == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = real(*args, **kwargs)
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(where, call, counted)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def trained(alpha: float, seed: int) -> peftc.CompiledModel:
    return stir(peftc.compile(tiny("bert"), peftc.load_spec("lora", alpha=alpha)), seed=seed)


def state(path: Path) -> tuple[float, bytes]:
    """(alpha of the spec, the bytes of the tensors) as they load."""
    model = peftc.load(path, tiny("bert"))
    values = b"".join(v.detach().numpy().tobytes() for v in model.deltas.values().values())
    return model.plan.spec.arguments["alpha"], values


def require_exchange() -> None:
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("this system cannot exchange directories")


@pytest.mark.parametrize(
    ("whole", "call"),
    [*((True, one) for one in EXCHANGED), *((False, one) for one in ONE_BY_ONE)],
)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.sampled(4)
def test_a_killed_write_is_never_a_mix(
    whole: bool, call: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole:
        require_exchange()
    else:
        monkeypatch.setattr(directory, "exchange", lambda *_: False)
    old, new = trained(16, 1), trained(64, 2)
    states = {}
    for name, model in (("old", old), ("new", new)):
        model.save_pretrained(tmp_path / name)
        states[name] = state(tmp_path / name)
    for number in range(1, 20):
        path = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "old", path)
        (path / "trainer_state.json").write_text("{}")
        if not killed(lambda: new.save_pretrained(path), call, number, after):  # noqa: B023
            break
        try:
            assert state(path) in states.values()
        except DeltaError as error:
            assert "interrupted" in str(error) and not whole
        assert (path / "trainer_state.json").read_text() == "{}"
        new.save_pretrained(path)  # goes on from there
        assert state(path) == states["new"]
        assert (path / "trainer_state.json").read_text() == "{}"
        assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []
    assert number > 1


@pytest.mark.parametrize("call", EXCHANGED)
@pytest.mark.parametrize("after", [False, True])
def test_a_killed_bundle_is_the_old_or_the_new(call: str, after: bool, tmp_path: Path) -> None:
    """What an export writes, rows for a cache and the certificate among it, over another one."""
    require_exchange()
    made = {"old": {"b.onnx": b"old", "rows.safetensors": b"old"}, "new": {"b.onnx": b"new!"}}

    def write(path: Path, name: str) -> None:
        def fill(folder: Path) -> dict[str, object]:
            for file, content in made[name].items():
                (folder / file).write_bytes(content)
            return {"format": FORMAT, "graphs": {}, "name": name}

        write_directory(path, fill)

    for number in range(1, 20):
        path = tmp_path / f"{number}"
        write(path, "old")
        for one in ("certificate.json", "tokenizer.json"):
            (path / one).write_text("old")
        if not killed(lambda: write(path, "new"), call, number, after):  # noqa: B023
            break
        manifest = read_manifest(path, ("graphs",))
        check_files(path, manifest, content=True)
        found = {one.name: one.read_bytes() for one in path.iterdir()}
        assert {k: found.get(k) for k in made[manifest["name"]]} == made[manifest["name"]]
        assert found["tokenizer.json"] == b"old"
        assert (
            ("certificate.json" in found)
            == ("rows.safetensors" in found)
            == (manifest["name"] == "old")
        )
        write(path, "new")
        assert {one.name for one in path.iterdir()} == {"b.onnx", MANIFEST, "tokenizer.json"}
        assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []
    assert number > 1


def test_folders_in_a_directory_stay(tmp_path: Path) -> None:
    """They cannot be in two places, so files are replaced one by one."""
    trained(16, 1).save_pretrained(tmp_path / "d")
    (tmp_path / "d" / "checkpoint-1").mkdir()
    (tmp_path / "d" / "checkpoint-1" / "state").write_text("mine")
    new = trained(64, 2)
    new.save_pretrained(tmp_path / "d")
    assert state(tmp_path / "d")[0] == 64
    assert (tmp_path / "d" / "checkpoint-1" / "state").read_text() == "mine"


def test_a_killed_write_to_a_new_directory_is_nothing(tmp_path: Path) -> None:
    model = trained(16, 1)
    for number in range(1, 20):
        path = tmp_path / f"{number}"
        if not killed(lambda: model.save_pretrained(path), "replace", number, False):  # noqa: B023
            break
        assert not path.exists()
        model.save_pretrained(path)
        assert read_manifest(path)["format"]
        assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_a_write_in_progress_is_no_orphan(tmp_path: Path) -> None:
    """Two writers of one directory: the second leaves the first one's files alone."""

    def fill(text: str) -> Callable[[Path], None]:
        return lambda folder: (folder / "a.txt").write_text(text) and None

    def outer(folder: Path) -> None:
        write_directory(tmp_path / "d", fill("inner"))
        assert folder.is_dir()
        fill("outer")(folder)
        (folder / MANIFEST).write_text("{}")

    write_directory(tmp_path / "e", fill("x"))
    with pytest.raises(DeltaError, match="did not write"):  # `d` came to be meanwhile
        write_directory(tmp_path / "d", outer)
    assert (tmp_path / "d" / "a.txt").read_text() == "inner"


def test_other_weights_under_a_spec_are_refused(tmp_path: Path) -> None:
    for name, alpha in (("a", 16.0), ("b", 64.0)):
        trained(alpha, int(alpha)).save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "b" / WEIGHTS, tmp_path / "a" / WEIGHTS)
    with pytest.raises(DeltaError, match=r"model\.safetensors is not the file .* written with"):
        peftc.load(tmp_path / "a", tiny("bert"))


def test_deltas_of_before_have_no_digest(tmp_path: Path) -> None:
    model = trained(16, 1)
    model.save_pretrained(tmp_path / "a")
    want = state(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    del manifest["files"]
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest))
    assert state(tmp_path / "a") == want


def test_a_bundle_is_checked_by_sizes_when_it_loads_and_by_content_when_verified(
    tmp_path: Path,
) -> None:
    peftc.export(tiny("bert"), tmp_path / "a")
    peftc.runtime.load(tmp_path / "a")
    data = tmp_path / "a" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    data.write_bytes(content[:-4])
    with pytest.raises(PeftcError, match=r"model\.onnx\.data is damaged"):
        peftc.runtime.load(tmp_path / "a")
    content[100] ^= 1
    data.write_bytes(content)
    peftc.runtime.load(tmp_path / "a")
    with pytest.raises(DeltaError, match="is not the file"):
        check_files(tmp_path / "a", read_manifest(tmp_path / "a", ("graphs",)), content=True)


def test_a_damaged_file_leaves_the_backbone_as_it_was(tmp_path: Path) -> None:
    trained(16, 1).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-8])
    backbone = tiny("bert")
    flags = [one.requires_grad for one in backbone.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(DeltaError):
        peftc.load(tmp_path / "a", backbone)
    assert [one.requires_grad for one in backbone.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("form", "other"),
        ("form", None),
        ("edits", 3),
        ("left", [["a"]]),
        ("left", [[7, "nowhere:ffn"]]),
        ("left", None),
        ("spec", {"name": 1}),
        ("backbone", None),
        ("backbone", {"name": "", "class": "Bert"}),
        ("backbone", {"name": [], "class": 3, "fingerprint": {}}),
        ("files", []),
        ("files", {"model.safetensors": {"bytes": "many"}}),
    ],
)
def test_a_manifest_of_other_things_is_damaged(
    key: str, value: object, tmp_path: Path, run: Run
) -> None:
    trained(16, 1).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(DeltaError):
        peftc.load(tmp_path / "a", tiny("bert"))
    code, _, err = run("verify", tmp_path / "a")
    assert code == 1 and "Traceback" not in err


@pytest.mark.parametrize("key", ["kind", "graphs", "parity", "files", "max_tokens"])
@pytest.mark.parametrize("value", [None, 3, {"model": 3}])
def test_a_bundles_manifest_of_other_things_is_damaged(
    key: str, value: object, bundle: Path, tmp_path: Path, run: Run
) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    file = tmp_path / "b" / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    code, _, err = run("verify", tmp_path / "b")
    assert code in (0, 1) and "Traceback" not in err


def test_a_bundle_of_a_model_with_other_shapes(bundle: Path) -> None:
    said = r"^model: 'logits' is \[\d+, 3\], in torch \[\d+, 4\], at a batch of \d × \d+ tokens"
    with pytest.raises(PeftcError, match=said):
        list(verified(tiny("bert", num_labels=4), bundle))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "b"
    peftc.export(tiny("bert"), path)
    return path


def test_a_spec_that_is_no_text(run: Run, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    for one in (tmp_path / "bad.yaml", tmp_path):
        code, _, err = run("plan", one, "-m", folder)
        assert code == 1 and "Traceback" not in err
