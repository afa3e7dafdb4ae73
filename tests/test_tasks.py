"""A row a task: the same numbers and answers as torch and transformers' own pipelines, or a refusal that names all rows."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ENCODER, SEQ2SEQ, Run, batch, stir, tiny, wide
from methods import lacks
from methods import spec as spec_of
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import peftc
from peftc.driver import outputs
from peftc.errors import PeftcError
from peftc.export.tasks import TASKS
from peftc.language.shelf import shipped
from peftc.rewrite.tolerance import tolerance
from peftc.runtime import RUNNERS, RuntimeFault

BERT = {k: v for k, v in ENCODER.items() if k != "num_labels"}
VIT = {k: v for k, v in BERT.items() if k not in ("vocab_size", "max_position_embeddings")}
WORDS = ["good", "fine", "great", "bad", "poor", "sad", "very", "so", "film", "song"]
TEXTS = ["a very good film", "so sad", "great song very very fine"]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=24,
    )


def built(name: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    sizes = VIT | dict(image_size=16, patch_size=4) if name.startswith("ViT") else BERT
    return wide(cls(cls.config_class(**{**sizes, **changes})))


# Heads of one graph: (class, changes of its configuration) by the row that it belongs to, and the method put on it.
HEADS: dict[str, tuple[str, str, dict[str, object], str]] = {
    "one label": (
        "text-classification",
        "BertForSequenceClassification",
        {"num_labels": 3},
        "lora",
    ),
    "several labels": (
        "text-classification",
        "BertForSequenceClassification",
        dict(num_labels=3, problem_type="multi_label_classification"),
        "mam",
    ),
    "a number": (
        "text-classification",
        "BertForSequenceClassification",
        dict(num_labels=1, problem_type="regression"),
        "ia3",
    ),
    "tokens": (
        "token-classification",
        "BertForTokenClassification",
        {"num_labels": 3},
        "houlsby_adapter",
    ),
    "spans": ("question-answering", "BertForQuestionAnswering", {}, "prefix_tuning"),
    "words": ("fill-mask", "BertForMaskedLM", {}, "prompt_tuning"),
    "vectors": ("feature-extraction", "BertModel", {}, "parallel_adapter"),
    "images": ("image-classification", "ViTForImageClassification", {"num_labels": 3}, "lora"),
}
SMALL: dict[str, dict[str, object]] = {
    "mam": dict(l=3, m=4, r=4),
    "prefix_tuning": dict(l=3, m=4),
    "prompt_tuning": dict(l=3),
}


def exported(one: str, tmp_path: Path, tokenizer: Any = None) -> tuple[PreTrainedModel, Any]:
    """A compiled model and the runner of its bundle."""
    _, name, changes, method = HEADS[one]
    spec = peftc.load_spec(method, **SMALL.get(method, {}))
    model = stir(peftc.compile(built(name, **changes), spec))
    for parity in peftc.export(model, tmp_path / "b", tokenizer=tokenizer):
        assert parity.error <= parity.tolerance
    return model, peftc.runtime.load(tmp_path / "b")


@pytest.mark.sampled(8)
@pytest.mark.parametrize("one", HEADS)
def test_outputs_are_those_of_torch(one: str, tmp_path: Path) -> None:
    model, runner = exported(one, tmp_path)
    manifest = json.loads((tmp_path / "b" / "peftc.json").read_text())
    assert manifest["kind"] == HEADS[one][0]
    for padding in ("none", "left", "right") if model.main_input_name == "input_ids" else ("none",):
        inputs = batch(model, padding)
        want, got = outputs(model, inputs), runner(**inputs)
        for name in got:
            real = inputs.get("attention_mask", torch.ones(1)).bool()
            along = want[name].ndim > 1 and want[name].shape[:2] == real.shape
            a, b = (v[real] if along else v for v in (want[name], got[name]))
            assert (a - b).abs().max() <= tolerance(want[name].abs().max().item()), name


ANSWERS = ("one label", "several labels", "a number", "tokens", "words")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("one", ANSWERS)
def test_answers_are_those_of_transformers(
    one: str, tmp_path: Path, words: PreTrainedTokenizerFast
) -> None:
    """Its pipelines over the torch model are the oracle."""
    model, runner = exported(one, tmp_path, words)
    kind = HEADS[one][0]
    texts = [f"{text} <mask>" for text in TEXTS] if kind == "fill-mask" else TEXTS
    want = transformers.pipeline(kind, model=model, tokenizer=words, device="cpu")(texts)
    assert near(getattr(runner, kind.replace("-", "_"))(texts), want)


def test_images(tmp_path: Path) -> None:
    maker = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    model = stir(peftc.compile(tiny("vit"), "lora"))
    peftc.export(model, tmp_path / "b", processor=maker)
    noise = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy().astype("uint8"))
    pipe = transformers.pipeline(
        "image-classification", model=model, image_processor=maker, device="cpu"
    )
    got = peftc.runtime.load(tmp_path / "b").image_classification([image] * 2)
    assert near(got, pipe([image] * 2))


@pytest.mark.slow
def test_sounds(tmp_path: Path) -> None:
    letters = [chr(97 + i % 26) + str(i // 26 or "") for i in range(116)]
    names = ["<|pad|>", "<|unk|>", "<|endoftext|>", "<|startoftranscript|>"]
    places = dict(zip(("pad", "bos", "eos", "decoder_start"), range(116, 120)))
    words = transformers.WhisperTokenizer(
        vocab={name: i for i, name in enumerate([*letters, *names])},
        merges=[],
        unk_token="<|unk|>",
        pad_token="<|pad|>",
    )
    ears = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=267)
    processor = transformers.WhisperProcessor(feature_extractor=ears, tokenizer=words)
    hearing = tiny("whisper", **{f"{name}_token_id": i for name, i in places.items()})
    model = stir(peftc.compile(hearing, "lora"))
    peftc.export(model, tmp_path / "b", processor=processor)
    wave = torch.randn(8000, generator=torch.Generator().manual_seed(0)).numpy()
    parts = {"tokenizer": words, "feature_extractor": ears, "device": "cpu"}
    pipe = transformers.pipeline("automatic-speech-recognition", model=model, **parts)
    runner = peftc.runtime.load(tmp_path / "b")
    settings = dict(max_new_tokens=6, min_new_tokens=5)
    got, want = (
        one({"raw": wave, "sampling_rate": 16000}, generate_kwargs=settings)
        for one in (runner.automatic_speech_recognition, pipe)
    )
    assert got == want
    assert len(want["text"]) >= 5


def near(one: Any, other: Any) -> bool:
    """Whether two answers are equal but for rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(near, one, other))
    if isinstance(one, str) or one is None:
        return bool(one == other)
    return float(one) == pytest.approx(float(other), abs=1e-4)


