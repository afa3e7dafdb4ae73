"""The fields of a delta: sizes, initialisers, formulas and places, each read with its problems."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from peftc.errors import suggest
from peftc.language import expr as ex
from peftc.language.ops import OPS, infer, text
from peftc.language.ports import SITES, STORED, by_op
from peftc.language.source import Item, Source
from peftc.language.spec import FORMULA, Arguments, Init, Param, Where, Words

WHERE = ("stack", "kind", "layers")
PARAM = ("shape", "init", "per", "trainable")
STACKS = ("encoder", "decoder", "first")
POSITIONS = ("keep", "shift")
PER = ("site", "kind", "shape", "model")
# Initialisers and how many arguments they take, at least and at most.
INITS = {
    "zeros": (0, 0),
    "ones": (0, 0),
    "constant": (1, 1),
    "normal": (0, 1),
    "uniform": (1, 1),
    "linear": (1, 1),
    "kaiming_uniform": (0, 0),
    "identity": (0, 0),
}


@dataclass
class Scope:
    """What the names in an entry stand for: symbolic shapes, and which of them have been read."""

    shapes: dict[str, ex.Shape]
    read: set[str]


class Fields:
    """Reads single fields; `used` are the arguments that something reads."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.used: set[str] = set()

    def number(self, node: yaml.Node, values: Arguments) -> float | int | None:
        expression = self.expression(node, "a value")
        if expression is None:
            return None
        self.used |= set(ex.names(expression))
        try:
            return ex.number(expression, values)
        except ex.ExprError as error:
            self.source.fail(node, error.fact, error.fix, error.column)
            return None

    def expression(self, node: yaml.Node, what: str) -> ex.Expr | None:
        written = self.source.text(node, what)
        if written is None:
            return None
        try:
            return ex.parse(written)
        except ex.ExprError as error:
            self.source.fail(node, error.fact, error.fix, error.column)
            return None

    def where(self, items: Mapping[str, Item]) -> Where:
        if "where" not in items:
            return Where()
        inner = self.source.mapping(items["where"][1], "'where'", WHERE)
        stack = kind = layers = None
        if "stack" in inner:
            stack = self.source.choice(inner["stack"][1], "'stack'", STACKS)
        if "kind" in inner:
            kind = self.source.choice(inner["kind"][1], "'kind'", ("self", "cross"))
        if "layers" in inner:
            layers = self.layers(inner["layers"][1])
        return Where(stack, kind, layers)

    def at(self, items: Mapping[str, Item]) -> tuple[str, str | None]:
        _, node = items["at"]
        if isinstance(node, yaml.MappingNode):
            inner = self.source.mapping(node, "'at'", ("op", "scope"))
            op = self.source.choice(inner["op"][1], "'op'", by_op()) if "op" in inner else None
            scope = self.source.text(inner["scope"][1], "'scope'") if "scope" in inner else None
            if op is None or scope is None:
                ops = " or ".join(by_op())
                self.source.fail(node, f"give both: {{op: {ops}, scope: a glob over module paths}}")
                return "", None
            return op, scope
        sites = tuple(row.name for row in SITES.values() if not row.by_op)
        return self.source.choice(node, "'at'", sites) or "", None

    def layers(self, node: yaml.Node) -> tuple[int, ...] | None:
        written = self.source.text(node, "'layers'") or ""
        found: list[int] = []
        for part in written.split(","):
            match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
            if match is None:
                self.source.fail(node, f"'layers' cannot be '{written}'", 'write it as "0-5,11"')
                return None
            found += range(int(match[1]), int(match[2] or match[1]) + 1)
        if not found:
            self.source.fail(node, f"'layers' selects nothing: '{written}'")
        return tuple(found)

    def expect(self, items: Mapping[str, Item]) -> int | None:
        return self.source.integer(items["expect"][1], "'expect'") if "expect" in items else None

    def params(
        self, items: Mapping[str, Item], names: Scope, at: str, arguments: Arguments
    ) -> tuple[Param, ...]:
        if "params" not in items:
            return ()
        found = []
        for name, (key, node) in self.source.mapping(items["params"][1], "'params'").items():
            if not self.fresh(key, name, names):
                continue
            ports = set(SITES[at].ports)
            param = self.param(name, node, names, {*arguments, *SITES[at].dims}, ports)
            names.shapes[name] = tuple(_symbol(dim) for dim in param.shape)
            found.append(param)
        return tuple(found)

    def fresh(self, key: yaml.Node, name: str, names: Scope) -> bool:
        if not name.isidentifier():
            self.source.fail(key, f"'{name}' is not a name")
        elif name in names.shapes or name in OPS:
            self.source.fail(key, f"'{name}' already has a meaning here", "choose another name")
        else:
            return True
        return False

    def param(
        self, name: str, node: yaml.Node, names: Scope, sizes: set[str], ports: set[str]
    ) -> Param:
        items = self.source.mapping(node, f"'{name}'", PARAM)
        shape = [
            one
            for dim in (self.source.items(items["shape"][1], "'shape'") if "shape" in items else ())
            if (one := self.size(dim, names, sizes)) is not None
        ]
        for key in ("shape", "init"):
            if items and key not in items:
                self.source.fail(node, f"parameter '{name}' has no '{key}'")
        init = (
            self.init(items["init"][1], names, sizes, ports) if "init" in items else Init("zeros")
        )
        per = self.source.choice(items["per"][1], "'per'", PER) if "per" in items else "site"
        word = "true"
        if "trainable" in items:
            word = (
                self.source.choice(items["trainable"][1], "'trainable'", ("true", "false")) or word
            )
        return Param(name, tuple(shape), init, per or "site", word == "true")

    def size(self, node: yaml.Node, names: Scope, sizes: set[str]) -> ex.Expr | None:
        expression = self.expression(node, "a size")
        if expression is None:
            return None
        for leaf in ex.leaves(expression):
            if leaf.id not in sizes:
                self.source.fail(
                    node, f"unknown size '{leaf.id}'", suggest(leaf.id, sizes), leaf.column
                )
        names.read |= set(ex.names(expression))
        if isinstance(expression, ex.Number) and (expression.value < 0 or expression.value % 1):
            self.source.fail(node, f"'{expression.value}' is not a size")
        return expression

    def init(self, node: yaml.Node, names: Scope, sizes: set[str], ports: set[str]) -> Init:
        """An initialiser, or a formula of the site's own weight such as `norm(W)`, or of its values."""
        expression = self.expression(node, "'init'")
        if expression is None:
            return Init("zeros")
        read = ex.leaves(expression)
        if any(leaf.id in ports for leaf in read):
            init, known = Init(FORMULA, (expression,)), sizes | ports
        else:
            call = isinstance(expression, ex.Call)
            init = (
                Init(expression.op, expression.args)
                if isinstance(expression, ex.Call)
                else Init(ex.show(expression))
            )
            self.known_init(node, init)
            read, known = read if call else (), sizes
        for leaf in read:
            if leaf.id not in known:
                fix = suggest(leaf.id, known)
                self.source.fail(node, f"unknown size '{leaf.id}'", fix, leaf.column)
        names.read |= {leaf.id for leaf in read}
        return init

    def known_init(self, node: yaml.Node, init: Init) -> None:
        if init.name not in INITS:
            fix = suggest(init.name, INITS) or f"one of: {', '.join(INITS)}, or a formula of W"
            self.source.fail(node, f"unknown init '{init.name}'", fix)
        elif not INITS[init.name][0] <= len(init.args) <= INITS[init.name][1]:
            most = INITS[init.name][1]
            self.source.fail(
                node, f"init '{init.name}' takes {most} arguments, not {len(init.args)}"
            )

    def let(self, items: Mapping[str, Item], names: Scope) -> tuple[tuple[str, ex.Expr], ...]:
        if "let" not in items:
            return ()
        found = []
        for name, (key, node) in self.source.mapping(items["let"][1], "'let'").items():
            if self.fresh(key, name, names):
                expression, shape = self.checked(node, names)
                if expression is not None:
                    found.append((name, expression))
                names.shapes[name] = shape
        return tuple(found)

    def checked(self, node: yaml.Node, names: Scope) -> tuple[ex.Expr | None, ex.Shape]:
        """An expression whose names, ops and shapes have been checked, and its shape."""
        expression = self.expression(node, "a formula")
        if expression is None:
            return None, ("...",)
        unknown = [leaf for leaf in ex.leaves(expression) if leaf.id not in names.shapes]
        for leaf in unknown:
            fix = suggest(leaf.id, names.shapes)
            self.source.fail(node, f"unknown name '{leaf.id}'", fix, leaf.column)
        names.read |= set(ex.names(expression))
        if unknown:
            return None, ("...",)
        try:
            return expression, infer(expression, names.shapes)
        except ex.ExprError as error:
            self.source.fail(node, error.fact, error.fix, error.column)
            return None, ("...",)

    def penalty(self, items: Mapping[str, Item], names: Scope, ports: set[str]) -> ex.Expr | None:
        """A number at each site, of parameters alone."""
        if "penalty" not in items:
            return None
        node = items["penalty"][1]
        expression, shape = self.checked(node, names)
        read = set(ex.names(expression)) if expression is not None else set()
        if read & ports:
            self.source.fail(
                node, f"'penalty' reads the value '{min(read & ports)}'", "parameters alone"
            )
        elif expression is not None and shape != ():
            self.source.fail(node, f"'penalty' is {text(shape)}, not a number", "sum(...) it")
        return expression

    def words(self, items: Mapping[str, Item], params: Sequence[Param], at: str) -> Words | None:
        """What the backbone reads while the ports are recorded that parameters start as."""
        ports = set(SITES[at].ports) - {*SITES[at].having(*STORED)}
        starts = [
            p
            for p in params
            if p.init.name == FORMULA
            for arg in p.init.args
            if ports & {*ex.names(arg)}
        ]
        if "words" not in items:
            for param in starts:
                key, _ = items["params"]
                port = min(ports & {*ex.names(param.init.args[0])})
                self.source.fail(
                    key,
                    f"'{param.name}' starts as '{port}', a value",
                    "say of which text: words: ...",
                )
            return None
        key, node = items["words"]
        if not starts:
            self.source.fail(key, "no parameter starts from the words", "init: k, for a prefix")
        if isinstance(node, yaml.SequenceNode):
            ids = [
                self.source.integer(one, "a token") for one in self.source.items(node, "'words'")
            ]
            return tuple(one for one in ids if one is not None)
        return self.source.text(node, "'words'")


def _symbol(dim: ex.Expr) -> ex.Dim:
    if isinstance(dim, ex.Number):
        return int(dim.value)
    return ex.show(dim)
