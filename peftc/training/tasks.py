"""THE table of tasks: the columns of each, how its rows become tokens and labels, its collator, what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import transformers

from peftc.errors import PeftcError, number_of

Batch = Mapping[str, list[Any]]
IGNORED = -100  # a label that no loss counts


class RowError(PeftcError):
    """A row that cannot be learned from."""


@dataclass(frozen=True)
class Encoder:
    """What rows are encoded with. `columns` are by role, a dotted one goes into a mapping; `names` those of a
    column of ClassLabels; `classes` the model's."""

    tokenizer: Any
    columns: Mapping[str, str]
    classes: Mapping[str, int]
    names: tuple[str, ...] = ()
    max_length: int = 64
    max_target_length: int = 32
    packed: bool = False
    place: str = "data"

    def values(self, rows: Batch, role: str, at: Sequence[int]) -> list[Any]:
        """Of a role. Raises RowError where a row has none."""
        first, *inner = self.columns[role].split(".")
        found = rows[first]
        for key in inner:
            found = [None if one is None else one.get(key) for one in found]
        for row, value in zip(at, found, strict=True):
            if value is None:
                raise RowError(f"{self.place}, row {row + 1}: no column '{self.columns[role]}'")
        return found

    def texts(self, rows: Batch, role: str, at: Sequence[int]) -> list[str]:
        return [str(one) for one in self.values(rows, role, at)]

    def tokens(self, rows: Batch, at: Sequence[int]) -> dict[str, list[Any]]:
        """Of the text, or of the two."""
        roles = [one for one in ("text", "pair") if one in self.columns]
        texts = (self.texts(rows, one, at) for one in roles)
        return dict(self.tokenizer(*texts, truncation=True, max_length=self.max_length))

    def index(self, value: Any, row: int) -> int:
        """Of a class. Raises RowError where the model has no such class."""
        if self.names and not (isinstance(value, int) and 0 <= value < len(self.names)):
            raise RowError(
                f"{self.place}, row {row + 1}: label {value} is out of range: "
                f"'{self.columns['label']}' has classes 0 to {len(self.names) - 1}"
            )
        name = self.names[value] if self.names else str(value)
        if name not in self.classes:
            raise RowError(
                f"{self.place}, row {row + 1}: class '{name}' is not one that the model knows: "
                + ", ".join(self.classes)
            )
        return self.classes[name]


@dataclass(frozen=True)
class Task:
    """`columns` by role: the name that it has unless it is told; None where it may be absent. `classes`: what a
    label is: `one`, `many`, `tags`, or nothing to count. `predicts` is what its metrics compare."""

    columns: Mapping[str, str | None]
    predicts: str
    encode: Callable[[Encoder, Batch, Sequence[int]], dict[str, list[Any]]]
    metrics: tuple[str, ...]
    classes: str = ""
    collator: str = "DataCollatorWithPadding"
    labels: tuple[str, ...] = ("labels",)
    settings: Mapping[str, Any] | None = None

    @property
    def generates(self) -> bool:
        return self.predicts == "texts"

    @property
    def heads(self) -> bool:
        """Whether its model has a new head, which must learn."""
        return self.predicts not in ("texts", "losses")


def _classes(one: Encoder, rows: Batch, at: Sequence[int]) -> dict[str, list[Any]]:
    labels = zip(one.values(rows, "label", at), at, strict=True)
    return {**one.tokens(rows, at), "labels": [one.index(label, row) for label, row in labels]}


def _many(one: Encoder, rows: Batch, at: Sequence[int]) -> dict[str, list[Any]]:
    count, wanted = len(one.classes), []
    for labels, row in zip(one.values(rows, "label", at), at, strict=True):
        own = {one.index(label, row) for label in labels}
        wanted.append([float(i in own) for i in range(count)])
    return {**one.tokens(rows, at), "labels": wanted}


def _number(one: Encoder, rows: Batch, at: Sequence[int]) -> dict[str, list[Any]]:
    found = []
    for value, row in zip(one.values(rows, "label", at), at, strict=True):
        try:
            found.append(float(value))
        except (TypeError, ValueError) as error:
            raise RowError(f"{one.place}, row {row + 1}: {value!r} is no number") from error
    return {**one.tokens(rows, at), "labels": found}


