"""The three panes of a page: the lines of the spec, the graph, the ONNX nodes; each element says what it belongs to.

`data-is` names an element, `data-of` what it came of, `data-in` the blocks around it, `data-reads` what it reads: the
script marks what shares a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from peftc.plan.design import form, place
from peftc.plan.plan import Plan
from peftc.report.changes import FOLDED, INSERTED, KEPT, REMOVED, Step
from peftc.report.layers import Block, Tree, span
from peftc.report.picture import hue
from peftc.report.source import Sheet
from peftc.rewrite.folding import Outcome

DEEP = 8  # modules around what is open from the start
SAID = {KEPT: "", INSERTED: "inserted", FOLDED: "folded", REMOVED: "gone"}


@dataclass(frozen=True)
class Ids:
    """The ids of what is shown, by the names of steps and the paths of blocks."""

    tree: Tree
    steps: Mapping[str, str]
    blocks: Mapping[str, str]
    inside: Mapping[str, tuple[str, ...]]
    groups: Sequence[int]

    @staticmethod
    def of(tree: Tree, plan: Plan, letter: str = "") -> Ids:
        steps = {step.name: f"{letter}n{i}" for i, step in enumerate(tree.root.steps())}
        blocks = {one.path: f"{letter}b{i}" for i, one in enumerate(tree.root.blocks())}
        inside: dict[str, tuple[str, ...]] = {}

        def walk(block: Block, around: tuple[str, ...]) -> None:
            for one in block.items:
                if isinstance(one, Block):
                    inside[one.path] = around
                    walk(one, (*around, blocks[one.path]))

        walk(tree.root, ())
        groups = [one.group for one in plan.spec.entries]
        return Ids(tree, steps, blocks, inside, groups)

    def ink(self, entries: Sequence[int]) -> str:
        """The style of what is of an entry of the spec: one hue for what was written as one delta."""
        return f"--h:{hue(self.groups[entries[0]])}" if entries else ""

    def step(self, name: str) -> str:
        """The id of the step that is shown for one of this name, or nothing."""
        return self.steps.get(self.tree.step(name), "")

    def around(self, path: str) -> tuple[str, ...]:
        """The ids of the block that is shown for a module, and of those around it."""
        shown = self.tree.place(path)
        return (*self.inside.get(shown, ()), self.blocks[shown]) if shown in self.blocks else ()


def _attributes(**given: object) -> str:
    """`data-is` of `is_`; what is empty is left out."""
    found = []
    for name, value in given.items():
        said = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if said:
            found.append(f' {name.strip("_").replace("_", "-")}="{escape(said, quote=True)}"')
    return "".join(found)


def _tokens(entries: Iterable[int], parameters: Iterable[str] = ()) -> list[str]:
    """`e0` of an entry, `e0.down` of its parameter."""
    found = [f"e{one}" for one in entries]
    return [*found, *(f"{one}.{name}" for one in found for name in parameters)]


def spec(
    plan: Plan, sheets: Sequence[Sheet], outcomes: Sequence[Outcome], ids: Ids
) -> Iterator[str]:
    yield '<section class="pane" id="spec" aria-label="the spec"><div class="bar"><h2>Spec</h2></div>'
    yield '<div class="chips">'
    for index, match in enumerate(plan.matches):
        said = _became([one for one in outcomes if one.key[0] == index])
        many = "parameters" if match.entry.train else "sites"
        numbers = f"{match.sites:,} {many}, {match.parameters:,} numbers train"
        yield (
            f'<div class="chip"{_attributes(role="button", style=ids.ink([index]), data_is=f"e{index}")}><b>{escape(match.entry.method)}</b> '
            f'at {escape(place(match.entry))}<br><span class="quiet">{numbers}{said}</span>'
            f'<span class="hidden">: {escape(form(match.entry))}</span></div>'
        )
    yield "</div>"
    for number, sheet in enumerate(sheets):
        yield f'<div class="file">{escape(sheet.file)}</div><div class="code" role="group"{_attributes(aria_label=sheet.file)}>'
        for line in sheet.lines:
            mine = _tokens(line.entries, [line.parameter] if line.parameter else ())
            own = [one for one in mine if "." in one] or mine
            more = _attributes(class_="line")
            if line.entries:
                ink = ids.ink(line.entries)
                more = _attributes(class_="line of", role="button", style=ink, data_is=own)
            yield f'<div id="f{number}l{line.number}"{more}><i>{line.number}</i>{escape(line.text) or " "}</div>'
        yield "</div>"
    yield "</section>"


def _became(outcomes: Sequence[Outcome]) -> str:
    """`; 24 folded by fold_affine; 36 kept: why`."""
    found: dict[str, int] = {}
    for one in outcomes:
        if not (one.folded or one.note):
            continue
        said = f"folded by {one.by}" if one.folded else f"kept: {one.note}"
        found[said] = found.get(said, 0) + 1
    return "".join(f"; {count} {escape(said)}" for said, count in found.items())


def graph(tree: Tree, ids: Ids) -> Iterator[str]:
    yield (
        '<section class="pane" id="graph" aria-label="the graph"><div class="bar"><h2>Graph</h2>'
        '<label><input type="checkbox" id="moves"> moves and sizes too</label>'
        '<button type="button" data-open="yes">open all</button>'
        '<button type="button" data-open="no">close all</button>'
        '<div class="columns" aria-hidden="true"><span>before</span><span>after</span></div></div>'
        '<div class="graph">'
    )
    shared = [one for one in tree.root.items if isinstance(one, Step) and one.ahead]
    if shared:
        yield '<details open><summary><span class="name">shared</span>'
        yield '<span class="kind">of parameters alone, once for several sites</span></summary><div class="items">'
        yield from (_step(one, ids) for one in shared)
        yield "</div></details>"
    for one in tree.root.items:
        if one not in shared:
            yield from _item(one, ids, 0)
    yield "</div></section>"


def _item(item: Block | Step, ids: Ids, depth: int) -> Iterator[str]:
    if isinstance(item, Step):
        yield _step(item, ids)
        return
    if _is_one(item):
        yield from (_step(one, ids, item) for one in item.steps())
        return
    changed = dict.fromkeys(e for step in item.steps() for e in step.entries)
    is_open = " open" if changed and depth < DEEP else ""
    yield f"<details{is_open}>{_summary(item, ids, list(changed), depth)}"
    yield '<div class="items">'
    for one in item.items:
        yield from _item(one, ids, depth + 1)
    yield "</div></details>"


def _is_one(block: Block) -> bool:
    """Whether a module is one call, and what moves its values."""
    inner = any(isinstance(one, Block) for one in block.items)
    return len(block.paths) == 1 and not inner and sum(not s.minor for s in block.steps()) == 1


def _summary(block: Block, ids: Ids, entries: Sequence[int], depth: int) -> str:
    own = ids.blocks[block.path]
    times = f'<span class="times">× {len(block.paths)}</span>' if len(block.paths) > 1 else ""
    dots = "".join(f'<i style="{one}"></i>' for one in dict.fromkeys(ids.ink([e]) for e in entries))
    count = sum(step.state in (INSERTED, FOLDED) for step in block.steps())
    said = f"+{count}" if count else ""
    links = _attributes(id=own, data_is=own, data_in=ids.inside[block.path])
    return (
        f'<summary{links}><span class="name">{escape(_name(block))}</span>'
        f'<span class="kind">{escape(block.kind)}</span>{times}'
        f'<span class="dots">{dots}{said}<span class="hidden"> inserted or changed</span></span></summary>'
    )


def _name(block: Block) -> str:
    """The path in the model of the outermost ones, and of layers their numbers."""
    if len(block.paths) > 1:
        return ".".join(span(block.paths).rsplit(".", 2)[-2:])
    parts = block.path.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]


def _step(step: Step, ids: Ids, module: Block | None = None) -> str:
    """A row; of a `module` that is one call, it stands for that too."""
    around = ids.around(step.modules[-1][0]) if step.modules else ()
    named = [one.name for one in step.tensors if one.kind == "delta"]
    of = _tokens(step.entries)
    of += [one for one in _tokens(step.entries, named) if one not in of]
    reads = [one for name in step.reads if (one := ids.step(name))]
    trains = "" if step.state != KEPT or not step.entries else "trains"
    changed = "" if step.was is None else "changed"
    kinds = ["step", step.state, "minor" if step.minor else "", trains, changed]
    own = ids.steps[step.name]
    shown = module is not None and not step.minor
    links = _attributes(
        class_=[one for one in kinds if one],
        role="button",
        id=own,
        style=ids.ink(step.entries),
        title=_title(step),
        data_is=[own, ids.blocks[module.path]] if module is not None and shown else own,
        data_of=of,
        data_in=around,
        data_reads=list(dict.fromkeys(reads)),
    )
    name = _name(module) if module is not None and shown else ""
    said = _cell(step, name)
    before = _cell(step.was or step, name) if step.state in (KEPT, REMOVED) else ""
    hidden = ' aria-hidden="true"' if step.state == KEPT and not changed else ""
    after = "" if step.state == REMOVED else said
    word = SAID[step.state] or trains
    told = f'<span class="hidden">{word} </span>' if word else ""
    if step.state == FOLDED:
        where = f" by {step.by}" if step.by else ""
        after = f'<del>{said}</del> <span class="by">folded{escape(where)}</span>'
    return f'<div{links}><span class="cell before"{hidden}>{told if before and not after else ""}{before}</span><span class="cell after">{told}{after}</span></div>'


def _cell(step: Step, module: str = "") -> str:
    tensors = " ".join(f"{one.name}{one.shape}" for one in step.tensors)
    said = f'<span class="module">{escape(module)}</span> ' if module else ""
    said += f"<b>{escape(step.op)}</b>"
    said += f' <span class="sizes">{escape(step.shape)}</span>' if step.shape else ""
    return said + (f' <span class="tensors">of {escape(tensors)}</span>' if tensors else "")


def _title(step: Step) -> str:
    """All that is known of a step, for who points at it."""
    lines = [
        f"{step.name}: {step.op}({step.settings})" if step.settings else f"{step.name}: {step.op}"
    ]
    lines += [f"{one.kind} {one.path} {one.shape}" for one in step.tensors]
    if step.shape:
        lines.append(f"gives {step.shape}")
    if step.modules:
        lines.append(f"in {step.modules[-1][0]}")
    if step.state == FOLDED:
        lines.append(f"folded by {step.by} into {step.into}")
    return "\n".join(lines)


def onnx(
    graphs: Mapping[str, Tree], links: Mapping[str, str], plan: Plan, ids: Ids
) -> Iterator[str]:
    if not graphs:
        return
    yield '<section class="pane" id="onnx" aria-label="the ONNX nodes"><div class="bar"><h2>ONNX</h2></div>'
    for number, (role, tree) in enumerate(graphs.items()):
        own = Ids.of(tree, plan, f"o{number}")
        count = len([*tree.root.steps()]) + len(tree.stands)
        yield (
            f'<details open class="graph one"><summary><span class="name">{escape(role)}.onnx</span>'
            f'<span class="kind">{count:,} nodes</span></summary><div class="items">'
        )
        for one in tree.root.items:
            yield from _onnx_item(one, links, own, ids, 0)
        yield "</div></details>"
    yield "</section>"


def _onnx_item(
    item: Block | Step, links: Mapping[str, str], own: Ids, ids: Ids, depth: int
) -> Iterator[str]:
    if isinstance(item, Step):
        yield _node(item, links, own, ids)
        return
    if _is_one(item):
        yield from (_node(one, links, own, ids, _name(item)) for one in item.steps())
        return
    times = f'<span class="times">× {len(item.paths)}</span>' if len(item.paths) > 1 else ""
    changed = any(step.entries for step in item.steps())
    is_open = " open" if depth < (DEEP if changed else 3) else ""
    name = own.blocks[item.path]
    more = _attributes(id=name, data_is=name, data_of=ids.around(item.path)[-1:])
    yield f'<details{is_open}><summary{more}><span class="name">{escape(_name(item))}</span>{times}</summary><div class="items">'
    for one in item.items:
        yield from _onnx_item(one, links, own, ids, depth + 1)
    yield "</div></details>"


def _node(node: Step, links: Mapping[str, str], own: Ids, ids: Ids, module: str = "") -> str:
    came = ids.step(links.get(node.name, ""))
    kinds = ["step", INSERTED if node.entries else KEPT, "minor" if node.minor else ""]
    more = _attributes(
        class_=[one for one in kinds if one],
        role="button",
        id=own.steps[node.name],
        style=ids.ink(node.entries),
        title=_title(node),
        data_is=own.steps[node.name],
        data_of=[*([came] if came else []), *_tokens(node.entries)],
        data_in=ids.around(node.modules[-1][0]) if node.modules else (),
    )
    return f'<div{more}><span class="cell after">{_cell(node, "" if node.minor else module)}</span></div>'
