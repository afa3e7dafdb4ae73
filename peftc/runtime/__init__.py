"""Run an ONNX bundle: sessions and one runner a task. Serving needs no compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftc.runtime.predicting import (
    FeatureExtraction,
    FillMask,
    ImageClassification,
    QuestionAnswering,
    TextClassification,
    TokenClassification,
)
from peftc.runtime.runner import KEYS, Runner, opened
from peftc.runtime.session import CPU, PROVIDERS, RuntimeFault, Session
from peftc.runtime.writing import SpeechRecognition, Text2TextGeneration, TextGeneration
from peftc.store.directory import FILES, MANIFEST, WEIGHTS, check_files, read_manifest

__all__ = ["KEYS", "PROVIDERS", "RUNNERS", "Runner", "RuntimeFault", "kind_of", "load"]


@dataclass(frozen=True)
class Row:
    """The runner of a kind of bundle, and the graphs that it takes in order."""

    runner: type[Runner]
    roles: tuple[str, ...] = ("model",)


# Kinds have the names of Hugging Face's pipelines, and a runner has a method of that name.
RUNNERS: Mapping[str, Row] = {
    "text-classification": Row(TextClassification),
    "token-classification": Row(TokenClassification),
    "question-answering": Row(QuestionAnswering),
    "fill-mask": Row(FillMask),
    "feature-extraction": Row(FeatureExtraction),
    "image-classification": Row(ImageClassification),
    "text-generation": Row(TextGeneration),
    "text2text-generation": Row(Text2TextGeneration, ("encoder", "decoder")),
    "automatic-speech-recognition": Row(SpeechRecognition, ("encoder", "decoder")),
}
OWN = "peftc"  # the layout of bundles whose graphs are those of RUNNERS
# What bundles were called that were written before there were others.
_BEFORE = {"classifier": "text-classification", "seq2seq": "text2text-generation"}


def kind_of(manifest: Mapping[str, Any]) -> str:
    """The row of RUNNERS that a bundle says it is for."""
    said = str(manifest["kind"])
    return _BEFORE.get(said, said)


def load(
    bundle_dir: str | Path,
    providers: Sequence[str] = CPU,
    *,
    allow_cpu_fallback: bool = False,
    check: bool = False,
) -> Any:
    """A runner for the bundle in `bundle_dir`: a model of the class that it was made of, whose forward runs its graphs, with
    a method of its task's name. `providers` are ONNX Runtime's, in their order; `allow_cpu_fallback` lets it do without
    them. Sizes of files are compared with what was written, and digests, of the weights only with `check`.
    Raises RuntimeFault or DeltaError when the bundle is damaged, or a provider is missing and falling back to the CPU
    was not allowed."""
    directory = Path(bundle_dir)
    manifest = read_manifest(directory, KEYS)
    try:
        row = RUNNERS[kind_of(manifest)]
        if manifest.get("layout", OWN) != OWN and not set(row.roles) <= set(manifest["graphs"]):
            raise RuntimeFault(
                f"{directory} is in the layout of {manifest['layout']}, which runs it; export it without --layout for peftc"
            )
        files = [directory / Path(manifest["graphs"][role]["file"]).name for role in row.roles]
    except (KeyError, TypeError) as error:
        raise RuntimeFault(
            f"{directory / MANIFEST} is damaged: no such kind or graph: {error}"
        ) from error
    for file in files:
        if not file.is_file():
            raise RuntimeFault(f"{directory} lacks {file.name}; export it again")
    check_files(directory, manifest, content=check)
    small = [name for name in manifest.get(FILES, {}) if not name.endswith(WEIGHTS)]
    if small and not check:
        check_files(directory, manifest, content=True, only=small)
    sessions = [Session.open(file, providers, allow_cpu_fallback) for file in files]
    return opened(row.runner, directory, manifest, sessions)
