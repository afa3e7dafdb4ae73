"""What every runner of texts has: the settings and the tokenizer of its bundle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from peftc.runtime.session import RuntimeFault
from peftc.store.directory import read_manifest


def settings(kind: Any, directory: Path, name: str) -> Any:
    """`config.json` or `generation_config.json`, never from the hub."""
    if not (directory / name).is_file():
        raise RuntimeFault(f"{directory} lacks {name}")
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise RuntimeFault(f"{directory / name} is damaged: {str(error)[:200]}") from error


class Texts:
    """The tokenizer of a bundle, when it has one."""

    directory: Path

    @cached_property
    def tokenizer(self) -> Any:
        if not (self.directory / "tokenizer_config.json").is_file():
            raise RuntimeFault(f"{self.directory} holds no tokenizer; pass token ids instead")
        return AutoTokenizer.from_pretrained(self.directory, local_files_only=True)

    @cached_property
    def max_tokens(self) -> int:
        """The longest text that there are positions for, besides rows in front of it."""
        said = read_manifest(self.directory, ("kind", "graphs")).get("max_tokens")
        return said if isinstance(said, int) else 512

    def encode(self, texts: Sequence[str], longest: int | None = None) -> dict[str, torch.Tensor]:
        most = self.tokenizer.model_max_length  # RoBERTa's is below its positions
        longest = min(most, self.max_tokens, longest or most)
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        return dict(encoded)
