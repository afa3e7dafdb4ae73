"""Tasks of one graph: a model that predicts from what it reads, at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from peftc.export.graph import Graph
from peftc.export.pooling import EMBEDDING
from peftc.export.source import Source, masked
from peftc.graph.grid import LENGTHS, fed

# The inputs of each kind of thing that is read, the one that tells it first.
READS = {
    "texts": ("input_ids", "attention_mask", "token_type_ids"),
    "images": ("pixel_values",),
}


@dataclass(frozen=True)
class Predicting:
    """A row of `peftc.export.tasks.TASKS`.

    `reads` is a row of READS, `gives` the axes of each output that makes a model one of this task: batch, length, the
    labels and the words of its configuration, and "size", which is any. `pooled`: where the model says how the vectors
    of tokens become one, that is in the graph too.
    """

    name: str
    title: str
    reads: str
    gives: Mapping[str, tuple[str, ...]]
    pooled: bool = False

    def refuses(self, one: Source) -> str:
        """Why a model is none, or nothing."""
        known = READS[self.reads]
        if one.reads != known[0]:
            return f"it reads {one.reads}, not {self.reads}"
        if one.facts.reads_its_end:
            return "it picks a state by the tokens' values"
        if one.facts.generates:
            return "it writes texts"
        odd = [name for name in one.inputs if name not in known]
        if odd:
            return f"it reads '{odd[0]}' too"
        if one.error:
            return f"it does not run on a batch of {self.reads}: {one.error}"
        missing = [name for name in self.gives if name not in one.outputs]
        if missing:
            return f"no '{missing[0]}' among its outputs"
        if self.pooled and "logits" in one.outputs:
            return "it has a head"
        return next(filter(None, (self._unlike(one, name) for name in self.gives)), "")

    def _unlike(self, one: Source, name: str) -> str:
        """How the axes of an output are others."""
        axes, shape = self.gives[name], one.outputs[name].shape
        fits = len(axes) == len(shape) and all(
            axis == "size" or one.sizes.get(axis) == n for axis, n in zip(axes, shape)
        )
        if fits:
            return ""
        names = {n: axis for axis, n in one.sizes.items()}
        said = ", ".join(names.get(n, str(n)) for n in shape)
        return f"'{name}' is [{said}], not [{', '.join(axes)}]"

    def graphs(self, one: Source) -> Iterator[Graph]:
        texts = self.reads == "texts"
        inputs = masked(one.inputs) if texts else dict(one.inputs)
        if texts and one.facts.segments > 1:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        pool = one.pooling if self.pooled else None
        pooler = ["pooler_output"] if self.pooled and "pooler_output" in one.outputs else []
        more = [EMBEDDING] if pool is not None else pooler
        axes = {name: axes.index("length") for name, axes in self.gives.items() if "length" in axes}
        yield Graph(
            role="model",
            program=one.program("forward", inputs),
            inputs=inputs,
            names={name: name for name in inputs},
            outputs={name: name for name in (*self.gives, *more)},
            feeds=partial(fed, inputs),
            cases=tuple((n, 0, 0) for n in LENGTHS) if texts else ((0, 0, 0),),
            padded=axes if texts else {},
            after=pool,
        )
