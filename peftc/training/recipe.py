"""A recipe: how a task is learned, as YAML: its columns, lengths, generation, and keys of TrainingArguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig, TrainingArguments

from peftc.errors import PeftcError, suggest
from peftc.training.metrics import METRICS
from peftc.training.tasks import TASKS

SHIPPED = Path(__file__).parent / "shipped"
# Keys of TrainingArguments that are the trainer's own here, and what sets them.
OWN = {
    "output_dir": "--output",
    "report_to": "--log",
    "restore_callback_states_from_checkpoint": "--checkpoints",
    "disable_tqdm": "the terminal",
    "logging_nan_inf_filter": "the check of every loss",
}
ROLES = tuple(dict.fromkeys(role for task in TASKS.values() for role in task.columns))
SPLITS = ("train", "eval")
LANGUAGES = ("source", "target")


class RecipeError(PeftcError):
    """A recipe that cannot be used: every key that is wrong, a line each."""


@dataclass(frozen=True)
class Recipe:
    """Lengths in tokens. `columns` are by role, `train` are keys of TrainingArguments, `generation` of
    GenerationConfig; `data` and `config` name a data set of the hub, `eval_rows` how many rows score while
    training, `patience` how many evaluations without a better score end it."""

    name: str = "recipe"
    task: str = "classification"
    data: str | None = None
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    languages: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 64
    max_target_length: int = 32
    packed: bool = False
    generation: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    eval_rows: int | None = None
    patience: int | None = None
    stream: bool = False
    train: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.train.get("seed", 0))

    def using(self, **changes: Any) -> Recipe:
        """With these, where they are not None: fields, entries of its mappings, or keys of TrainingArguments."""
        given = {name: value for name, value in changes.items() if value is not None}
        mine = {one.name for one in fields(self)}
        settings = {name: value for name, value in given.items() if name not in mine}
        if "num_train_epochs" in settings:
            settings.setdefault("max_steps", -1)
        merged: dict[str, Any] = {
            name: {**getattr(self, name), **value} if isinstance(value, Mapping) else value
            for name, value in given.items()
            if name in mine
        }
        return checked(replace(self, **merged, train={**self.train, **settings}), "options")


def shipped() -> tuple[str, ...]:
    """The names of the recipes that peftc ships."""
    return tuple(sorted(file.stem for file in SHIPPED.glob("*.yaml")))


def load_recipe(name: str | Path) -> Recipe:
    """A shipped recipe by its `name`, or a YAML file. Raises RecipeError with all that is wrong."""
    file = SHIPPED / f"{name}.yaml"
    if str(name) not in shipped():
        file = Path(name)
        if not file.is_file():
            hint = suggest(str(name), shipped())
            raise RecipeError(
                f"no recipe '{name}': shipped are {', '.join(shipped())}, or name a YAML file"
                + (f" ({hint})" if hint else "")
            )
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        fact = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{place}: not YAML: {fact}") from error
    return recipe_of(data, str(file), default=file.stem)


def recipe_of(data: Any, place: str, default: str = "recipe") -> Recipe:
    """A recipe from the `data` that YAML or JSON holds; `place` is what errors name, `default` its name where it has none.
    Raises RecipeError with all that is wrong."""
    if not isinstance(data, dict):
        raise RecipeError(f"{place}: a recipe is a mapping of keys, as {SHIPPED / 'sst2.yaml'} is")
    _raise(place, _unknown("", data, [one.name for one in fields(Recipe)]))
    if isinstance(data.get("metrics"), list):
        data = {**data, "metrics": tuple(data["metrics"])}
    return checked(Recipe(**{"name": default, **data}), place)


def checked(recipe: Recipe, place: str) -> Recipe:
    """The recipe, its numbers of the types that TrainingArguments has. Raises RecipeError with all that is wrong."""
    _raise(place, _wrong(recipe))
    kinds = _kinds(TrainingArguments)
    settings, problems = {}, []
    for key, value in recipe.train.items():
        settings[key] = _number(value, kinds[key])
        if settings[key] is None and value is not None:
            problems.append(f"'train.{key}' is {value!r}, not {_NAMES[kinds[key]]}")
    _raise(place, problems)
    return replace(recipe, train=settings)


def _wrong(recipe: Recipe) -> Iterator[str]:
    for one in fields(recipe):
        value, kind = getattr(recipe, one.name), _FIELDS[str(one.type)]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            yield f"'{one.name}' is {value!r}, not {_SAID[str(one.type)]}"
            return
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            yield f"'{one.name}' is {value}, not 1 or more"
    yield from _unknown("task ", [recipe.task], TASKS)
    yield from _unknown("columns.", recipe.columns, ROLES)
    yield from _unknown("splits.", recipe.splits, SPLITS)
    yield from _unknown("languages.", recipe.languages, LANGUAGES)
    yield from _unknown("metrics ", recipe.metrics, METRICS)
    yield from _unknown("generation.", recipe.generation, GenerationConfig().to_dict())
    yield from _unknown("train.", recipe.train, _kinds(TrainingArguments))
    for key in recipe.train:
        if key in OWN:
            yield f"'train.{key}' is not a recipe's to set: {OWN[key]} sets it"
    if recipe.task in TASKS:
        for metric in recipe.metrics:
            if metric in METRICS and METRICS[metric].of != TASKS[recipe.task].predicts:
                known = [k for k, one in METRICS.items() if one.of == TASKS[recipe.task].predicts]
                yield f"metric '{metric}' is not one of {recipe.task}: {', '.join(known)}"


def _unknown(where: str, given: Any, known: Any) -> Iterator[str]:
    for key in given:
        if key not in known:
            hint = suggest(str(key), known)
            yield f"unknown key '{where}{key}'" + (f" ({hint})" if hint else "")


def _raise(place: str, problems: Any) -> None:
    if lines := [f"{place}: {one}" for one in problems]:
        raise RecipeError("\n".join(lines))


_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}
_FIELDS: Mapping[str, Any] = {
    "str": str,
    "str | None": str | None,
    "int": int,
    "int | None": int | None,
    "bool": bool,
    "tuple[str, ...]": tuple,
    "Mapping[str, str]": Mapping,
    "Mapping[str, Any]": Mapping,
}
_SAID = {
    **dict.fromkeys(("str", "str | None"), "text"),
    **dict.fromkeys(("int", "int | None"), "a whole number"),
    "bool": "true or false",
    "tuple[str, ...]": "a list",
    **dict.fromkeys(("Mapping[str, str]", "Mapping[str, Any]"), "a mapping"),
}


def _kinds(cls: Any) -> dict[str, Any]:
    return {one.name: one.type for one in fields(cls)}


def _number(value: Any, kind: Any) -> Any:
    """A value of that type, or None; YAML 1.1 reads 5e-5 as text."""
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind not in (int, float):
        return value
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        return None
    if kind is int and number is not None:
        return int(number) if number == int(number) else None
    return number
