"""The catalogue lists what recipes can name, with what their docstrings say."""

from __future__ import annotations

import inspect
import re

import pytest

from jaxrl_llm import catalogue
from jaxrl_llm.training.recipes import credit_terms, loss_terms, reward_terms
from jaxrl_llm.training.wiring import signature

METHODS = catalogue.methods()
IDS = [f"{entry['room']}-{entry['name']}" for entry in METHODS]


def test_every_room_has_methods_and_no_name_stands_for_two():
    assert {entry["room"] for entry in METHODS} == set(catalogue.ROOMS)
    assert len({entry["name"] for entry in METHODS}) == len(METHODS)
    assert {"exact_answer", "group_normalized", "clipped_surrogate", "divergence"} <= {e["name"] for e in METHODS}


def test_helpers_are_no_methods():
    assert not {"group_mean", "group_sum", "aggregate", "row_weight", "checked_host_reward", "extract_answer"} & {
        entry["name"] for entry in METHODS
    }


@pytest.mark.parametrize("entry", METHODS, ids=IDS)
def test_every_method_says_what_it_is(entry):
    assert entry["summary"].endswith((".", "?")), entry["summary"]
    assert entry["certainty"] in ("verified", "recalled", "reconstructed", "")
    assert entry["where"] in ("program", "host")
    for number in entry["arxiv"]:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", number)
        assert number in entry["reference"]


@pytest.mark.parametrize("entry", [e for e in METHODS if e["arxiv"]], ids=lambda entry: entry["name"])
def test_every_published_method_states_its_certainty(entry):
    assert entry["certainty"]


@pytest.mark.parametrize("entry", METHODS, ids=IDS)
def test_every_method_can_be_named_in_a_recipe(entry):
    build = {"reward": reward_terms, "loss": loss_terms}.get(entry["room"])
    found = catalogue.described(entry["name"])
    function = getattr(catalogue.ROOMS[entry["room"]], entry["name"])
    required = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty
    ]
    assert set(required) <= found["hyper_parameters"].keys()
    if required:
        with pytest.raises(ValueError, match=f"{entry['name']} needs {required[0]}"):
            build([entry["name"]]) if build else credit_terms([{"advantages": entry["name"]}])
        return
    (term,) = build([entry["name"]]) if build else credit_terms([{"advantages": entry["name"]}])
    assert term.name == entry["name"]
    assert signature(term.function).required[: len(entry["needs"])] == tuple(entry["needs"]) or not entry["needs"]


def test_one_method_is_described_whole():
    entry = catalogue.described("clipped_surrogate")
    assert entry["room"] == "loss"
    assert entry["hyper_parameters"]["clip_high"] == 0.2
    assert entry["hyper_parameters"]["dual_clip"] is None
    assert entry["needs"] == ["logprobs", "old_logprobs", "advantages", "mask"]
    assert "1707.06347" in entry["arxiv"]
    assert "dual_clip: largest ratio" in entry["doc"]
    assert catalogue.described("exact_match")["where"] == "host"
    assert catalogue.described("exact_answer")["where"] == "program"


def test_a_reference_that_goes_over_lines_is_read_whole():
    assert {"1707.06347", "2512.02556"} <= set(catalogue.described("clipped_surrogate")["arxiv"])


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"there is no method 'clip_surrogate'; did you mean 'clipped_surrogate'\?"):
        catalogue.described("clip_surrogate")
