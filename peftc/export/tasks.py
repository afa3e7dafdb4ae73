"""Tasks: what a model must be to be exported, the graphs that it becomes, and what feeds them. A row has a runner of
its name in `peftc.runtime`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

import passes
from peftc.driver import outputs
from peftc.export.graph import Case, ExportError, Graph, Tensors
from peftc.graph.arguments import forward_flags, reads_its_end
from peftc.graph.cache import CacheSlot, flatten_cache
from peftc.graph.call import Call
from peftc.graph.capture import capture, exclusive
from peftc.graph.program import Program
from peftc.graph.rows import room_of
from peftc.model.compiled import CompiledModel

# (past, query) lengths of a decoder; a classifier and an encoder have neither.
STEPS = ((0, 1), (0, 3), (5, 1), (5, 3))


@dataclass(frozen=True)
class Task:
    """A kind of bundle: `name` is what its manifest says, `title` what users read.

    `refuses` gives the reason why a model is none, by one batch, or nothing; `graphs` what it becomes.
    """

    name: str
    title: str
    refuses: Callable[[PreTrainedModel, Tensors], str]
    graphs: Callable[[PreTrainedModel, Tensors], Iterator[Graph]]


def task_of(model: PreTrainedModel, inputs: Tensors) -> Task:
    """The first task that a model suits. Raises ExportError with every task's reason."""
    reasons = []
    for task in TASKS:
        reason = task.refuses(model, inputs)
        if not reason:
            return task
        reasons.append(f"\n  as {task.title}: {reason}")
    raise ExportError(f"{type(model).__name__} cannot be exported yet" + "".join(reasons))


@exclusive
def program_of(model: PreTrainedModel, entry: str, inputs: Tensors) -> Program:
    """The graph of an entry, of a compiled or a plain model."""
    flags = forward_flags(model) if entry == "forward" else {}
    if isinstance(model, CompiledModel):
        return model.program(entry, inputs, flags)
    program = capture(model, Call.of(model, entry, inputs), flags)
    passes.Normalize().run(program)
    return program


def _no_texts(model: PreTrainedModel, inputs: Tensors, known: tuple[str, ...]) -> str:
    if model.main_input_name != "input_ids":
        return f"it reads {model.main_input_name}, not texts"
    odd = [name for name in inputs if name not in known]
    return f"it reads '{odd[0]}' too" if odd else ""


# ---- sequence classification

_TEXT = ("input_ids", "attention_mask", "token_type_ids")


def _no_classifier(model: PreTrainedModel, inputs: Tensors) -> str:
    config = model.config
    if reads_its_end(model):
        return "it picks a state by the tokens' values"
    if config.is_encoder_decoder or model.can_generate():
        return "it writes texts"
    if reason := _no_texts(model, inputs, _TEXT):
        return reason
    try:
        logits = outputs(model, inputs).get("logits")
    except Exception as error:  # whatever a model raises that is called otherwise
        return f"it does not run on a batch of texts: {str(error).splitlines()[0][:200]}"
    if logits is None:
        return "no 'logits' among its outputs"
    batch, length = inputs["input_ids"].shape
    if logits.shape != (batch, config.num_labels):
        axes = [{batch: "batch", length: "length"}.get(n, str(n)) for n in logits.shape]
        return f"'logits' is [{', '.join(axes)}], not [batch, labels]"
    if config.problem_type == "multi_label_classification":
        return "its head gives several labels at once, which a softmax does not"
    if config.problem_type == "regression" or config.num_labels == 1:
        return "its head gives a number, not a class"
    return ""


def _classifier(model: PreTrainedModel, inputs: Tensors) -> Iterator[Graph]:
    fed = _masked(inputs)
    if getattr(model.config, "type_vocab_size", 0) > 1:
        fed["token_type_ids"] = torch.zeros_like(fed["input_ids"])
    yield Graph(
        role="model",
        program=program_of(model, "forward", fed),
        inputs=fed,
        names={k: k for k in fed},
        outputs={"logits": "logits"},
        held=dict.fromkeys(fed, 0),
        feeds=partial(_texts, fed),
    )


