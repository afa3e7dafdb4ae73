"""Lists that `peftc plan` prints: the sites of a model, and what each method gets for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from peftc.plan.algebra import port_shapes
from peftc.plan.budget import Solved
from peftc.sites.site import Site


def budget_rows(found: Sequence[Solved]) -> list[dict[str, Any]]:
    """One row for each method: the size it gets, and what that weighs."""
    return [
        {
            "method": one.plan.spec.name,
            "argument": one.argument,
            "value": one.value,
            "weights": one.plan.parameters.weights,
            "percent": round(100 * one.plan.parameters.weights / one.plan.parameters.backbone, 3),
        }
        for one in found
    ]


def places_data(sites: Sequence[Site]) -> list[dict[str, Any]]:
    """Every site with its ports and their shapes."""
    return [
        {
            "at": site.at,
            "scope": site.scope,
            "stack": site.stack,
            "kind": site.kind,
            "layer": site.layer,
            "ports": {port: list(shape) for port, shape in port_shapes(site).items()},
            "dims": dict(site.dims),
            "slice": _slice(site),
        }
        for site in sites
    ]


def _slice(site: Site) -> dict[str, int] | None:
    """Which columns of a fused projection a site is."""
    columns = site.weights["W"].view.columns if "W" in site.weights else None
    return asdict(columns) if columns else None


def places(sites: Sequence[Site]) -> RenderableType:
    """The answer to what a spec can name: each kind of site once, with its ports and an example's scope."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.at, site.group, _ports(site)), []).append(site)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("at", "where", "sites", "ports"):
        table.add_column(
            name, justify="right" if name == "sites" else "left", no_wrap=name != "ports"
        )
    for (at, group, ports), found in groups.items():
        cell = " ".join(ports) + f"\nsuch as {found[0].scope}"
        table.add_row(at, group.replace("_", " "), str(len(found)), cell)
    return table


def _ports(site: Site) -> tuple[str, ...]:
    """`x[..., 1024]` for each port; a bias that the linear lacks is none."""
    return tuple(
        f"{port}[{', '.join(map(str, shape))}]"
        for port, shape in port_shapes(site).items()
        if port not in site.absent
    )


def columns(rows: Sequence[dict[str, Any]]) -> Table:
    """Rows of data as a table; numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    return table
