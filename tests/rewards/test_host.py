"""A user's reward that misbehaves is named, with the row, the value and the remedy."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import RewardError, checked_host_reward, exact_match

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


def test_a_library_reward():
    assert checked_host_reward(exact_match, DATA).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, float("nan"), 0.0], r"'my_reward' returned nan at row 1 .*<a>2</a>.*finite"),
        ([1.0, 0.0, float("inf")], r"returned inf at row 2 .*bad"),
        ([1e300, 0.0, 0.0], r"returned 1e\+300 at row 0"),
        ([1.0, None, 0.0], r"returned None at row 1"),
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
