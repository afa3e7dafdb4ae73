"""peftc: a compiler for parameter-efficient fine-tuning.

spec = peftc.load_spec("mam", r=256)        # a shipped name or a path
plan = peftc.plan(hf_model, spec)           # pure: what would change, and what would not
model = peftc.compile(hf_model, spec)       # same class; trains, generates, saves deltas only
merged, report = peftc.merge(model)         # a plain Hugging Face model, and what folded
peftc.export(model, "bundle")               # ONNX; run it with peftc.runtime.load("bundle")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc import runtime
    from peftc.driver import compile, load, plan
    from peftc.errors import PeftcError
    from peftc.export.bundle import export
    from peftc.language.reader import load_spec
    from peftc.language.spec import Spec
    from peftc.merging import merge
    from peftc.model.compiled import CompiledModel, detach
    from peftc.prune import prune
    from peftc.saved import saved

# Loaded on first use, so that `peftc --help` and the spec language do not wait for torch.
_HOME = {
    "CompiledModel": "peftc.model.compiled",
    "PeftcError": "peftc.errors",
    "Spec": "peftc.language.spec",
    "compile": "peftc.driver",
    "detach": "peftc.model.compiled",
    "export": "peftc.export.bundle",
    "load": "peftc.driver",
    "load_spec": "peftc.language.reader",
    "merge": "peftc.merging",
    "plan": "peftc.driver",
    "prune": "peftc.prune",
    "saved": "peftc.saved",
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
    "saved",
]


class _Face(ModuleType):
    """The public verbs. `plan`, `export`, `prune` and `saved` name a function here and a module of the package
    too: importing the module would put it in the function's place, so what is set under a verb's name is left out."""

    def __getattr__(self, name: str) -> Any:
        if name == "runtime":
            return importlib.import_module("peftc.runtime")
        if name not in _HOME:
            raise AttributeError(f"module 'peftc' has no attribute '{name}'")
        return getattr(importlib.import_module(_HOME[name]), name)

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
