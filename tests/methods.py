"""The shipped methods, small; what is promised of each; which families have no place for it."""

from __future__ import annotations

from functools import cache

from peftc.language.reader import load_spec
from peftc.language.spec import Spec, with_words

SMALL: dict[str, dict[str, float]] = {
    "compacter": dict(r=8),
    "houlsby_adapter": dict(r=4),
    "learned_scale_adapter": dict(r=4),
    "lokr": dict(r=2, f=2),
    "lora": dict(r=4, alpha=8),
    "lora_conv": dict(r=2),
    "lora_experts": dict(r=2, alpha=4),
    "lora_ffn": dict(r=4, alpha=8),
    "mam": dict(l=5, m=6, r=4),
    "multi_head_parallel_adapter": dict(r=3),
    "oft": dict(n=2),
    "parallel_adapter": dict(r=4),
    "parallel_adapter_attention": dict(r=4),
    "pfeiffer_adapter": dict(r=4),
    "prefix_direct": dict(l=5),
    "prefix_tuning": dict(l=5, m=6),
    "prefix_ungated": dict(l=5),
    "prefix_words": dict(l=5),
    "prompt_tuning": dict(l=5),
    "scaled_parallel_adapter": dict(r=4),
    "vera": dict(r=6),
}
# Bit-identical to the captured graph before training. DoRA and PiSSA are the same function, computed another way.
EXACT = [
    "adalora",
    "bitfit",
    "bitfit_subset",
    "diff_pruning",
    "head",
    "ia3",
    "learned_scale_adapter",
    "loha",
    "lokr",
    "lora",
    "lora_conv",
    "lora_embedding",
    "lora_experts",
    "lora_ffn",
    "norm_tuning",
    "oft",
    "rslora",
    "scaled_parallel_adapter",
    "sparse_difference",
    "vera",
]
CLOSE = ("compacter", "dora", "pissa")
# What folds into the weights entirely, by algebra alone.
FOLDS = [
    "adalora",
    "bitfit",
    "bitfit_subset",
    "diff_pruning",
    "dora",
    "head",
    "ia3",
    "loha",
    "lokr",
    "lora",
    "lora_conv",
    "lora_embedding",
    "lora_experts",
    "lora_ffn",
    "norm_tuning",
    "oft",
    "pissa",
    "rslora",
    "sparse_difference",
    "vera",
]
ATTENTION = [
    "adalora",
    "dora",
    "loha",
    "lokr",
    "lora",
    "multi_head_parallel_adapter",
    "oft",
    "parallel_adapter_attention",
    "pissa",
    "prefix_direct",
    "prefix_tuning",
    "prefix_ungated",
    "prefix_words",
    "rslora",
    "vera",
]
FEED_FORWARD = [
    "learned_scale_adapter",
    "lora_ffn",
    "parallel_adapter",
    "pfeiffer_adapter",
    "scaled_parallel_adapter",
]
BOTH = ("compacter", "houlsby_adapter", "ia3", "mam")
# Why a method has no place in a family: what the family's architecture lacks.
LACKS = {
    "mixtral": ("ia3", "lora_ffn"),  # experts are one product in a batch, no linears
    "mamba": (*ATTENTION, *FEED_FORWARD, *BOTH, "bitfit_subset"),
    "vit": ("lora_embedding", "prompt_tuning", "prefix_words"),
    "whisper": ("prefix_words",),  # its encoder reads no words
    "t5": ("bitfit", "bitfit_subset", "head"),
    "t5_gated": ("bitfit", "bitfit_subset", "head"),
    "llama": ("bitfit", "bitfit_subset"),
    "phi3": ("bitfit", "bitfit_subset"),
    "gemma2": ("bitfit", "bitfit_subset"),
    "mpt": ("bitfit", "bitfit_subset"),
    "modernbert": ("bitfit_subset",),
}
LACKS["mixtral"] += ("bitfit", "bitfit_subset")
# A slice of a fused projection has no bias of its own to train; nothing else of the method fails.
LACKS |= dict.fromkeys(("gpt2", "neox", "bloom"), ("bitfit_subset",))
CONVOLVE = ("vit", "whisper", "mamba")


def lacks(method: str, family: str) -> bool:
    """Whether a family's architecture has no place for a method."""
    only = {"lora_conv": CONVOLVE, "lora_experts": ("mixtral",)}
    return method in LACKS.get(family, ()) or family not in only.get(method, (family,))


@cache
def spec(method: str) -> Spec:
    """A shipped method, small."""
    one = load_spec(method, **SMALL.get(method, {}))
    return with_words(one, (7, 8, 9)) if method == "prefix_words" else one
