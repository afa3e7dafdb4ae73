"""docs/language.md: every key, site, port, op and initialiser, from the tables, each with an example that ran here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
import transformers
from conftest import tiny, wide
from transformers import PreTrainedModel

from peftc import driver
from peftc.language import expr as ex
from peftc.language.field import FORMS, Field
from peftc.language.fields import FIELDS, TOP
from peftc.language.formulas import INITS
from peftc.language.ops import OPS, Op, infer
from peftc.language.params import PARAM
from peftc.language.ports import SITES, SiteType
from peftc.language.reader import parse_spec
from peftc.language.shapes import NUMBER, text
from peftc.language.where import WHERE
from peftc.model.tensors import initial
from peftc.plan.algebra import port_shapes
from peftc.plan.edit import Parameter
from peftc.plan.plan import Plan
from peftc.rewrite.evaluate import evaluate
from peftc.sites.kinds import KINDS
from peftc.sites.site import Site

HEAD = """# The language

Every key, site, port, op and initialiser, as the tables in `peftc/language` have them. `tests/page_language.py` writes
this page (`pytest --accept tests/test_docs.py`) and runs each example: specs are planned on toy models of two layers, 32
wide, formulas are computed. [A first method](tutorial.md) is the place to start; `peftc schema` has the same for editors.

A spec is a YAML mapping; each of its deltas is one of these forms, by the key that says so:

| form | what it does | needs |
|---|---|---|
"""
SAID = {
    "delta": "adds a formula to the result of a site",
    "rewrite": "replaces values or weights of a site by formulas",
    "train": "unfreezes parameters that the model has",
    "use": "takes in another spec",
}
LORA = """params:
  A: {shape: [in, 4],  init: kaiming_uniform}
  B: {shape: [4, out], init: zeros}
delta: x @ A @ B"""
SIZED = LORA.replace("4", "r")
SCALE = """params: {scale: {shape: [out], init: ones}}
rewrite: {h: h * scale}"""


def delta(*lines: str) -> str:
    """A spec of one delta."""
    first, *rest = "\n".join(lines).splitlines()
    return "\n".join(["deltas:", f"  - {first}", *(f"    {one}" for one in rest)])


# A spec for each key.
KEYS: Mapping[str, str] = {
    "name": f"name: mine\n{delta('train: [bias]')}",
    "title": f"title: all that the model adds\n{delta('train: [bias]')}",
    "with": f"with: {{r: 4}}\n{delta('at: ffn', SIZED)}",
    "budget": f"with: {{r: auto}}\nbudget: 5%\n{delta('at: ffn', SIZED)}",
    "deltas": f"{delta('at: attention.q', LORA)}\n  - train: [bias]",
    "deltas.method": delta("at: attention.q", "method: low_rank", LORA),
    "deltas.with": delta("at: attention.q", "with: {r: 2}", SIZED),
    "deltas.at": delta("at: [attention.q, attention.v]", LORA),
    "deltas.where": delta("at: attention.q", "where: {layers: 1}", LORA),
    "deltas.expect": delta("at: attention.q", "expect: 2", LORA),
    "deltas.params": delta("at: ffn", LORA),
    "deltas.let": delta(
        "at: ffn", LORA.replace("delta: x @ A", "let: {low: relu(x @ A)}\ndelta: low")
    ),
    "deltas.delta": delta("at: ffn", LORA.replace("[in", "[out").replace("x @ A", "relu(h @ A)")),
    "deltas.compose": delta("at: ffn", LORA, "compose: h + 4 * delta"),
    "deltas.rewrite": delta("at: ffn.up", SCALE),
    "deltas.penalty": delta("at: ffn.up", SCALE, "penalty: 0.1 * sum(scale * scale)"),
    "deltas.positions": delta(
        "at: attention.heads",
        "params: {P: {shape: [kv_heads, 5, head_dim], init: normal}}",
        'rewrite: {k: "prepend(P, k)", v: "prepend(P, v)"}',
        "positions: shift",
    ),
    "deltas.words": delta(
        "at: attention.heads",
        "words: [7, 8, 9]",
        "params:",
        "  K: {shape: [kv_heads, 3, head_dim],  init: k}",
        "  V: {shape: [kv_heads, 3, value_dim], init: v}",
        'rewrite: {k: "prepend(K, k)", v: "prepend(V, v)"}',
    ),
    "deltas.train": delta("at: norm", "train: [weight]"),
    "deltas.use": delta("use: lora", "with: {r: 2}"),
    "where.stack": delta("at: attention.q", "where: {stack: encoder}", LORA),
    "where.kind": delta("at: attention.q", "where: {kind: self}", LORA),
    "where.layers": delta("at: attention.q", 'where: {layers: "0-1"}', LORA),
    "where.experts": delta("at: experts", 'where: {experts: "0-1"}', LORA),
    "where.scope": delta("at: attention.q", 'where: {scope: "*.0.*"}', LORA),
    "params.shape": delta("at: ffn", LORA),
    "params.init": delta(
        "at: attention.q",
        "params: {m: {shape: [out, 1], init: norm(W)}}",
        "rewrite: {W: m * W / norm(W)}",
    ),
    "params.per": delta("at: attention.q", LORA.replace("uniform", "uniform, per: model")),
    "params.trainable": delta("at: ffn", LORA.replace("uniform", "uniform, trainable: false")),
}
# What a site's example does where it is no bottleneck from x to h.
DELTAS: Mapping[str, str] = {
    "attention.heads": """params:
  A: {shape: [heads, head_dim, 4],  init: normal}
  B: {shape: [heads, 4, value_dim], init: zeros}
