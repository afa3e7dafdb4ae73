"""Steps: the batch that a training step reads, as a collator and a Trainer make it of texts without padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from peftc.errors import PeftcError
from peftc.graph.arguments import argument, dummy_inputs, is_ids, resized
from peftc.graph.call import Call
from peftc.graph.facts import ModelFacts
from peftc.graph.rows import Room

# Problems whose labels are numbers, not classes.
_FLOATING = ("regression", "multi_label_classification")


class StepError(PeftcError):
    """A batch that a model does not read."""


def step_inputs(
    model: PreTrainedModel,
    batch: int,
    length: int | None,
    logits: tuple[int | None, ...],
    room: Room,
    example: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The inputs of one step by argument name: `batch` rows of `length` tokens, source and target alike, and labels
    where the model takes them, on the model's device.

    `logits` are the sizes of what it predicts, None where they are those of the batch. `room` is for rows in front.
    `example` is one batch, where the inputs cannot be guessed: repeated or cut to size. Raises StepError.
    """
    facts = ModelFacts.read(model)
    inputs = dict(example or dummy_inputs(model))
    _require(facts, inputs, batch, length, room)
    if example is None and _makes_its_own(model, facts):
        inputs.pop("decoder_input_ids", None)
    sizes = {"batch": batch, "seq": length or 0, "target": length or 0}
    labels = Call.of(model, "forward", inputs).labels
    found = {name: resized(one, labels[name], sizes) for name, one in inputs.items()}
    varying = (batch, *[length or 0] * len(logits))
    predicted = tuple(n if one is None else one for one, n in zip(logits, varying))
    for name in find_labels(type(model)):
        if name not in found:
            place = argument(name).role == "place"
            found[name] = torch.zeros(batch).long() if place else _labels(model, name, predicted)
    return {name: one.to(model.device) for name, one in found.items()}


def _require(
    facts: ModelFacts,
    inputs: Mapping[str, torch.Tensor],
    batch: int,
    length: int | None,
    room: Room,
) -> None:
    if batch < 1:
        raise StepError(f"batch {batch}: a step reads rows; say 1 or more")
    if not any(is_ids(name, one) for name, one in inputs.items()):
        if length is not None:
            raise StepError(
                f"length {length}: {facts.name} reads {facts.main_input} of one size, no tokens; leave length out"
            )
        return
    if length is None:
        raise StepError(f"{facts.name} reads tokens: say how many a row has, as length")
    if length < 1:
        raise StepError(f"length {length}: a row has tokens; say 1 or more")
    longest = None if facts.longest is None else room.longest(facts.longest)
    if longest is None or length <= longest:
        return
    behind = " behind the rows in front" if room else ""
    advice = f"say {longest} or less" if longest > 0 else "put fewer rows there"
    raise StepError(
        f"length {length}: {facts.name} has positions for {max(longest, 0)} tokens{behind}; {advice}"
    )


def _makes_its_own(model: PreTrainedModel, facts: ModelFacts) -> bool:
    """Whether a decoder reads its labels, moved by the model's own code; else the collator moves them."""
    collated = hasattr(model, "prepare_decoder_input_ids_from_labels")
    return "labels" in facts.arguments and not collated


def _labels(model: PreTrainedModel, name: str, logits: tuple[int, ...]) -> torch.Tensor:
    """Labels: a class for all that is predicted, or numbers where these are what is learned."""
    if name != "labels" or len(logits) not in (2, 3):
        raise StepError(
            f"{type(model).__name__}: nothing says what its '{name}' are like; pass example={{...}} with one batch"
        )
    one = len(logits) == 2 and logits[-1] == 1
    problem = getattr(model.config, "problem_type", None) or ("regression" if one else "")
    if problem in _FLOATING:
        return torch.zeros(logits[:1] if one else logits)
    return torch.zeros(logits[:-1], dtype=torch.long)
