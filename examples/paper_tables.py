"""Tables 2 to 6 and 12 of He et al. (2022): our exact count of each row, its percentage, and the printed one.

Counts are of BART-large (table 2: RoBERTa-base), planned on the meta device from `specs/paper`. The paper
counts weights without biases or the reparametrising MLP, over BART-large's 406,291,456, and cuts percentages
to one decimal; a row that this does not reproduce is flagged with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from peftc.driver import plans
from peftc.language.reader import load_spec
from peftc.language.shelf import directory
from peftc.model import backbones
from peftc.plan.design import paper_percent

BART, ROBERTA = "facebook/bart-large", "roberta-base"
ROUNDED = "rounded, not cut"
OWN = "its formula: 0.5"  # and MAM's 6.7 needs it
# (table, model, {row of specs/paper: printed percentage}, {row: what is odd})
TABLES: tuple[tuple[str, str, dict[str, float], dict[str, str]], ...] = (
    (
        "2",
        ROBERTA,
        {"bitfit": 0.1, "prefix_32": 0.5, "lora_attn_16": 0.5, "sa_ffn_32": 0.5, "mam_16_16": 0.5},
        dict.fromkeys(("bitfit", "prefix_32", "lora_attn_16", "sa_ffn_32", "mam_16_16"), ROUNDED),
    ),
    (
        "3",
        BART,
        {
            "prefix_200": 3.6,
            "sa_attn_200": 3.6,
            "sa_ffn_200": 2.4,
            "pa_attn_200": 3.6,
            "pa_ffn_200": 2.4,
        },
        {},
    ),
    (
        "4",
        BART,
        {
            "pa_attn_200": 3.6,
            "prefix_200": 3.6,
            "mh_pa_attn_200": 3.6,
            "prefix_30": 0.1,
            "prefix_30_ungated": 0.1,
            "pa_ffn_30": 0.1,
            "pa_attn_30": 0.1,
            "mh_pa_attn_30": 0.1,
        },
        dict.fromkeys(("prefix_30", "prefix_30_ungated", "pa_attn_30", "mh_pa_attn_30"), OWN)
        | {"pa_ffn_30": "its formula: 0.3"},
    ),
    (
        "5",
        BART,
        {
            "lora_ffn_102": 6.1,
            "lora_ffn_102_s1": 6.1,
            "pa_ffn_512": 6.1,
            "scaled_pa_ffn_512": 6.1,
            "learned_pa_ffn_512": 6.1,
        },
        {},
    ),
    (
        "6",
        BART,
        {
            "bitfit": 0.1,
            "prompt_200": 0.1,
            "prefix_200": 3.6,
            "pfeiffer_600": 7.2,
            "lora_ffn_102": 7.2,
            "pa_ffn_1024": 12.3,
            "pa_attn_30_pa_ffn_512": 6.7,
            "prefix_30_lora_ffn_102": 6.7,
            "mam_30_512": 6.7,
        },
        {
            "bitfit": ROUNDED,
            "prompt_200": "l is not stated",
            "lora_ffn_102": "6.1 in 5 and 12",
        },
    ),
    (
        "12",
        BART,
        {
            "prefix_200": 3.6,
            "prefix_512": 9.2,
            "lora_attn_200": 7.2,
            "sa_attn_200": 3.6,
            "sa_attn_512": 9.2,
            "pa_attn_200": 3.6,
            "pa_attn_512": 9.2,
            "lora_ffn_102": 6.1,
            "sa_ffn_200": 2.4,
            "sa_ffn_512": 6.1,
            "sa_ffn_1024": 12.3,
            "pa_ffn_200": 2.4,
            "pa_ffn_512": 6.1,
            "pa_ffn_1024": 12.3,
        },
        {},
    ),
)


@dataclass(frozen=True)
class Row:
    """A row of the paper, and what we count."""

    table: str
    spec: str
    weights: int
    percent: float
    printed: float
    odd: str


def rows() -> Iterator[Row]:
    """Every row; a spec is planned once for each model."""
    counted: dict[tuple[str, str], tuple[int, int]] = {}
    for model in (BART, ROBERTA):
        names = sorted({name for _, m, found, _ in TABLES for name in found if m == model})
        task = "classification" if model == ROBERTA else None
        backbone = backbones.resolve(
            model, random_weights=True, meta=True, task=task, num_labels=2 if task else None
        )
        specs = [load_spec(directory() / "paper" / f"{name}.yaml") for name in names]
        for name, plan in zip(names, plans(backbone, specs), strict=True):
            counted[model, name] = plan.parameters.weights, plan.parameters.backbone
    for table, model, found, odd in TABLES:
        for name, printed in found.items():
            weights, whole = counted[model, name]
            yield Row(
                table, name, weights, paper_percent(weights, whole), printed, odd.get(name, "")
            )


def main() -> None:
    transformers.logging.set_verbosity_error()
    assert {path.stem for path in Path(directory() / "paper").glob("*.yaml")} == {
        name for _, _, found, _ in TABLES for name in found
    }
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("table", "specs/paper", "weights", "%", "printed"):
        table.add_column(name, justify="left" if name == "specs/paper" else "right", no_wrap=True)
    table.add_column("")
    for row in rows():
        agrees = row.percent == row.printed
        note = "" if agrees else row.odd or "UNEXPLAINED"
        table.add_row(
            row.table, row.spec, f"{row.weights:,}", f"{row.percent}", f"{row.printed}", note
        )
    Console(highlight=False, soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
