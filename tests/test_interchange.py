"""PEFT's checkpoints: the same logits after reading, the same folded weights, and LoRA written back exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import batch, logits, stir, tiny
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import peftc
from peftc.errors import PeftcError
from peftc.interchange.read import add_peft, import_peft
from peftc.interchange.settings import COMMON, KINDS
from peftc.interchange.write import export_peft
from peftc.language.expr import show
from peftc.language.reader import parse_spec

Q, K, V, DOWN = (
    {"bart": "q_proj", "roberta": "query", "llama": "q_proj"},
    {"bart": "k_proj", "roberta": "key", "llama": "k_proj"},
    {"bart": "v_proj", "roberta": "value", "llama": "v_proj"},
    {"bart": "fc2", "roberta": "output.dense", "llama": "down_proj"},
)


def config(kind: str, family: str) -> peft.PeftConfig:
    q, v = Q[family], V[family]
    match kind:
        case "lora":
            return peft.LoraConfig(r=4, lora_alpha=8, target_modules=[q, v])
        case "patterns":
            first = {"bart": "layers.0.self_attn.q_proj", "roberta": "layer.0.attention.self.query"}
            name = first.get(family, "layers.0.self_attn.q_proj")
            return peft.LoraConfig(
                r=4, target_modules=[q, v], rank_pattern={name: 2}, alpha_pattern={name: 32}
            )
        case "rslora":
            return peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=[q])
        case "dora":
            return peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=[q, v])
        case "ia3":
            down = DOWN[family]
            return peft.IA3Config(target_modules=[K[family], v, down], feedforward_modules=[down])
        case "vera":
            return peft.VeraConfig(r=4, target_modules=[q, DOWN[family]])
        case "loha":
            return peft.LoHaConfig(r=4, alpha=8, target_modules=[q, v])
        case "lokr":
            return peft.LoKrConfig(r=2, alpha=8, target_modules=[q, DOWN[family]])
    raise AssertionError(kind)


def adapter(kind: str, family: str, path: Path) -> PreTrainedModel:
    """PEFT's model with weights of some size, and its checkpoint at `path`."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny(family), config(kind, family)).eval()
    with torch.no_grad():
        for value in (p for p in model.parameters() if p.requires_grad):
            value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(path)
    return model


@pytest.mark.habit("files: adapters of PEFT, in", "PEFT's logits and merged weights")
@pytest.mark.parametrize("family", ["bart", "roberta", "llama"])
@pytest.mark.parametrize(
    "kind", ["lora", "patterns", "rslora", "dora", "ia3", "vera", "loha", "lokr"]
)
def test_import(kind: str, family: str, tmp_path: Path) -> None:
    theirs = adapter(kind, family, tmp_path)
    mine = import_peft(tmp_path, tiny(family))
    inputs = batch(mine)
    want = logits(theirs, inputs)
    bound = 1e-5 * want.abs().max().clamp(min=1)  # fp32, two layers
    assert (logits(mine, inputs) - want).abs().max() <= bound
    assert (want - logits(tiny(family), inputs)).abs().max() > 1e-3
    merged, report = peftc.merge(mine)
    assert not report.kept
    weights = dict(theirs.merge_and_unload().named_parameters())
    for name, value in merged.named_parameters():
        assert (value - weights[name]).abs().max() <= 1e-5 * value.abs().max().clamp(min=1), name


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_import_beside_other_deltas(kind: str, tmp_path: Path) -> None:
    theirs = adapter(kind, "bart", tmp_path)
    inputs = batch(theirs)
    model = stir(peftc.compile(tiny("bart"), "mam"), 0.1)
    want = logits(model, inputs)
    add_peft(model, tmp_path, "theirs")
    assert torch.equal(logits(model, inputs), want)
    model.use("theirs")
    assert torch.allclose(logits(model, inputs), logits(theirs, inputs), atol=1e-5)
    model.use("default")
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "odd": torch.zeros(1)}, file)
    with pytest.raises(PeftcError):
        add_peft(model, tmp_path, "damaged")
    assert model.delta_sets == ("default", "theirs")
    assert torch.equal(logits(model, inputs), want)


