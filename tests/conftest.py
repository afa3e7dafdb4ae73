"""Tiny models of several families, batches for them, and the options of the suite."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from messages import Recorder
from methods import lacks
from transformers import AutoModelForSequenceClassification, BertTokenizer, PreTrainedModel

import peftc
from peftc import cli
from peftc.graph.arguments import dummy_inputs
from peftc.graph.captures import CAPTURES
from peftc.language.shelf import shipped

transformers.logging.set_verbosity_error()

ROOT = Path(__file__).parent.parent
RECORDER: pytest.StashKey[Recorder] = pytest.StashKey()
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
T5 = dict(vocab_size=120, d_model=32, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
SPEECH = dict(
    **SEQ2SEQ,
    max_source_positions=30,
    max_target_positions=30,
    num_mel_bins=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=3,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
DECODER = dict(
    vocab_size=120,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=66,
    pad_token_id=0,
)
GROUPED = dict(**DECODER, num_key_value_heads=2)
DISENTANGLED = dict(
    relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=True
)
FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "bart": ("BartConfig", "BartForConditionalGeneration", SEQ2SEQ),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", SEQ2SEQ),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", ENCODER),
    "bert": ("BertConfig", "BertForSequenceClassification", ENCODER),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        dict(vocab_size=120, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=3),
    ),
    "deberta": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        {**ENCODER, **DISENTANGLED, "position_biased_input": False, "type_vocab_size": 0},
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", dict(**T5, d_kv=8)),
    "t5_gated": (
        "T5Config",
        "T5ForConditionalGeneration",
        dict(**T5, d_kv=6, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", DECODER),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        dict(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings")}
        | dict(image_size=16, patch_size=4),
    ),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", SPEECH),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        dict(vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=4),
    ),
    # Families that nothing here was written for.
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(**GROUPED, head_dim=8)),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        dict(vocab_size=120, hidden_size=32, n_layer=2, n_head=4),
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        dict(vocab_size=120, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    ),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        dict(
            **ENCODER,
            pad_token_id=0,
            bos_token_id=1,
            cls_token_id=1,
            eos_token_id=2,
            sep_token_id=2,
        ),
    ),
}
EAGER = ("deberta", "mamba", "gemma2", "bloom", "mpt")  # have no SDPA


def attention_of(family: str) -> str:
    """Eager and SDPA in turn over the families, because each takes graphs of its own."""
    return "eager" if family in EAGER or list(FAMILIES).index(family) % 2 else "sdpa"


@dataclass(frozen=True)
class Variant:
    """How a cell of methods x families runs: full or padded batches, greedy or beams, so that each pair of these
    occurs with each method and each family."""

    family: str
    attention: str
    padding: str
    beams: int

    @staticmethod
    def of(method: str, family: str) -> Variant:
        turn = shipped().index(method) + list(FAMILIES).index(family)
        padding, beams = ("right", "none", "left")[turn // 2 % 3], turn // 3 % 2 + 1
        return Variant(family, attention_of(family), padding, beams)

    def backbone(self) -> PreTrainedModel:
        return tiny(self.family, self.attention)


def _sample(seed: int) -> tuple[tuple[str, str], ...]:
    """Cells in which each method meets each number of beams and each kind of attention that it has, each family each
    padding and number of beams, and each padding each number of beams with each kind of attention; taken greedily,
    those first that show most."""
    cells = [(m, f) for m in shipped() for f in FAMILIES if not lacks(m, f)]
    random.Random(seed).shuffle(cells)
    shown = {cell: _shown(*cell) for cell in cells}
    left = {fact for facts in shown.values() for fact in facts}
    chosen: list[tuple[str, str]] = []
    while left:
        best = max(cells, key=lambda cell: len(shown[cell] & left))
        chosen.append(best)
        left -= shown[best]
    return tuple(sorted(chosen))


def _shown(method: str, family: str) -> frozenset[object]:
    one = Variant.of(method, family)
    return frozenset(
        {
            (method, one.beams),
            (method, one.attention),
            (family, one.padding),
            (family, one.beams),
            (one.padding, one.beams, one.attention),
        }
    )


def tiny(
    family: str, attention: str | None = None, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A two-layer model with weights wide enough that every part of it matters."""
    attention = attention or ("eager" if family in EAGER else "sdpa")
    config_name, model_name, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(
        **{**sizes, **changes}, attn_implementation=attention
    )
    return wide(getattr(transformers, model_name)(config))


