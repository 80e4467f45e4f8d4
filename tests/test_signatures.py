"""Names say what a function needs; `call` obeys them."""

from __future__ import annotations

from functools import partial

import pytest

from jaxrl_llm.experience import Method
from jaxrl_llm.losses import clipped_surrogate
from jaxrl_llm.signatures import call, missing, names, signature


def scaled(rewards, weight=None, *, by=2.0):
    return rewards * by if weight is None else rewards * by * weight


COUNTING = Method(lambda: 0, lambda memory, rewards, step=None: (rewards + memory + (step or 0), memory + 1))


def test_signature_separates_data_optional_data_and_hyper_parameters():
    read = signature(scaled)
    assert (read.required, read.optional, read.hyper) == (("rewards",), ("weight",), ("by",))
    assert names(scaled) == {"rewards", "weight"}


def test_bound_hyper_parameters_stay_hyper_parameters():
    assert signature(partial(clipped_surrogate, clip_high=0.3)) == signature(clipped_surrogate)


def test_signature_of_a_method_is_that_of_its_update_without_memory():
    assert signature(COUNTING).required == ("rewards",)
    assert signature(COUNTING).optional == ("step",)


def test_variable_arguments_are_no_names():
    assert names(lambda rewards, *rest, **others: rewards) == {"rewards"}


def test_call_passes_what_is_named_and_nothing_else():
    assert call(scaled, {"rewards": 3.0, "group": 1}) == 6.0
    assert call(partial(scaled, by=10.0), {"rewards": 3.0}) == 30.0


@pytest.mark.parametrize(("provided", "expected"), [({"weight": 0.5}, 3.0), ({"weight": None}, 6.0), ({}, 6.0)])
def test_optional_data_is_passed_where_something_provides_it(provided, expected):
    assert call(scaled, {"rewards": 3.0} | provided) == expected


def test_call_gives_a_method_its_memory():
    assert call(COUNTING, {"rewards": 1}, 5) == (6, 6)
    assert call(COUNTING, {"rewards": 1, "step": 10}, 5) == (16, 6)


def test_missing_names_are_the_required_ones():
    assert missing(scaled, frozenset({"weight"})) == ("rewards",)
    assert missing(scaled, frozenset({"rewards"})) == ()
