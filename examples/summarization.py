"""MAM by a recipe, on the encoder-decoder that is named or on a small BART: a synopsis in one word, its section."""

from __future__ import annotations

import sys
from typing import Any

import torch
from corpus import load_packages
from datasets import Dataset
from demo import bert_folder
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig

import peftc
from peftc.language.reader import parse_spec
from peftc.training import run
from peftc.training.recipe import load_recipe

WIDTHS = dict(layers=1, attention_heads=4, ffn_dim=128).items()
SIZES: dict[str, Any] = {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in WIDTHS}
SIZES |= dict(d_model=64, vocab_size=30522, init_std=0.1, forced_eos_token_id=None)
SIZES |= dict(pad_token_id=0, bos_token_id=101, eos_token_id=102, decoder_start_token_id=101)
WHOLE = """
deltas:
  - {at: embedding, train: [weight]}
  - {at: norm, train: [weight, bias]}
  - {at: {op: linear, scope: "*"}, train: [weight, bias]}
"""


def main() -> None:
    torch.manual_seed(0)
    name = next(iter(sys.argv[1:]), None)
    tokenizer = AutoTokenizer.from_pretrained(name or bert_folder())
    kind, specs = AutoModelForSeq2SeqLM, [peftc.load_spec("mam", l=8, m=32, r=32)]
    backbone = kind.from_pretrained(name) if name else kind.from_config(BartConfig(**SIZES))
    specs += [] if name else [parse_spec(WHOLE)]  # which knows nothing: its own weights learn too
    model, packages = peftc.compile(backbone, specs), load_packages("sample", 1600, 100)
    both = packages.train, packages.test
    parts = [[{"text": p.text, "summary": p.section} for p in some] for some in both]
    train, test = map(Dataset.from_list, parts)
    recipe = load_recipe("summarization").using(num_train_epochs=6.0, learning_rate=3e-3)
    before = run.evaluate(model, tokenizer, test, recipe)[0]["rougeL"]
    done = run.train(model, tokenizer, train, test, recipe)
    print(f"ROUGE-L {before:.2f} before, {done.metrics['rougeL']:.2f} after")
    print(f"{packages.test[0].text!r} is in {done.predictions[0]!r}")


if __name__ == "__main__":
    main()
