"""Backbones: what `--model` names becomes a Hugging Face model: a folder, a hub name, or random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from peftc.errors import PeftcError, suggest

T = TypeVar("T")

# Published configurations, shipped so that their models can be planned and built without a network.
CONFIGS = Path(__file__).parent / "configs"
# A backbone of random weights is named by this and its configuration: both rebuild it exactly.
RANDOM = "random:"
SEED = 0
HUB_TIMEOUT = 5.0

TASKS = {
    "classification": "AutoModelForSequenceClassification",
    "multi-label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "summarization": "AutoModelForSeq2SeqLM",
    "translation": "AutoModelForSeq2SeqLM",
    "language-modeling": "AutoModelForCausalLM",
}
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,  # a setting of a configuration that is of another type
)


class BackboneError(PeftcError):
    """A model that cannot be found, read or built."""


def resolve(
    name: str,
    *,
    random_weights: bool = False,
    meta: bool = False,
    task: str | None = None,
    num_labels: int | None = None,
    cls: str | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model that `name` stands for, in evaluation mode.

    The class is `cls`, or the one for `task`, or the one that the configuration names. `settings`
    override the configuration. With `meta` no weight is made or read. What a checkpoint lacks (a new
    head) is drawn from a fixed seed, so that the same call gives the same model. Raises BackboneError.
    """
    if name.startswith(RANDOM):
        name, random_weights = name.removeprefix(RANDOM), True
    config = _settled(_config(name, random_weights), num_labels, settings or {})
    kind = _class(config, task, cls, name)
    if not (meta or random_weights):
        model = _pretrained(kind, name, config, dtype or torch.float32)
        return _evaluating(model)
    build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    with _seeded(), torch.device("meta" if meta else "cpu"):
        model = build(config, dtype=dtype or torch.float32)
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    model.config.name_or_path = RANDOM + place if random_weights else place
    return _evaluating(model)


def _evaluating(model: Any) -> PreTrainedModel:
    model.eval()
    evaluating: PreTrainedModel = model
    return evaluating


def tokenizer(name: str) -> Any | None:
    """The tokenizer that lies with a model, or None where there is none; there transformers makes one up, which knows
    special tokens alone and, of some kinds, the one for a space."""
    found = _beside(name, transformers.AutoTokenizer)
    made_up = found is not None and {*found.get_vocab()} <= {*found.all_special_tokens, "▁"}
    return None if made_up else found


def processor(name: str) -> Any | None:
    """What makes inputs of texts, images or sounds and lies with a model, or None where there is none."""
    return _beside(name, transformers.AutoProcessor)


def _beside(name: str, kind: Any) -> Any | None:
    name = name.removeprefix(RANDOM)
    if not name:
        return None
    try:
        return kind.from_pretrained(name, local_files_only=True)
    except _UNREADABLE:
        return None


def shipped() -> dict[str, Path]:
    """The published configurations by the name of their model on the hub."""
    return {file.stem.replace("--", "/"): file for file in sorted(CONFIGS.glob("*.json"))}


def _config(name: str, random_weights: bool) -> PretrainedConfig:
    folder = Path(name)
    if folder.is_dir():
        return _local_config(folder)
    if random_weights and name in shipped():
        data = json.loads(shipped()[name].read_text())
        return AutoConfig.for_model(data.pop("model_type"), **data)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BackboneError(f"there is no folder '{name}'")
    config: PretrainedConfig = _from_hub(
        name, lambda local: AutoConfig.from_pretrained(name, local_files_only=local), random_weights
    )
    return config


def _local_config(folder: Path) -> PretrainedConfig:
    if (folder / "peftc.json").is_file():
        raise BackboneError(
            f"{folder} holds what peftc wrote, not a model; name the backbone of it"
        )
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder} holds no config.json: not the folder of a model")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except _UNREADABLE as error:
        raise BackboneError(f"{folder / 'config.json'} cannot be read: {_line(error)}") from error
    return config


