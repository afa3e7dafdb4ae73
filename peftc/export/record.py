"""The record of a bundle: what `peftc report` draws it from: what it was made of, what folded, where its nodes came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftc.errors import PeftcError, fault
from peftc.export.graph import ExportError
from peftc.export.origins import Row
from peftc.language import resolved
from peftc.language.spec import Spec
from peftc.model.compiled import CompiledModel
from peftc.rewrite.folding import Outcome

RECORD = "report.json"


@dataclass(frozen=True)
class Record:
    """The model that was exported, by its class and configuration, and its spec; `nodes` are those of each graph."""

    spec: Spec
    cls: str
    config: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    nodes: Mapping[str, Sequence[Row]]


def write(
    directory: Path,
    model: CompiledModel,
    outcomes: Sequence[Outcome],
    nodes: Mapping[str, Sequence[Row]],
) -> None:
    """Put the record of a compiled model into its bundle."""
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    said = {
        "spec": resolved.write(model.plan.spec),
        "class": type(model).__name__,
        "config": config,
        "outcomes": [asdict(one) for one in outcomes],
        "nodes": nodes,
    }
    (directory / RECORD).write_text(json.dumps(said, default=str) + "\n")


def read(directory: Path) -> Record:
    """Raises ExportError where a bundle has none, or it is damaged."""
    file = directory / RECORD
    if not file.is_file():
        raise ExportError(
            f"{directory} holds no {RECORD}: it was exported without deltas, or by an older peftc; export it again"
        )
    try:
        said = json.loads(file.read_text())
        return Record(
            resolved.read(said["spec"], "spec"),
            said["class"],
            said["config"],
            tuple(_outcome(one) for one in said["outcomes"]),
            {
                role: [
                    (n, op, at, edit and (edit[0], edit[1]), to) for n, op, at, edit, to in found
                ]
                for role, found in said["nodes"].items()
            },
        )
    except (PeftcError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{file} is damaged: {fault(error)}; export it again") from error


def _outcome(said: Mapping[str, Any]) -> Outcome:
    index, site = said["key"]
    return Outcome(**{**said, "key": (int(index), str(site))})
