"""A sequence classifier on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from peftc.runtime.session import Session
from peftc.runtime.texts import Texts, settings


class Classifier(Texts):
    """A sequence classifier on ONNX Runtime."""

    def __init__(self, directory: Path, session: Session) -> None:
        self.directory, self.session = directory, session
        self.config = settings(AutoConfig, directory, "config.json")

    def logits(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """[batch, labels] of token ids [batch, length]; a missing mask means no padding."""
        given = {"attention_mask": torch.ones_like(input_ids), "input_ids": input_ids, **inputs}
        if "token_type_ids" in self.session.inputs:
            given.setdefault("token_type_ids", torch.zeros_like(input_ids))
        feeds = {name: given[name] for name in self.session.inputs}
        return self.session.run(feeds)["logits"].cpu()

    def classify(
        self, texts: Sequence[str], batch: int = 32, max_length: int = 512
    ) -> list[tuple[str, float]]:
        """The label and its probability for each text."""
        found = []
        for start in range(0, len(texts), batch):
            logits = self.logits(**self.encode(texts[start : start + batch], max_length))
            scores, labels = logits.softmax(-1).max(-1)
            found += [
                (str(self.config.id2label[i]), s)
                for i, s in zip(labels.tolist(), scores.tolist(), strict=True)
            ]
        return found
