"""What a model says of itself, read once."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stacks:
    """What a model says of its own layout: its encoder's path, its only stack, its headless part."""

    encoder: str | None
    single: str
    body: str

    @staticmethod
    def read(model: PreTrainedModel) -> Stacks:
        encoder = None
        if model.config.is_encoder_decoder:
            module = model.get_encoder()
            encoder = next(name for name, one in model.named_modules() if one is module)
        single = "decoder" if model.can_generate() else "encoder"
        body = next((name for name, one in model.named_modules() if one is model.base_model), "")
        return Stacks(encoder, single, body)

    def of(self, scope: str) -> str:
        if self.encoder is None:
            return self.single
        return "encoder" if f"{scope}.".startswith(f"{self.encoder}.") else "decoder"

    def is_head(self, scope: str) -> bool:
        return bool(self.body) and not f"{scope}.".startswith(f"{self.body}.")
