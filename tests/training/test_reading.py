"""Rewards inside the program and on the host, and their sum."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import TrainState
from jaxrl_llm.rewards import RewardError
from jaxrl_llm.training import Placement, Resources, Reward, Rollout, make_train_step
from jaxrl_llm.training.fill import reward_parts
from jaxrl_llm.training.reading import Context
from jaxrl_llm.training.segments import compiled, run

ITEMS = [{"body": f"prompt {i}", "answer": f"answer {i}", "level": i} for i in range(4)]


def decode(ids):
    return " ".join(map(str, ids))


def short(length):
    return (length <= 3).astype(jnp.int32)


@pytest.fixture
def rewarded(bigram):
    """(rewards, rows) -> rows with their rewards."""

    def make(rewards, rows):
        step = make_train_step(
            bigram,
            optax.sgd(0.1),
            source=Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0),
            rewards=rewards,
            credit=[("advantages", advantages.group_normalized)],
            losses=[losses.clipped_surrogate],
            resources=Resources(decode=decode),
        )
        state = TrainState({}, {}, jax.random.key(0), jnp.int32(0))
        segments = compiled(reward_parts(step.composition, "rows"), Placement(), None)
        return run(segments, state, {"rows": rows}, Context(ITEMS, decode))["rows"]

    return make


@pytest.fixture
def on_host(rewarded):
    """(a function on the host, rows) -> rows that know its rewards beside those of one inside the program."""
    return lambda function, rows: rewarded([Reward(short, 1.0, "short"), Reward(function, 0.5, "judge")], rows)


def test_host_rewards_fill_their_own_columns_with_what_they_name(rows, on_host):
    seen = {}

    def judge(items, completions, answers, prompts):
        seen.update(items=items, completions=completions, answers=answers, prompts=prompts)
        return np.arange(len(completions))

    # Groups are ids: rows need not stand in the order of their prompts.
    shuffled = replace(rows, group=jnp.asarray([3, 3, 1, 1, 0, 0, 2, 2]))
    components = on_host(judge, shuffled)["reward_components"]
    np.testing.assert_array_equal(components[:, 0], np.asarray(rows.length) <= 3)
    np.testing.assert_array_equal(components[:, 1], np.arange(8))
    assert seen["prompts"] == [f"prompt {i}" for i in (3, 3, 1, 1, 0, 0, 2, 2)]
    assert [item["level"] for item in seen["items"]] == [3, 3, 1, 1, 0, 0, 2, 2]
    assert seen["answers"][0] == "answer 3"
    # Completions end where they end, whatever the width of the batch.
    assert [len(text.split()) for text in seen["completions"]] == rows.length.tolist()
    assert seen["completions"][1] == decode(rows.tokens[1, :2].tolist())


def at_row(value):
    return lambda completions: [value if row == 5 else 0.0 for row in range(len(completions))]


def raising(completions):
    return [1 / (text.count(" ") - 5) for text in completions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raising, r"'judge' raised ZeroDivisionError: .* at row 0 \(completion '.*'\); catch the case in the function"),
        (at_row(float("inf")), r"'judge' returned inf at row 5 .* must be finite .* return a number such as 0\.0"),
        (at_row(float("-inf")), r"'judge' returned -inf at row 5"),
        (lambda completions: [0.0] * 7, "'judge' returned 7 values for 8 rows; it must return .* 8 floats"),
        (lambda completions: 0.5, "'judge' returned a float for 8 rows"),
    ],
)
def test_a_host_reward_that_fails_is_named_with_its_row_and_a_remedy(rows, on_host, function, message):
    with pytest.raises(RewardError, match=message):
        on_host(function, rows)


@pytest.mark.parametrize("absent", [None, float("nan")])
def test_what_does_not_apply_is_left_out_of_the_sum_of_its_row(rows, on_host, rewarded, absent):
    some = on_host(at_row(absent), rows)
    np.testing.assert_array_equal(np.isnan(some["reward_components"]), [[False, row == 5] for row in range(8)])
    np.testing.assert_array_equal(some["rewards"], np.asarray(rows.length) <= 3)
    np.testing.assert_array_equal(some.weight, np.ones(8))
    np.testing.assert_array_equal(some["unrated"], np.zeros(8))
    none = rewarded([Reward(at_row(absent), 0.5, "judge")], rows)
    np.testing.assert_array_equal(none.weight, [row != 5 for row in range(8)])
    np.testing.assert_array_equal(none["unrated"], [row == 5 for row in range(8)])
    np.testing.assert_array_equal(none["rewards"], np.zeros(8))


def test_rows_of_no_weight_are_handed_to_nobody(rows, on_host):
    counts = []

    def judge(completions):
        counts.append(len(completions))
        return [1.0] * len(completions)

    weight = jnp.asarray([1.0, 0, 1, 1, 0, 1, 1, 1])
    scored = on_host(judge, replace(rows, weight=weight))
    assert counts == [6]
    np.testing.assert_array_equal(scored.weight, weight)


def test_rewards_are_weighted_and_the_first_one_is_the_verifier(rows, rewarded):
    columns = [lambda group: jnp.where(group < 2, 1.0, 0.9), lambda group: jnp.where(group < 2, 0.3, 1.0)]
    columns.append(lambda group: 7.0 + 0 * group)
    terms = [Reward(column, weight, str(weight)) for column, weight in zip(columns, (1.0, 0.1, 0.0), strict=True)]
    scored = rewarded(terms, rows)
    np.testing.assert_allclose(scored["reward_components"], [[1.0, 0.3, 7.0]] * 4 + [[0.9, 1.0, 7.0]] * 4, rtol=1e-6)
    np.testing.assert_allclose(scored["rewards"], [1.03] * 4 + [1.0] * 4, rtol=1e-6)
    np.testing.assert_array_equal(scored["correct"], [1] * 4 + [0] * 4)
