"""Numbers, sizes and formulas in a spec: each read with its problems, names and shapes checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import yaml

from peftc.errors import number_of, suggest
from peftc.language import expr as ex
from peftc.language.ops import OPS, infer
from peftc.language.ports import SITES
from peftc.language.shapes import NUMBER
from peftc.language.source import Source
from peftc.language.spec import FORMULA, Arguments, Init


@dataclass(frozen=True)
class Initialiser:
    """How a new tensor starts: how many arguments it takes, at least and at most, and what it is filled with."""

    least: int
    most: int
    doc: str


# Initialisers by name.
INITS: Mapping[str, Initialiser] = {
    "zeros": Initialiser(0, 0, "all 0"),
    "ones": Initialiser(0, 0, "all 1"),
    "constant": Initialiser(1, 1, "constant(c): all c"),
    "normal": Initialiser(0, 1, "normal(s): drawn from N(0, s^2), s = 0.02 where it is left out"),
    "uniform": Initialiser(1, 1, "uniform(a): drawn from U(-a, a)"),
    "linear": Initialiser(
        1, 1, "linear(n): drawn from U(-1/sqrt(n), 1/sqrt(n)), as nn.Linear of n inputs"
    ),
    "kaiming_uniform": Initialiser(0, 0, "drawn from U(-1/sqrt(n), 1/sqrt(n)), n the first axis"),
    "identity": Initialiser(0, 0, "1 on the diagonal of a matrix, else 0"),
}
UNKNOWN: ex.Shape = ("...",)  # of a formula with a problem: what uses it is not blamed


@dataclass
class Scope:
    """What the names in a delta stand for: symbolic shapes, and which of them have been read."""

    shapes: dict[str, ex.Shape] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    @staticmethod
    def of(at: str, arguments: Iterable[str]) -> Scope:
        """The names that every delta at this kind of site sees: arguments, dims and ports."""
        site = SITES[at]
        return Scope({**dict.fromkeys((*arguments, *site.dims), NUMBER), **site.shapes})

    def also(self, name: str, shape: ex.Shape) -> Scope:
        """The same with one more name; what is read counts for both."""
        return Scope({**self.shapes, name: shape}, self.read)


class Formulas:
    """Reads the formulas of one file. A problem is noted in `source`; what is returned then is None or stands
    for anything. `used` are the arguments of the file that something reads."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.used: set[str] = set()

    def expression(self, node: yaml.Node, what: str) -> ex.Expr | None:
        """What the node writes, its names unchecked; `what` names it in a problem."""
        written = self.source.text(node, what)
        if written is None:
            return None
        try:
            return ex.parse(written)
        except ex.ExprError as error:
            self.source.fail(node, error.fact, error.fix, error.column)
            return None

    def number(self, node: yaml.Node, values: Arguments) -> float | int | None:
        """The value of an expression of arguments."""
        expression = self.expression(node, "a value")
        if expression is None:
            return None
        self.used |= set(ex.names(expression))
        try:
            return ex.number(expression, values)
        except ex.ExprError as error:
            self.source.fail(node, error.fact, error.fix, error.column)
            return None

    def checked(self, node: yaml.Node, names: Scope) -> tuple[ex.Expr | None, ex.Shape]:
        """An expression whose names, ops and shapes have been checked, and its shape."""
        expression = self.expression(node, "a formula")
        if expression is None:
            return None, UNKNOWN
        unknown = [leaf for leaf in ex.leaves(expression) if leaf.id not in names.shapes]
        for leaf in unknown:
            fix = suggest(leaf.id, names.shapes)
            self.source.fail(node, f"unknown name '{leaf.id}'", fix, leaf.column)
        names.read |= set(ex.names(expression))
        if unknown:
            return None, UNKNOWN
        if any(names.shapes[name] is UNKNOWN for name in ex.names(expression)):
            return expression, UNKNOWN
        try:
            return expression, infer(expression, names.shapes)
        except ex.ExprError as error:
            self.source.fail(node, error.fact, error.fix, error.column)
            return None, UNKNOWN

    def fresh(self, key: yaml.Node, name: str, names: Scope) -> bool:
        """Whether a delta may give this name a meaning; a problem where it has one."""
        if not ex.is_name(name):
            self.source.fail(key, f"'{name}' is not a name")
        elif name in names.shapes or name in OPS:
            self.source.fail(key, f"'{name}' already has a meaning here", "choose another name")
        else:
            return True
        return False

    def size(self, node: yaml.Node, names: Scope, sizes: set[str]) -> ex.Expr | None:
        """An axis of a parameter: an expression of `sizes`, which are dims and arguments."""
        expression = self.expression(node, "a size")
        if expression is None:
            return None
        self._known(node, ex.leaves(expression), sizes)
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
        elif isinstance(expression, ex.Call):
            init, known = Init(expression.op, expression.args), sizes
            self._initialiser(node, init)
        else:
            init, known, read = Init(ex.show(expression)), sizes, ()
            self._initialiser(node, init)
        self._known(node, read, known)
        names.read |= {leaf.id for leaf in read}
        return init

    def _known(self, node: yaml.Node, leaves: Iterable[ex.Name], sizes: set[str]) -> None:
        for leaf in leaves:
            if leaf.id not in sizes:
                fix = suggest(leaf.id, sizes)
                self.source.fail(node, f"unknown size '{leaf.id}'", fix, leaf.column)

    def _initialiser(self, node: yaml.Node, init: Init) -> None:
        if init.name not in INITS:
            fix = suggest(init.name, INITS) or f"one of: {', '.join(INITS)}, or a formula of W"
            self.source.fail(node, f"unknown init '{init.name}'", fix)
            return
        row = INITS[init.name]
        if not row.least <= len(init.args) <= row.most:
            takes = number_of(row.most, "argument")
            self.source.fail(node, f"init '{init.name}' takes {takes}, not {len(init.args)}")
