"""What a training leaves beside its deltas: `train_report.json`, and the curve of its losses as SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from peftc.errors import PeftcError
from peftc.store.deltas import manifest_of, sets_of
from peftc.store.versions import versions
from peftc.training.recipe import Recipe, recipe_of
from peftc.training.run import Result

REPORT, CURVE = "train_report.json", "loss.svg"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
VERSIONS = ("accelerate", "datasets", "tokenizers")


def write(deltas: Path, recipe: Recipe, result: Result, data: Mapping[str, Any]) -> None:
    """Beside saved deltas: versions, the spec's digest, the backbone's fingerprint, seed, scores, losses."""
    manifest = manifest_of(deltas)
    told = {
        "versions": versions(VERSIONS),
        "specs": {one["set"]: one["spec_digest"] for one in sets_of(manifest)},
        "backbone": {key: manifest["backbone"][key] for key in ("name", "class", "fingerprint")},
        "data": data,
        "recipe": asdict(recipe),
        "seed": recipe.seed,
        "metrics": result.metrics,
        "steps": result.steps,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens / result.seconds if result.seconds else 0.0,
        "mean_loss": result.loss if math.isfinite(result.loss) else None,
        "stopped": result.stopped,
        "history": result.history,
    }
    (deltas / REPORT).write_text(json.dumps(told, indent=1, default=str) + "\n")
    (deltas / CURVE).write_text(curve({recipe.name: losses(result)}))


def losses(result: Result) -> list[tuple[float, float]]:
    """Steps and the losses that were logged there."""
    return [(one["step"], one["loss"]) for one in result.history if "loss" in one]


def recipe_beside(deltas: Path) -> Recipe | None:
    """The recipe that deltas were trained by, where that was told."""
    file = deltas / REPORT
    if not file.is_file():
        return None
    try:
        told = json.loads(file.read_text())["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise PeftcError(f"{file} is damaged: it holds no recipe; name one (--recipe)") from error
    return recipe_of(told, str(file))


def curve(
    lines: Mapping[str, Sequence[tuple[float, float]]], width: int = 640, height: int = 320
) -> str:
    """Losses over steps, a line for each name, as an SVG image."""
    left, low = 56, 32
    xs, ys = zip(*chain([(0.0, 0.0)] if not any(lines.values()) else (), *lines.values()))
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    wide, high = (x1 - x0) or 1.0, (y1 - y0) or 1.0

    def place(x: float, y: float) -> str:
        across = left + (x - x0) / wide * (width - left - 16)
        down = 16 + (y1 - y) / high * (height - low - 32)
        return f"{across:.1f},{down:.1f}"

    text = '<text x="{}" y="{}" text-anchor="{}" fill="{}">{}</text>'
    floor = height - 12
    drawn = [
        text.format(left - 6, 20, "end", "black", f"{y1:.4g}"),
        text.format(left - 6, height - low - 12, "end", "black", f"{y0:.4g}"),
        text.format(left, floor, "start", "black", f"step {x0:g}"),
        text.format(width - 16, floor, "end", "black", f"step {x1:g}"),
        text.format((left + width) // 2, floor, "middle", "black", "loss"),
    ]
    for i, ((name, points), colour) in enumerate(zip(lines.items(), cycle(COLOURS))):
        line = " ".join(place(x, y) for x, y in points)
        drawn.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        drawn.append(text.format(width - 16, 28 + 16 * i, "end", colour, escape(name)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )
