"""The ONNX bundle: the same numbers and tokens as torch, and nothing of this machine in it."""

from __future__ import annotations

import copy
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import onnx_ir
import onnxruntime
import pytest
import torch
from conftest import batch, logits, stir, tiny
from transformers import PreTrainedModel

import peftc
from peftc.errors import PeftcError
from peftc.export.bundle import verified
from peftc.rewrite.tolerance import tolerance
from peftc.runtime.session import CPU, CUDA

SMALL = {"lora": dict(r=4, alpha=8), "mam": dict(l=5, m=6, r=4)}
MODES = {
    "greedy": dict(do_sample=False),
    "beam": dict(num_beams=4, do_sample=False, length_penalty=2.0),
    "sample": dict(do_sample=True, top_k=20),
    "uncached": dict(do_sample=False, use_cache=False),
}


@pytest.fixture(scope="module", params=[pytest.param("lora", marks=pytest.mark.slow), "mam"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """(method, compiled BART with stirred deltas, its bundle)"""
    model = stir(
        peftc.compile(tiny("bart"), peftc.load_spec(request.param, **SMALL[request.param]))
    )
    directory = tmp_path_factory.mktemp("bundle") / request.param
    return request.param, model, directory, peftc.export(model, directory)


def generate(model: PreTrainedModel, mode: str) -> torch.Tensor:
    inputs = batch(tiny("bart"), "left")
    del inputs["decoder_input_ids"]
    torch.manual_seed(7)
    out: torch.Tensor = model.generate(**inputs, max_new_tokens=10, min_new_tokens=6, **MODES[mode])
    return out


def test_tokens_are_those_of_torch(written) -> None:  # type: ignore[no-untyped-def]
    _, model, directory, _ = written
    runner = peftc.runtime.load(directory)
    for mode in MODES:
        assert torch.equal(generate(runner, mode), generate(model, mode)), mode


def test_certificate_and_files(written) -> None:  # type: ignore[no-untyped-def]
    method, model, directory, certificate = written
    assert {one.graph: one.cases for one in certificate} == {"encoder": 8, "decoder": 11}
    assert all(one.error <= one.tolerance for one in certificate)
    whole = [*verified(model, directory, full=True)]
    assert {one.graph: one.cases for one, _ in whole} == {"encoder": 14, "decoder": 84}
    assert not any(fault for _, fault in whole)
    names = {one.name for one in directory.iterdir()}
    assert names == {
        "config.json",
        "decoder.onnx",
        "encoder.onnx",
        "generation_config.json",
        "model.onnx.data",
        "peftc.json",
        "report.json",
        *(["rows.safetensors"] if method == "mam" else []),
    }
    here = str(Path(peftc.__file__).parent).encode()
    for one in directory.iterdir():
        content = one.read_bytes()
        assert here not in content and b"site-packages" not in content and b".py" not in content
    weights = (directory / "model.onnx.data").stat().st_size
    assert weights < 2 * 4 * tiny("bart").num_parameters() + 4096 * 200


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_rows_in_front(family: str, tmp_path: Path) -> None:
    """A prompt is in the graph; whoever runs it sees the tokens alone."""
    model = stir(peftc.compile(tiny(family), peftc.load_spec("prompt_tuning", l=5)))
    for parity in peftc.export(model, tmp_path):
        assert parity.error <= parity.tolerance
    runner = peftc.runtime.load(tmp_path)
    assert runner.max_tokens == model.config.max_position_embeddings - 5
    inputs = batch(model, "left")
    if family == "bert":
        got, want = runner(**inputs).logits, logits(model, inputs)
        assert (got - want).abs().max() <= tolerance(want.abs().max())
    else:
        assert torch.equal(generate(runner, "beam"), generate(model, "beam"))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("opset", [20, 23])
def test_classifier(family: str, opset: int, tmp_path: Path) -> None:
    method = {"roberta": "mam", "bert": "lora"}[family]
    model = stir(peftc.compile(tiny(family), [peftc.load_spec(method, **SMALL[method]), "head"]))
    peftc.export(model, tmp_path / "b", opset=opset)
    runner = peftc.runtime.load(tmp_path / "b")
    for padding in ("none", "left", "right"):
        inputs = batch(model, padding)
        want = logits(model, inputs)
        assert (runner(**inputs).logits - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1)


def test_what_is_refused(  # type: ignore[no-untyped-def]
    written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, directory, _ = written
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(PeftcError, match="not written by peftc"):
        peftc.export(model, tmp_path / "mine")
    assert [one.name for one in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    assert peftc.runtime.load(broken, check=True).can_generate()
    for name, plain in (("encoder.onnx", False), ("model.onnx.data", True)):
        whole = (broken / name).read_bytes()
        middle = len(whole) // 2
        (broken / name).write_bytes(
            whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        )
        said = rf"{re.escape(name)} is not the file that peftc\.json was written with"
        with pytest.raises(PeftcError, match=said):
            peftc.runtime.load(broken, check=plain)
        (broken / name).write_bytes(whole)
    (broken / "encoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(PeftcError, match=r"encoder\.onnx is damaged"):
        peftc.runtime.load(broken)
    (broken / "encoder.onnx").unlink()
    with pytest.raises(PeftcError, match=r"lacks encoder\.onnx"):
        peftc.runtime.load(broken)
    with pytest.raises(PeftcError, match=f"has no {CUDA}"):
        peftc.runtime.load(directory, (CUDA,))
    if not torch.cuda.is_available():  # as a wheel for GPUs has it: listed, and not there
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, *CPU])
        said = f"{CUDA} did not start, and ONNX Runtime would run on the CPU; see peftc doctor"
        with pytest.raises(PeftcError, match=said):
            peftc.runtime.load(directory, (CUDA,))
    with pytest.raises(PeftcError, match="an ONNX bundle, not what is wanted"):
        peftc.load(directory, backbone=tiny("bart"))


def test_verified_says_what_differs(written) -> None:  # type: ignore[no-untyped-def]
    _, model, directory, _ = written
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.model.decoder.layers[1].fc2.weight.mul_(1.1)
    encoder, decoder = (fault for _, fault in verified(moved, directory))
    assert not encoder and re.match(
        r"decoder: '\S+' differs from torch by .*, at a batch of [13] × \d", decoder
    )
    with pytest.raises(PeftcError, match="is for text2text-generation, and this model for text-cl"):
        next(verified(tiny("bert"), directory))
    wider = stir(peftc.compile(tiny("bart", decoder_layers=3), "lora"))
    with pytest.raises(
        PeftcError, match=r"coder\.onnx is of another model: only one of both has \'p"
    ):
        list(verified(wider, directory))


def test_a_bundle_does_not_replace_deltas(tmp_path: Path) -> None:
    model = peftc.compile(tiny("bert"), "head")
    model.save_pretrained(tmp_path / "deltas")
    with pytest.raises(PeftcError, match="holds deltas, which a bundle would replace"):
        peftc.export(model, tmp_path / "deltas")


def test_a_damaged_bundle_says_so(written, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, _, directory, _ = written
    for name, old, new, message in (
        ("peftc.json", "text2text-generation", "other", "no such kind or graph"),
        (
            "peftc.json",
            "BartForConditionalGeneration",
            "Bart5",
            "broken was made of a Bart5, which transformers does not have",
        ),
        ("config.json", "{", "", r"/config\.json is damaged"),
        ("config.json", '"d_model": 32', '"d_model": "x"', "'d_model' expected int, got str"),
        ("generation_config.json", "{", "", r"generation_config\.json is damaged"),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(directory, broken)
        content = (broken / name).read_text()
        assert old in content
        (broken / name).write_text(content.replace(old, new))
        with pytest.raises(PeftcError, match=message):
            peftc.runtime.load(broken)
        (broken / name).unlink()
        with pytest.raises(PeftcError, match=rf"broken (lacks|holds no) {re.escape(name)}"):
            peftc.runtime.load(broken)
        shutil.rmtree(broken)


def test_what_a_runner_is_asked_wrong(written) -> None:  # type: ignore[no-untyped-def]
    runner = peftc.runtime.load(written[2])
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(PeftcError, match="token ids and masks are int64, not attention_mask: tor"):
        runner.generate(ids, attention_mask=ids.int())
    with pytest.raises(
        PeftcError, match=r"the graph cannot run on these inputs: .* out of .*bounds"
    ):
        runner.generate(ids * 120)
    encoder = runner.sessions[0]
    for given, said in (
        ({"input_ids": ids}, "needs 'attention_mask'"),
        (dict.fromkeys([*encoder.inputs, "labels"], ids), "takes no 'labels'"),
    ):
        with pytest.raises(PeftcError, match=f"graph {said}; it takes input_ids, attention_mask$"):
            encoder.run(given)
    with pytest.raises(PeftcError, match="holds no tokenizer; export it with one, or pass tensors"):
        runner.text2text_generation(["a"])


GRAPHS = {
    "causal": ("Attention", {"is_causal": 1}, "an Attention node relies on is_causal; pass a mask"),
    "branches": ("If", {}, "the graph has control flow (If)"),
    "loops": ("Loop", {}, "the graph has control flow (Loop)"),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_a_graph_that_runtimes_disagree_on_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No exporter of now writes one; one that does must not go unseen."""
    op, attributes, message = GRAPHS[case]
    node = onnx_ir.node(op, [], attributes)
    made = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[node]), ir_version=10)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model=made))
    with pytest.raises(PeftcError) as caught:
        peftc.export(tiny("bert"), tmp_path / "b")
    assert str(caught.value) == f"model: {message}"
    assert [*tmp_path.iterdir()] == []


def test_a_graph_that_torch_cannot_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such op\nin the middle of it")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(PeftcError, match=r"^model cannot be exported: no such op") as caught:
        peftc.export(tiny("bert"), tmp_path / "b")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [*tmp_path.iterdir()] == []


def test_positions_that_padding_takes_are_no_tokens(tmp_path: Path) -> None:
    """RoBERTa numbers its tokens from behind the padding on: a text is shorter by that."""
    model = tiny("roberta")
    peftc.export(model, tmp_path / "b")
    most = peftc.runtime.load(tmp_path / "b").max_tokens
    assert most == model.config.max_position_embeddings - model.config.pad_token_id - 1
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, most + 1), 5))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "kind"), [("bert", "classifier"), ("bart", "seq2seq")])
def test_a_bundle_by_the_name_that_its_kind_had(family: str, kind: str, tmp_path: Path) -> None:
    peftc.export(tiny(family), tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "peftc.json").read_text())
    said = {k: v for k, v in manifest.items() if k != "files"} | {"kind": kind}
    (tmp_path / "b" / "peftc.json").write_text(json.dumps(said))
    runner = peftc.runtime.load(tmp_path / "b")
    inputs = batch(tiny(family))
    assert runner(**inputs).logits.shape == tiny(family)(**inputs).logits.shape


def test_two_hundred_threads(written) -> None:  # type: ignore[no-untyped-def]
    """One runner, called by all of them at once, gives each its own answer: caches are the callers'."""
    _, _, directory, _ = written
    runner = peftc.runtime.load(directory)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 120, (1, 3 + i % 5), generator=generator) for i in range(200)]

    def write(ids: torch.Tensor) -> list[int]:
        found: list[int] = runner.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[
            0
        ].tolist()
        return found

    with ThreadPoolExecutor(200) as pool:
        at_once = [*pool.map(write, texts)]
    assert at_once == [write(ids) for ids in texts]
