"""LoRA and a head on a real BERT, or on the model that is named, with a stock Trainer: a synopsis to its section."""

from __future__ import annotations

import sys
import tempfile

import torch
import transformers
from corpus import load_packages
from demo import bert_folder
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer, Trainer, TrainingArguments

import peftc


def main() -> None:
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    corpus, name = load_packages("sample", 1600, 200), next(iter(sys.argv[1:]), str(bert_folder()))
    tokenizer = AutoTokenizer.from_pretrained(name)
    backbone = Classifier.from_pretrained(name, num_labels=10)
    model = peftc.compile(backbone, [peftc.load_spec("lora", r=8, alpha=16), "head"])
    train, test = (
        [{**tokenizer(p.text), "labels": corpus.labels.index(p.section)} for p in some]
        for some in (corpus.train, corpus.test)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=100, learning_rate=2e-3, per_device_train_batch_size=16, use_cpu=True
        )
        trainer = Trainer(
            model,
            arguments,
            processing_class=tokenizer,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=lambda out: {"right": (out[0].argmax(-1) == out[1]).mean()},
        )
        trainer.train()
    folded = peftc.merge(model)[1].folded
    print(f"accuracy {trainer.evaluate()['eval_right']:.2f}; {len(folded)} deltas folded")


if __name__ == "__main__":
    main()
