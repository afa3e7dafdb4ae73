"""The report: every change is on the page, with its line of the spec and its nodes; laws on toy models."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import Run, batch, saved, stir, tiny
from rich.console import Console
from toys import ADAPTER, LORA, PREFIX
from transformers import AutoModelForSequenceClassification

import peftc
from peftc.cli.picture import picture as drawn
from peftc.export.bundle import export
from peftc.language.reader import load_spec, parse_spec
from peftc.plan.plan import Miss
from peftc.report import report
from peftc.report.changes import FOLDED, INSERTED, REMOVED, steps
from peftc.report.costs import costs
from peftc.report.layers import Block, tree
from peftc.report.sketch import sketches
from peftc.report.source import sheets
from peftc.report.subject import Subject, of_bundle, of_deltas, of_specs

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "mam.svg"
CASES = {
    "lora": ("bert", "lora"),
    "mam": ("bart", "mam"),
    "ia3": ("llama", "ia3"),
    "dora": ("gpt2", "dora"),
    "prompt": ("bart", "prompt_tuning"),
    "bitfit": ("bert", "bitfit"),
    "experts": ("mixtral", "lora_experts"),
    "mixer": ("mamba", "lora_conv"),
}


@cache
def subject(case: str) -> Subject:
    family, method = CASES[case]
    return of_specs(tiny(family), [load_spec(method)])


class Read(HTMLParser):
    """The elements of a page that are linked, by their ids, and all the tokens that stand for one."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.found: list[dict[str, str]] = []
        self.feed(html)
        self.known = {word for one in self.found for word in one.get("data-is", "").split()}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.append(given["id"])
        if "data-is" in given:
            self.found.append(given)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
