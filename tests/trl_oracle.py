"""What trl makes of a compiled model and of PEFT's, as JSON: run by test_trl.py, in an environment that has trl.

python tests/trl_oracle.py DIRECTORY
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peftc.interchange.read import import_peft

WORDS = [
    "a",
    "file",
    "game",
    "library",
    "reading",
    "sound",
    "text",
    "tool",
    "writing",
    "for",
    "the",
    "of",
]
ADAPTER = LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM"
)
COMMON: dict[str, Any] = dict(
    per_device_train_batch_size=2,
    max_steps=6,
    logging_steps=1,
    learning_rate=1e-2,
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    save_strategy="no",
    max_length=24,
    bf16=False,
    gradient_checkpointing=False,
)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def backbone(dropout: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            attention_dropout=dropout,
            pad_token_id=0,
        )
    )


def pair(directory: Path, dropout: float, scale: float) -> dict[str, Any]:
    """PEFT's model and the compiled one, of the same weights, whose changes of the backbone are of some `scale`."""
    bare = backbone(dropout)
    torch.manual_seed(1)
    theirs = get_peft_model(copy.deepcopy(bare), ADAPTER)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale)
    theirs.save_pretrained(directory)
    return {"peft": theirs, "ours": import_peft(directory, bare)}


def said(trainer: Any) -> list[dict[str, float]]:
    """The numbers that a trainer logged at each step, but times."""
    trainer.train()
    times = ("runtime", "per_second", "flos", "train_loss")
    return [
        {k: v for k, v in one.items() if not any(t in k for t in times)}
        for one in trainer.state.log_history
    ]


def sft(model: Any, output: Path) -> list[dict[str, float]]:
    rows = [{"text": " ".join(WORDS[i % 7 :][: 4 + i % 5])} for i in range(12)]
    return said(
        SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(output), dataset_text_field="text", **COMMON),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
    )


def dpo(model: Any, output: Path, reference: Any) -> list[dict[str, float]]:
    rows = [
        {
            "prompt": WORDS[i % 12] + " " + WORDS[(i + 3) % 12],
            "chosen": " " + " ".join(WORDS[i % 5 :][:3]),
            "rejected": " " + " ".join(WORDS[i % 7 :][:4]),
        }
        for i in range(12)
    ]
    return said(
        DPOTrainer(
            model=model,
            ref_model=reference,
            args=DPOConfig(output_dir=str(output), beta=0.5, **COMMON),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
    )


def main() -> None:
    directory = Path(sys.argv[1])
    found: dict[str, dict[str, Any]] = {"sft": {}, "dpo": {}}
    for side, model in pair(directory / "adapter", dropout=0.3, scale=0.05).items():
        found["sft"][side] = sft(model, directory / "sft")
    # trl's reference for PEFT's model is its adapter as it was, in the model's mode: the backbone, if that does nothing
    # yet and nothing drops out.
    for side, model in pair(directory / "adapter", dropout=0.0, scale=0.0).items():
        reference = model.backbone.eval() if side == "ours" else None
        found["dpo"][side] = dpo(model, directory / "dpo", reference)
        if side == "ours":
            found["modes"] = {
                "model": all(m.training for m in model.modules()),
                "reference": any(m.training for m in reference.modules()),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