@pytest.mark.habit("files: adapters for PEFT, out", "PEFT's logits, and the tensors back")
@pytest.mark.parametrize("family", ["bart", "roberta", "gpt2", "neox"])
def test_export_and_back(family: str, tmp_path: Path) -> None:
    backbone = tiny(family)
    mine = stir(peftc.compile(backbone, peftc.load_spec("lora", r=4, alpha=8)), 0.1)
    modules = export_peft(mine, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    inputs = batch(mine)
    want = logits(mine, inputs)
    assert (logits(theirs, inputs) - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
    again = import_peft(tmp_path / "adapter", tiny(family))
    assert len(again.plan.edits) == len(modules)
    export_peft(again, tmp_path / "again")
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_head_that_was_saved_whole(tmp_path: Path) -> None:
    torch.manual_seed(3)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"])
    theirs = peft.get_peft_model(tiny("roberta"), settings).eval()
    with torch.no_grad():
        for value in (p for p in theirs.parameters() if p.requires_grad):
            value.add_(torch.randn_like(value) * 0.1)
    theirs.save_pretrained(tmp_path / "a")
    mine = import_peft(tmp_path / "a", tiny("roberta"))
    inputs = batch(mine)
    assert (logits(mine, inputs) - logits(theirs, inputs)).abs().max() <= 1e-5
    mine.save_pretrained(tmp_path / "deltas")
    again = peftc.load(tmp_path / "deltas", backbone=tiny("roberta"))
    assert torch.equal(logits(again, inputs), logits(mine, inputs))


TASK = {
    "gpt2": "CAUSAL_LM",
    "llama": "CAUSAL_LM",
    "neox": "CAUSAL_LM",
    "gemma2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "roberta": "SEQ_CLS",
    "bart": "SEQ_2_SEQ_LM",
    "t5": "SEQ_2_SEQ_LM",
}
ROWS = {
    "prompt": peft.PromptTuningConfig,
    "p-tuning": peft.PromptEncoderConfig,
    "prefix": peft.PrefixTuningConfig,
}


def rows(kind: str, family: str, path: Path) -> PreTrainedModel:
    """PEFT's model with five rows of some size in front, and its checkpoint at `path`."""
    torch.manual_seed(3)
    settings = ROWS[kind](task_type=TASK[family], num_virtual_tokens=5)
    model = peft.get_peft_model(tiny(family), settings).eval()
    with torch.no_grad():
        for value in (p for p in model.parameters() if p.requires_grad):
            value.add_(torch.randn_like(value) * 0.3)
    model.save_pretrained(path)
    return model


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("prompt", family) for family in ("gpt2", "llama", "gemma2", "roberta", "bart", "t5")),
        *(("p-tuning", family) for family in ("gpt2", "neox", "bert")),
        *(("prefix", family) for family in ("gpt2", "llama", "neox", "roberta")),
    ],
)
def test_rows_in_front(kind: str, family: str, tmp_path: Path) -> None:
    """The cases in which PEFT is right: no prefix of an encoder-decoder."""
    theirs = rows(kind, family, tmp_path)
    mine = import_peft(tmp_path, tiny(family))
    inputs = batch(mine, "right")
    want, got, bare = (logits(one, inputs) for one in (theirs, mine, tiny(family)))
    if kind != "prefix" and TASK[family] == "CAUSAL_LM":
        want = want[:, 5:]  # PEFT returns the outputs of its rows too
    real = inputs["attention_mask"] > 0 if TASK[family] == "CAUSAL_LM" else slice(None)
    assert (got - want)[real].abs().max() <= 1e-5 * want[real].abs().max().clamp(min=1)
    assert (got - bare)[real].abs().max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.sampled(2)
def test_prefix_of_peft_token_by_token(family: str, tmp_path: Path) -> None:
    """The cache holds the tokens alone; their positions are behind the prefix all the same."""
    theirs = rows("prefix", family, tmp_path)
    mine = import_peft(tmp_path, tiny(family))
    inputs = batch(mine)
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    got = mine.generate(**inputs, **settings)
    assert torch.equal(got, theirs.generate(**inputs, **settings))
    assert torch.equal(got, mine.generate(**inputs, **settings, use_cache=False))
    spec = mine.plan.spec
    kept = replace(spec, entries=tuple(replace(one, positions="keep") for one in spec.entries))
    other = peftc.compile(tiny(family), kept)
    for name, value in mine.deltas.values().items():
        other.deltas.values()[name].data.copy_(value)
    assert (logits(other, inputs) - logits(mine, inputs)).abs().max() > 1e-3


