"""What a training leaves beside its deltas: `train_report.json`, and the curve of its losses as SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftc.errors import PeftcError
from peftc.store.deltas import manifest_of, sets_of
from peftc.store.versions import versions
from peftc.training.recipe import Recipe, recipe_of
from peftc.training.run import Result

REPORT, CURVE = "train_report.json", "loss.svg"
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
    points = [(one["step"], one["loss"]) for one in result.history if "loss" in one]
    (deltas / REPORT).write_text(json.dumps(told, indent=1, default=str) + "\n")
    (deltas / CURVE).write_text(curve(points))


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


def curve(points: Sequence[tuple[float, float]], width: int = 640, height: int = 320) -> str:
    """Losses over steps, as an SVG image."""
    left, low = 56, 32
    xs, ys = [x for x, _ in points] or [0.0], [y for _, y in points] or [0.0]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    wide, high = (x1 - x0) or 1.0, (y1 - y0) or 1.0

    def place(x: float, y: float) -> str:
        across = left + (x - x0) / wide * (width - left - 16)
        down = 16 + (y1 - y) / high * (height - low - 32)
        return f"{across:.1f},{down:.1f}"

    line = " ".join(place(x, y) for x, y in points)
    text = '<text x="{}" y="{}" text-anchor="{}">{}</text>'
    floor = height - 12
    words = [
        text.format(left - 6, 20, "end", f"{y1:.4g}"),
        text.format(left - 6, height - low - 12, "end", f"{y0:.4g}"),
        text.format(left, floor, "start", f"step {x0:g}"),
        text.format(width - 16, floor, "end", f"step {x1:g}"),
        text.format((left + width) // 2, floor, "middle", "loss"),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>\n'
        + "\n".join(words)
        + "\n</svg>\n"
    )
