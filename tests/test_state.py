"""What a compiled model shares with its backbone, and which graph it uses: always the one for the state of now."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ENCODER, FAMILIES, batch, logits, stir, tiny
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache

import peftc
from peftc.driver import Trace
from peftc.errors import PeftcError
from peftc.graph import watch as watching
from peftc.graph.captures import CAPTURES
from peftc.graph.state import fingerprint
from peftc.graph.watch import Watch
from peftc.language.reader import parse_spec

LORA = peftc.load_spec("lora", r=2, alpha=4)


def compiled(family: str = "bert", spec: object = LORA, **sizes: object) -> PreTrainedModel:
    return stir(peftc.compile(tiny(family, **sizes), spec))


def held(model: PreTrainedModel) -> int:
    return len(model._programs)


def output(model: PreTrainedModel, **inputs: object) -> object:
    with torch.no_grad():
        return model(**inputs)


# The compiled model and its backbone


def test_tensors_and_configuration_are_shared() -> None:
    backbone = tiny("bart")
    model = peftc.compile(backbone, LORA)
    assert model.backbone is backbone and model.config is backbone.config
    model.to(torch.bfloat16)
    assert model.final_logits_bias is backbone.final_logits_bias
    assert backbone.final_logits_bias.dtype == torch.bfloat16
    assert model(**batch(model)).logits.dtype == torch.bfloat16
    backbone.lm_head.weight = nn.Parameter(torch.zeros(120, 32, dtype=torch.bfloat16))
    assert model.lm_head.weight is backbone.lm_head.weight
    assert (model(**batch(model)).logits == model.final_logits_bias).all()


def test_modules_and_their_attributes_are_not() -> None:
    backbone = tiny("bart")
    before = {path: dict(vars(module)) for path, module in backbone.named_modules()}
    model = peftc.compile(backbone, LORA)
    model.train()
    model.name_or_path, model.mark = "here", 1  # what its body has is set there
    assert vars(model.body)["name_or_path"] == "here" and "mark" not in vars(model.body)
    model.lm_head = nn.Linear(32, 120, bias=False)
    assert model.body.lm_head is model.lm_head
    model.model.encoder.layers[0].register_forward_hook(lambda *_: None)
    model.model.decoder.layers[0].extra = nn.Linear(2, 2)
    logits(model, batch(model))
    model.loss_function = lambda *_, **__: 0
    for path, module in backbone.named_modules():
        after = vars(module)
        assert before[path].keys() == after.keys()
        assert all(before[path][name] is after[name] for name in after)
        assert not any(after[name] for name in after if "hooks" in name)
    assert not set(backbone.modules()) & set(model.modules())


@pytest.mark.habit("models: the backbone as a reference", "the bare backbone")
def test_a_backbone_is_a_reference_while_the_model_trains() -> None:
    """As DPO has it: in evaluation, whatever the mode of the model, and without its deltas."""
    backbone = tiny("llama", attention_dropout=0.5)
    model = stir(peftc.compile(backbone, LORA))
    inputs = batch(model)
    want = logits(tiny("llama", attention_dropout=0.5), inputs)
    reference = model.backbone
    for first, then in ((reference, model), (model, reference)):
        for one in (first, then):
            one.train(one is model)
        assert model.training and all(m.training for m in model.modules())
        assert not any(m.training for m in reference.modules())
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        assert torch.equal(logits(reference, inputs), want)
        loss.backward()
        assert not torch.equal(logits(model, inputs), logits(model, inputs))
    assert all(p.grad is None for p in reference.parameters())
    reference.train()
    model.eval()
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    assert not torch.equal(logits(reference, inputs), logits(reference, inputs))
    assert peftc.detach(model) is reference and reference.training


@pytest.mark.parametrize("change", ["forward", "generate", "compile", "inner compile"])
def test_what_hides_the_class_is_refused(change: str) -> None:
    backbone = tiny("gpt2")
    if change == "compile":
        backbone.compile(backend="eager")
    elif change == "inner compile":
        backbone.transformer.h[0].compile(backend="eager")
    else:
        own = getattr(backbone, change)
        setattr(backbone, change, lambda *args, **kwargs: own(*args, **kwargs))
    flags = [p.requires_grad for p in backbone.parameters()]
    with pytest.raises(PeftcError, match=r"\.compile\(\)|replaced on the instance"):
        peftc.compile(backbone, LORA)
    assert [p.requires_grad for p in backbone.parameters()] == flags


def test_a_patched_part_is_traced_as_it_is() -> None:
    backbone = tiny("bert")
    head = backbone.classifier
    head.forward = lambda x: type(head).forward(head, x) * 2
    model = peftc.compile(backbone, LORA)
    inputs = batch(model)
    assert torch.allclose(logits(model, inputs), logits(tiny("bert"), inputs) * 2, atol=1e-5)
    del model.classifier.forward
    assert torch.allclose(logits(model, inputs), logits(tiny("bert"), inputs), atol=1e-5)


def test_accelerate_patches_the_compiled_model(tmp_path: Path) -> None:
    model = compiled()
    inputs = batch(model)
    rows = [{k: v[i] for k, v in inputs.items()} | {"labels": i} for i in range(3)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        bf16=True,
        use_cpu=True,
        max_steps=2,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=3,
    )
    before = {k: v.detach().clone() for k, v in model.deltas.values().items()}
    Trainer(model=model, args=args, train_dataset=rows).train()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in model.deltas.values().items())
    assert "forward" not in vars(model.backbone)


@pytest.mark.habit("models: autocast", "the backbone's values and types")
def test_autocast_is_that_of_the_call() -> None:
    model = compiled("llama")
    inputs = batch(model)
    full = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(model, inputs)
        want = logits(model.backbone, inputs)
    assert half.dtype == want.dtype == torch.bfloat16
    assert torch.equal(logits(model, inputs), full)
    zero = peftc.compile(tiny("llama"), LORA)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(zero, inputs)
    # bfloat16 has 8 bits; the trace may sum in another order, two layers
    assert (got - want).abs().max() <= 2**-6 * want.abs().max()


def test_a_loss_that_is_set_is_used() -> None:
    model = compiled("llama")
    inputs = batch(model)
    labels = inputs["input_ids"]
    usual = output(model, **inputs, labels=labels).loss
    model.loss_function = lambda logits, labels, *_, **__: logits.float().sum() * 0 + 123.0
    assert output(model, **inputs, labels=labels).loss == 123.0
    model.loss_function = lambda logits, labels, *_, **__: logits.float().sum() * 0 + 7.0
    assert output(model, **inputs, labels=labels).loss == 7.0
    backbone = peftc.detach(model)
    bare = output(tiny("llama"), **inputs, labels=labels).loss
    assert output(backbone, **inputs, labels=labels).loss == bare != usual


def test_one_compiled_model_at_a_time() -> None:
    backbone = tiny("bert")
    backbone.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    backbone.train()
    backbone.bert.encoder.layer[0].eval()
    flags = {n: p.requires_grad for n, p in backbone.named_parameters()}
    modes = {n: m.training for n, m in backbone.named_modules()}
    first = peftc.compile(backbone, "bitfit")
    trained = [p.requires_grad for p in backbone.parameters()]
    for again in (peftc.compile, lambda m, s: peftc.load("nowhere", backbone=m)):
        with pytest.raises(PeftcError, match=r"detach|peftc did not write"):
            again(backbone, LORA)
    with pytest.raises(PeftcError, match="compiled already"):
        peftc.compile(first, LORA)
    assert [p.requires_grad for p in backbone.parameters()] == trained
    first.eval()
    assert peftc.detach(first) is backbone
    assert {n: p.requires_grad for n, p in backbone.named_parameters()} == flags
    assert {n: m.training for n, m in backbone.named_modules()} == modes
    second = peftc.compile(backbone, LORA)
    del second
    peftc.compile(backbone, LORA)  # what is gone holds nothing


def test_deleting_it_frees_it_at_once() -> None:
    backbone = tiny("bert")
    inputs = batch(backbone)
    trace = Trace()
    model = peftc.compile(backbone, peftc.load_spec("dora", r=2), trace=trace)
    model.train()(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    logits(model.eval(), inputs)
    gone = [weakref.ref(one) for one in (model, backbone, backbone.classifier.weight)]
    gone += [weakref.ref(one) for one in model.deltas.values().values()]
    gc.collect()  # what transformers left in circles when it built the backbone
    gc.disable()
    try:
        del model, backbone
        assert trace.model is None and not [one for one in gone if one() is not None]
    finally:
        gc.enable()


@pytest.mark.habit("models: deepcopy, pickle, torch.save", "the original's values")
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_its_own(how: str) -> None:
    model = compiled("bart", peftc.load_spec("mam", l=3, m=4, r=2))
    inputs = batch(model)
    want = logits(model, inputs)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(model) and other.backbone is not model.backbone
    assert other.model.encoder is other.body.model.encoder and held(other) == 0
    assert other.lm_head.weight is other.backbone.lm_head.weight is not model.lm_head.weight
    assert torch.equal(logits(other, inputs), want)
    stir(other, seed=5)
    assert not torch.equal(logits(other, inputs), want)
    assert torch.equal(logits(model, inputs), want)
    with pytest.raises(PeftcError, match="detach"):
        peftc.compile(other.backbone, LORA)
    assert all(p.requires_grad for p in peftc.detach(other).parameters())


@pytest.mark.habit("files: save_pretrained(state_dict=...)", "the deltas saved")
def test_save_pretrained_takes_what_others_give(tmp_path: Path) -> None:
    model = compiled()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    want = logits(model, batch(model))
    stir(model, seed=9)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "a", True, state, safe_serialization=True, token=None)
    again = peftc.load(tmp_path / "a", backbone=tiny("bert"))
    assert torch.equal(logits(again, batch(again)), want)
    with pytest.raises(PeftcError, match=r"lacks 'deltas\."):
        model.save_pretrained(tmp_path / "b", state_dict={})
    with pytest.raises(TypeError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "b", push_to_hub=True)


# The graph for the state of now


def test_modes_and_dropout_of_each_module() -> None:
    model = compiled("bert", hidden_dropout_prob=0.5).train()
    inputs = batch(model)
    assert not torch.equal(logits(model, inputs), logits(model, inputs))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert not torch.equal(logits(model, inputs), logits(model, inputs))
    for module in model.children():
        module.eval()
    assert model.training and torch.equal(logits(model, inputs), logits(model, inputs))


def switches() -> Iterator[tuple[str, Callable[[PreTrainedModel], None]]]:
    yield "hidden_states", lambda m: setattr(m.config, "output_hidden_states", True)
    yield "attentions", lambda m: setattr(m.config, "output_attentions", True)


@pytest.mark.parametrize(("field", "switch"), switches())
def test_switches_of_the_configuration(
    field: str, switch: Callable[[PreTrainedModel], None]
) -> None:
    model = peftc.compile(tiny("bert", "eager"), LORA)
    inputs = batch(model)
    assert field not in output(model, **inputs)
    switch(model)
    got, want = output(model, **inputs)[field], output(model.backbone, **inputs)[field]
    assert len(got) == len(want)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


def test_the_attention_that_is_set() -> None:
    model = peftc.compile(tiny("bert"), LORA)
    inputs = batch(model)
    logits(model, inputs)
    model.set_attn_implementation("eager")
    (graph,) = [
        str(r.program.graph)
        for k, r in model._programs._runners.items()
        if logits(model, inputs) is not None
    ][-1:]
    assert held(model) == 2
    latest = str(model.program("forward", inputs, {}).graph)
    assert "scaled_dot_product" in graph and "scaled_dot_product" not in latest


def test_containers_and_constants_that_change_in_place() -> None:
    backbone = tiny("bert")
    scale = backbone.classifier.scale = torch.tensor(1.0)
    numbers = backbone.classifier.numbers = [2.0]
    head = backbone.classifier
    head.forward = lambda x: type(head).forward(head, x) * scale * numbers[0]
    model, inputs = peftc.compile(backbone, LORA), batch(backbone)
    want = logits(model, inputs)
    numbers[0] = 4.0
    assert torch.allclose(logits(model, inputs), want * 2)
    scale.fill_(3.0)
    assert torch.allclose(logits(model, inputs), want * 6)


def test_parameters_that_are_replaced() -> None:
    backbone = tiny("bert")
    model = stir(peftc.compile(backbone, peftc.load_spec("dora", r=2)))
    inputs = batch(model)

    def check() -> None:
        with torch.no_grad():
            folded, report = peftc.merge(model)
            assert not report.kept
            error = (logits(model, inputs) - logits(folded, inputs)).abs().max()
            assert error <= 1e-4 * logits(folded, inputs).abs().max()

    check()
    weight = backbone.classifier._parameters
    weight["weight"] = nn.Parameter(weight["weight"] * 2, requires_grad=False)
    check()
    query = backbone.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        query.weight.mul_(2)  # what DoRA computes of it follows
    check()
    query.weight.data = query.weight.data * 0.5
    check()
    backbone.bert.encoder.layer[1].attention.self.value = copy.deepcopy(query)
    check()
    stir(model, seed=4)
    check()
    bare = logits(model, inputs)
    model.double()
    assert torch.allclose(logits(model, inputs).float(), bare, atol=1e-4)


def test_ties_that_are_cut() -> None:
    model = peftc.compile(tiny("gpt2"), LORA)
    inputs = batch(model)
    want = logits(model, inputs)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    assert torch.allclose(logits(model, inputs), want * 2)


def test_images_of_another_size() -> None:
    sizes = dict(
        num_channels=3, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3]
    )
    more = dict(strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], num_encoder_blocks=2)
    torch.manual_seed(0)
    backbone = transformers.SegformerForImageClassification(
        transformers.SegformerConfig(**sizes, **more)
    ).eval()
    want = {n: logits(backbone, {"pixel_values": torch.ones(2, 3, n, n)}) for n in (32, 64)}
    model = peftc.compile(backbone, "head", example={"pixel_values": torch.ones(2, 3, 32, 32)})
    for n, one in want.items():
        assert torch.allclose(
            logits(model, {"pixel_values": torch.ones(2, 3, n, n)}), one, atol=1e-5
        )


def test_a_model_that_counts_by_a_size() -> None:
    """Mamba's loop runs once a token: a graph for each length."""
    model = peftc.compile(tiny("mamba"), "bitfit")
    for length in (11, 5, 13, 1):
        inputs = batch(model, length=length)
        assert torch.allclose(logits(model, inputs), logits(model.backbone, inputs), atol=1e-4)