def _tags(one: Encoder, rows: Batch, at: Sequence[int]) -> dict[str, list[Any]]:
    """The tag of a word at its first token."""
    words = one.values(rows, "text", at)
    encoded = one.tokenizer(
        words, is_split_into_words=True, truncation=True, max_length=one.max_length
    )
    labels = []
    for i, (tags, row) in enumerate(zip(one.values(rows, "label", at), at, strict=True)):
        if len(tags) != len(words[i]):
            raise RowError(
                f"{one.place}, row {row + 1}: {number_of(len(tags), 'tag')} for {number_of(len(words[i]), 'word')}"
            )
        of, own = encoded.word_ids(i), [one.index(tag, row) for tag in tags]
        first = [word is not None and word != before for word, before in zip(of, [None, *of])]
        labels.append([own[w] if is_first else IGNORED for w, is_first in zip(of, first)])
    return {**encoded, "labels": labels}


def _pairs(one: Encoder, rows: Batch, at: Sequence[int]) -> dict[str, list[Any]]:
    wanted = one.tokenizer(
        text_target=one.texts(rows, "target", at),
        truncation=True,
        max_length=one.max_target_length,
    )
    return {**one.tokens(rows, at), "labels": wanted["input_ids"]}


def _language(one: Encoder, rows: Batch, at: Sequence[int]) -> dict[str, list[Any]]:
    """Texts whole; of a prompt and its completion, and of a chat, what is answered alone."""
    lead, end = one.tokenizer, one.tokenizer.eos_token or ""
    if "messages" in one.columns:
        chats = one.values(rows, "messages", at)
        prompts = [
            lead.apply_chat_template(c[:-1], tokenize=False, add_generation_prompt=True)
            for c in chats
        ]
        whole = [lead.apply_chat_template(c, tokenize=False) for c in chats]
    elif "target" in one.columns:
        prompts = one.texts(rows, "text", at)
        answers = one.texts(rows, "target", at)
        whole = [f"{p}{a}{end}" for p, a in zip(prompts, answers)]
    else:
        whole = [f"{t}{end}" for t in one.texts(rows, "text", at)]
        prompts = [""] * len(whole)
    if one.packed:
        return _packed(one, whole)
    more = {"truncation": True, "max_length": one.max_length}
    if "messages" in one.columns:
        more["add_special_tokens"] = False  # a template has them
    encoded = lead(whole, return_offsets_mapping=True, **more)
    labels = [
        [i if after > len(prompt) else IGNORED for i, (_, after) in zip(ids, spans)]
        for ids, spans, prompt in zip(encoded["input_ids"], encoded.pop("offset_mapping"), prompts)
    ]
    return {**encoded, "labels": labels}


def _packed(one: Encoder, texts: Sequence[str]) -> dict[str, list[Any]]:
    """Blocks of `max_length` tokens, one text after the other; the rest of a batch is a shorter block."""
    ids = list(chain.from_iterable(one.tokenizer(list(texts))["input_ids"]))
    size = one.max_length
    blocks = [ids[i : i + size] for i in range(0, len(ids), size)]
    return {
        "input_ids": blocks,
        "attention_mask": [[1] * len(b) for b in blocks],
        "labels": [list(b) for b in blocks],
    }


