"""The sweep's own parts: what eager code is seen to do, how classes are made small, and the page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import FAMILIES, batch, tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import sweep
from cells import NO_PLACE, REFUSED, cell
from nature import Nature
from registry import Shrink, registered, small


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_eager_code_does(family: str) -> None:
    """The oracle of places, on families whose architecture is known."""
    model = tiny(family)
    found = Nature.of(model, batch(model))
    state_space = family == "mamba"
    assert bool(found.attention) is not state_space
    assert bool(found.feed_forward) is not state_space
    assert bool(found.table) is (model.main_input_name == "input_ids" or family == "whisper")


def test_a_place_that_is_missed_is_no_true_answer() -> None:
    """Where eager code has what a spec asks for, no place is a refusal."""
    model = tiny("mamba")
    inputs = batch(model)
    nature = Nature.of(model, inputs)
    assert cell("lora", model, inputs, nature).outcome == NO_PLACE
    seen = Nature(attention="backbone.layers.0.mixer")
    said = cell("lora", model, inputs, seen)
    assert said.outcome == REFUSED and "eager code has backbone.layers.0.mixer" in said.reason


def test_sizes_alone_change() -> None:
    """Of a hybrid as many layers stay as it has kinds of them; what is no size is as it was."""
    one = next(one for one in registered() if one.name == "Qwen3NextForCausalLM")
    config = one.cls.config_class()
    made = small(config, Shrink(16, 2))
    assert set(made.layer_types) == set(config.layer_types)
    assert made.num_hidden_layers == len(made.layer_types) < config.num_hidden_layers
    assert made.hidden_size == config.hidden_size // 16
    assert (made.hidden_act, made.rms_norm_eps) == (config.hidden_act, config.rms_norm_eps)


def test_the_page_is_of_the_results() -> None:
    import json

    known = [json.loads(line) for line in sweep.RESULTS.read_text().splitlines()]
    assert sweep.PAGE.read_text() == sweep.page(known)
    assert len({one["class"] for one in known}) == len(known) <= len(registered())
