"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import transformers
import typer
from transformers import PreTrainedModel

from peftc.cli.console import step
from peftc.errors import PeftcError
from peftc.language.reader import load_spec
from peftc.language.spec import Spec, with_words
from peftc.model import backbones
from peftc.runtime.session import PROVIDERS

Specs = Annotated[
    list[str],
    typer.Argument(metavar="SPEC...", help="Shipped names or YAML files; several act as one."),
]
OptionalSpecs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SPEC]...", help="Shipped names or YAML files; several act as one."),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A folder, a name on the Hugging Face hub.", metavar="MODEL"
    ),
]
Backbone = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="The backbone, if it moved since the deltas were saved.",
    ),
]
RandomWeights = Annotated[
    bool,
    typer.Option("--random-weights", help="Build the configuration with random weights (seed 0)."),
]
TaskName = Literal[
    "classification",
    "multi-label",
    "regression",
    "token-classification",
    "question-answering",
    "summarization",
    "translation",
    "language-modeling",
]
Task = Annotated[
    TaskName | None,
    typer.Option("--task", metavar="TASK", help="Load the model with this task's head."),
]
NumLabels = Annotated[
    int | None, typer.Option("--num-labels", min=2, help="Classes of a classifier.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Override an argument of the spec; repeatable."
    ),
]
Words = Annotated[
    str | None,
    typer.Option("--words", metavar="TEXT", help="What a spec starts from that starts from words."),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="cpu|cuda", help="Where graphs run; never elsewhere than asked."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]


class OptionError(PeftcError):
    """A value on the command line that cannot be used."""


def providers(device: str) -> Sequence[str]:
    """What runs graphs on a device. Raises OptionError for one that is not known."""
    if device not in PROVIDERS:
        raise OptionError(f"no device '{device}'; there are {', '.join(PROVIDERS)}")
    return PROVIDERS[device]


def specs(names: list[str], sets: list[str] | None, words: str | None = None) -> tuple[Spec, ...]:
    """The specs that the command line names, with its --set values and --words; they act as one, but a budget
    is of one of them."""

    values = dict(_pair(one) for one in sets or ())
    loaded = [load_spec(name) for name in names]
    if values:
        known = [{k: v for k, v in values.items() if k in one.arguments} for one in loaded]
        unknown = values.keys() - {k for one in known for k in one}
        if unknown:  # let the first spec say it, with its own suggestion
            known[0] |= {k: values[k] for k in unknown}
        loaded = [load_spec(name, **mine) for name, mine in zip(names, known, strict=True)]
    if words is None:
        return tuple(loaded)
    worded = [any(entry.words is not None for entry in one.entries) for one in loaded]
    if not any(worded):
        raise OptionError(f"{name_of(loaded)} starts from no words; leave --words out")
    pairs = zip(loaded, worded, strict=True)
    return tuple(with_words(one, words) if has else one for one, has in pairs)


def name_of(specs: Sequence[Spec]) -> str:
    """What several specs that act as one are called."""
    return "+".join(one.name for one in specs)


def _pair(text: str) -> tuple[str, float | int]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise OptionError(f"--set takes NAME=VALUE, not '{text}'")
    for kind in (int, float):
        try:
            return name.strip(), kind(value)
        except ValueError:
            continue
    raise OptionError(f"--set {name}: '{value}' is no number")


def backbone(
    name: str,
    random_weights: bool = False,
    *,
    meta: bool = False,
    task: str | None = None,
    num_labels: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The model of --model, with progress; quiet from here on."""

    with step(f"building {name}" + (" on the meta device" if meta else "")):
        quiet()
        return backbones.resolve(
            name,
            random_weights=random_weights,
            meta=meta,
            task=task,
            num_labels=num_labels,
            settings=settings,
        )


def quiet() -> None:
    """Silence what torch and transformers say about themselves; errors still come as exceptions."""

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