def test_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of a number is a graph of its own; the oldest go, of the model and of the process."""
    monkeypatch.setattr(CAPTURES, "bound", 2)
    monkeypatch.setattr(CAPTURES, "programs", OrderedDict())
    model = peftc.compile(tiny("llama"), LORA)
    model._programs._bound = 3
    inputs = batch(model)
    for keep in range(6):
        got = output(model, **inputs, logits_to_keep=keep).logits
        assert torch.equal(got, output(model.backbone, **inputs, logits_to_keep=keep).logits)
    assert held(model) == 3 and len(model._programs._states) == 1
    assert len(CAPTURES.programs) == 2


def test_a_step_of_the_same_state_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled("llama")
    inputs = batch(model)
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.generate(**inputs, **settings)
    logits(model.train(), inputs)
    monkeypatch.setattr(torch.export, "export", None)
    for _ in range(2):
        model.eval().generate(**inputs, **settings)
        logits(model.train(), inputs)
    model.backbone.name_or_path = "there"  # what a model notes of itself is no state
    model.requires_grad_(False)
    logits(model, inputs)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_look_sees_other_data_in_place(guarded: bool) -> None:
    """A weight stays the object that it is where its data is another's: by torch's guard, and where there is none."""
    backbone = tiny("bert")
    watch = Watch(backbone, nn.Module())
    weight = backbone.classifier.weight
    own = weight.data
    for other in (own.half(), own[:2], own.double(), own):
        count = watch.look()
        if not guarded:
            watch._guard = None
        assert watch.look() == count
        weight.data = other
        assert watch.look() == count + 1
    count = watch.look()
    weight.data = own.clone()  # others of the same kind
    weight.requires_grad_(False)
    with torch.autocast("cpu"):
        assert watch.look() == count
    with torch.inference_mode():
        assert watch.look() == count


@pytest.mark.parametrize("counted", [True, False])
def test_a_look_sees_every_write(monkeypatch: pytest.MonkeyPatch, counted: bool) -> None:
    """By the number of the latest write to each dict, and where nobody counts these; what is there again is no
    change, however often it was written."""
    if not counted:
        monkeypatch.setattr(watching, "_VERSION_OF", None)
    backbone = tiny("bert")
    watch, layer, config = (
        Watch(backbone, nn.Module()),
        backbone.bert.encoder.layer[0],
        backbone.config,
    )
    config.odd, was = {"rates": [1, 2]}, config.hidden_size
    writes: list[Callable[[], object]] = [
        lambda: setattr(layer.attention.self.dropout, "p", 0.7),
        lambda: layer.output.dropout.train(),
        lambda: setattr(config, "hidden_act", "relu"),
        lambda: config.odd["rates"].append(3),
        lambda: config.odd.update(more=1),
        lambda: setattr(layer, "told", "so"),
        lambda: delattr(layer, "told"),
        lambda: setattr(layer, "output", nn.Identity()),
        lambda: layer.register_forward_hook(print),
        lambda: layer.register_buffer("more", torch.ones(2)),
    ]
    for write in writes:
        count = watch.look()
        for _ in range(2):
            for value in (7, was):
                config.hidden_size = value
            assert watch.look() == count
        write()
        assert watch.look() == count + 1


def test_what_a_forward_decides_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier notes in its configuration the kind of the first labels it sees: they are traced once, and a model
    that finds the trace made notes it too."""
    monkeypatch.setattr(CAPTURES, "programs", OrderedDict())
    kinds = {
        "multi_label_classification": torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]),
        "single_label_classification": torch.tensor([2, 0]),
    }
    for seed in (0, 1):
        bare = tiny("bert", seed=seed)
        model = peftc.compile(tiny("bert", seed=seed), LORA)
        inputs = batch(bare, size=2)
        for kind, labels in kinds.items():
            model.config.problem_type = bare.config.problem_type = None
            for _ in range(3):
                want = output(bare, **inputs, labels=labels).loss
                assert torch.allclose(output(model, **inputs, labels=labels).loss, want, atol=1e-5)
                assert model.config.problem_type == bare.config.problem_type == kind
        assert len(CAPTURES.programs) == held(model) == 1 + len(kinds)