def _spans(one: Encoder, rows: Batch, at: Sequence[int]) -> dict[str, list[Any]]:
    """A long context is several windows; where a window lacks the answer, it is at the first token."""
    encoded = one.tokenizer(
        one.texts(rows, "question", at),
        one.texts(rows, "context", at),
        truncation="only_second",
        max_length=one.max_length,
        stride=one.max_length // 4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    answers, owner = one.values(rows, "answers", at), encoded.pop("overflow_to_sample_mapping")
    starts, ends, shown = [], [], []
    for i, of in enumerate(owner):
        inside = [which == 1 for which in encoded.sequence_ids(i)]
        spans = [s if real else (0, 0) for s, real in zip(encoded["offset_mapping"][i], inside)]
        start, end = _place(spans, answers[of])
        starts.append(start)
        ends.append(end)
        shown.append([list(s) for s in spans])
    encoded.pop("offset_mapping")
    own = {"start_positions": starts, "end_positions": ends}
    return {**encoded, **own, "spans": shown, "row": [at[of] for of in owner]}


def _place(spans: Sequence[tuple[int, int]], answer: Mapping[str, Any]) -> tuple[int, int]:
    if not answer["text"]:
        return 0, 0
    first = answer["answer_start"][0]
    last = first + len(answer["text"][0])
    held = [i for i, (a, b) in enumerate(spans) if a < b and a < last and b > first]
    whole = held and spans[held[0]][0] <= first and spans[held[-1]][1] >= last
    return (held[0], held[-1]) if whole else (0, 0)


TEXT = {"text": "text", "pair": None}
SEQ2SEQ = "DataCollatorForSeq2Seq"
TASKS: Mapping[str, Task] = {
    "classification": Task(
        {**TEXT, "label": "label"}, "classes", _classes, ("accuracy",), classes="one"
    ),
    "multi-label": Task(
        {**TEXT, "label": "labels"},
        "class sets",
        _many,
        ("f1_micro", "f1_macro"),
        classes="many",
        settings={"problem_type": "multi_label_classification"},
    ),
    "regression": Task(
        {**TEXT, "label": "label"},
        "numbers",
        _number,
        ("mse", "pearson"),
        settings={"problem_type": "regression", "id2label": {0: "value"}, "label2id": {"value": 0}},
    ),
    "token-classification": Task(
        {"text": "tokens", "label": "tags"},
        "tags",
        _tags,
        ("tag_accuracy", "tag_f1"),
        classes="tags",
        collator="DataCollatorForTokenClassification",
    ),
    "question-answering": Task(
        {"question": "question", "context": "context", "answers": "answers"},
        "spans",
        _spans,
        ("exact_match", "span_f1"),
        labels=("start_positions", "end_positions"),
        settings={"id2label": {0: "start", 1: "end"}, "label2id": {"start": 0, "end": 1}},
    ),
    "summarization": Task(
        {"text": "text", "target": "summary"}, "texts", _pairs, ("rougeL",), collator=SEQ2SEQ
    ),
    "translation": Task(
        {"text": "text", "target": "target"}, "texts", _pairs, ("bleu",), collator=SEQ2SEQ
    ),
    "language-modeling": Task(
        {"text": "text", "target": None, "messages": None},
        "losses",
        _language,
        (),
        collator=SEQ2SEQ,
    ),
}


def collator(task: Task, tokenizer: Any, model: Any) -> Any:
    """Of transformers; one that makes a decoder's inputs asks the model how."""
    more = {"model": model} if task.generates else {}
    return getattr(transformers, task.collator)(tokenizer, **more)


def reduced(task: Task) -> Callable[[Any, Any], Any] | None:
    """What is kept of logits while rows are scored: classes instead of all scores."""
    reductions: Mapping[str, Callable[[Any], Any]] = {
        "classes": lambda scores: scores.argmax(-1),
        "tags": lambda scores: scores.argmax(-1),
        "class sets": lambda scores: (scores > 0).long(),
        "numbers": lambda scores: scores.squeeze(-1).float(),
    }
    reduce = reductions.get(task.predicts)
    if reduce is None:
        return None
    return lambda scores, _: reduce(scores[0] if isinstance(scores, tuple) else scores)


@dataclass(frozen=True)
class Reader:
    """From what a Trainer predicts to what the metrics of a task compare: (found, wanted)."""

    task: Task
    tokenizer: Any
    rows: Any = None
    encoded: Any = None
    columns: Mapping[str, str] | None = None

    def read(self, found: Any, wanted: Any) -> tuple[list[Any], list[Any]]:
        if self.task.predicts == "texts":
            return self._decoded(found), self._decoded(wanted)
        if self.task.predicts == "tags":
            kept = np.asarray(wanted) != IGNORED
            return np.asarray(found)[kept].tolist(), np.asarray(wanted)[kept].tolist()
        if self.task.predicts == "spans":
            return self._answers(*found[:2])
        return np.asarray(found).tolist(), np.asarray(wanted).tolist()

    def _decoded(self, tokens: Any) -> list[str]:
        tokens = np.asarray(tokens)
        tokens = np.where(tokens < 0, self.tokenizer.pad_token_id, tokens)
        return [t.strip() for t in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _answers(self, starts: Any, ends: Any) -> tuple[list[str], list[list[str]]]:
        """The best span of at most 30 tokens over the windows of each row."""
        columns = self.columns or {}
        best: dict[int, tuple[float, str]] = {}
        for start, end, window in zip(starts, ends, self.encoded):
            score, place = _best_span(start, end, window["spans"])
            text = self.rows[window["row"]][columns["context"]]
            said = text[slice(*place)] if place else ""
            if window["row"] not in best or score > best[window["row"]][0]:
                best[window["row"]] = score, said
        wanted = [list(one["text"]) for one in self.rows[columns["answers"]]]
        return [best[i][1] for i in range(len(wanted))], wanted


def _best_span(start: Any, end: Any, spans: Any) -> tuple[float, tuple[int, int] | None]:
    best: tuple[float, tuple[int, int] | None] = float(start[0] + end[0]), None
    inside = [i for i, (a, b) in enumerate(spans) if a < b]
    for i in inside:
        for j in inside:
            if i <= j < i + 30 and start[i] + end[j] > best[0]:
                best = float(start[i] + end[j]), (spans[i][0], spans[j][1])
    return best
