"""What an export has no runner for is refused, with the tasks that it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from conftest import ENCODER, SEQ2SEQ, tiny, wide

import peftc
from peftc.errors import PeftcError
from peftc.export.tasks import TASKS
from peftc.runtime import RUNNERS

BERT = {k: v for k, v in ENCODER.items() if k != "num_labels"}
# (model, changes of its configuration) -> what is said of it
REFUSED = {
    "BertForTokenClassification": ({}, r"'logits' is \[batch, length, 2\]"),
    "BertForQuestionAnswering": ({}, "no 'logits'"),
    "BertForMaskedLM": ({}, r"'logits' is \[batch, length, 120\]"),
    "BertModel": ({}, "no 'logits'"),
    "BertForMultipleChoice": ({}, "cannot be exported yet"),
}


def built(name: str, **changes: object) -> transformers.PreTrainedModel:
    cls = getattr(transformers, name)
    return wide(cls(cls.config_class(**{**BERT, **changes})))


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_runner(name: str, tmp_path: Path) -> None:
    changes, reason = REFUSED[name]
    with pytest.raises(PeftcError, match=reason) as caught:
        peftc.export(built(name, **changes), tmp_path / "b")
    assert all(task.title in str(caught.value) for task in TASKS)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(problem_type="multi_label_classification"), "several labels at once"),
        (dict(problem_type="regression"), "a number, not a class"),
        (dict(num_labels=1), "a number, not a class"),
    ],
)
def test_a_head_that_is_no_softmax(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    model = peftc.compile(tiny("bert", **changes), "lora")
    with pytest.raises(PeftcError, match=reason):
        peftc.export(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("family", ["gpt2", "vit", "whisper"])
def test_other_inputs_and_outputs(family: str, tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match="cannot be exported yet"):
        peftc.export(tiny(family), tmp_path / "b")


def test_a_classifier_that_reads_its_end(tmp_path: Path) -> None:
    model = wide(
        transformers.BartForSequenceClassification(transformers.BartConfig(**SEQ2SEQ, num_labels=3))
    )
    with pytest.raises(PeftcError, match="picks a state by the tokens' values"):
        peftc.export(model, tmp_path / "b")


def test_every_task_has_a_runner() -> None:
    assert {task.name for task in TASKS} == RUNNERS.keys()
