"""`make gpu` at toy size on the CPU: every row has its figures or says why not, and no row stops another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu
import measured
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

TOY = ("--size", "toy", "--device", "cpu")
QUICK = (*TOY, "--pairs", "2", "--seconds", "0.1", "--backend", "aot_eager")


def run(path: Path, *arguments: str) -> dict[str, Any]:
    """What a run writes."""
    gpu.main([*arguments, "--out", str(path)])
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_every_row(name: str, tmp_path: Path) -> None:
    found = run(tmp_path / "gpu.json", *QUICK, "--only", name)
    rows = {what: found["rows"][f"{name}: {what}"] for what in gpu.ROWS}
    assert found["machine"]["device"] == "cpu" and found["machine"]["size"] == "toy"
    assert len(found["rows"]) == len(gpu.ROWS) == len(found["left"])
    for more in ("", ", fp16, fused"):
        assert rows[f"generate, ONNX Runtime{more}"]["provider"] == "CPUExecutionProvider"
    for what, row in rows.items():
        assert "refused" not in row, what
        if "seconds" in row:
            low, high = row["interval"]
            assert low <= row["ratio"] <= high and row["pairs"] >= 2, what
            speeds = row.get("tokens per second", {})
            assert speeds.keys() == (row["seconds"].keys() if speeds else set())
            for side, speed in speeds.items():
                assert speed == pytest.approx(measured.SIZES["toy"].tokens / row["seconds"][side])
    cores = {"llama": 2, "bart": 6}[name]
    ways = {"ways": {"flash": cores}, "kernels": {}}
    for what in ("attention, full batch", "attention, padded batch"):
        assert rows[what] == {"bare": ways, "peft": ways, "ours": ways}
    assert 0.5 < rows["peak memory of a training step"]["ratio"] < 2
    for what in ("training step, compiled", "generate, compiled"):
        assert all(side["graphs"] >= 1 for side in rows[what]["compiled"].values())


@pytest.mark.slow
def test_a_row_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what was found stands in the file before the next row is taken."""
    path = tmp_path / "gpu.json"

    def fails(*_: object) -> dict[str, Any]:
        raise RuntimeError(f"no kernel in {tmp_path}\nfor this <object at 0x7f00>")

    def sees(subject: gpu.Subject, _: object) -> dict[str, Any]:
        assert "left" in json.loads(path.read_text())
        return {"name": subject.name}

    monkeypatch.setattr(gpu, "ROWS", {"fails": fails, "sees": sees})
    found = run(path, *TOY)
    refused = found["rows"]["bart: fails"]["refused"]
    assert refused.startswith("RuntimeError: no kernel in ") and str(tmp_path) not in refused
    assert refused.endswith(" for this <object>") and "bart: fails" in capsys.readouterr().out
    assert found["rows"]["llama: sees"] == {"name": "llama"} and found["left"] == []
    assert [one.name for one in tmp_path.iterdir()] == ["gpu.json"]


def test_only_adds_to_a_file_of_the_same_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "ROWS", {"one": lambda *_: {"n": 1}, "two": lambda *_: {"n": 2}})
    assert [*run(path, *TOY, "--only", "one")["rows"]] == ["bart: one", "llama: one"]
    found = run(path, *TOY, "--only", "bart: two")
    assert [*found["rows"]] == ["bart: one", "bart: two", "llama: one"]
    assert found["left"] == ["llama: two"]
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(SystemExit, match="its rows are of another torch; give --out another file"):
        run(path, *TOY, "--only", "two")


def test_without_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    said = capsys.readouterr().err
    assert "--device cuda: torch " in said and "pass --device cpu --size toy" in said
    assert gpu.parsed(TOY).out is None


def test_without_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "get_available_providers", tuple)
    subject = gpu.Subject("bart", measured.SIZES["toy"], "cuda", "inductor")
    with pytest.raises(RuntimeError, match=r"CUDAExecutionProvider is not installed: peftc"):
        gpu.onnx_runtime(subject, lambda *_: {})


@pytest.mark.parametrize(("name", "parameters"), [("bart", 406_291_456), ("llama", 1_104_218_112)])
def test_real_sizes(name: str, parameters: int) -> None:
    model = measured.bare(name, device="meta", **measured.SIZES["real"].models[name])
    assert model.num_parameters() == parameters


def test_attention_is_named_by_its_op() -> None:
    toy = measured.SIZES["toy"].models["llama"]
    step = measured.training_step(measured.bare("llama", **toy), measured.batch("llama", 2, 8))
    with sdpa_kernel(SDPBackend.MATH):
        assert measured.attention(step) == {"ways": {"math": 2}, "kernels": {}}