def _texts(inputs: Tensors, case: Case, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Ids of the batch anew, padded as the case has it, in two segments where there are segments."""
    size = (case.rows, case.length)
    made = {
        "input_ids": _drawn(inputs["input_ids"], size, generator),
        "attention_mask": case.mask(),
        "token_type_ids": (torch.arange(case.length) * 2 // case.length).repeat(case.rows, 1),
    }
    return {name: made[name] for name in inputs}


def _masked(inputs: Tensors) -> dict[str, torch.Tensor]:
    """Ids and their mask; a batch without one has no padding."""
    ids = inputs["input_ids"]
    return {"input_ids": ids, "attention_mask": inputs.get("attention_mask", torch.ones_like(ids))}


def _drawn(values: torch.Tensor, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    pool = values.reshape(-1)
    return pool[torch.randint(0, len(pool), size, generator=generator)]


# ---- text encoder-decoder


def _no_seq2seq(model: PreTrainedModel, inputs: Tensors) -> str:
    if not (model.config.is_encoder_decoder and model.can_generate()):
        return "it has no encoder and decoder that write"
    return _no_texts(model, inputs, ("input_ids", "attention_mask", "decoder_input_ids"))


def _seq2seq(model: PreTrainedModel, inputs: Tensors) -> Iterator[Graph]:
    tokens = inputs["decoder_input_ids"]
    texts = _masked(inputs)
    with torch.no_grad():
        cache = model(**texts, decoder_input_ids=tokens, use_cache=True).past_key_values
    past = {k: v.clone() for k, v in flatten_cache(cache).items()}
    cross = {k: _onnx_name(k, "present") for k in past if _is_cross(k)}
    yield Graph(
        role="encoder",
        program=program_of(model, "encode_cross", texts),
        inputs=texts,
        names={k: k for k in texts},
        outputs={"last_hidden_state": "last_hidden_state", **cross},
        held=dict.fromkeys(texts, 0),
        feeds=partial(_texts, texts),
        padded={"last_hidden_state": 1, **dict.fromkeys(cross, 2)},
    )
    step = {"decoder_input_ids": tokens, "attention_mask": texts["attention_mask"], **past}
    names = {"decoder_input_ids": "input_ids", "attention_mask": "encoder_attention_mask"}
    held = {name: room_of(model).held(name, seq2seq=True) for name in step}
    yield Graph(
        role="decoder",
        program=program_of(model, "decode", step),
        inputs=step,
        names={**names, **{k: _onnx_name(k, "past_key_values") for k in past}},
        outputs={"logits": "logits"}
        | {k: _onnx_name(k, "present") for k in past if k not in cross},
        held=held,
        feeds=partial(_step, step, held),
        steps=STEPS,
    )


def _step(
    inputs: Tensors, held: Mapping[str, int], case: Case, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Tokens and a mask as the case has it, and a cache of noise behind `held` rows."""
    made: dict[str, torch.Tensor] = {}
    for name, real in inputs.items():
        if name == "attention_mask":
            made[name] = case.mask()
        elif name == "decoder_input_ids":
            made[name] = _drawn(real, (case.rows, case.query), generator)
        else:
            length = held[name] + (case.length if _is_cross(name) else case.past)
            shape = (case.rows, real.shape[1], length, real.shape[3])
            made[name] = torch.randn(shape, generator=generator, dtype=real.dtype)
    return made


def _is_cross(name: str) -> bool:
    return name.split(".")[1] == "cross"


def _onnx_name(name: str, prefix: str) -> str:
    slot = CacheSlot.read(name)
    assert slot is not None  # a tensor of a cache
    return slot.onnx(prefix)


TASKS = (
    Task(
        "classifier",
        "sequence classification (one label of several, by softmax)",
        _no_classifier,
        _classifier,
    ),
    Task("seq2seq", "text encoder-decoder (generation)", _no_seq2seq, _seq2seq),
)
