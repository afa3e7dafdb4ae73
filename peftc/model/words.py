"""Words: what the ports of a site hold while the backbone reads them; a delta may start as that (Li & Liang
2021, section 7.4: a prefix from the activations of real words)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from peftc.errors import PeftcError
from peftc.graph.arguments import argument
from peftc.graph.facts import ModelFacts, token_table
from peftc.graph.program import Program, Read, Value
from peftc.graph.quantized import applied
from peftc.language.spec import Words
from peftc.model import backbones
from peftc.model.running import run_program
from peftc.plan.edit import Edit
from peftc.sites.index import Index
from peftc.sites.kinds import KINDS
from peftc.sites.view import Port, compute


class WordsError(PeftcError):
    """Words that this backbone cannot read."""


@dataclass
class Activations:
    """The `forward` Program of the bare backbone, run on words; each run is kept."""

    model: PreTrainedModel
    program: Program
    index: Index = field(init=False)
    _runs: dict[tuple[Any, ...], Mapping[fx.Node, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = Index(self.program)

    def at(self, edit: Edit, length: int) -> dict[str, torch.Tensor]:
        """The ports of a site, without the batch axis, where the entry's words fill `length` tokens, repeated.

        k of 12 heads of 64 is [12, length, 64]. Raises WordsError.
        """
        place = KINDS[edit.site.at].locate(self.index, edit.site)[0]
        assert edit.entry.words is not None  # the reader asks for them
        values = self._run(edit.entry.words, length)
        return {
            name: value[0]
            for name, port in place.ports.items()
            if (value := _value(port, values)) is not None
        }

    def _run(self, words: Words, length: int) -> Mapping[fx.Node, torch.Tensor]:
        key = (words, length)
        if key not in self._runs:
            ids = torch.tensor([list(islice(cycle(self._ids(words)), length))])
            ids = ids.to(self.model.device)
            inputs = {
                name: ids if argument(name).role == "ids" else torch.ones_like(ids)
                for name in self.program.inputs
            }
            with torch.no_grad():
                self._runs[key] = _Recorder(self.program).read(self.model, inputs)
        return self._runs[key]

    def _ids(self, words: Words) -> tuple[int, ...]:
        facts = ModelFacts.read(self.model)
        if argument(facts.main_input).role != "ids":
            raise WordsError(f"{facts.name} reads no words")
        if isinstance(words, str):
            words = self._tokens(words)
        table = token_table(self.model)
        if table is None:
            raise WordsError(f"{facts.name} has no one table of tokens to read words by")
        size = len(table.weight)
        odd = [one for one in words if not 0 <= one < size]
        if odd or not words:
            fact = f"{odd[0]} is no token" if odd else "they are no tokens"
            raise WordsError(f"words: {fact}; the backbone has {size} of them")
        return words

    def _tokens(self, text: str) -> tuple[int, ...]:
        name = self.model.config.name_or_path
        tokenizer = backbones.tokenizer(name) if name else None
        if tokenizer is None:
            raise WordsError(
                f"words: there is no tokenizer with the backbone ({name or 'it has no name'}) to read "
                f"'{text}'; give ids instead, such as [713, 16]"
            )
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class _Recorder(fx.Interpreter):
    """Runs a Program and keeps every tensor on the way."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.root, graph=program.graph)
        self.program = program
        self.values: dict[fx.Node, torch.Tensor] = {}

    def read(
        self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
    ) -> dict[fx.Node, torch.Tensor]:
        run_program(model, self.program, inputs, self.run)
        return self.values

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return applied(target, *args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op == "call_function":
            self.values[n] = value
        return value


def _value(port: Port, values: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The value of a port that is an activation; weights have none here."""
    if isinstance(port, Value | Read):
        return values.get(port.node)
    whole = values.get(port.whole.node)
    return None if whole is None else port.view.read(compute, whole)