def test_a_shared_trace_tells_models_apart() -> None:
    """What differs in anything that tracing sees has another fingerprint; weights alone have not."""
    one = fingerprint(tiny("bert"))
    assert one.shared and one == fingerprint(tiny("bert", seed=3))
    others = [
        tiny("bert", hidden_dropout_prob=0.2),
        tiny("bert", "eager"),
        tiny("bert").train(),
        tiny("bert").bfloat16(),
        tiny("bert", num_labels=2),
    ]
    tied, changed, patched = tiny("bert"), tiny("bert"), tiny("bert")
    layers = tied.bert.encoder.layer
    layers[0].output.dense.weight = layers[1].output.dense.weight
    changed.bert.encoder.layer[0].attention.self.scaling = 2.0
    patched.classifier.forward = lambda x: x
    found = {one, *map(fingerprint, (*others, tied, changed, patched))}
    assert len(found) == 1 + len(others) + 3
    assert not fingerprint(patched).shared


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_shares_its_trace(family: str) -> None:
    assert fingerprint(tiny(family)).shared


def test_tracing_leaves_the_model_as_it_was() -> None:
    backbone = tiny("bert")
    embeddings = backbone.bert.embeddings
    own = type(embeddings).forward

    def forward(*args: object, **kwargs: object) -> torch.Tensor:
        embeddings.calls = getattr(embeddings, "calls", 0) + 1
        return own(embeddings, *args, **kwargs)

    embeddings.forward = forward
    model, inputs = peftc.compile(backbone, LORA), batch(backbone)
    for _ in range(3):
        logits(model, inputs)
    assert not hasattr(embeddings, "calls") and held(model) == 1


