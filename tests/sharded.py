"""Two processes, each with a part of every layer: what `test_regions.py` starts, as `python sharded.py RANK FOLDER METHOD`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from conftest import batch, stir, tiny
from methods import spec
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import peftc
from peftc.graph.layers import layers_of

LAYERS, STEPS = 12, 3


def steps(method: str, sharded: bool) -> tuple[list[float], int, int]:
    """Losses of some steps; the most numbers of weights that a process held at once, and those of one layer."""
    model = stir(peftc.compile(tiny("llama", num_hidden_layers=LAYERS), spec(method)), 0.1).train()
    layers = [*layers_of(model).values()]
    held: list[int] = []
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: held.append(whole(layers)))
    inputs = batch(model, "right")
    inputs["labels"] = inputs["input_ids"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(STEPS):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, max(held, default=0), sum(p.numel() for p in layers[0].parameters())


def whole(layers: list[nn.Module]) -> int:
    """How many numbers of the layers' weights are here whole."""
    return sum(
        p.numel() for layer in layers for p in layer.parameters() if not isinstance(p, DTensor)
    )


def main() -> None:
    rank, folder, method = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    found = steps(method, False), steps(method, True)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
