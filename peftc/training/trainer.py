"""Trainers of transformers whose loss has a method's penalty wherever it is computed: the model's own has it already."""

from __future__ import annotations

from typing import Any

import torch
import transformers


class _Penalized:
    """Mixed in front of a Trainer: adds the penalty to the losses of label smoothing and of `compute_loss_func`."""

    def compute_loss(
        self: Any,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As Trainer's. Where gradients are accumulated, the parts of a batch have their shares of one penalty."""
        labels, bare = inputs.get("labels"), self.accelerator.unwrap_model(model)
        elsewhere = self.label_smoother is not None or self.compute_loss_func is not None
        more: Any = 0
        if elsewhere and labels is not None and bare.training and hasattr(bare, "penalty"):
            more = bare.penalty() * self._share(inputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
        return (loss + more, outputs) if return_outputs else loss + more

    def _share(self: Any, inputs: dict[str, Any], items: Any) -> Any:
        """Of the step's tokens, as the Trainer counts them, where it does not divide the loss itself."""
        if items is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return 1
        return self._get_num_items_in_batch([inputs], self.args.device) / items


class Trainer(_Penalized, transformers.Trainer):
    """transformers' Trainer, with the penalty in every loss."""


class Seq2SeqTrainer(_Penalized, transformers.Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer, with the penalty in every loss."""
