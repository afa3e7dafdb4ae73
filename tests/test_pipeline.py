"""The pipeline: what surrounds every pass, and the verifier that looks at what it left."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from conftest import batch, logits, tiny
from toys import program

import peftc
from passes import Normalize
from peftc.driver import Trace
from peftc.graph.program import Program, aten
from peftc.merging import merge
from peftc.rewrite.pipeline import PassError, Pipeline
from peftc.rewrite.verify import check


def test_the_verifier_sees_what_is_wrong() -> None:
    one = program()
    assert any("assertion left" in problem for problem in check(one))
    Normalize().run(one)
    assert check(one) == ()
    untagged(one)
    assert check(one) == ("inserted without a tag: stray",)


def untagged(one: Program) -> None:
    """A node of which nothing says where it comes from."""
    first = next(iter(one.graph.nodes))
    with one.graph.inserting_after(first):
        one.graph.create_node("call_function", aten.neg.default, (first,), name="stray")


@dataclass(frozen=True)
class Careless:
    """A pass that tags nothing."""

    name: str = "careless"

    def run(self, one: Program) -> int:
        untagged(one)
        return 1


def test_a_pass_that_leaves_something_wrong_is_named() -> None:
    message = "after pass 'careless': inserted without a tag: stray"
    with pytest.raises(PassError, match=message):
        Pipeline(check).run((Normalize(), Careless()), program())


def test_every_pass_is_timed_and_seen() -> None:
    seen: list[str] = []
    trace = Trace(after=lambda name, _: seen.append(name))
    model = peftc.compile(tiny("bert"), "mam", trace=trace)
    logits(model, batch(model))
    merge(model, trace=trace)
    assert seen[:3] == ["normalize", "normalize", "insert"]  # for planning, then for training
    assert {"fold_constants", "fold_affine"} <= set(seen)
    assert len(trace.results) == len(seen)
    assert all(one.seconds >= 0 for one in trace.results)
