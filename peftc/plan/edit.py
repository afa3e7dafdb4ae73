"""An Edit: one delta at one site, with its tensors named and sized. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from peftc.language.expr import Expr
from peftc.language.spec import Entry
from peftc.sites.site import Site


@dataclass(frozen=True)
class Parameter:
    """A delta tensor: `name` in the expression, `path` in the module tree, shape in numbers.

    It starts by `init`, one of the language's initialisers, or as the `formula` of the site's own weight. Of as many
    `experts` as that says it is one tensor, [experts, ...], and an expression sees what is of one.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    init: str
    init_args: tuple[float, ...]
    trainable: bool
    formula: Expr | None = None
    experts: int = 0

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape that an expression sees."""
        return self.shape[1:] if self.experts else self.shape

    def under(self, old: str, new: str) -> Parameter:
        """The same tensor, of the delta set `old` until now, in `new`."""
        return replace(self, path=_moved(self.path, old, new))

    @property
    def rows(self) -> int:
        """The length of a prefix [heads, l, head_dim] or a prompt [l, d]."""
        return self.shape[-2]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Edit:
    """One delta at one site. `path` is where its own tensors live among the deltas; `index` counts the
    entries of the spec, and stays when the entry is rewritten. `of` names the delta set that it is of, where that
    is not the one without a name, and starts all its paths."""

    site: Site
    entry: Entry
    path: str
    parameters: tuple[Parameter, ...]
    index: int = 0
    of: str = ""

    def under(self, name: str, first: int = 0) -> Edit:
        """The same edit in a set of this name; its spec's entries are counted from `first` on."""
        return replace(
            self,
            path=_moved(self.path, self.of, name),
            parameters=tuple(one.under(self.of, name) for one in self.parameters),
            index=first + self.index,
            of=name,
        )

    @property
    def parts(self) -> range | tuple[None]:
        """The places of what is of each expert in tensors that are per expert; None alone where there are none."""
        count = max((one.experts for one in self.parameters), default=0)
        return range(count) if count else (None,)

    @property
    def key(self) -> tuple[int, str]:
        """What tells it from every other of its plan: two entries of one method may share a site."""
        return self.index, self.site.name

    @property
    def name(self) -> str:
        return f"{self.site.name}:{self.entry.method}"


def _moved(path: str, old: str, new: str) -> str:
    """A path that starts with the name `old`, with `new` in its place; each may be none."""
    bare = path[len(old) + 1 :] if old else path
    return f"{new}.{bare}" if new else bare
