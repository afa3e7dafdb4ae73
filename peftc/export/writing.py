"""Tasks of models that write: graphs of one step, with what a cache holds as inputs and outputs.

What a method puts in front of the keys and values of a cache stands there from the start: a runner feeds it with the
first step (`Graph.rows`), and no step computes or copies it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import passes
from peftc.export.graph import Graph, Tensors
from peftc.export.source import Source, masked, plain
from peftc.graph.arguments import argument
from peftc.graph.cache import CacheSlot, flatten_cache, holds_states
from peftc.graph.grid import LENGTHS, Case, drawn, fed, mask_of
from peftc.graph.program import Program
from peftc.model.compiled import run_program
from peftc.rewrite.held import filling, holding

# How many tokens stand behind and in a step.
PASTS, QUERIES = (0, 1, 20), (1, 7)
PAST, PRESENT = "past_key_values", "present"


@dataclass(frozen=True)
class Step:
    """A step of a decoder: its graph, its inputs of tokens alone, and the rows that stand before them in the cache, [1,
    heads, rows, width] by our names. `held` counts those that an encoder gave; `reference` is the graph that puts a
    prefix there itself, where there is one."""

    program: Program
    inputs: Tensors
    rows: Tensors
    held: Mapping[str, int]
    reference: Program | None

    @staticmethod
    def of(one: Source, inputs: Tensors) -> Step:
        """`inputs` hold in their caches the rows that stand in front of the tokens, and nothing of a prefix."""
        program = one.program("decode", inputs)
        several = one.facts.encoder_decoder
        held = {k: n for k in inputs if (n := one.room.held(k, several)) and _slot(k)}
        own = {name: n for name, n in held.items() if not _is_cross(name)}
        rows = {name: inputs[name][:1, :, :n] for name, n in own.items()}
        reference = None
        marked = replace(program)
        passes.HeldRows().run(marked)
        if marked.held:
            reference = program
            rows |= _prefix(one, marked, inputs, rows)
            program = holding(marked)
        tokens = {**inputs, **{name: inputs[name][:, :, n:] for name, n in own.items()}}
        given = {name: n for name, n in held.items() if name not in own}
        return Step(program, tokens, rows, given, reference)


def _prefix(
    one: Source, program: Program, inputs: Tensors, rows: Tensors
) -> dict[str, torch.Tensor]:
    """What a graph puts in front of the keys and values that it is given, before the rows that are there."""
    with torch.no_grad():
        fields = run_program(one.model, filling(program), inputs)
    found = {}
    for held in program.held:
        there = rows[held.name].shape[2] if held.name in rows else 0
        found[held.name] = fields[held.name][:1, :, : held.rows + there].clone()
    return found


def _slot(name: str) -> CacheSlot | None:
    return CacheSlot.read(name)


def _is_cross(name: str) -> bool:
    slot = _slot(name)
    return slot is not None and slot.cross


def _cache_names(inputs: Any, seq2seq: bool, prefix: str) -> dict[str, str]:
    slots = ((name, _slot(name)) for name in inputs)
    return {name: slot.onnx(prefix, seq2seq) for name, slot in slots if slot is not None}


def _cached(one: Source, inputs: Tensors) -> dict[str, torch.Tensor]:
    """What a cache holds behind a batch, the rows that stand in front of the tokens among it."""
    model = one.model if one.room.rows else plain(one.model)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).get(one.facts.cache)
    return {} if cache is None else {k: v.clone() for k, v in flatten_cache(cache).items()}


def _states(one: Source, inputs: Tensors) -> str:
    """Why no graph goes on from its cache, or nothing."""
    try:
        found = _cached(one, inputs)
    except Exception as error:  # whatever a model raises that is called otherwise
        return f"it does not run on a batch: {str(error).splitlines()[0][:200]}"
    if not found:
        return "it keeps no cache"
    if holds_states(found):
        return "its cache holds states, which no graph here goes on from"
    return ""


@dataclass(frozen=True)
class Causal:
    """A row of `peftc.export.tasks.TASKS`: decoders of texts, in one graph."""

    name: str
    title: str

    def refuses(self, one: Source) -> str:
        """Why a model is none, or nothing."""
        if one.facts.encoder_decoder or not one.facts.generates:
            return "it is no decoder that writes"
        return _no_texts(one, ("input_ids", "attention_mask")) or _states(one, masked(one.inputs))

    def graphs(self, one: Source) -> Iterator[Graph]:
        texts = masked(one.inputs)
        past = _cached(one, texts)
        ids = texts["input_ids"]
        given = {"input_ids": ids, "attention_mask": torch.cat([torch.ones_like(ids)] * 2, 1)}
        if "position_ids" in one.facts.arguments:
            given["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids) + ids.shape[1]
        step = Step.of(one, {**given, **past})
        present = _cache_names(past, False, PRESENT)
        yield Graph(
            role="model",
            program=step.program,
            inputs=step.inputs,
            names={**{k: k for k in given}, **_cache_names(past, False, PAST)},
            outputs={"logits": "logits", **present},
            rows=step.rows,
            held=step.held,
            reference=step.reference,
            feeds=partial(_next, step),
            cases=tuple((p + q, p, q) for p in PASTS for q in LENGTHS),
            padded={"logits": 1, **dict.fromkeys(present, 2)},
        )


@dataclass(frozen=True)
class EncoderDecoder:
    """A row of `peftc.export.tasks.TASKS`: an encoder of what `reads` names, and a decoder of texts."""

    name: str
    title: str
    reads: tuple[str, ...]

    def refuses(self, one: Source) -> str:
        """Why a model is none, or nothing."""
        if not (one.facts.encoder_decoder and one.facts.generates):
            return "it has no encoder and decoder that write"
        if one.reads not in self.reads:
            return f"it reads {one.reads}"
        known = (one.reads, "attention_mask", "decoder_input_ids")
        odd = [name for name in one.inputs if name not in known]
        return f"it reads '{odd[0]}' too" if odd else _states(one, one.inputs)

    def graphs(self, one: Source) -> Iterator[Graph]:
        parts = Parts.of(one)
        yield parts.encoder("encoder", "encode_cross", tuple(parts.cross))
        yield parts.step("decoder")


def in_three(one: Source) -> Iterator[Graph]:
    """The graphs of an encoder-decoder as optimum has them: its first step makes the cross keys and values."""
    parts = Parts.of(one)
    yield parts.encoder("encoder_model", "encode")
    yield parts.first("decoder_model")
    step = parts.step("decoder_with_past_model")
    # It binds what a cache holds by position: layer by layer, the decoder's before the encoder's.
    slots = ((name, _slot(name)) for name in step.inputs)
    order = {k: (-1,) if s is None else (s.layer, s.cross, s.side) for k, s in slots}
    yield replace(step, inputs={k: step.inputs[k] for k in sorted(order, key=order.__getitem__)})


@dataclass(frozen=True)
class Parts:
    """An encoder-decoder and what its graphs are fed: what the encoder reads, tokens for the decoder, what a cache holds
    behind both."""

    one: Source
    source: Tensors
    tokens: torch.Tensor
    past: Tensors

    @staticmethod
    def of(one: Source) -> Parts:
        texts = one.reads == "input_ids"
        source = masked(one.inputs) if texts else {one.reads: one.inputs[one.reads]}
        tokens = one.inputs["decoder_input_ids"]
        return Parts(one, source, tokens, _cached(one, {**source, "decoder_input_ids": tokens}))

    @property
    def texts(self) -> bool:
        return self.one.reads == "input_ids"

    @property
    def mask(self) -> Tensors:
        return {"attention_mask": self.source["attention_mask"]} if self.texts else {}

    @property
    def cross(self) -> dict[str, str]:
        """The names in ONNX of what the decoder's attention to the encoder reads."""
        return {k: v for k, v in _cache_names(self.past, True, PRESENT).items() if _is_cross(k)}

    @property
    def own(self) -> dict[str, str]:
        """Of what its attention to itself does."""
        named = _cache_names(self.past, True, PRESENT)
        return {k: v for k, v in named.items() if k not in self.cross}

    def encoder(self, role: str, entry: str, more: tuple[str, ...] = ()) -> Graph:
        """The encoder, which gives `more` of what a cache holds too."""
        cross = {k: self.cross[k] for k in more}
        return Graph(
            role=role,
            program=self.one.program(entry, self.source),
            inputs=self.source,
            names={k: k for k in self.source},
            outputs={"last_hidden_state": "last_hidden_state", **cross},
            feeds=partial(fed, self.source),
            cases=tuple((n, 0, 0) for n in LENGTHS) if self.texts else ((0, 0, 0),),
            padded={"last_hidden_state": 1, **dict.fromkeys(cross, 2)} if self.texts else {},
        )

    def first(self, role: str) -> Graph:
        """The decoder's first tokens, without a cache."""
        with torch.no_grad():
            hidden = self.one.model.get_encoder()(**self.source)[0]
        given = {"decoder_input_ids": self.tokens, "encoder_hidden_states": hidden, **self.mask}
        return Graph(
            role=role,
            program=self.one.program("prefill", given),
            inputs=given,
            names={k: argument(k).step or k for k in given},
            outputs={"logits": "logits", **self.own, **self.cross},
            feeds=partial(_states_of, given),
            cases=tuple((n, 0, q) for n in self._lengths for q in QUERIES),
            padded=dict.fromkeys(self.cross, 2) if self.texts else {},
        )

    def step(self, role: str) -> Graph:
        """The decoder's next tokens, behind what a cache holds."""
        given = {"decoder_input_ids": self.tokens, **self.mask}
        step = Step.of(self.one, {**given, **self.past})
        return Graph(
            role=role,
            program=step.program,
            inputs=step.inputs,
            names={k: argument(k).step for k in given} | _cache_names(self.past, True, PAST),
            outputs={"logits": "logits", **self.own},
            rows=step.rows,
            held=step.held,
            reference=step.reference,
            feeds=partial(_next, step),
            cases=tuple((n, p, q) for n in self._lengths for p in PASTS for q in QUERIES),
        )

    @property
    def _lengths(self) -> tuple[int, ...]:
        """Of what the encoder gives."""
        if self.texts:
            return LENGTHS
        return tuple({v.shape[2] for k, v in self.past.items() if _is_cross(k)})