def test_every_change_is_on_the_page_with_its_line(case: str) -> None:
    one = subject(case)
    page = report.page(one)
    html = page.html()
    read = Read(html)
    assert len(read.ids) == len(set(read.ids))
    for given in read.found:
        for key in ("data-of", "data-in"):
            assert set(given.get(key, "").split()) <= read.known
        assert set(given.get("data-reads", "").split()) <= set(read.ids)
    named = {step.name: step for step in steps(one)}
    shown = {step.name for step in page.graph.root.steps()}
    lines = {e for sheet in page.sheets for line in sheet.lines for e in line.entries}
    inserted = [node for node in one.after.graph.nodes if "delta" in node.meta]
    for node in inserted:
        step = named[node.name]
        assert step.state == INSERTED
        assert set(step.entries) <= lines and step.entries
        assert page.graph.step(step.name) in shown or step.is_size
    assert lines == set(range(len(one.plan.spec.entries)))
    if not inserted:
        assert any(step.entries for step in named.values())
    assert "http" not in re.sub(r"http-equiv", "", html)
    assert len(html) < 400_000


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
def test_before_and_after_are_both_whole(case: str) -> None:
    """Each call of either graph is a step, once."""
    one = subject(case)
    found = steps(one)
    before, after = (
        [n.name for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
        for graph in (one.before, one.after)
    )
    gone = [step.name for step in found if step.state == REMOVED]
    assert sorted(step.name for step in found) == sorted({*before, *after})
    assert sorted(gone) == sorted(set(before) - set(after))


def test_before_is_what_was_there() -> None:
    """A linear reads its own weight before, and one that is computed after; rows in front make values longer."""
    found = steps(of_specs(tiny("bert"), [load_spec("dora")]))
    changed = [one for one in found if one.was and one.op == "linear"]
    assert len(changed) == 4
    for one in changed:
        assert "weight" not in [t.name for t in one.tensors]
        assert "weight" in [t.name for t in one.was.tensors]
    longer = [one for one in steps(subject("prompt")) if one.was]
    assert any(
        (one.was.shape, one.shape) == ("[batch, seq, 32]", "[batch, seq + 100, 32]")
        for one in longer
    )


def blocks(one: Subject) -> dict[str, int]:
    return {block.path: len(block.paths) for block in tree(steps(one)).root.blocks()}


def test_layers_of_one_structure_are_one_block() -> None:
    bare = tiny("bert", num_hidden_layers=3)
    assert blocks(of_specs(bare, [load_spec("lora")]))["bert.encoder.layer.0"] == 3
    found = blocks(of_specs(bare, [parse_spec(LORA, "first")]))
    assert (found["bert.encoder.layer.0"], found["bert.encoder.layer.1"]) == (1, 2)
    assert "bert.encoder.layer.2" not in found


def test_what_is_not_shown_stands_for_what_is() -> None:
    """A step of each of the equal layers is that of the first, op for op."""
    one = subject("mam")
    found = tree(steps(one))
    named = {step.name: step for step in steps(one)}
    for other, shown in found.stands.items():
        assert named[other].op == named[shown].op
        assert named[other].entries == named[shown].entries
    values = [step for step in named.values() if not step.is_size]
    assert sum(_times(found.root)) == len(values)


def _times(block: Block, times: int = 1) -> Iterator[int]:
    for one in block.items:
        if isinstance(one, Block):
            yield from _times(one, times * len(one.paths))
        elif not one.is_size:
            yield times


def test_lines_of_specs_that_use_others() -> None:
    spec = load_spec("mam")
    found = {sheet.file: sheet.lines for sheet in sheets([spec], spec.entries)}
    assert list(found) == ["mam.yaml", "prefix_tuning.yaml", "scaled_parallel_adapter.yaml"]
    lines = [line.entries for line in found["mam.yaml"]]
    assert lines == [(), (), (), (), (0,), (0,), (1,), (1,), ()]
    named = {line.parameter for line in found["scaled_parallel_adapter.yaml"]}
    assert named == {"", "down", "down_bias", "up", "up_bias"}
    assert found["prefix_tuning.yaml"][-2].entries == (0,)


def test_a_comment_behind_a_delta_is_of_none() -> None:
    spec = parse_spec(LORA + "\n# done\n", "own.yaml")
    (sheet,) = sheets([spec], spec.entries)
    assert [line.number for line in sheet.lines if line.entries] == [3, 4, 5, 6, 7, 8, 9]


@pytest.fixture(scope="module", params=["lora", "mam"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / request.param
    with torch.no_grad():
        export(stir(peftc.compile(tiny("bert"), request.param)), path)
    return path


def test_a_bundle_strikes_out_what_folded(bundle: Path) -> None:
    one = of_bundle(bundle)
    page = report.page(one)
    folded = {key for key, outcome in one.outcomes.items() if outcome.folded}
    assert {edit.key for edit in one.plan.edits} == one.outcomes.keys()
    found = steps(one)
    sites = {
        (step.entries[0], step.site) for step in found if step.state == FOLDED and not step.ahead
    }
    assert sites == folded
    assert all(step.by for step in found if step.state == FOLDED)
    html = page.html()
    assert ("<del>" in html) == any(step.state == FOLDED for step in found)
    assert len(one.checks) == 1 and one.checks[0].holds
    if bundle.name == "lora":
        assert len(folded) == 4
        assert not [step for step in found if step.state == INSERTED]
        assert {outcome.by for outcome in one.outcomes.values()} == {"fold_affine"}


def test_onnx_nodes_know_their_calls(bundle: Path) -> None:
    one = of_bundle(bundle)
    page = report.page(one)
    assert one.bundle is not None
    (nodes,) = one.bundle.nodes.values()
    linked = [name for name in page.links if name.startswith("model:")]
    assert len(linked) > 0.8 * len(nodes)
    named = {step.name: step for step in steps(one)}
    products = [i for i, row in enumerate(nodes) if row[1] == "MatMul"]
    for i in products:
        assert named[page.links[f"model:{i}"]].op in (
            "linear",
            "matmul",
            "add",
        )  # of two as one, their sum
    entries = {e for step in page.onnx["model"].root.steps() for e in step.entries}
    assert entries == set(range(len(one.plan.spec.entries)))


def test_deltas_need_no_weights(folder: Path, tmp_path: Path) -> None:
    path = saved("lora", folder, tmp_path / "d")
    one = of_deltas(path)
    assert one.model.device.type == "meta"
    assert {line.entries for line in sheets(one.specs, one.plan.spec.entries)[0].lines} >= {(0, 1)}
    assert report.page(one).checks == ()


def test_deltas_that_were_saved_as_they_are_stored(folder: Path, tmp_path: Path) -> None:
    """Without the MLP of the prefix: it is struck out, as is what a merge took."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    peftc.compile(model, "mam").save_pretrained(tmp_path / "d", stored=True)
    found = steps(of_deltas(tmp_path / "d"))
    gone = [step for step in found if step.state == FOLDED]
    assert gone and all(step.ahead and step.by == "saving" for step in gone)
    said = json.loads((tmp_path / "d" / "peftc.json").read_text())
    said["left"] = [one for one in said["left"] if one[0] == 0]
    (tmp_path / "d" / "peftc.json").write_text(json.dumps(said))
    merged = [step for step in steps(of_deltas(tmp_path / "d")) if step.by == "merge"]
    assert merged and {step.entries for step in merged} == {(1,)}


def test_costs_are_those_of_the_graphs() -> None:
    spent = costs(subject("lora"), 2, 16)
    assert spent.kernels and spent.flops and spent.saved
    assert spent.kernels[0] < spent.kernels[1] <= spent.kernels[0] + 4 * 4
    rows, width, rank = 2 * 16, 32, 8
    assert spent.flops[1] - spent.flops[0] == 4 * 2 * 2 * rows * width * rank
    assert spent.saved[1] < spent.saved[0]


@pytest.mark.slow
def test_costs_of_a_graph_that_is_one_for_its_length() -> None:
    spent = costs(subject("mixer"), 2, 8)
    assert spent.kernels and spent.flops
    assert spent.flops[0] == spent.flops[1]  # what is of weights alone is computed once


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
def test_pictures_are_drawn_of_every_method(case: str) -> None:
    one = subject(case)
    drawings = report.pictures(one, alone=True)
    assert drawings
    for said in drawings:
        root = ET.fromstring(said)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
    marked = {edit.entry.method for edit in one.plan.edits}
    assert all(any(name in said for said in drawings) for name in marked)


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "lora_ffn"), ("gpt2", "lora"), ("bart", "mam"), ("mixtral", "lora_experts")],
)
def test_a_delta_reads_what_the_picture_shows(family: str, method: str) -> None:
    """Its first matrix is as wide as the projection that it is drawn at, or as the sub-layer."""
    seen = 0
    for layer in sketches(of_specs(tiny(family), [load_spec(method)]).plan):
        for part in layer.parts:
            sizes = dict(part.pieces)
            for mark in (one for one in part.marks if one.insertion == "parallel"):
                first = next(one.sizes for one in mark.stages if one.sizes)
                assert {first[0]} == {sizes[one][0] for one in mark.pieces} or (
                    not mark.pieces and first[0] == part.sizes[0]
                )
                seen += 1
    assert seen


def small(case: str, plain: bool) -> str:
    console = Console(width=80, highlight=False)
    with console.capture() as capture:
        console.print(drawn(subject(case).plan, 80, plain))
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def test_the_picture_of_a_plan(golden: object) -> None:
    cases = ("lora", "mam", "bitfit", "dora", "experts")
    said, plain = ("".join(f"# {c}\n{small(c, p)}" for c in cases) for p in (False, True))
    assert plain.isascii()
    assert max(map(len, (*said.splitlines(), *plain.splitlines()))) <= 80
    golden("plan_pictures.txt", said + plain)  # type: ignore[operator]


def test_the_command_writes_a_page_and_a_picture(run: Run, folder: Path, tmp_path: Path) -> None:
    page, svg = tmp_path / "r.html", tmp_path / "r.svg"
    code, out, err = run("report", "lora", "-m", folder, "-o", page, "--svg", svg, "--batch", 2)
    assert code == 0, err
    assert f"wrote {page} ({page.stat().st_size:,} bytes)" in " ".join(out.split())
    assert "bytes saved for backward" in page.read_text()
    ET.fromstring(svg.read_text())
    assert str(folder.parent) not in page.read_text()


def test_the_command_compares(run: Run, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    code, out, _ = run("report", "--compare", "lora", "ia3", "-m", folder, "-o", page, "--batch", 2)
    assert code == 0
    assert "parameters that train" in out and "bytes that a step saves" in out
    assert page.read_text().count("<svg") == 2


def test_what_is_left_alone_says_why() -> None:
    page = report.page(subject("lora"))
    miss = Miss("lora", "a.b:attention.q", "'x < y' reads this weight too")
    html = replace(page, plan=replace(page.plan, misses=(miss,))).html()
    assert "&#x27;x &lt; y&#x27; reads this weight too" in html and "1: a.b:attention.q" in html


def test_a_head_alone_has_no_picture() -> None:
    one = of_specs(tiny("bert"), [load_spec("head")])
    assert report.pictures(one) == () and "people draw" not in report.page(one).html()


WRONG = {
    "nothing": ((), "name a spec, a directory of deltas or a bundle"),
    "nowhere": (("lora", "-m", "{model}"), "say what to write: -o report.html, or --svg layer.svg"),
    "no model": (("lora", "-o", "{out}"), "--model is needed: which model are these specs for?"),
    "one": (("--compare", "lora", "-m", "{model}"), "--compare takes two specs, not 1"),
    "set": (("{lora}", "--set", "r=2", "-o", "{out}"), "{lora} is reported by itself, as it is: no --set"),
    "a checkpoint": (
        ("{model}", "-o", "{out}"),
        "{model} is neither deltas nor a bundle; name one of these, or a spec and --model",
    ),
    "no picture": (
        ("lora", "-m", "{model}", "--svg", "{out}", "--layer", "9"),
        "there is no picture 9: lora has 1",
    ),
    "no record": (
        ("{old}", "-o", "{out}"),
        "{old} holds no report.json: it was exported without deltas, or by an older peftc; export it again",
    ),
    "no backbone": (
        ("{nameless}", "-o", "{out}"),
        "{nameless} names no backbone (BertForSequenceClassification); say --model",
    ),
    "damaged record": (
        ("{record}", "-o", "{out}"),
        "{record}/report.json is damaged: it lacks 'spec'; export it again",
    ),
    "damaged manifest": (
        ("{manifest}", "-o", "{out}"),
        "{manifest}/peftc.json is damaged: it lacks 'graph'; export it again",
    ),
    "damaged certificate": (
        ("{certificate}", "-o", "{out}"),
        "{certificate}/certificate.json is damaged: it lacks 'rows'; run peftc verify again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(run: Run, case: str, folder: Path, lora: Path, tmp_path: Path) -> None:
    places = {"model": folder, "lora": lora, "out": tmp_path / "out"}
    said = {"format": 2, "kind": "x", "graphs": {}, "parity": [], "data_bytes": 0}
    for name, more in (("old", {}), ("record", {}), ("manifest", {"parity": [{}]}), ("certificate", {})):  # fmt: skip
        places[name] = tmp_path / name
        places[name].mkdir()
        (places[name] / "peftc.json").write_text(json.dumps({**said, **more}))
        (places[name] / "model.onnx").write_text("")
    (places["record"] / "report.json").write_text("{}")
    (places["certificate"] / "certificate.json").write_text("{}")
    places["nameless"] = shutil.copytree(lora, tmp_path / "nameless")
    named = json.loads((lora / "peftc.json").read_text())
    named["backbone"]["name"] = ""
    (places["nameless"] / "peftc.json").write_text(json.dumps(named))
    given, message = WRONG[case]
    code, _, err = run("report", *(one.format(**places) for one in given))
    assert code == 1
    assert err.splitlines()[-1].partition(" (see")[0] == f"error: {message.format(**places)}"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("bart-large")
def test_a_page_of_bart_large(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    given = ("mam", "-m", "facebook/bart-large", "--random-weights", "-o", page)
    code, _, err = run("report", *given)
    assert code == 0, err
    text = page.read_text()
    assert len(text) < 2_000_000
    assert text.count("× 12<") >= 2
    assert "27,414,528" in text and "406,291,456" in text


@pytest.mark.slow
@pytest.mark.xdist_group("bart-large")
def test_the_picture_of_the_readme(
    run: Run, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """It is what the command draws; `pytest --accept` draws it anew."""
    drawn = PICTURE if request.config.getoption("--accept") else tmp_path / "mam.svg"
    given = ("mam", "-m", "facebook/bart-large", "--random-weights", "--svg", drawn)
    code, _, err = run("report", *given)
    assert code == 0, err
    assert drawn.read_text() == PICTURE.read_text()


@pytest.mark.parametrize("spec", [LORA, PREFIX, ADAPTER])
def test_the_facts_are_carried_by_the_nodes(spec: str) -> None:
    """Each node that an edit inserted knows it, in graphs that run too."""
    model = peftc.compile(tiny("bert"), parse_spec(spec, "toy"))
    known = {edit.key for edit in model.plan.edits}
    for mode in (False, True):
        program = model.train(mode).lean_program(batch(model))
        for node in program.graph.nodes:
            if "delta" in node.meta:
                index, site = node.meta["edit"]
                assert (index, site) in known or (not site and index == 0)