# Threads


@pytest.mark.habit("processes: threads", "one thread")
def test_first_calls_from_threads(capfd: pytest.CaptureFixture[str]) -> None:
    models = [compiled("bert"), compiled("bert"), compiled("gpt2")]
    calls = [(model, batch(model, size=n)) for model in models for n in (2, 3)]
    want = [logits(copy.deepcopy(model), inputs) for model, inputs in calls]
    kept, CAPTURES.programs = CAPTURES.programs, type(CAPTURES.programs)()
    got: dict[int, object] = {}

    def call(i: int) -> None:
        try:
            got[i] = logits(*calls[i])
        except Exception as error:
            got[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        CAPTURES.programs = kept
    for i, one in enumerate(want):
        assert isinstance(got[i], torch.Tensor), got[i]
        assert torch.equal(got[i], one)
    print("seen")
    assert capfd.readouterr().out == "seen\n"


# Ordinary uses


@pytest.mark.habit("models: heads of many labels, of regression", "the backbone's losses")
@pytest.mark.parametrize("kind", ["multi-label", "regression", "regression column"])
def test_labels_of_other_heads(kind: str) -> None:
    labels = {
        "multi-label": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1]]),
        "regression": torch.tensor([0.5, 1.0, 2.0]),
        "regression column": torch.tensor([[0.5], [1.0], [2.0]]),
    }[kind]
    model = peftc.compile(tiny("bert", num_labels=labels.shape[1] if labels.ndim > 1 else 1), LORA)
    inputs = batch(model)
    got = output(model, **inputs, labels=labels).loss
    assert torch.allclose(got, output(model.backbone, **inputs, labels=labels).loss, atol=1e-5)
    for length in (3, 1):  # as long as there are classes
        short = batch(model, length=length)
        got = output(model, **short, labels=labels).loss
        assert torch.allclose(got, output(model.backbone, **short, labels=labels).loss, atol=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.habit("models: masks of four axes", "the backbone's values")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_masks_of_four_axes(family: str) -> None:
    model = peftc.compile(tiny(family), LORA)
    inputs = batch(model)
    full = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()
    for mask in (full, full[:, :, :5, :5], full[:1], full[:, :, -1:]):
        if mask.shape[2] == 1 and family == "llama":
            continue
        given = {
            "input_ids": inputs["input_ids"][:, : mask.shape[-1]],
            "attention_mask": mask,
        }
        assert torch.allclose(logits(model, given), logits(model.backbone, given), atol=1e-5)


def test_positions_for_all_rows() -> None:
    model = peftc.compile(tiny("llama"), LORA)
    for size in (3, 2):
        inputs = batch(model, size=size) | {"position_ids": torch.arange(11)[None]}
        assert torch.allclose(logits(model, inputs), logits(model.backbone, inputs), atol=1e-5)


DECODERS = {
    "Bert": "BertLMHeadModel",
    "Roberta": "RobertaForCausalLM",
    "Electra": "ElectraForCausalLM",
    "Camembert": "CamembertForCausalLM",
    "Data2VecText": "Data2VecTextForCausalLM",
}


@pytest.mark.habit("models: language models that give no cache", "Hugging Face's tokens")
@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", DECODERS)
def test_what_gives_no_cache_generates_as_eager_code(name: str) -> None:
    torch.manual_seed(0)
    sizes = {k: v for k, v in ENCODER.items() if k != "num_labels"} | dict(pad_token_id=0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    backbone = getattr(transformers, DECODERS[name])(config).eval()
    settings = dict(max_new_tokens=3, do_sample=False)
    inputs = batch(backbone)
    want = backbone.generate(**inputs, **settings)
    model = peftc.compile(backbone, LORA)
    assert torch.equal(model.generate(**inputs, **settings), want)
    assert "past_key_values" not in output(model, **inputs, use_cache=True)
    folded, _ = peftc.merge(stir(model))
    for cached in (True, False):  # with one it reads the last token alone, in eager code too
        mine, theirs = (
            one.generate(**inputs, **settings, use_cache=cached) for one in (model, folded)
        )
        assert torch.equal(mine, theirs)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bart"])
def test_a_cache_that_is_cut_back(family: str) -> None:
    sizes = dict(sliding_window=6) if family == "gemma2" else {}
    settings = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=2)
    model = peftc.compile(tiny(family, **sizes), LORA)
    inputs = {k: v[:1] for k, v in batch(model).items() if k != "decoder_input_ids"}
    plain = dict(settings, prompt_lookup_num_tokens=None)
    want = model.backbone.generate(**inputs, **plain)
    assert torch.equal(model.generate(**inputs, **settings), want)
    assert torch.equal(model.generate(**inputs, **plain), want)


def test_a_cache_of_other_layers() -> None:
    model = peftc.compile(tiny("gemma2", sliding_window=6), LORA)
    inputs = batch(model)
    ids = inputs["input_ids"]
    cache = DynamicCache(config=model.config)  # it has layers that drop what a window leaves out
    first = output(model, input_ids=ids[:, :9], past_key_values=cache, use_cache=True)
    second = output(model, input_ids=ids[:, 9:], past_key_values=cache, use_cache=True)
    assert first.past_key_values is second.past_key_values is cache
    assert cache.get_seq_length() == 11
    want = logits(model, {"input_ids": ids})
    got = torch.cat([first.logits, second.logits], 1)
    assert torch.allclose(got, want, atol=1e-4)
    cache.crop(-4)
    again = output(model, input_ids=ids[:, 7:], past_key_values=cache, use_cache=True)
    assert torch.allclose(again.logits, want[:, 7:], atol=1e-4)
    full = DynamicCache(config=model.config)
    output(model.backbone, **inputs, past_key_values=full, use_cache=True)
    with pytest.raises(PeftcError, match="dropped tokens"):
        output(model, input_ids=ids[:, :1], past_key_values=full, use_cache=True)


def test_a_step_gives_all_that_was_asked_for() -> None:
    model = peftc.compile(tiny("llama"), LORA)
    inputs = batch(model)
    given = dict(**inputs, labels=inputs["input_ids"], use_cache=True, output_hidden_states=True)
    got, want = output(model, **given), output(model.backbone, **given)
    assert set(got) == set(want) and len(got.hidden_states) == len(want.hidden_states)
    assert torch.allclose(got.loss, want.loss)


# Hooks


def test_hooks_inside_are_named_and_do_not_run() -> None:
    backbone = tiny("bert")
    seen: list[object] = []
    model = peftc.compile(backbone, LORA)
    inputs = batch(model)
    want = logits(model, inputs)
    handle = model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(
        UserWarning, match=r"hooks on 'bert\.encoder\.layer\.0\.attention' do not run"
    ):
        assert torch.equal(logits(model, inputs), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, inputs)
        logits(model.train(), inputs)
    assert not seen
    handle.remove()
    outer = model.register_forward_hook(lambda *_: seen.append(2))
    logits(model.eval(), inputs)
    outer.remove()
    logits(model, inputs)
    assert seen == [2]
    logits(peftc.detach(model), inputs)
    assert seen == [2]


@pytest.mark.habit("training: NEFTune", "the backbone's losses")
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.sampled(2)
def test_noise_on_embeddings(family: str, tmp_path: Path) -> None:
    """NEFTune hooks the embedding: the losses are those of the backbone trained as it is, noise for noise."""
    losses = []
    for bare in (False, True):
        backbone = tiny(family)
        model = backbone if bare else peftc.compile(backbone, "norm_tuning")
        free = {one.path for one in peftc.plan(tiny(family), "norm_tuning").unfrozen}
        for path, weight in backbone.named_parameters():
            weight.requires_grad_(path in free)
        inputs = batch(backbone)
        labels = inputs["input_ids"] if backbone.can_generate() else torch.arange(3)
        rows = [{k: v[i] for k, v in inputs.items()} | {"labels": labels[i]} for i in range(3)]
        args = TrainingArguments(
            output_dir=str(tmp_path),
            neftune_noise_alpha=5.0,
            use_cpu=True,
            max_steps=2,
            report_to=[],
            disable_tqdm=True,
        )
        losses.append(Trainer(model=model, args=args, train_dataset=rows).train().training_loss)
        assert not model.get_input_embeddings()._forward_hooks
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32, two layers


@pytest.mark.habit("models: forward hooks outside of layers", "the backbone's hooks")
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "mam"])
def test_hooks_outside_of_layers_run(method: str) -> None:
    """They see what the module gives, and what they give is read; beside deltas there too, and cached."""
    backbone = tiny("llama")
    model = stir(peftc.compile(backbone, peftc.load_spec(method)), 0.1)
    inputs = batch(model)
    want = logits(model, inputs)
    seen: list[torch.Tensor] = []
    embedding, norm = model.model.embed_tokens, model.model.norm
    handles = [
        embedding.register_forward_hook(lambda _, args, out: seen.append(out)),
        norm.register_forward_hook(lambda _, args, out: out * 2),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(logits(model, inputs), 2 * want, atol=1e-5)  # the head is linear
        assert len(seen) == 1 and torch.equal(seen[0][:, -11:], embedding(inputs["input_ids"]))
        seen.clear()
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert len(seen) == 3
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model, inputs), want)


