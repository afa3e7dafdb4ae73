"""What is measured on: models with random weights, of d = 512 unless said, what they run, and counters.

It asks for torch and transformers alone: `adapterhub.py` counts with it in an environment of its own.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

RESULTS = Path(__file__).parent / "results"
WIDTH, VOCABULARY, LAYERS = 512, 8000, 4
# No dropout: bare, PEFT and ours then compute the same numbers.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        dict(
            hidden_size=WIDTH,
            intermediate_size=1024,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=2,
            pad_token_id=0,
        ),
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=8,
            bos_token_id=1,
            eos_token_id=2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        ),
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        dict(
            d_model=WIDTH,
            encoder_layers=6,
            decoder_layers=6,
            encoder_ffn_dim=2048,
            decoder_ffn_dim=2048,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            max_position_embeddings=512,
            dropout=0.0,
        ),
    ),
}


@dataclass(frozen=True)
class Size:
    """What a model of MODELS is changed to, by name, and how much it is given: `rows` x `length` tokens to train on,
    `prompt` tokens to go on from with `tokens` more."""

    models: Mapping[str, Mapping[str, Any]]
    rows: int
    length: int
    prompt: int
    tokens: int


SIZES = {
    "toy": Size(
        {
            "bart": dict(
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                max_position_embeddings=64,
            ),
            "llama": dict(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
        },
        rows=2,
        length=16,
        prompt=8,
        tokens=4,
    ),
    "real": Size(
        {
            # BART-large: 406,291,456 parameters.
            "bart": dict(
                vocab_size=50265,
                d_model=1024,
                encoder_layers=12,
                decoder_layers=12,
                encoder_ffn_dim=4096,
                decoder_ffn_dim=4096,
                encoder_attention_heads=16,
                decoder_attention_heads=16,
                max_position_embeddings=1024,
            ),
            # As Llama 3.2 1B, with a vocabulary and a head of its own as Llama 2's: 1,104,218,112 parameters.
            "llama": dict(
                vocab_size=32000,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
            ),
        },
        rows=8,
        length=512,
        prompt=64,
        tokens=64,
    ),
}


def bare(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """One of MODELS, the same weights each time."""
    config, cls, sizes = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{"vocab_size": VOCABULARY, **sizes, **changes})
    with torch.device(device):
        model: PreTrainedModel = getattr(transformers, cls)._from_config(made, dtype=dtype).eval()
    return model


# ---- what is run


def batch(name: str, rows: int = 4, length: int = 64, padded: bool = False) -> dict[str, Any]:
    """Ids, their mask and labels."""
    torch.manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -length // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def training_step(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], None]:
    """A forward and a backward."""
    model.train()

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(**inputs, use_cache=False).loss.backward()

    return run


def generating(model: Any, inputs: Mapping[str, Any], tokens: int) -> Callable[[], Any]:
    """Greedy generation of so many tokens; by a model, or by what runs its bundle."""
    if isinstance(model, nn.Module):
        model.eval()
    prompt = {k: v for k, v in inputs.items() if k != "labels"}
    exact = dict(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)

    @torch.no_grad()
    def run() -> Any:
        return model.generate(**prompt, **exact)

    return run


# ---- counters

# Ops that move nothing and are no views by their schema.
_FREE = ("aten._unsafe_view.default", "aten.detach.default", "aten._reshape_alias.default")


@dataclass
class Kernels(TorchDispatchMode):
    """Counts what is dispatched: kernels, and views apart."""

    kernels: collections.Counter[str] = field(default_factory=collections.Counter)
    views: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view or str(func) in _FREE:
            self.views += 1
        else:
            self.kernels[str(func)] += 1
        return func(*args, **(kwargs or {}))


def kernels(run: Callable[[], object]) -> tuple[int, int]:
    """Kernels and views of one call, which has run before."""
    with Kernels() as mode:
        run()
    return mode.kernels.total(), mode.views


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def saved_bytes(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Bytes that a training step keeps for backward: unique storages, without parameters, buffers and inputs. What is
    packed is held, so that no later storage has its address."""
    given = (*model.parameters(), *model.buffers(), *inputs.values())
    own = {one.untyped_storage().data_ptr() for one in given}
    found: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def pack(one: torch.Tensor) -> torch.Tensor:
        storage = one.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(one)
        return one

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        model(**inputs, use_cache=False)
    return sum(found.values())


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """The most memory that a call holds at once beyond what was held before it."""
    return _peak_by_events(run) if device == "cpu" else _peak_by_allocator(run)


def _peak_by_allocator(run: Callable[[], object]) -> int:
    held = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    run()
    return torch.accelerator.max_memory_allocated() - held


def _peak_by_events(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# What PyTorch calls each way to compute attention, and the ops that start it.
ATTENTION = {
    "flash": ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    "memory-efficient": ("_scaled_dot_product_efficient_attention",),
    "cudnn": ("_scaled_dot_product_cudnn_attention",),
    "math": ("_scaled_dot_product_attention_math",),
    "overrideable": ("_scaled_dot_product_fused_attention_overrideable",),
}
# Parts of the names of kernels of attention on CUDA devices.
_FUSED = ("flash", "fmha", "sdpa", "attention")


def attention(run: Callable[[], object]) -> dict[str, dict[str, int]]:
    """Which attention a call computes: how often each of ATTENTION, and each device kernel that is one by its name.

    Ops say which way was taken on any device; names of kernels do not, as cuDNN's have "flash" in them.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as seen:
        run()
    called: collections.Counter[str] = collections.Counter()
    launched: collections.Counter[str] = collections.Counter()
    for event in seen.key_averages():
        if event.device_type != DeviceType.CPU:
            if any(part in event.key.lower() for part in _FUSED):
                launched[event.key] += event.count
        for way, ops in ATTENTION.items():
            if event.key.removeprefix("aten::") in ops:
                called[way] += event.count
    return {"ways": dict(called), "kernels": dict(launched)}


# ---- results


def machine() -> dict[str, Any]:
    """Where figures were taken, and with which versions."""
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "peftc")
    }
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": done.stdout.strip(),
        **versions,
    }


def write(name: str, data: Mapping[str, Any]) -> Path:
    """Figures as JSON in `results`."""
    return write_at(RESULTS / f"{name}.json", data)


def write_at(path: Path, data: Mapping[str, Any]) -> Path:
    """Figures as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    part.replace(path)
    return path
