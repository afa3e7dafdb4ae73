"""A Trainer on one or more processes: what `test_launched.py` starts, alone or by `accelerate launch`.

python tests/launched.py FOLDER alone|ddp|fsdp|zero [--resume]

Each process writes losses, and a sum of the deltas as it holds them, to FOLDER/RANK.json; Trainer saves the rest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import state
from conftest import batch, stir, tiny
from methods import spec
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

import peftc
from peftc.graph.layers import layers_of

LAYERS, ROWS, STEPS = 4, 8, 4
SHARDED: dict[str, Any] = dict(
    fsdp=True,
    fsdp_config=dict(
        version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_layer_cls_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    ),
)
# ZeRO of DeepSpeed, stage 3: every weight in parts, gathered by the hooks on its layer.
ZERO: dict[str, Any] = dict(
    deepspeed={
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
    }
)
MORE = {"fsdp": SHARDED, "zero": ZERO}


def let_cpus_share() -> None:
    """accelerate shards models on accelerators alone; torch does on CPUs too."""
    made = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == state.DistributedType.MULTI_CPU:
            for one in (self, state.PartialState()):
                one.distributed_type = state.DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = init


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, model: Any) -> None:
        inputs = batch(model, "right", size=ROWS)
        self.inputs = inputs | {"labels": inputs["input_ids"]}

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {k: v[index] for k, v in self.inputs.items()}


def gathered(one: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may have a part."""
    if isinstance(one, DTensor):
        return one.full_tensor()
    if hasattr(one, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([one]):
            return one.detach().clone()
    return one


def main() -> None:
    folder, how, resume = Path(sys.argv[1]), sys.argv[2], "--resume" in sys.argv
    if how == "fsdp":
        let_cpus_share()
    model = stir(peftc.compile(tiny("llama", num_hidden_layers=LAYERS), spec("mam")), 0.1)
    arguments = TrainingArguments(
        str(folder / "run"),
        use_cpu=True,
        max_steps=STEPS,
        learning_rate=1e-2,
        per_device_train_batch_size=ROWS if how == "alone" else ROWS // 2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        **MORE.get(how, {}),
    )
    if how == "zero":
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [type(one) for one in layers_of(model).values()][:1])
    trainer = Trainer(model, arguments, train_dataset=Rows(model))
    trainer.train(resume_from_checkpoint=resume or None)
    if how == "fsdp":  # checkpoints are in parts, and so would these be
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "deltas"))
    whole = {k: gathered(v) for k, v in model.deltas.named_parameters()}
    found = {
        "losses": [one["loss"] for one in trainer.state.log_history if "loss" in one],
        "norms": [one["grad_norm"] for one in trainer.state.log_history if "loss" in one],
        "deltas": {k: v.double().sum().item() for k, v in whole.items()},
        "sharded": sum(isinstance(p, DTensor) or p.numel() == 0 for p in model.parameters()),
        "processes": arguments.world_size,
    }
    (folder / f"{arguments.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