def _from_hub(name: str, load: Callable[[bool], T], random_weights: bool = False) -> T:
    """From the cache; else from the hub, asked once first, because transformers retries for 20 seconds."""
    try:
        return load(True)
    except _UNREADABLE:
        reason = _hub_refusal(name)
    if reason is None:
        try:
            return load(False)
        except _UNREADABLE as error:
            reason = _line(error)
    names = ", ".join(shipped())
    if random_weights:
        close = suggest(name, shipped())
        raise BackboneError(
            f"no configuration of '{name}': it is no local folder, not in the cache, and {reason}; "
            f"shipped are {names}" + (f"; {close}" if close else "")
        )
    raise BackboneError(
        f"model '{name}' is no local folder, not in the Hugging Face cache, and {reason}; "
        + (
            "--random-weights builds its published configuration"
            if name in shipped()
            else f"--random-weights builds a published configuration ({names})"
        )
    )


def _hub_refusal(name: str) -> str | None:
    """Why the hub will not give the model, or None when it should."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return "the hub has no such model"
    except Exception:  # whatever the HTTP client of this version of the hub raises
        return "the hub cannot be reached"
    return None


def _settled(
    config: PretrainedConfig, num_labels: int | None, settings: Mapping[str, Any]
) -> PretrainedConfig:
    if settings:
        name = config.name_or_path
        config = type(config).from_dict({**config.to_dict(), **settings})
        config.name_or_path = name
    if num_labels is not None:
        config.num_labels = num_labels
    return config


def _class(config: PretrainedConfig, task: str | None, cls: str | None, name: str) -> Any:
    wanted = cls or (TASKS[task] if task else None) or (config.architectures or ["AutoModel"])[0]
    kind: Any = getattr(transformers, wanted, None)
    known = isinstance(kind, type) and (
        issubclass(kind, PreTrainedModel) or wanted.startswith("AutoModel")
    )
    if not known:
        raise BackboneError(f"'{name}' is a {wanted}, which transformers does not have")
    mapping = getattr(kind, "_model_mapping", None)
    suits = (
        type(config) in mapping if mapping is not None else isinstance(config, kind.config_class)
    )
    if not suits:
        raise BackboneError(
            f"'{name}' is a {config.model_type} model; there is no {wanted} of that kind"
        )
    return kind


def _pretrained(
    kind: Any, name: str, config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    arguments = {"config": config, "dtype": dtype, "output_loading_info": True}
    with _seeded():
        if Path(name).is_dir():
            place = str(Path(name).resolve())
            try:
                model, info = kind.from_pretrained(place, **arguments)
            except _UNREADABLE as error:
                raise BackboneError(
                    f"the model in {name} cannot be read: {_line(error)}"
                ) from error
            model.config.name_or_path = place
        else:
            model, info = _from_hub(
                name, lambda local: kind.from_pretrained(name, local_files_only=local, **arguments)
            )
    missing, all_paths = info["missing_keys"], list(model.state_dict())
    if 2 * len(missing) > len(all_paths):
        raise BackboneError(
            f"'{name}' lacks {len(missing)} of the {len(all_paths)} tensors of a {type(model).__name__}"
        )
    loaded: PreTrainedModel = model
    return loaded


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def _line(error: BaseException) -> str:
    """The first line of a message, and the next where it ends in a colon, without the period."""
    lines = [one.strip() for one in str(error).strip().splitlines()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return said.rstrip(".") or type(error).__name__


def made(name: str, cls: str, settings: Mapping[str, Any]) -> PreTrainedModel:
    """A model of a class of transformers with the configuration that `settings` are, on the meta device; `name` says where
    both are from. Raises BackboneError."""
    kind: Any = getattr(transformers, cls, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise BackboneError(f"'{name}' is a {cls}, which transformers does not have")
    try:
        known: Any = kind.config_class
        config = known.from_dict(dict(settings))
    except _UNREADABLE as error:
        raise BackboneError(f"'{name}' has no configuration of a {cls}: {_line(error)}") from error
    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.float32)
    return _evaluating(model)