delta: relu(q @ A) @ B""",
    "ffn.hidden": SCALE,
    "norm": SCALE,
    "embedding": """params:
  A: {shape: [vocab, 4], init: zeros}
  B: {shape: [4, out],   init: normal}
delta: lookup(A, ids) @ B""",
    "conv": """params:
  A: {shape: [in, 4],  init: normal}
  B: {shape: [4, out], init: zeros}
rewrite: {W: W + transpose(A @ B)}""",
}
FAMILIES = ("bert", "llama", "mixtral", "mamba", "deepseek")
TWICE = dict(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
    max_position_embeddings=64,
)
# What the names of samples of ops are bound to.
SHAPES: Mapping[str, ex.Shape] = {
    "x": ("...", "in"),
    "h": ("...", "out"),
    "W": ("out", "in"),
    "down": ("in", "r"),
    "up": ("r", "out"),
    "scale": ("out",),
    "size": ("out",),
    "blocks": ("n", "in", "r"),
    "turn": ("in", "in"),
    "table": ("vocab", "out"),
    "ids": ("...", "tokens"),
    "rows": ("l", "kv"),
    "P": ("kv_heads", "l", "head_dim"),
    "k": ("...", "kv_heads", "keys", "head_dim"),
    "heads": NUMBER,
    "r": NUMBER,
}
SIZES = {"...": 1, "in": 3, "out": 2, "r": 1, "n": 2, "vocab": 3, "tokens": 2, "l": 1, "kv": 2} | {
    "kv_heads": 1,
    "keys": 1,
    "head_dim": 2,
}


@cache
def model(family: str) -> PreTrainedModel:
    if family != "deepseek":
        return tiny(family)
    torch.manual_seed(0)
    return wide(transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**TWICE)))


@cache
def sites(family: str) -> tuple[Site, ...]:
    return driver.survey(model(family))


def page() -> str:
    forms = [
        f"| `{form}` | {SAID[form]} | {', '.join(f'`{key}`' for key in needs)} |"
        for form, needs in FORMS.items()
    ]
    return "\n".join([HEAD.rstrip(), *forms, "", *_keys(), *_sites(), *_ops(), *_inits()])


def _keys() -> Iterator[str]:
    for title, prefix, rows in (
        ("Keys of a spec", "", TOP),
        ("Keys of a delta", "deltas.", FIELDS),
        ("Keys of `where`", "where.", WHERE),
        ("Keys of a parameter", "params.", PARAM),
    ):
        yield f"## {title}\n"
        for row in rows:
            yield from _key(prefix, row)


def _key(prefix: str, row: Field) -> Iterator[str]:
    yield f"### `{prefix}{row.name}`\n"
    goes = f" Goes with {', '.join(f'`{one}`' for one in row.forms)}." if row.forms else ""
    more = f" It may be {row.more()}." if row.more() and row.name != "params" else ""
    must = " It must be there." if row.required else ""
    yield f"{_sentence(row.doc)}{must}{goes}{more}\n"
    said = KEYS[f"{prefix}{row.name}"]
    yield from ("```yaml", said, "```\n")
    family = "mixtral" if row.name == "experts" else "bert"
    yield f"{_planned(said, family)}\n"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _planned(said: str, family: str) -> str:
    """What an example is on a toy model."""
    plan = driver.plan(model(family), parse_spec(said, "spec.yaml"))
    counts = plan.parameters
    places = [f"{len(plan.edits)} sites"] if plan.edits else []
    places += [f"{len(plan.unfrozen)} parameters unfrozen"] if plan.unfrozen else []
    solved = _solved(plan, said)
    return f"On a toy {_title(family)}: {', '.join(places)}; {counts.training:,} numbers train, {counts.stored:,} are stored{solved}."


def _solved(plan: Plan, said: str) -> str:
    return f"; r = {plan.spec.arguments['r']}" if "auto" in said else ""


def _title(family: str) -> str:
    return {"bert": "BERT", "llama": "Llama", "mixtral": "Mixtral", "mamba": "Mamba"}.get(
        family, "DeepSeek V3"
    )


def _sites() -> Iterator[str]:
    yield "## Sites and their ports\n"
    yield "A site is a place in the model; a port is a value there, or a weight, that formulas read and, where it says so,"
    yield "assign. `...` stands for the axes before those that are named. Sizes are numbers that formulas may use.\n"
    for row in SITES.values():
        yield from _site(row)


def _site(row: SiteType) -> Iterator[str]:
    yield f"### `{row.name}`\n"
    yield f"{_sentence(row.doc)}\n"
    yield from ("| port | shape | what it is | assigned |", "|---|---|---|---|")
    for name, port in row.ports.items():
        grows = f", with rows in front ({port.rows})" if port.rows else ""
        assigned = f"yes{grows}" if port.assign else "no"
        yield f"| `{name}` | {_shape(port.shape)} | {port.role} | {assigned} |"
    folds = KINDS[row.name].folds
    way = f"Folds by: {folds.by}." if folds else "Nothing of it folds."
    papers = "" if row.counted else " What trains here is no part of the papers' counts."
    yield f"\nSizes: {', '.join(f'`{one}`' for one in row.dims)}. {way}{papers}\n"
    at = f'{{op: {row.name}, scope: "*"}}' if row.by_op else row.name
    said = delta(f"at: {at}", DELTAS.get(row.name, LORA))
    yield from ("```yaml", said, "```\n")
    yield f"{_found(row, said)}\n"


def _found(row: SiteType, said: str) -> str:
    family = next((one for one in FAMILIES if any(s.at == row.name for s in sites(one))), None)
    if family is None:
        parse_spec(said, "spec.yaml")
        return "No toy model of this page has one."
    first = next(one for one in sites(family) if one.at == row.name)
    ports = ", ".join(
        f"`{port}` {_shape(shape)}"
        for port, shape in port_shapes(first).items()
        if port not in first.absent
    )
    return f"{_planned(said, family)} The first is `{first.scope}`: {ports}."


def _shape(shape: Sequence[object]) -> str:
    return f"`[{', '.join(map(str, shape))}]`"


def _ops() -> Iterator[str]:
    yield "## Ops\n"
    bound = ", ".join(f"`{name}` {text(shape)}" for name, shape in SHAPES.items() if shape)
    yield f"Formulas have names, numbers, `+ - * / // @`, and calls of these ops. The examples bind {bound}; `heads` and `r`"
    yield "are numbers. How an op acts on an affine map of x is what folding asks: an opaque one stops it.\n"
    yield from (
        "| op | what it is | acts on affine maps | example | shape | value |",
        "|---|---|---|---|---|---|",
    )
    for row in OPS.values():
        yield _op(row)
    yield ""


def _op(row: Op) -> str:
    said = row.sample or f"{row.name}(x)"
    expression = ex.parse(said)
    value = evaluate(expression, dict(_tensors()), {"heads": 1, "r": 1})
    cells = (
        f"`{row.name}`",
        row.doc.replace("*", "\\*"),
        row.affine,
        f"`{said}`",
        text(infer(expression, SHAPES)),
    )
    shown = "up to signs, which are the machine's" if row.name.startswith("svd") else _value(value)
    return f"| {' | '.join(cells)} | {shown} |"


def _tensors() -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in SHAPES.items():
        if shape == NUMBER:
            continue
        sizes = [SIZES[str(dim)] for dim in shape]
        count = torch.Size(sizes).numel()
        if name == "ids":
            yield name, torch.tensor([[2, 0]])
        elif name == "size":
            yield name, torch.tensor([1.0, 4.0])
        else:
            steps = torch.arange(count, dtype=torch.float64) - (1 if name in "xh" else -1)
            yield name, steps.reshape(sizes)


def _value(value: torch.Tensor) -> str:
    rounded = (value.double() * 1000).round() / 1000 + 0.0
    return str(rounded.tolist()).replace(".0,", ",").replace(".0]", "]")


def _inits() -> Iterator[str]:
    yield "## Initialisers\n"
    yield "Besides these, a formula of the site's own weights (`norm(W)`, `svd_in(W, r)`), or of what its ports hold while"
    yield "the backbone reads `words` (`k`). Drawn ones follow torch's seed; the values are those of seed 0.\n"
    yield from (
        "| init | what it is | example, of shape [3, 2] | value |",
        "|---|---|---|---|",
    )
    for name, row in INITS.items():
        args: tuple[float, ...] = {"constant": (5.0,), "uniform": (0.5,), "linear": (4,)}.get(
            name, ()
        )
        said = f"{name}({', '.join(f'{one:g}' for one in args)})" if args else name
        yield f"| `{name}` | {row.doc} | `{said}` | {_value(_started(name, args))} |"
    yield ""


def _started(name: str, args: tuple[float, ...]) -> torch.Tensor:
    torch.manual_seed(0)
    given = Parameter("P", "P", (3, 2), name, args, True)
    return initial(given, torch.device("cpu"), torch.float64)
