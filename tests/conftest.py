"""Tiny models of several families, batches for them, and the options of the suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

transformers.logging.set_verbosity_error()

SEQ2SEQ = dict(
    vocab_size=120,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    max_position_embeddings=64,
)
ENCODER = dict(
    vocab_size=120,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=66,
    num_labels=3,
)
GPT2 = dict(
    vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=2
)
FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "bart": ("BartConfig", "BartForConditionalGeneration", SEQ2SEQ),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", SEQ2SEQ),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", ENCODER),
    "bert": ("BertConfig", "BertForSequenceClassification", ENCODER),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
}


def tiny(family: str, attention: str = "sdpa", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A two-layer model with weights wide enough that every part of it matters."""
    config_name, model_name, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(
        **{**sizes, **changes}, attn_implementation=attention
    )
    model: PreTrainedModel = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def batch(
    model: PreTrainedModel, padding: str = "none", size: int = 3, length: int = 11, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Token ids with a mask; `padding` is none, left or right and reaches 4 tokens into some rows."""
    torch.manual_seed(seed)
    ids = torch.randint(4, 120, (size, length))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4] = 0
    elif padding == "right":
        mask[0, -4:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(4, 120, (size, 7))
    return inputs


def stir(model: PreTrainedModel, scale: float = 0.3, seed: int = 2) -> PreTrainedModel:
    """Give every delta a value, so that nothing is an identity by accident."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.deltas.values().values():
            value.copy_(torch.randn_like(value) * scale)
    return model


def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs).logits
    return out


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the goldens anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], None]]:
    """Compare text with tests/golden/NAME; `--accept` writes it."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--accept"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"no golden {name}: run pytest --accept and read it"
        assert text == path.read_text()

    yield check
