"""Names say what a function needs; `call` obeys them."""

from __future__ import annotations

from functools import partial

import pytest

from jaxrl_llm.experience import Method
from jaxrl_llm.losses import clipped_surrogate
from jaxrl_llm.signatures import (
    Signature,
    call,
    missing,
    name_of,
    names,
    on_host,
    per_row,
    reading,
    renamed,
    required,
    signature,
)


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


def test_what_a_step_computes_is_what_some_function_cannot_do_without():
    assert required([scaled, COUNTING, lambda mask, *, rate=0.1: mask]) == {"rewards", "mask"}
    assert required([]) == frozenset()


def test_a_function_may_take_whatever_there_is():
    def anything(completions, **known):
        return known

    assert signature(anything).anything
    assert not signature(scaled).anything
    assert names(anything) == {"completions"}


def test_messages_call_a_function_by_its_own_name():
    assert name_of(partial(partial(scaled, by=3.0), by=2.0)) == "scaled"
    assert name_of(Method(int, scaled)) == "scaled"

    class Judge:
        def __call__(self, completions):
            return completions

    assert name_of(Judge()) == "Judge"


async def asked(rewards):
    return rewards


@pytest.mark.parametrize(
    ("function", "host", "single"),
    [
        (scaled, False, False),
        (COUNTING, False, False),
        (lambda completions: 0, True, False),
        (lambda tokens, items: 0, True, False),
        (lambda rewards, answer=None: 0, True, True),
        (partial(lambda completion, *, url: 0, url=""), True, True),
        (partial(asked), True, False),
        (reading(lambda rewards: rewards), True, False),
    ],
)
def test_what_runs_on_the_host_names_text_waits_or_says_so(function, host, single):
    assert (on_host(function), per_row(function)) == (host, single)


def test_a_function_may_read_data_of_other_names():
    def gap(logprobs, reference_logprobs, weight=None, *, scale=1.0):
        return scale * (logprobs - reference_logprobs)

    other = renamed(partial(gap, scale=2.0), reference_logprobs="teacher_logprobs")
    assert signature(other) == Signature(("logprobs", "teacher_logprobs"), ("weight",), ("scale",), False)
    assert call(other, {"logprobs": 3.0, "teacher_logprobs": 1.0, "reference_logprobs": 9.0}) == 4.0
    assert name_of(other) == "gap"
    remembering = renamed(Method(lambda: 0, lambda memory, reward: (reward, memory + 1)), reward="correct_share")
    assert call(remembering, {"correct_share": 0.5}, 1) == (0.5, 2)
    with pytest.raises(ValueError, match="gap reads no 'reference_logprob'; it reads logprobs, reference_l"):
        renamed(gap, reference_logprob="teacher_logprobs")


def test_a_reading_stays_one_under_other_names():
    assert on_host(renamed(reading(lambda rewards: rewards), rewards="returns"))
    assert on_host(renamed(lambda texts: texts, texts="completions"))


def test_several_parameters_may_read_the_same_data_under_another_name():
    def ratio(yes, no, mask=None, *, by=1.0):
        return yes / no * by * (1 if mask is None else mask)

    doubled = renamed(ratio, yes="judged", no="judged")
    assert signature(doubled) == Signature(("judged",), ("mask",), ("by",))
    assert call(partial(doubled, by=3.0), {"judged": 5.0, "mask": 2.0, "yes": 7.0}) == 6.0
    assert signature(renamed(ratio, mask="yes")).required == ("yes", "no")  # one of the two has no default
    assert call(renamed(ratio, yes="no", no="yes"), {"yes": 2.0, "no": 8.0}) == 4.0
    with pytest.raises(ValueError, match="ratio has a hyper-parameter 'by'; its data needs another name"):
        renamed(ratio, yes="by")


def test_data_with_the_own_name_of_a_parameter_that_reads_other_data_is_left_out():
    def said(completions, **columns):
        return completions, columns

    given = {"completions": "own", "first_text": "other", "hint": "h"}
    assert renamed(said, completions="first_text")(**given) == ("other", {"hint": "h"})
    assert renamed(said, completions="first_text")(**dict(reversed(given.items()))) == ("other", {"hint": "h"})
