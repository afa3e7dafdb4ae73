"""One training on two processes, started by `accelerate launch`; deltas are equal on both and saved once.

python examples/two_processes.py            # starts itself twice, on CPUs
accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip HOST \\
    --main_process_port 29500 examples/two_processes.py   # on each of two nodes, with its rank
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import torch
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import peftc

TINY = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
LAUNCH = ["-W", "ignore", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
PLAIN = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def collated(rows: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
    return dict(zip(("input_ids", "labels"), map(torch.stack, zip(*rows))))


def main() -> None:
    if "RANK" not in os.environ:
        sys.exit(subprocess.call([sys.executable, *LAUNCH, *PLAIN, *sys.argv]))
    torch.manual_seed(0)  # the same model and the same deltas in each process
    model = peftc.compile(BertForSequenceClassification(TINY), "lora")
    ids = torch.randint(5, 1000, (64, 12))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, use_cpu=True, max_steps=20, learning_rate=1e-2, report_to=[], disable_tqdm=True
        )
        trainer = Trainer(model, arguments, collated, TensorDataset(ids, ids.sum(1) % 2))
        done = trainer.train()
        trainer.save_model(folder)
        if trainer.is_world_process_zero():
            loss = f"loss {done.training_loss:.3f}"
            print(f"{arguments.world_size} processes, {loss}:", *os.listdir(folder))


if __name__ == "__main__":
    main()