def wide(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation mode, with matrices of some size and vectors of some noise."""
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
    """Token ids with a mask; `padding` is none, left or right and reaches 4 tokens into some rows.
    Images and spectrograms have none."""
    torch.manual_seed(seed)
    if model.main_input_name != "input_ids":
        inputs = {
            k: torch.randn(v.shape).to(v)
            for k, v in dummy_inputs(model).items()
            if v.is_floating_point()
        }
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(4, 120, (size, 7))
        return inputs
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


def overlay(folder: Path, *packages: str, needs: Sequence[str] = ()) -> str:
    """A Python that has `packages`, without what they ask for, over the packages of this one and peftc; and what they
    `need`."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    own = next((folder / "lib").glob("python*")) / "site-packages"
    (own / "below.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    for more in (["setuptools", "wheel"], needs, ["--no-deps", "--no-build-isolation", *packages]):
        if more:
            subprocess.run([*install, *more], check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    return python


def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs).logits
    return out


class Told:
    """A streamer, which is put the prompt and then each token."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.reshape(1, -1).cpu())

    def end(self) -> None:
        self.ended = True


# A model is traced once for all tests of a process: the product's store of graphs, without its bound.
CAPTURES.bound = None
# Graphs are many objects that stay: a worker spent a tenth of its time on looking through them.
gc.set_threshold(20_000, 20, 50)


def pytest_collection_finish() -> None:
    """Modules stay, and are not looked through again: Trainer collects garbage several times in each training."""
    gc.freeze()


def roomy(item: pytest.Function) -> None:
    """Run a test, with 320 kB for the frames of what it calls."""
    item.obj(**{name: item.funcargs[name] for name in item._fixtureinfo.argnames})


# CPython 3.11 maps memory for each 16 kB of frames and unmaps it on return: a loop that calls across such a border
# spends most of its time there, and a tenth of the tests' was. A frame that asks for room gets it all at once.
roomy.__code__ = roomy.__code__.replace(co_stacksize=40_000)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    roomy(pyfuncitem)
    return True


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker has all tests of a family, and else of a file: a model of one configuration is traced once in a
    process. Of the cases of a test that is `sampled(n)`, every n-th runs in CI."""
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        words = [given.get(key) for key in ("family", "model", "name")]
        group = next((one for one in words if isinstance(one, str)), item.path.stem)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))
    turns: dict[object, Iterator[int]] = {}
    for item in items:
        sampled = item.get_closest_marker("sampled")
        turn = turns.setdefault(getattr(item, "function", None), itertools.count())
        if sampled is not None and next(turn) % sampled.args[0]:
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the goldens anew")
    parser.addoption("--laws-seed", help="the seed of the long run of the laws; else a random one")
    parser.addoption("--matrix", help="write the table of methods x families to this file")
    parser.addoption("--messages", action="store_true", help="remember an example of each message")


def pytest_configure(config: pytest.Config) -> None:
    """One seed for the long run of the laws, in all processes."""
    if config.option.messages:
        config.stash[RECORDER] = Recorder()
        config.stash[RECORDER].start()
    if config.option.laws_seed is None:
        config.option.laws_seed = random.SystemRandom().randrange(2**32)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"--laws-seed {terminalreporter.config.option.laws_seed}")


@pytest.fixture(scope="session")
def start(request: pytest.FixtureRequest) -> int:
    """The seed of the long run of the laws, printed at the end."""
    return int(request.config.option.laws_seed)


_CELLS: dict[tuple[str, str], str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember how each cell of the matrix ended."""
    name = report.nodeid.partition("::test_cell[")[2].partition("]")[0]
    if name and (report.when == "call" or report.failed):
        method, _, family = name.partition("-")
        _CELLS[method, family] = {"passed": "✓", "skipped": "·"}.get(report.outcome, "✗")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What one of several processes saw, the first one writes."""
    if RECORDER in node.config.stash:
        node.config.stash[RECORDER].add(getattr(node, "workeroutput", {}).get("messages", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if RECORDER in session.config.stash:
        recorder = session.config.stash[RECORDER]
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["messages"] = recorder.found
        else:
            recorder.write()
    path = session.config.getoption("--matrix")
    if path and _CELLS:
        Path(path).write_text(_table())


def _table() -> str:
    methods = sorted({method for method, _ in _CELLS})
    families = [family for family in FAMILIES if any(f == family for _, f in _CELLS)]
    lines = ["| | " + " | ".join(families) + " |", "|---" * (len(families) + 1) + "|"]
    for method in methods:
        cells = " | ".join(_CELLS.get((method, family), " ") for family in families)
        lines.append(f"| {method} | {cells} |")
    return "\n".join(lines) + "\n"


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


# CI's cells of methods x families, pairwise; all of the matrix is in the slow set.
SAMPLE = _sample(0)


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
def body(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a head, and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "body"
    tiny("bert").base_model.save_pretrained(path)
    BertTokenizer.from_pretrained(folder).save_pretrained(path)
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