# Names


@pytest.mark.parametrize("name", ["values", "place", "type", "half", "train", "forward", "data"])
def test_names_that_torch_uses(name: str, tmp_path: Path) -> None:
    """Of a method and of its tensors."""
    text = f"""\
name: {name}
deltas:
  - at: attention.q
    params: {{{name}: {{shape: [in, out], init: zeros}}}}
    delta: x @ {name}
"""
    spec = parse_spec(text, name)
    model = stir(peftc.compile(tiny("bert"), spec))
    inputs = batch(model)
    want = logits(model, inputs)
    path = next(iter(model.deltas.values()))
    assert path.endswith(f".{name}.{name}")
    assert model.get_parameter(f"deltas.{path}") is model.deltas.values()[path]
    assert f"deltas.{path}" in model.state_dict()
    model.train()(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for p in model.deltas.parameters())
    model.eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peftc.load(tmp_path, backbone=tiny("bert")), inputs), want)
    assert torch.equal(logits(copy.deepcopy(model), inputs), want)
    assert torch.allclose(logits(peftc.merge(model)[0], inputs), want, atol=1e-4)


@pytest.mark.parametrize("name", ["values", "place"])
def test_names_that_modules_have(name: str) -> None:
    backbone = tiny("bert")
    layer = backbone.bert.encoder.layer[0].attention
    layer._modules[name] = layer._modules.pop("self")
    own = type(layer).forward

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        self.__dict__["self"] = self._modules[name]
        try:
            return own(self, *args, **kwargs)
        finally:
            del self.__dict__["self"]

    layer.__class__ = type("Renamed", (type(layer),), {"forward": forward})
    model, inputs = stir(peftc.compile(backbone, LORA)), batch(backbone)
    assert any(f".{name}." in path for path in model.deltas.values())
    model.train()(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for p in model.deltas.parameters())


