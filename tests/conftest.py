"""Tiny models of several families, batches for them, and the options of the suite."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, BertTokenizer, PreTrainedModel

import peftc
from peftc import cli

transformers.logging.set_verbosity_error()

Run = Callable[..., tuple[int, str, str]]

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


def saved(spec: str, folder: Path, path: Path) -> Path:
    """Deltas with some values, on the classifier in `folder`."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    stir(peftc.compile(model, spec)).save_pretrained(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: (exit code, stdout, stderr)."""

    def one(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return one


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT classifier with its tokenizer, as `save_pretrained` leaves it."""
    path = tmp_path_factory.mktemp("models") / "tiny-bert"
    tiny("bert").save_pretrained(path)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA with some values, as `peftc.compile(...).save_pretrained` leaves it."""
    path = saved("lora", folder, tmp_path_factory.mktemp("deltas") / "lora")
    BertTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of different lengths whose first letter decides the class."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"text": ("ab"[i % 2] + " ") * (2 + i % 7), "label": ("even", "odd")[i % 2], "summary": "b"}
        for i in range(64)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
