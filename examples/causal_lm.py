"""A causal language model learns to write a package's section behind its synopsis, with DoRA; then it writes some."""

from __future__ import annotations

import tempfile

import torch
from corpus import load_packages
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import peftc

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
)


def row(text: str, section: str, length: int = 64) -> dict[str, torch.Tensor]:
    """Bytes of the synopsis, then of the section, which alone count in the loss."""
    prompt, answer = [*text.encode()[:52], 10], [*section.encode(), 10]
    spare = [0] * (length - len(prompt) - len(answer))
    labels = [-100] * (length - len(answer)) + answer
    mask = [0] * len(spare) + [1] * (length - len(spare))
    named = dict(input_ids=[*spare, *prompt, *answer], attention_mask=mask, labels=labels)
    return {name: torch.tensor(one) for name, one in named.items()}


def main() -> None:
    torch.manual_seed(0)
    packages = load_packages("sample", 800, 100)
    model = peftc.compile(LlamaForCausalLM(TINY), ["dora", "lora_embedding", "head"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=150, learning_rate=1e-2, per_device_train_batch_size=32, use_cpu=True
        )
        rows = [row(one.text, one.section) for one in packages.train]
        done = Trainer(model, arguments, train_dataset=rows).train()
    print(f"loss {done.training_loss:.3f} a byte")
    text = packages.test[0].text
    prompt = torch.tensor([[*text.encode()[:52], 10]])
    written = model.train(False).generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    print(f"{text!r} is in {bytes(written[prompt.shape[1] :]).decode(errors='replace')!r}")


if __name__ == "__main__":
    main()
