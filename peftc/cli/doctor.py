"""`peftc doctor`: what is installed, which providers of ONNX Runtime are real, what conflicts."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from packaging.requirements import Requirement

from peftc.cli import options
from peftc.cli.console import raw, say
from peftc.errors import PeftcError
from peftc.runtime.session import RuntimeFault, providers
from peftc.store.versions import versions

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Health:
    """Versions by package, of those that peftc uses and that are here; what computes; the providers that ONNX Runtime
    lists, and whether each starts; what conflicts, with the fix."""

    versions: Mapping[str, str]
    missing: Mapping[str, str]
    devices: tuple[str, ...]
    providers: Mapping[str, bool]
    conflicts: tuple[str, ...]


def doctor(as_json: options.Json = False) -> None:
    """Tell what is installed, what really runs, and what conflicts. Exit code 1 when something does.

    \b
    peftc doctor
    """
    found = _health()
    if as_json:
        raw(json.dumps(asdict(found), indent=1))
    else:
        say("\n".join(_lines(found)))
    if found.conflicts:
        raise PeftcError("; ".join(found.conflicts))


def _lines(found: Health) -> Iterator[str]:
    yield from (f"{name:<18} {version}" for name, version in found.versions.items())
    yield from (f"{name:<18} not here: {fix}" for name, fix in found.missing.items())
    yield from (f"{'torch computes on':<18} {one}" for one in found.devices)
    for name, real in found.providers.items():
        yield f"{name:<26} {'starts' if real else 'is listed, and does not start'}"


def _health() -> Health:
    wanted = _requirements()
    here = versions([*wanted, *_RUNTIMES])
    gone = {
        name: f'pip install "peftc[{extra}]"' if extra else f"pip install {name}"
        for name, (_, extra) in wanted.items()
        if name not in here and name not in _RUNTIMES
    }
    conflicts = [*_outside(wanted, here), *_runtimes(here)]
    try:
        real = providers()
    except RuntimeFault as fault:
        real = {}
        conflicts += [str(fault)] if any(one in here for one in _RUNTIMES) else []
    return Health(here, gone, tuple(_devices()), real, tuple(conflicts))


def _requirements() -> dict[str, tuple[Requirement, str]]:
    """What peftc's own metadata asks for, and the extra that brings it; what only its developers need is left out."""
    found: dict[str, tuple[Requirement, str]] = {}
    for line in importlib.metadata.requires("peftc") or []:
        one = Requirement(line)
        extra = str(one.marker).rpartition("extra == ")[2].strip("\"'") if one.marker else ""
        if extra not in ("dev", "docs"):
            found.setdefault(one.name, (one, extra))
    return found


def _outside(
    wanted: Mapping[str, tuple[Requirement, str]], here: Mapping[str, str]
) -> Iterator[str]:
    for name, (one, _) in wanted.items():
        if name in here and not one.specifier.contains(here[name], prereleases=True):
            yield f'{name} {here[name]} is not {one.specifier}: pip install "{name}{one.specifier}"'


def _runtimes(here: Mapping[str, str]) -> Iterator[str]:
    """Both wheels of ONNX Runtime own one folder, and pip does not notice."""
    if all(name in here for name in _RUNTIMES):
        yield (
            f"{' and '.join(_RUNTIMES)} are both installed and overwrite each other: "
            "uninstall both, then install one"
        )


def _devices() -> Iterator[str]:
    yield f"cpu: {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    for i in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}: {one.name}, {one.total_memory / 2**30:.0f} GiB"