def _states_of(given: Tensors, case: Case, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch for a first step; of what the encoder gave, noise as long as the case's length."""
    hidden = given["encoder_hidden_states"]
    shape = (case.rows, case.length, hidden.shape[2])
    states = torch.randn(shape, generator=generator, dtype=hidden.dtype)
    rest = {k: v for k, v in given.items() if v is not hidden}
    return {**fed(rest, case, generator), "encoder_hidden_states": states}


def _next(step: Step, case: Case, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tokens and a mask as the case has it, and a cache of noise."""
    mask = mask_of(case, case.length)
    made: dict[str, torch.Tensor] = {}
    for name, real in step.inputs.items():
        if name == "attention_mask":
            made[name] = mask
        elif name == "position_ids":
            made[name] = (mask.cumsum(1) - 1).clamp(min=0)[:, -case.query :]
        elif (slot := _slot(name)) is None:
            made[name] = drawn(real, (case.rows, case.query), generator)
        else:
            length = step.held.get(name, 0) + case.length if slot.cross else case.past
            shape = (case.rows, real.shape[1], length, real.shape[3])
            made[name] = torch.randn(shape, generator=generator, dtype=real.dtype)
    return made


def _no_texts(one: Source, known: tuple[str, ...]) -> str:
    if one.reads != known[0]:
        return f"it reads {one.reads}, not texts"
    odd = [name for name in one.inputs if name not in known]
    return f"it reads '{odd[0]}' too" if odd else ""
