"""The report: of a subject the page, and the pictures of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peftc.export.origins import Row
from peftc.plan.design import paper_percent
from peftc.report.changes import FOLDED, INSERTED, KEPT, Modules, Step, modules_of, steps
from peftc.report.costs import Costs
from peftc.report.flow import elements
from peftc.report.layers import Tree, tree
from peftc.report.page import Page, Tile
from peftc.report.picture import figure
from peftc.report.sketch import sketches
from peftc.report.source import sheets
from peftc.report.subject import ReportError, Subject

_TENS = {"T": 1e12, "G": 1e9, "M": 1e6}
_TWOS = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10}
FIGURES = 4  # sorts of layers that a page draws


def page(subject: Subject, spent: Costs | None = None) -> Page:
    """What is known of a subject as a page; `spent` are its costs, where they were counted."""
    found = steps(subject)
    links, onnx = _onnx(subject, found)
    return Page(
        title=f"What {subject.title} does to {subject.backbone}",
        about=_about(subject),
        tiles=(*_sizes(subject), *_spent(spent), *_exported(subject)),
        figures=pictures(subject, found)[:FIGURES],
        plan=subject.plan,
        sheets=sheets(subject.specs, subject.plan.spec.entries),
        graph=tree(found),
        onnx=onnx,
        links=links,
        outcomes=tuple(subject.outcomes.values()),
        checks=subject.checks,
    )


def pictures(
    subject: Subject, found: Sequence[Step] | None = None, alone: bool = False
) -> tuple[str, ...]:
    """The layers in which something is changed, the most changed first, as SVG."""
    found = steps(subject) if found is None else found
    layers = [one for one in sketches(subject.plan) if one.parts]
    folded = _folded(subject)
    return tuple(figure(one, elements(one, subject.plan, found), folded, alone) for one in layers)


def _folded(subject: Subject) -> frozenset[int]:
    """The deltas of the spec of which nothing is left."""
    entries = subject.plan.spec.entries
    became: dict[int, list[bool]] = {}
    for (index, _), outcome in subject.outcomes.items():
        became.setdefault(entries[index].group, []).append(outcome.folded)
    return frozenset(group for group, all_ in became.items() if all(all_))


def picture(subject: Subject, number: int) -> str:
    """One of `pictures`, counted from 1, as a file of its own. Raises ReportError."""
    drawn = pictures(subject, alone=True)
    if not 1 <= number <= len(drawn):
        raise ReportError(f"there is no picture {number}: {subject.title} has {len(drawn)}")
    return drawn[number - 1]


def _about(subject: Subject) -> str:
    titles = [one.title for one in subject.specs if one.title]
    folded = [one for one in subject.outcomes.values() if one.folded]
    said = "; ".join(titles)
    if subject.bundle is not None:
        said += f". An ONNX bundle: {len(folded)} of {len(subject.outcomes)} deltas are folded into weights"
    return said


def _sizes(subject: Subject) -> tuple[Tile, ...]:
    counts, plan = subject.plan.parameters, subject.plan
    share = 100 * counts.training / counts.backbone
    paper = f"{paper_percent(counts.weights, counts.backbone)} % as papers count"
    places = ", ".join(f"{count} {kind}" for kind, count in plan.site_counts.items())
    return (
        Tile("parameters that train", f"{counts.training:,}", f"{counts.backbone:,}", f"{share:.2f} %"),
        Tile("parameters that are stored", f"{counts.stored:,}", note=paper),
        Tile("places that change", f"{len(plan.edits):,}", note=places),
    )  # fmt: skip


def _spent(spent: Costs | None) -> tuple[Tile, ...]:
    if spent is None:
        return ()
    batch = (
        f"{spent.rows} rows" if spent.length is None else f"{spent.rows} × {spent.length} tokens"
    )
    found = []
    if spent.kernels and spent.flops:
        found.append(_tile("kernels", spent.kernels, f"forward of {batch}", {}))
        found.append(_tile("FLOPs", spent.flops, f"forward of {batch}", _TENS))
    if spent.saved:
        note = "a training step; before: of all weights"
        found.append(_tile("bytes saved for backward", spent.saved, note, _TWOS))
    if spent.why:
        found.append(Tile("not counted", "–", note=spent.why.splitlines()[0][:160]))
    return tuple(found)


def _tile(name: str, pair: tuple[int, int], note: str, units: Mapping[str, float]) -> Tile:
    """`units` are from the largest on; numbers are of the first that `pair` reaches."""
    unit = next((one for one in units if max(pair) >= units[one]), "")
    size = units.get(unit, 1)
    before, after = (f"{one / size:,.4g}" if size > 1 else f"{one:,}" for one in pair)
    change = f"{100 * (pair[1] / pair[0] - 1):+.1f} %; " if pair[0] else ""
    return Tile(name, f"{after} {unit}".strip(), before, change + note)


def _exported(subject: Subject) -> tuple[Tile, ...]:
    if subject.bundle is None:
        return ()
    counts = {role: len(nodes) for role, nodes in subject.bundle.nodes.items()}
    said = ", ".join(f"{role} {count:,}" for role, count in counts.items())
    size = f"{subject.bundle.bytes:,} bytes of weights"
    return (Tile("ONNX nodes", f"{sum(counts.values()):,}", note=f"{said}; {size}"),)


def _onnx(subject: Subject, found: Sequence[Step]) -> tuple[dict[str, str], dict[str, Tree]]:
    """(step of each node by its name, the graphs of a bundle as trees): names are told apart by their graph."""
    if subject.bundle is None:
        return {}, {}
    modules: dict[str, Modules] = {}
    for node in subject.after.graph.nodes:
        stack = modules_of(node)
        for depth, (path, _) in enumerate(stack, 1):
            modules.setdefault(path, stack[:depth])
    named = {one.address: one for one in found if one.address}
    folded = {one.into: one for one in found if one.state == FOLDED}
    links: dict[str, str] = {}
    graphs: dict[str, Tree] = {}
    for role, nodes in subject.bundle.nodes.items():
        made = []
        for i, row in enumerate(nodes):
            step = _node(f"{role}:{i}", row, modules)
            made.append(step)
            if row[2] in named:
                links[step.name] = named[row[2]].name
        graphs[role] = tree([_touched(one, named, links, folded) for one in made], role)
    return links, graphs


def _node(name: str, row: Row, modules: Mapping[str, Modules]) -> Step:
    _, op, address, edit, given = row
    return Step(
        name,
        op,
        KEPT if edit is None else INSERTED,
        modules.get(address.rpartition(":")[0], ()),
        given,
        entries=() if edit is None else (edit[0],),
        minor=not given.startswith("["),
        address=address,
    )


def _touched(
    node: Step, named: Mapping[str, Step], links: Mapping[str, str], folded: Mapping[str, Step]
) -> Step:
    """A node whose weight a delta was folded into is of that delta's entry."""
    came = named.get(node.address) if node.name in links else None
    mine = [folded[one.path] for one in came.tensors if one.path in folded] if came else []
    return replace(node, entries=mine[0].entries) if mine and not node.entries else node
