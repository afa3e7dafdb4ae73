"""Run an ONNX bundle: sessions and one runner a task. Serving needs no compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftc.runtime.classifier import Classifier
from peftc.runtime.seq2seq import Seq2Seq
from peftc.runtime.session import CPU, RuntimeFault, Session
from peftc.store.directory import MANIFEST, check_files, read_manifest

__all__ = ["RUNNERS", "Classifier", "RuntimeFault", "Seq2Seq", "load"]

# The runner of each kind of bundle, and the graphs it takes in order.
RUNNERS: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "classifier": (Classifier, ("model",)),
    "seq2seq": (Seq2Seq, ("encoder", "decoder")),
}


def load(
    bundle_dir: str | Path, providers: Sequence[str] = CPU, *, allow_cpu_fallback: bool = False
) -> Classifier | Seq2Seq:
    """A runner for a bundle. Raises RuntimeFault or DeltaError when the bundle is damaged, or a provider
    is missing and falling back to the CPU was not allowed."""
    directory = Path(bundle_dir)
    manifest = read_manifest(directory, ("kind", "graphs"))
    try:
        runner, roles = RUNNERS[manifest["kind"]]
        files = [directory / Path(manifest["graphs"][role]["file"]).name for role in roles]
    except (KeyError, TypeError) as error:
        raise RuntimeFault(
            f"{directory / MANIFEST} is damaged: no such kind or graph: {error}"
        ) from error
    for file in files:
        if not file.is_file():
            raise RuntimeFault(f"{directory} lacks {file.name}")
    check_files(directory, manifest, content=False)
    sessions = [Session.open(file, providers, allow_cpu_fallback) for file in files]
    opened: Classifier | Seq2Seq = runner(directory, *sessions)
    return opened
