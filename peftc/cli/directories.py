"""What commands read from directories and write to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from peftc import driver
from peftc.cli import options
from peftc.cli.console import say, step
from peftc.model import backbones
from peftc.model.compiled import CompiledModel
from peftc.store.deltas import manifest_of
from peftc.store.directory import MANIFEST, write_directory


def new_directory(path: Path) -> Path:
    """`path`, unless something is there already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise options.OptionError(f"{path} exists and is not empty; choose another directory")
    return path


def load(deltas: Path, model: str | None) -> CompiledModel:
    """Deltas on the backbone that they name, or on the one that --model names."""

    with step(f"loading {deltas}"):
        options.quiet()
        if model is None:
            return driver.load(deltas)
        named = manifest_of(deltas)["backbone"]
        backbone = backbones.resolve(model, cls=named["class"], settings=named.get("labels"))
        return driver.load(deltas, backbone)


def model_of(directory: Path, model: str | None = None) -> PreTrainedModel:
    """The model that a directory holds: deltas on their backbone, or an ordinary checkpoint."""
    if (directory / MANIFEST).is_file():
        return load(directory, model)
    return options.backbone(str(directory))


def save(
    compiled: CompiledModel,
    target: Path,
    tokenizer: Any,
    *,
    stored: bool = False,
    more: Callable[[Path], None] = lambda _: None,
) -> None:
    """Deltas, the tokenizer of the backbone, and what `more` writes beside them: all of it, or nothing."""

    def fill(directory: Path) -> None:
        inner = directory / "deltas"  # what a kill leaves beside it goes with the directory
        compiled.save_pretrained(inner, stored=stored)
        for one in inner.iterdir():
            one.rename(directory / one.name)
        inner.rmdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        more(directory)

    write_directory(target, fill)
    size = sum(one.stat().st_size for one in target.glob("*.safetensors"))
    say(f"saved deltas to {target} ({size:,} bytes)")


def tokenizer(directory: Path, model: PreTrainedModel) -> Any | None:
    """The tokenizer beside deltas, or that of their backbone."""
    return _beside(backbones.tokenizer, directory, model)


def processor(directory: Path, model: PreTrainedModel) -> Any | None:
    """What makes the inputs of a model that reads no texts, beside deltas or their backbone."""
    if model.main_input_name == "input_ids":
        return None
    return _beside(backbones.processor, directory, model)


def _beside(find: Callable[[str], Any], directory: Path, model: PreTrainedModel) -> Any | None:
    beside = find(str(directory)) if directory.is_dir() else None
    return beside or find(model.config.name_or_path or "")