# Calls that fail


def test_plan_leaves_the_modes() -> None:
    backbone = tiny("bert").train()
    backbone.bert.embeddings.dropout.eval()
    modes = [m.training for m in backbone.modules()]
    peftc.plan(backbone, LORA)
    assert [m.training for m in backbone.modules()] == modes
    model = peftc.compile(backbone, LORA)
    peftc.merge(model)
    assert [m.training for m in backbone.modules()] == modes


@pytest.mark.parametrize("fault", ["compile", "load", "damaged"])
def test_a_failed_call_changes_nothing(fault: str, tmp_path: Path) -> None:
    backbone = tiny("bert").train()
    compiled("bert").save_pretrained(tmp_path)
    if fault == "damaged":
        (tmp_path / "model.safetensors").write_bytes(b"nothing")
    flags, modes = [p.requires_grad for p in backbone.parameters()], backbone.training
    with pytest.raises(PeftcError):
        if fault == "compile":
            peftc.compile(backbone, parse_spec("deltas: [{at: attention.q, delta: z}]", "bad"))
        elif fault == "load":
            peftc.load(tmp_path / "nothing", backbone=backbone)
        else:
            peftc.load(tmp_path, backbone=backbone)
    assert [p.requires_grad for p in backbone.parameters()] == flags
    assert backbone.training == modes
    peftc.compile(backbone, LORA)


def test_what_is_overwritten_is_not_drawn(tmp_path: Path) -> None:
    model = stir(peftc.compile(tiny("bart"), peftc.load_spec("mam", l=3, m=4, r=2)))
    model.save_pretrained(tmp_path)
    backbone = tiny("bart")
    state = torch.get_rng_state()
    again = peftc.load(tmp_path, backbone=backbone)
    peftc.merge(again)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trace_keeps_nothing_from_the_collector() -> None:
    """What was garbage before a model was traced is gone behind it, without a walk through all that is loaded."""

    class Ring:
        def __init__(self) -> None:
            self.own = self

    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    gone = weakref.ref(Ring())
    model = peftc.compile(tiny("bert"), "lora")
    model(**batch(model))
    gc.collect(1)
    assert gone() is None
    assert gc.get_threshold() == before and gc.get_freeze_count() <= frozen
