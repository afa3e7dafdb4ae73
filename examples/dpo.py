"""Direct preference optimisation with trl; the reference is the backbone, over the same tensors: pip install trl."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import peftc

WORDS = ["<pad>", "</s>", "<unk>", "a", "file", "game", "library", "sound", "good", "bad"]
SIZES: Any = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def tokenizer() -> PreTrainedTokenizerFast:
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="</s>")


def main() -> None:
    torch.manual_seed(0)
    model = peftc.compile(LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **SIZES)), "lora")
    rows = [{"prompt": f"a {w}", "chosen": " good", "rejected": " bad"} for w in WORDS[4:8] * 8]
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = dict(
            max_steps=20, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False
        )
        trainer = DPOTrainer(
            model,
            ref_model=model.backbone.eval(),  # in a mode of its own
            args=DPOConfig(folder, disable_tqdm=True, logging_steps=5, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        trainer.train()
    last = [one for one in trainer.state.log_history if "rewards/margins" in one][-1]
    print(f"margin {last['rewards/margins']:.2f}, accuracy {last['rewards/accuracies']:.2f}")


if __name__ == "__main__":
    main()
