"""A user's reward that misbehaves is named, with the row, the value and the remedy."""

from __future__ import annotations

import asyncio
import functools
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import RewardError, checked_host_reward, exact_match
from jaxrl_llm.rewards.host import Reading, answered

DATA = {"completions": ["<a>1</a>", "<a>2</a>", "bad"], "answers": ["1", "1", "1"]}


def returning(value):
    def my_reward(completions, answers):
        return value

    return my_reward


@pytest.mark.parametrize(
    "value", [[1, 0, True], (1.0, 0.0, 1.0), np.array([1, 0, 1]), jnp.asarray([1.0, 0.0, 1.0]), [np.float64(1), 0, 1]]
)
def test_numbers_come_back_as_float32(value):
    rewards = checked_host_reward(returning(value), DATA)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [1, 0, 1]


@pytest.mark.parametrize("absent", [None, float("nan"), np.nan, np.float32("nan")])
def test_none_and_nan_say_that_it_does_not_apply(absent):
    rewards = checked_host_reward(returning([1.0, absent, 0.0]), DATA)
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, [1.0, np.nan, 0.0])


def test_a_function_of_one_row_is_called_for_each():
    def long(completion, answer, *, least=4):
        return None if completion == "bad" else float(len(completion) > least) if answer == "1" else 7.0

    one_row = {"completion": DATA["completions"], "answer": DATA["answers"]}
    np.testing.assert_array_equal(checked_host_reward(long, one_row, rows=3), [1.0, 1.0, np.nan])


def test_a_function_may_be_awaited():
    async def judged(completion):
        await asyncio.sleep(0)
        return len(completion)

    async def all_judged(completions):
        return [len(text) for text in completions]

    expected = [len(text) for text in DATA["completions"]]
    assert checked_host_reward(judged, {"completion": DATA["completions"]}, rows=3).tolist() == expected
    assert checked_host_reward(all_judged, {"completions": DATA["completions"]}).tolist() == expected


def read(function, data=DATA, rows=3, names=("confidence",), **calling):
    return answered(Reading(function, "read", **calling), data, rows=rows, names=names)


def test_a_reading_may_return_several_names():
    expected = {"low": [1.0, 2.0, 3.0], "high": [4.0, None, "x"]}
    data = {"completions": DATA["completions"]}
    for returned in (expected, (expected["low"], expected["high"])):
        assert read(lambda completions, r=returned: r, data, names=("low", "high")).values == expected

    def one(completion):
        return {"low": len(completion), "high": None}

    by_row = read(one, {"completion": DATA["completions"]}, names=("low", "high")).values
    assert by_row == {"low": [8.0, 8.0, 3.0], "high": [None] * 3}


def test_a_call_that_is_late_is_named_or_gets_the_value_on_failure():
    def slow(completion):
        time.sleep(0.5 if completion == "bad" else 0.0)
        return 1.0

    one_row = {"completion": DATA["completions"]}
    with pytest.raises(RewardError, match=r"'read' took longer than its deadline of 0.1 s at row 2 .*value_on_failure"):
        read(slow, one_row, deadline_s=0.1)
    found = read(slow, one_row, deadline_s=0.1, value_on_failure=-1.0)
    assert (found.values["confidence"], found.failures) == ([1.0, 1.0, -1.0], 1)


def test_a_row_that_fails_gets_the_value_on_failure_and_the_others_their_own():
    def lengths(completions, answers):
        return [int(text[3]) for text in completions]

    found = read(lengths, value_on_failure=0.5)
    assert (found.values["confidence"], found.failures) == ([1.0, 2.0, 0.5], 1)


def test_no_rows_ask_nobody():
    def never(completions):
        raise AssertionError

    assert read(never, {"completions": []}, rows=0).values == {"confidence": []}


def test_a_library_reward():
    assert checked_host_reward(exact_match, DATA).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, float("-inf"), 0.0], r"'my_reward' returned -inf at row 1 .*<a>2</a>.*finite"),
        ([1.0, 0.0, float("inf")], r"returned inf at row 2 .*bad"),
        ([1e300, 0.0, 0.0], r"returned 1e\+300 at row 0"),
        ([1.0, "1", 0.0], r"returned '1' at row 1"),
        ([[1.0], [0.0], [1.0]], r"returned \[1.0\] at row 0"),
        (np.ones((3, 1)), r"at row 0"),
        ([1.0, 0.0], r"returned 2 values for 3 rows"),
        (np.float32(1), r"returned a float32 for 3 rows"),
        (1.0, r"returned a float for 3 rows"),
        (None, r"returned a NoneType for 3 rows"),
        ("abc", r"returned a str for 3 rows"),
        ({"a": 1, "b": 2, "c": 3}, r"returned a dict for 3 rows"),
    ],
)
def test_values_that_are_no_rewards(value, message):
    with pytest.raises(RewardError, match=message):
        checked_host_reward(returning(value), DATA)


def test_an_exception_names_the_row_that_raised():
    def lengths(completions, answers, scale=1.0):
        return [scale * int(text[3]) for text in completions]

    with pytest.raises(RewardError, match=r"'lengths' raised IndexError.* at row 2 \(completion 'bad'\)") as caught:
        checked_host_reward(functools.partial(lengths, scale=2.0), DATA)
    assert isinstance(caught.value.__cause__, IndexError)
    assert isinstance(caught.value, ValueError)


def test_an_exception_of_the_whole_batch_says_so():
    def crowded(completions, answers):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="RuntimeError: too many on the batch as a whole"):
        checked_host_reward(crowded, DATA)


def test_a_name_and_a_number_of_rows_can_be_given():
    with pytest.raises(RewardError, match=r"'judge' returned 3 values for 4 rows"):
        checked_host_reward(lambda: [1, 2, 3], {}, rows=4, name="judge")


def test_an_interrupt_is_not_swallowed():
    def interrupted(completions, answers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked_host_reward(interrupted, DATA)