def test_spans(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    """The best of all spans of the context, by the torch model, counted out; in windows of 24 tokens too."""
    model, runner = exported("spans", tmp_path, words)
    short, long = " ".join(WORDS), " ".join(WORDS * 4)
    found = runner.question_answering(["very good", "so"], [short, long], stride=8)
    assert [context[a["start"] : a["end"]] for context, a in zip((short, long), found)] == [
        a["answer"] for a in found
    ]
    encoded = words("very good", short, return_tensors="pt")
    first = encoded.sequence_ids(0).index(1)
    out = outputs(model, dict(encoded))
    start, end = (out[k][0, first : first + len(WORDS)] for k in ("start_logits", "end_logits"))
    scores = (start.softmax(0)[:, None] * end.softmax(0)).triu()
    a, b = divmod(int(scores.argmax()), len(WORDS))
    assert found[0]["answer"] == " ".join(WORDS[a : b + 1])
    assert found[0]["score"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_vectors_are_pooled_as_the_model_says(
    tmp_path: Path, words: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "model"
    built("BertModel").save_pretrained(folder)
    plain = transformers.AutoModel.from_pretrained(folder)
    assert "sentence_embedding" not in described(plain, tmp_path / "plain")["outputs"]
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"type": f"a.b.{k}", "path": str(i) if i else ""} for i, k in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1").mkdir()
    (folder / "1" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    model = stir(peftc.compile(transformers.AutoModel.from_pretrained(folder), "lora"))
    peftc.export(model, tmp_path / "b", tokenizer=words)
    runner = peftc.runtime.load(tmp_path / "b")
    for text, vector in zip(TEXTS, runner.feature_extraction(TEXTS), strict=True):
        states = model(**words(text, return_tensors="pt")).last_hidden_state[0]
        want = torch.nn.functional.normalize(states.mean(0), dim=0)
        assert (vector - want).abs().max() <= 1e-5
    (folder / "1" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    with pytest.raises(PeftcError, match="model pools by 'pooling_mode_lasttoken'; known are pool"):
        peftc.export(transformers.AutoModel.from_pretrained(folder), tmp_path / "c")
    (folder / "modules.json").write_text(json.dumps([{"type": "a.Dense", "path": ""}]))
    with pytest.raises(PeftcError, match=r"a 'Dense' in its modules\.json has no ONNX graph here"):
        peftc.export(transformers.AutoModel.from_pretrained(folder), tmp_path / "c")


def described(model: PreTrainedModel, folder: Path) -> Any:
    """What the manifest of a bundle says of its one graph, which nobody has loaded."""
    peftc.export(model, folder)
    return json.loads((folder / "peftc.json").read_text())["graphs"]["model"]


def test_a_manifest_describes_its_graphs(tmp_path: Path) -> None:
    said = described(tiny("bert"), tmp_path / "b")
    assert said["inputs"]["input_ids"] == {"dtype": "int64", "shape": ["batch", "seq_len"]}
    assert said["outputs"]["logits"] == {"dtype": "float", "shape": ["batch", 3]}


def test_a_tensor_that_no_graph_takes_is_refused(tmp_path: Path) -> None:
    peftc.export(tiny("roberta"), tmp_path / "b")
    runner, inputs = peftc.runtime.load(tmp_path / "b"), batch(tiny("roberta"))
    segments = torch.zeros_like(inputs["input_ids"])
    assert torch.equal(runner(**inputs).logits, runner(**inputs, token_type_ids=segments).logits)
    with pytest.raises(RuntimeFault, match="the graph takes no 'position_ids'; it takes input_ids"):
        runner(**inputs, position_ids=torch.arange(11).expand(3, -1))
    with pytest.raises(RuntimeFault, match="the graph takes no 'labels'"):
        runner(**inputs, labels=torch.ones(3, dtype=torch.long))
    assert runner.to("cpu") is runner


def test_a_model_without_a_row(tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="cannot be exported yet") as caught:
        peftc.export(built("BertForMultipleChoice"), tmp_path / "b")
    assert all(task.title in str(caught.value) for task in TASKS)
    with pytest.raises(PeftcError, match="its cache holds states, which no graph here goes on"):
        peftc.export(tiny("mamba"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_classifier_that_reads_its_end(tmp_path: Path) -> None:
    model = wide(
        transformers.BartForSequenceClassification(transformers.BartConfig(**SEQ2SEQ, num_labels=3))
    )
    with pytest.raises(PeftcError, match="picks a state by the tokens' values"):
        peftc.export(model, tmp_path / "b")


def test_every_task_has_a_runner_with_a_method_of_its_name() -> None:
    assert {task.name for task in TASKS} == RUNNERS.keys()
    for kind, row in RUNNERS.items():
        assert callable(getattr(row.runner, kind.replace("-", "_")))


# ---- models that write

MODES = {
    "greedy": dict(do_sample=False),
    "beam": dict(num_beams=3, do_sample=False, no_repeat_ngram_size=3),
    "sample": dict(do_sample=True, top_k=20),
    "uncached": dict(do_sample=False, use_cache=False),
}
# (family, method): prefixes and prompts stand in a cache from the start, gates and moved positions besides.
WRITERS = [
    ("gpt2", "lora"),
    ("gpt2", "prompt_tuning"),
    ("llama", "mam"),
    ("llama", "prompt_tuning"),
    ("neox", "prefix_tuning"),
    ("gemma2", "prefix_tuning"),
    ("mixtral", "lora"),
    ("phi3", "mam"),
    ("bloom", "prefix_tuning"),
    ("mpt", "prefix_tuning"),
    ("t5", "mam"),
    ("mbart", "prefix_tuning"),
    ("whisper", "mam"),
]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("family", "method"), WRITERS)
def test_tokens_are_those_of_torch(family: str, method: str, tmp_path: Path) -> None:
    model = stir(peftc.compile(tiny(family), peftc.load_spec(method, **SMALL.get(method, {}))))
    for parity in peftc.export(model, tmp_path / "b"):
        assert parity.error <= parity.tolerance
    runner = peftc.runtime.load(tmp_path / "b")
    inputs = batch(model, "left")
    inputs.pop("decoder_input_ids", None)
    for name, mode in MODES.items():
        found = []
        for one in (runner, model):
            torch.manual_seed(7)
            found.append(one.generate(**inputs, max_new_tokens=8, min_new_tokens=5, **mode))
        assert torch.equal(*found), name


# A family of each row, but those of the heads above: a method has the next one that it has a place in.
TURNS = ("bart", "bert", "llama", "whisper", "gpt2", "roberta", "t5", "vit", "neox")


@pytest.mark.sampled(44)
@pytest.mark.parametrize("method", shipped())
def test_every_method_on_a_row(method: str, tmp_path: Path) -> None:
    """What a method computes is in the bundle: the certificate compares it, and it is not the backbone's."""
    first = shipped().index(method) % len(TURNS)
    turn = (*TURNS[first:], *TURNS[:first])
    family = next(one for one in (*turn, "mixtral") if not lacks(method, one))  # with experts
    model = stir(peftc.compile(tiny(family), spec_of(method)))
    parity = peftc.export(model, tmp_path)
    assert all(one.error <= one.tolerance and one.cases > 1 for one in parity)
    inputs = batch(model)
    if model.can_generate():
        inputs = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
        mode = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
        runner = peftc.runtime.load(tmp_path)
        assert torch.equal(runner.generate(**inputs, **mode), model.generate(**inputs, **mode))
        return
    want, bare = outputs(model, inputs)["logits"], outputs(model.backbone, inputs)["logits"]
    got = peftc.runtime.load(tmp_path)(**inputs).logits
    assert (got - want).abs().max() <= tolerance(float(want.abs().max()))
    moved = (want - bare).abs().max() > tolerance(float(want.abs().max()))
    assert moved == bool(model.plan.edits)  # what trains the backbone's own is the backbone


def test_rows_stand_in_a_cache_from_the_start(tmp_path: Path) -> None:
    """No step of the graph computes the prefix, or copies the keys behind it."""
    model = stir(peftc.compile(tiny("llama"), peftc.load_spec("prefix_tuning", l=3, m=4)))
    peftc.export(model, tmp_path / "with")
    peftc.export(tiny("llama"), tmp_path / "bare")
    count = {one: nodes(tmp_path / one / "model.onnx") for one in ("with", "bare")}
    assert count["with"]["Concat"] <= count["bare"]["Concat"] + 1
    assert (tmp_path / "with" / "rows.safetensors").is_file()
    assert not (tmp_path / "bare" / "rows.safetensors").exists()


def nodes(file: Path) -> dict[str, int]:
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    found: dict[str, int] = {}
    for node in graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def test_a_cache_of_another_kind_is_refused(tmp_path: Path) -> None:
    peftc.export(tiny("llama"), tmp_path / "b")
    runner, inputs = peftc.runtime.load(tmp_path / "b"), batch(tiny("llama"))
    with pytest.raises(RuntimeFault, match="with DynamicCache, not StaticCache"):
        runner.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with torch.no_grad():
        cache = tiny("llama")(**inputs, use_cache=True).past_key_values
    with pytest.raises(RuntimeFault, match="goes on from a cache of its own only"):
        runner(inputs["input_ids"][:, :1], past_key_values=cache)
    once = runner(**inputs).past_key_values
    again = runner(inputs["input_ids"][:, :1], past_key_values=copy.deepcopy(once))
    want = runner(inputs["input_ids"][:, :1], past_key_values=once)
    assert torch.equal(again.logits, want.logits)


def test_texts_go_on(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    model = tiny("llama")
    peftc.export(model, tmp_path / "b", tokenizer=words)
    runner = peftc.runtime.load(tmp_path / "b")
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    settings = dict(max_new_tokens=4, do_sample=False)
    assert runner.text_generation(TEXTS, **settings) == pipe(TEXTS, **settings)


# What `peftc run` prints of a bundle, by its row: (what is asked, how its answer looks).
LINES = {
    "tokens": ("so sad", r"so/LABEL_\d sad/LABEL_\d"),
    "words": ("so <mask>", r"\w*\t?0\.\d{4}"),
    "spans": ("so\tvery good film", r"[a-z ]+\t0\.\d{4}"),
    "vectors": ("so sad", r"\[\[.*\]\]"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("one", LINES)
def test_run_answers_by_the_task(
    one: str,
    run: Run,
    tmp_path: Path,
    words: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported(one, tmp_path, words)
    bundle = tmp_path / "b"
    asked, answer = LINES[one]
    code, out, _ = run("run", bundle, asked)
    assert (code, bool(re.fullmatch(answer, out.strip()))) == (0, True), out
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{asked}\n\n{asked}\n"))
    rows = [json.loads(line) for line in run("run", bundle, "--json")[1].splitlines()]
    assert rows[0] == rows[1]
    columns = ("question", "context") if one == "spans" else ("text",)
    (tmp_path / "rows.jsonl").write_text(json.dumps({k: rows[0][k] for k in columns}))
    code, out, _ = run("run", bundle, "--input", tmp_path / "rows.jsonl", "--json")
    assert (code, json.loads(out)) == (0, rows[0])


def test_run_wants_a_context(run: Run, tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    exported("spans", tmp_path, words)
    code, _, error = run("run", tmp_path / "b", "so")
    assert code == 1
    assert "a line holds question and context with a tab between them; 'so' does not" in error