def test_peft_prefixes_an_encoder_decoder_otherwise_than_the_paper(tmp_path: Path) -> None:
    """PEFT has one prefix, of the decoder's self-attention (FACTS 2.4); the paper has three."""
    theirs = rows("prefix", "bart", tmp_path)
    paper = peftc.plan(tiny("bart"), peftc.load_spec("prefix_direct", l=5)).parameters.stored
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) < paper
    with pytest.raises(PeftcError, match="PEFT's prefix of an encoder-decoder"):
        import_peft(tmp_path, tiny("bart"))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match=r"has no adapter_config\.json"):
        import_peft(tmp_path, tiny("bert"))
    adapter("lora", "roberta", tmp_path / "a")
    with pytest.raises(PeftcError, match="the backbone has no linear"):
        import_peft(tmp_path / "a", tiny("bert"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(PeftcError, match="is damaged"):
        import_peft(tmp_path / "a", tiny("roberta"))
    file.rename(file.with_name("adapter_model.bin"))
    with pytest.raises(PeftcError, match="safe_serialization=True"):
        import_peft(tmp_path / "a", tiny("roberta"))
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings)[:-5])
    with pytest.raises(PeftcError, match="is not JSON"):
        import_peft(tmp_path / "a", tiny("roberta"))
    with pytest.raises(PeftcError, match="is not LoRA-like"):
        export_peft(peftc.compile(tiny("bert"), "ia3"), tmp_path / "out")
    with pytest.raises(PeftcError, match=r"^there are no deltas that PEFT could hold$"):
        export_peft(peftc.compile(tiny("bert"), "bitfit"), tmp_path / "out")
    rates = (
        f"{{at: attention.{side}, params: {{A: {{shape: [in, 2], init: normal}}, B: {{shape: [2, out], init: zeros}}}},"
        f" delta: 'dropout(x, {rate}) @ A @ B'}}"
        for side, rate in (("q", 0.1), ("v", 0.2))
    )
    dropped = peftc.compile(tiny("bert"), parse_spec(f"deltas: [{', '.join(rates)}]", "s"))
    last = "bert.encoder.layer.1.attention.self:attention"
    with pytest.raises(PeftcError) as error:
        export_peft(dropped, tmp_path / "out")
    assert str(error.value) == (
        "PEFT drops inputs at one rate, and these deltas at several: "
        f"0.1 at {last}.q:s, 0.2 at {last}.v:s"
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(PeftcError) as error:
        export_peft(peftc.compile(tiny("bert"), "lora"), tmp_path / "a")
    assert str(error.value) == (
        f"{tmp_path / 'a'} exists and is not empty; choose another directory"
    )


def settled(path: Path, **changes: object) -> Path:
    """The adapter with other settings."""
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return path


def started(family: str, config: peft.PeftConfig, path: Path) -> PreTrainedModel:
    """PEFT's model, trained a little, and its checkpoint as PEFT loads it anew."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny(family), config)
    with torch.no_grad():
        for value in (p for p in model.parameters() if p.requires_grad):
            value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(path)
    again: PreTrainedModel = peft.PeftModel.from_pretrained(tiny(family), path).eval()
    return again


REFUSED = {
    "alora_invocation_tokens": ([1, 2], "acts behind those tokens alone"),
    "layer_replication": ([[0, 1]], "repeats layers"),
    "target_parameters": (["experts.gate"], "no linear's weight"),
    "trainable_token_indices": ([3], "rows of the embedding"),
    "init_lora_weights": ("pissa_niter_4", "path_initial_model_for_weight_conversion"),
    "velora_config": ({"num_groups": 2}, "which peftc does not compute"),
    "a_key_of_the_future": (1.5, "which peftc does not compute"),
    "lora_dropout": (1.5, "a dropout of 1.5 is no rate"),
    "lora_alpha": (float("nan"), "no usable alpha"),
    "modules_to_save": ("head", "not a list of names"),
    "alpha_pattern": ({"(": 3}, r"the pattern '\(' cannot be used"),
    "rank_pattern": ([1], r"adapter_config\.json: 'rank_pattern' is \[1\], not a table"),
    "peft_type": ("XLORA", "XLORA has no form here; LORA"),
    "use_dora": (True, "does not fit the tensors"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_is_used_or_refused_by_name(key: str, tmp_path: Path) -> None:
    adapter("lora", "roberta", tmp_path)
    value, reason = REFUSED[key]
    backbone = tiny("roberta")
    flags = [one.requires_grad for one in backbone.parameters()]
    with pytest.raises(PeftcError, match=reason):
        import_peft(settled(tmp_path, **{key: value}), backbone)
    assert [one.requires_grad for one in backbone.parameters()] == flags


QUERY = "roberta.encoder.layer.0.attention.self.query"
KEY = f"base_model.model.{QUERY}"
Damage = Callable[[dict[str, torch.Tensor]], object]
# Tensors that do not go with their configuration, or with the backbone: the change, settings, what is said.
STRANGE: dict[str, tuple[str, Damage, dict[str, object], str]] = {
    "none": ("lora", lambda one: one.clear(), {}, "{file} holds no tensor"),
    "half a pair": (
        "lora",
        lambda one: one.pop(f"{KEY}.lora_B.weight"),
        {},
        f"'{QUERY}' has the tensors lora_A.weight: no known form",
    ),
    "a head of five classes": (
        "lora",
        lambda one: one.update({"base_model.model.classifier.out_proj.weight": torch.ones(5, 32)}),
        {"modules_to_save": ["classifier"]},
        "'classifier.out_proj.weight' is [5, 32], and the backbone's [3, 32]; load the backbone with the sizes that the "
        "adapter was trained with, such as num_labels",
    ),
    "a head of two layers": (
        "lora",
        lambda one: one.update({"base_model.model.classifier.more.weight": torch.ones(3, 32)}),
        {"modules_to_save": ["classifier"]},
        "the backbone has no parameter 'classifier.more.weight'",
    ),
    "no projections": (
        "vera",
        lambda one: [one.pop(f"base_model.vera_{name}") for name in "AB"],
        {},
        "the adapter was saved without its random projections; save it with save_projection=True",
    ),
    "another width": (
        "vera",
        lambda one: one.update({f"{KEY}.vera_lambda_b": torch.ones(7)}),
        {},
        f"'{QUERY}' is [32, 32], and its scale is of 7",
    ),
    "rows beside": (
        "lora",
        lambda one: one.update({"prompt_embeddings": torch.ones(5, 32)}),
        {},
        "'prompt_embeddings' of a LORA adapter has no form here",
    ),
}


@pytest.mark.parametrize("case", STRANGE)
def test_tensors_that_do_not_fit(case: str, tmp_path: Path) -> None:
    kind, damage, changes, message = STRANGE[case]
    adapter(kind, "roberta", tmp_path)
    assert refusal(tmp_path, "roberta", damage, changes) == message.format(
        file=tmp_path / "adapter_model.safetensors"
    )


def refusal(path: Path, family: str, damage: Damage, changes: dict[str, object]) -> str:
    """What reading says once the tensors and settings of an adapter were changed; the backbone stays free."""
    file = settled(path, **changes) / "adapter_model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    damage(tensors)
    save_file(tensors, file)
    backbone = tiny(family)
    with pytest.raises(PeftcError) as error:
        import_peft(path, backbone)
    assert all(one.requires_grad for one in backbone.parameters())
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "fact"),
    [("[1]", "is not a PEFT configuration"), (" " * (4 << 20) + "{}", "is larger than 4 MiB")],
    ids=("a list", "large"),
)
def test_a_configuration_that_is_none(text: str, fact: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(text)
    with pytest.raises(PeftcError) as error:
        import_peft(tmp_path, tiny("roberta"))
    assert str(error.value) == f"{file} {fact}"


def put(table: torch.Tensor) -> Damage:
    return lambda one: one.update({"prompt_embeddings": table})


MISPLACED: dict[str, tuple[str, Damage, dict[str, object], str]] = {
    "fewer rows": (
        "prompt",
        put(torch.ones(5, 32)),
        {"num_virtual_tokens": 9},
        "'num_virtual_tokens' is 9, and 'prompt_embeddings' has 5 rows",
    ),
    "narrower": (
        "prompt",
        put(torch.ones(5, 16)),
        {},
        "'prompt_embeddings' has rows [5, 16], and this backbone takes [5, 32]",
    ),
    "fewer layers": (
        "prefix",
        put(torch.ones(5, 64)),
        {},
        "'prompt_embeddings' has the shape [5, 64]; 2 layers of 4 heads of 8 need [5, 128]",
    ),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_rows_that_do_not_fit(case: str, tmp_path: Path) -> None:
    kind, damage, changes, message = MISPLACED[case]
    rows(kind, "gpt2", tmp_path)
    assert refusal(tmp_path, "gpt2", damage, changes) == message


def test_a_linear_that_never_runs(tmp_path: Path) -> None:
    """BERT's attention to an encoder's states, when it is given none."""

    def backbone() -> PreTrainedModel:
        return tiny("bert", is_decoder=True, add_cross_attention=True)

    made = peft.LoraConfig(r=4, target_modules=["query"])
    peft.get_peft_model(backbone(), made).save_pretrained(tmp_path)
    with pytest.raises(PeftcError) as error:
        import_peft(tmp_path, backbone())
    path = "bert.encoder.layer.0.crossattention.self.query"
    assert str(error.value) == f"'{path}' cannot have a delta here: no site is there"


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(),
        peft.IA3Config(),
        peft.VeraConfig(),
        peft.LoHaConfig(),
        peft.LoKrConfig(),
        peft.PromptTuningConfig(num_virtual_tokens=3),
        peft.PromptEncoderConfig(num_virtual_tokens=3),
        peft.PrefixTuningConfig(num_virtual_tokens=3),
    ],
    ids=lambda one: type(one).__name__,
)
def test_every_setting_of_this_peft_is_known(config: peft.PeftConfig) -> None:
    """A new version's settings are looked at, one by one."""
    kind = KINDS[config.peft_type.value]
    known = {*COMMON, *kind.used, *kind.harmless, *kind.refused}
    off = {key for key, value in config.to_dict().items() if not value}
    assert config.to_dict().keys() - known - off == set()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_moves_the_backbone_is_refused_and_its_conversion_read(
    start: str, tmp_path: Path
) -> None:
    settings = dict(r=4, lora_alpha=8, target_modules=["query"])
    torch.manual_seed(3)
    model = peft.get_peft_model(
        tiny("roberta"), peft.LoraConfig(**settings, init_lora_weights=start)
    )
    model.peft_config[
        "default"
    ].init_lora_weights = True  # as PEFT's guide has it: the start, without its name
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for value in (p for p in model.parameters() if p.requires_grad):
            value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(PeftcError, match=f"'{start}': its base weights move"):
        import_peft(tmp_path / "raw", tiny("roberta"))
    converted = tmp_path / "converted"
    model.save_pretrained(
        converted, path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    mine = import_peft(converted, tiny("roberta"))
    inputs = batch(mine)
    assert (logits(mine, inputs) - logits(model.eval(), inputs)).abs().max() <= 1e-5


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["lora", "vera", "lora bias"])
def test_dropout_acts_in_training_alone(kind: str, tmp_path: Path) -> None:
    """The mean over draws and its spread are PEFT's; in evaluation nothing is dropped."""
    targets = dict(target_modules=["query", "value"])
    made = {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.4, **targets),
        "vera": peft.VeraConfig(r=4, vera_dropout=0.4, **targets),
        "lora bias": peft.LoraConfig(r=4, lora_bias=True, lora_dropout=0.4, **targets),
    }[kind]
    theirs = started("roberta", made, tmp_path)
    mine = import_peft(tmp_path, tiny("roberta"))
    inputs = batch(mine)
    want = logits(theirs, inputs)
    assert (logits(mine, inputs) - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
    entry = mine.plan.spec.entries[0]
    assert "dropout(x, 0.4)" in show(entry.delta)
    _, report = peftc.merge(mine)
    assert not report.kept
    calm = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    draws = []
    for model in (
        import_peft(tmp_path, tiny("roberta", **calm)).train(),
        peft.PeftModel.from_pretrained(tiny("roberta", **calm), tmp_path).train(),
    ):
        torch.manual_seed(5)
        draws.append(torch.stack([logits(model, inputs) for _ in range(150)]))
    ours, others = draws
    assert ours.std(0).mean() > 1e-4
    assert (ours.std(0).mean() / others.std(0).mean() - 1).abs() < 0.1
    error = (ours.std(0) + others.std(0)) / 150**0.5
    assert ((ours.mean(0) - others.mean(0)).abs() <= 5 * error).all()


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
def test_a_dropout_that_no_spec_says_is_refused_with_its_fix(kind: str, tmp_path: Path) -> None:
    adapter(kind, "roberta", tmp_path)
    key = "lora_dropout" if kind == "dora" else "rank_dropout"
    with pytest.raises(PeftcError, match=rf"'{key}'.* set it to 0 in the file"):
        import_peft(settled(tmp_path, **{key: 0.1}), tiny("roberta"))
    import_peft(settled(tmp_path, **{key: 0.0}), tiny("roberta"))


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_fc", "c_proj"]])
@pytest.mark.parametrize("kind", ["vera", "lora", "dora"])
def test_linears_that_are_stored_turned(kind: str, targets: list[str], tmp_path: Path) -> None:
    made = {
        "vera": peft.VeraConfig(r=4, target_modules=targets, fan_in_fan_out=True),
        "lora": peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True),
        "dora": peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True, use_dora=True),
    }[kind]
    theirs = started("gpt2", made, tmp_path)
    mine = import_peft(tmp_path, tiny("gpt2"))
    inputs = batch(mine)
    want = logits(theirs, inputs)
    assert (logits(mine, inputs) - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
    assert (want - logits(tiny("gpt2"), inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_biases_that_train_along(bias: str, task: str | None, tmp_path: Path) -> None:
    made = peft.LoraConfig(r=4, target_modules=["query"], bias=bias, task_type=task)
    theirs = started("roberta", made, tmp_path)
    mine = import_peft(tmp_path, tiny("roberta"))
    inputs = batch(mine)
    assert (logits(mine, inputs) - logits(theirs, inputs)).abs().max() <= 1e-5


def test_modules_of_any_kind_that_were_saved_whole(tmp_path: Path) -> None:
    saved = ["LayerNorm", "word_embeddings", "classifier"]
    made = peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=saved)
    theirs = started("roberta", made, tmp_path / "a")
    mine = import_peft(tmp_path / "a", tiny("roberta"))
    inputs = batch(mine)
    assert (logits(mine, inputs) - logits(theirs, inputs)).abs().max() <= 1e-5
    mine.save_pretrained(tmp_path / "d")
    again = peftc.load(tmp_path / "d", backbone=tiny("roberta"))
    assert torch.equal(logits(again, inputs), logits(mine, inputs))


def test_a_tensor_of_nothing_known_is_named(tmp_path: Path) -> None:
    adapter("lora", "roberta", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in (
        "roberta.encoder.layer.0.attention.self.query.lora_C.weight",
        "classifier.dense.weight",
    ):
        save_file({**tensors, f"base_model.model.{name}": torch.ones(32, 32)}, file)
        with pytest.raises(
            PeftcError, match=rf"'base_model\.model\.{name}' is no tensor of a LORA"
        ):
            import_peft(tmp_path, tiny("roberta"))


def test_an_output_head_that_was_trained_apart_from_the_embedding(tmp_path: Path) -> None:
    made = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(tiny("gpt2"), made)
    model.save_pretrained(tmp_path / "same", save_embedding_layers=True)
    mine = import_peft(tmp_path / "same", tiny("gpt2"))
    assert not mine.plan.unfrozen  # the backbone's own
    made = peft.LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"]
    )
    started("gpt2", made, tmp_path / "apart")
    with pytest.raises(PeftcError, match="tie_word_embeddings=False"):
        import_peft(tmp_path / "apart", tiny("gpt2"))


def test_what_linears_share_is_written_for_each(tmp_path: Path) -> None:
    text = peftc.load_spec("lora", r=4).text.replace(
        "kaiming_uniform}", "kaiming_uniform, per: shape}"
    )
    mine = stir(peftc.compile(tiny("roberta"), parse_spec(text, "shared")), 0.1)
    assert len(export_peft(mine, tmp_path)) == 4
    theirs = peft.PeftModel.from_pretrained(tiny("roberta"), tmp_path).eval()
    inputs = batch(mine)
    assert (logits(theirs, inputs) - logits(mine, inputs)).abs().max() <= 1e-5


def test_dropout_goes_out_and_comes_in(tmp_path: Path) -> None:
    made = peft.LoraConfig(r=4, lora_dropout=0.25, target_modules=["query", "value"])
    started("roberta", made, tmp_path / "a")
    export_peft(import_peft(tmp_path / "a", tiny("roberta")), tmp_path / "b")
    a, b = (load_file(tmp_path / one / "adapter_model.safetensors") for one in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_dropout"] == 0.25
