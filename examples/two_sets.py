"""Two tasks on one backbone: a delta set for each, trained and saved by itself, and the backbone as it was."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import peftc

TINY = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def train(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Some steps on what requires grad: the sets in use."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def main() -> None:
    torch.manual_seed(0)
    backbone = BertForSequenceClassification(TINY).eval()
    ids = torch.randint(5, 1000, (16, 12))
    parity, size = ids.sum(1) % 2, (ids[:, 0] > 500).long()
    bare = backbone(input_ids=ids).logits

    model = peftc.compile(backbone, "lora", name="parity")
    print(f"parity, lora: loss {train(model, ids, parity):.3f}")
    model.add("houlsby_adapter", "size")
    model.use("size")  # parity rests, and does not move
    print(f"size, adapter: loss {train(model, ids, size):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        for name in model.delta_sets:
            model.save_pretrained(Path(folder) / name, name=name)
        with model.base(), torch.no_grad():
            print(f"the backbone as it was: {torch.equal(model(input_ids=ids).logits, bare)}")
        again = peftc.load(Path(folder) / "size", peftc.detach(model))
        print(f"loaded by itself: {', '.join(again.delta_sets)}")


if __name__ == "__main__":
    main()
