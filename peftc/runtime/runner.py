"""A runner: the class of the model that a bundle was made of, without its weights, whose forward runs ONNX graphs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from peftc.runtime.session import RuntimeFault, Session
from peftc.store.directory import read_manifest

KEYS = ("kind", "graphs")  # of a manifest, which tell a bundle
# What a graph that reads texts is given where a call has none of it.
_DEFAULTS = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
_BATCH = 32


class Runner:
    """Mixed in front of a Hugging Face class by `opened`; never built directly.

    Its configuration, its way to generate and what pipelines ask of a model are those of that class; its parameters
    hold nothing (they are on the meta device). `forward` takes what the class's own takes; where a graph has no
    input for it, RuntimeFault says so.
    """

    directory: Path
    sessions: tuple[Session, ...]
    arguments: tuple[str, ...]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return torch.device(self.sessions[0].device)

    def to(self, *_: Any, **__: Any) -> Any:
        """It runs where its sessions do."""
        return self

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, but those that are None."""
        given = dict(zip(self.arguments, args, strict=False)) | dict(kwargs)
        return {name: one for name, one in given.items() if one is not None}

    @cached_property
    def tokenizer(self) -> Any:
        return self._saved("tokenizer_config.json", transformers.AutoTokenizer, "tokenizer")

    @cached_property
    def processor(self) -> Any:
        """What makes inputs of images or sounds."""
        names = ("processor_config.json", "preprocessor_config.json")
        found = next((one for one in names if (self.directory / one).is_file()), names[0])
        return self._saved(found, transformers.AutoProcessor, "processor")

    def _saved(self, name: str, kind: Any, what: str) -> Any:
        if not (self.directory / name).is_file():
            raise RuntimeFault(
                f"{self.directory} holds no {what}; export it with one, or pass tensors"
            )
        return kind.from_pretrained(self.directory, local_files_only=True)

    @cached_property
    def max_tokens(self) -> int:
        """The longest text that there are positions for, besides rows in front of it."""
        said = read_manifest(self.directory, KEYS).get("max_tokens")
        return said if isinstance(said, int) else 512

    def longest(self, wanted: int | None = None) -> int:
        """How many tokens of a text are read."""
        most = int(self.tokenizer.model_max_length)  # RoBERTa's is below its positions
        return min(most, self.max_tokens, wanted or most)

    def encode(self, texts: Sequence[str], longest: int | None = None) -> dict[str, torch.Tensor]:
        """Tensors by argument name, padded to the longest text."""
        more = {"padding": True, "truncation": True, "return_tensors": "pt"}
        return dict(self.tokenizer(list(texts), max_length=self.longest(longest), **more))

    def pipeline(self, task: str, **parts: Any) -> Any:
        """transformers' pipeline of this name over this model, a batch of inputs at a time."""
        pads = "tokenizer" not in parts or parts["tokenizer"].pad_token_id is not None
        more = {"device": self.device, "batch_size": _BATCH if pads else 1}
        make: Any = transformers.pipeline
        return make(task, model=self, **parts, **more)


def fed(session: Session, given: Mapping[str, Any], known: Sequence[str] = ()) -> dict[str, Any]:
    """The inputs of a graph out of the arguments of a call. Raises RuntimeFault where a tensor would be left out, other
    than those `known`, and other than zeros, which segments are where there are none."""
    feeds = {name: one for name, one in given.items() if name in session.inputs}
    for name, one in given.items():
        if name not in feeds and name not in known and isinstance(one, torch.Tensor) and one.any():
            raise RuntimeFault(f"the graph takes no '{name}'; it takes {', '.join(session.inputs)}")
    for name, make in _DEFAULTS.items():
        if name in session.inputs and "input_ids" in feeds:
            feeds.setdefault(name, make(feeds["input_ids"]))
    return feeds


def opened(
    kind: Any, directory: Path, manifest: Mapping[str, Any], sessions: Sequence[Session]
) -> Any:
    """A runner of a kind for a bundle, made of the class that its manifest names. Raises RuntimeFault."""
    named = str(manifest["backbone"]["class"])
    cls = getattr(transformers, named, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise RuntimeFault(f"{directory} was made of a {named}, which transformers does not have")
    dtype = getattr(torch, str(manifest.get("dtype", "float32")))
    body = {"__module__": cls.__module__, "forward": _signed(kind, cls), "dtype": dtype}
    config = settings(transformers.AutoConfig, directory, "config.json")
    with torch.device("meta"):
        runner = type(cls.__name__, (kind, cls), body)(config).eval()
    arguments = tuple(inspect.signature(cls.forward).parameters)[1:]
    vars(runner).update(directory=directory, sessions=tuple(sessions), arguments=arguments)
    if runner.can_generate():
        kept = settings(transformers.GenerationConfig, directory, "generation_config.json")
        runner.generation_config = kept
    return runner


def _signed(kind: Any, cls: Any) -> Any:
    """The forward of a kind, with the signature of a model's, which generate and pipelines read."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return forward


def settings(kind: Any, directory: Path, name: str) -> Any:
    """`config.json` or `generation_config.json`, never from the hub."""
    if not (directory / name).is_file():
        raise RuntimeFault(f"{directory} lacks {name}; export it again")
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:200]
        raise RuntimeFault(f"{directory / name} is damaged: {said}; export it again") from error
