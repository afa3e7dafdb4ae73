"""Layouts: into which files, under which names, the graphs of a task are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from peftc.export.graph import ExportError, Graph
from peftc.export.source import Source
from peftc.export.tasks import Task
from peftc.export.writing import EncoderDecoder, in_three
from peftc.runtime import OWN


class Layout(Protocol):
    """`name` is what a manifest says."""

    @property
    def name(self) -> str: ...

    def graphs(self, task: Task, one: Source) -> Iterator[Graph]:
        """What a model of a task becomes. Raises ExportError where it cannot."""


@dataclass(frozen=True)
class Own:
    """What `peftc.runtime` runs: two graphs of an encoder-decoder, whose encoder makes the cross keys and values."""

    name: str = OWN

    def graphs(self, task: Task, one: Source) -> Iterator[Graph]:
        return task.graphs(one)


@dataclass(frozen=True)
class Optimum:
    """What optimum-onnx loads: three graphs of an encoder-decoder. It starts from an empty cache, so a prefix cannot
    stand there."""

    name: str = "optimum"

    def graphs(self, task: Task, one: Source) -> Iterator[Graph]:
        several = isinstance(task, EncoderDecoder)
        for graph in in_three(one) if several else task.graphs(one):
            if graph.rows or any(one.room.held(name, several) for name in graph.inputs):
                raise ExportError(
                    "optimum starts to write from an empty cache, and this method stands in front of the tokens there; "
                    "leave --layout out, or merge a method that folds"
                )
            yield graph


LAYOUTS: Mapping[str, Layout] = {one.name: one for one in (Own(), Optimum())}


def layout_of(name: str) -> Layout:
    """Raises ExportError where there is no such row."""
    if name not in LAYOUTS:
        raise ExportError(f"no layout '{name}'; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
