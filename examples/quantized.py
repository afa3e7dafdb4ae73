"""LoRA over int8 and int4 weights: what the backbone takes, what it learns, what a merge of the two costs.

A random Llama of 1.6 million parameters learns one sentence of tokens by heart, on the CPU, with torchao's formats.
"""

from __future__ import annotations

import torch
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from peftc.graph.quantized import backbone_bytes

FORMATS = {
    "float32": None,
    "int8": Int8WeightOnlyConfig(),
    "int4": PrototypeInt4WeightOnlyConfig(group_size=64),
}
SIZES = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2)


def main() -> None:
    sentence = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(0))
    print("format   bytes of the backbone   loss  tokens right  bytes merged  merge moved")
    for name, kind in FORMATS.items():
        torch.manual_seed(0)
        backbone = LlamaForCausalLM(SIZES).eval()
        if kind is not None:  # the layers; embedding and head stay
            quantize_(backbone.model.layers, kind, lambda one, _: isinstance(one, nn.Linear))
        model = peftc.compile(backbone, "lora")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(40):
            loss = model(input_ids=sentence, labels=sentence, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        told = model.generate(sentence[:, :2], max_new_tokens=14, do_sample=False, pad_token_id=0)
        right = int((told == sentence).sum()) - 2
        _, report = peftc.merge(model, dequantize=True)
        held = f"{backbone_bytes(backbone):>21,}  {loss.item():5.3f}  {right:9}/14"
        print(f"{name:7}  {held}  {report.held[1]:>12,}  {report.error / report.scale:11.1e}")


if __name__ == "__main__":
    main()
