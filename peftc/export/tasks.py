"""Tasks: what a model must be to be exported, the graphs that it becomes, and what feeds them. A row has a runner of
its name in `peftc.runtime`, and the name of a pipeline of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from peftc.export.graph import ExportError, Graph
from peftc.export.predicting import Predicting
from peftc.export.source import Source
from peftc.export.writing import Causal, EncoderDecoder


class Task(Protocol):
    """A kind of bundle: `name` is what its manifest says, `title` what users read."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    def refuses(self, one: Source) -> str:
        """The reason why a model is none, or nothing."""

    def graphs(self, one: Source) -> Iterator[Graph]:
        """What it becomes."""


# Of several rows that a model suits the first is taken.
TASKS: tuple[Task, ...] = (
    EncoderDecoder("text2text-generation", "text encoder-decoder", ("input_ids",)),
    EncoderDecoder(
        "automatic-speech-recognition", "speech encoder-decoder", ("input_features", "input_values")
    ),
    Causal("text-generation", "causal language model"),
    Predicting(
        "question-answering",
        "question answering by spans",
        "texts",
        {"start_logits": ("batch", "length"), "end_logits": ("batch", "length")},
    ),
    Predicting(
        "text-classification",
        "sequence classification (one label, several, or a number)",
        "texts",
        {"logits": ("batch", "labels")},
    ),
    Predicting(
        "image-classification", "image classification", "images", {"logits": ("batch", "labels")}
    ),
    Predicting(
        "token-classification",
        "token classification",
        "texts",
        {"logits": ("batch", "length", "labels")},
    ),
    Predicting(
        "fill-mask", "masked language model", "texts", {"logits": ("batch", "length", "words")}
    ),
    Predicting(
        "feature-extraction",
        "vectors of texts (pooled, where the model says how)",
        "texts",
        {"last_hidden_state": ("batch", "length", "size")},
        pooled=True,
    ),
)


def task_of(one: Source) -> Task:
    """The first task that a model suits. Raises ExportError with every task's reason."""
    reasons = []
    for task in TASKS:
        reason = task.refuses(one)
        if not reason:
            return task
        reasons.append(f"\n  as {task.title}: {reason}")
    raise ExportError(f"{type(one.model).__name__} cannot be exported yet" + "".join(reasons))
