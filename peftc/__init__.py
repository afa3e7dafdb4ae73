"""peftc: a compiler for parameter-efficient fine-tuning.

spec = peftc.load_spec("mam", r=256)        # a shipped name or a path
plan = peftc.plan(hf_model, spec)           # pure: what would change, and what would not
model = peftc.compile(hf_model, spec)       # same class; trains, generates, saves deltas only
merged, report = peftc.merge(model)         # a plain Hugging Face model, and what folded
peftc.export(model, "bundle")               # ONNX; run it with peftc.runtime.load("bundle")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc import runtime
    from peftc.bundle import export
    from peftc.driver import compile, load, merge, plan
    from peftc.errors import PeftcError
    from peftc.model import CompiledModel, detach
    from peftc.pruning import prune
    from peftc.spec import Spec, load_spec

# Loaded on first use, so that `peftc --help` and the spec language do not wait for torch.
_HOME = {
    "CompiledModel": "peftc.model",
    "PeftcError": "peftc.errors",
    "Spec": "peftc.spec",
    "compile": "peftc.driver",
    "detach": "peftc.model",
    "export": "peftc.bundle",
    "load": "peftc.driver",
    "load_spec": "peftc.spec",
    "merge": "peftc.driver",
    "plan": "peftc.driver",
    "prune": "peftc.pruning",
}
__version__ = "0.1.0"
__all__ = [
    "CompiledModel",
    "PeftcError",
    "Spec",
    "compile",
    "detach",
    "export",
    "load",
    "load_spec",
    "merge",
    "plan",
    "prune",
    "runtime",
]


def __getattr__(name: str) -> Any:
    if name == "runtime":
        return importlib.import_module("peftc.runtime")
    if name not in _HOME:
        raise AttributeError(f"module 'peftc' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
