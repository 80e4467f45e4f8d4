"""Rewards inside the program and on the host, their sum, and what a batch says about itself."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import RewardError
from jaxrl_llm.training import RewardTerm
from jaxrl_llm.training.metrics import constant_group_share, experience_metrics
from jaxrl_llm.training.score import host_components, traceable_components, with_rewards

ITEMS = [{"body": f"prompt {i}", "answer": f"answer {i}", "level": i} for i in range(4)]


def decode(ids):
    return " ".join(map(str, ids))


def short(length):
    return (length <= 3).astype(jnp.int32)


def on_host(function, rows):
    terms = [RewardTerm(short, 1.0, "short"), RewardTerm(function, 0.5, "judge")]
    scored = replace(rows, reward_components=traceable_components(terms, rows))
    return host_components(terms, scored, ITEMS, decode)


def test_host_rewards_fill_their_own_columns_with_what_they_name(rows):
    seen = {}

    def judge(items, completions, answers, prompts):
        seen.update(items=items, completions=completions, answers=answers, prompts=prompts)
        return np.arange(len(completions))

    # Groups are ids: rows need not stand in the order of their prompts.
    shuffled = replace(rows, group=jnp.asarray([3, 3, 1, 1, 0, 0, 2, 2]))
    components = on_host(judge, shuffled)
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
        (at_row(float("nan")), r"'judge' returned nan at row 5 .* must be finite .* return a number such as 0\.0"),
        (at_row(float("-inf")), r"'judge' returned -inf at row 5"),
        (at_row(None), "'judge' returned None at row 5"),
        (lambda completions: [0.0] * 7, "'judge' returned 7 values for 8 rows; it must return .* 8 floats"),
        (lambda completions: 0.5, "'judge' returned a float for 8 rows"),
    ],
)
def test_a_host_reward_that_fails_is_named_with_its_row_and_a_remedy(rows, function, message):
    with pytest.raises(RewardError, match=message):
        on_host(function, rows)


def test_rewards_are_weighted_and_the_first_one_is_the_verifier(rows):
    components = jnp.asarray([[1.0, 0.3, 7.0]] * 4 + [[0.9, 1.0, 7.0]] * 4)
    terms = [RewardTerm(short, weight, str(weight)) for weight in (1.0, 0.1, 0.0)]
    scored = with_rewards(replace(rows, reward_components=components), terms)
    np.testing.assert_allclose(scored.rewards, [1.03] * 4 + [1.0] * 4, rtol=1e-6)
    np.testing.assert_array_equal(scored.correct, [1] * 4 + [0] * 4)


def test_constant_groups_are_counted_among_those_that_are_there():
    group = jnp.asarray([0, 0, 1, 1, 5, 5])
    rewards = jnp.asarray([1.0, 1.0, 0.0, 1.0, 0.5, 0.5])
    assert constant_group_share(rewards, group, jnp.ones(6)) == pytest.approx(2 / 3)
    assert constant_group_share(rewards, group, jnp.asarray([0, 0, 1, 1, 1, 1.0])) == pytest.approx(1 / 2)
    # A group of which one row is left is constant.
    assert constant_group_share(rewards, group, jnp.asarray([0, 0, 1, 0, 0, 0.0])) == 1
    assert constant_group_share(rewards, group, jnp.zeros(6)) == 0


def test_metrics_count_rows_that_credit_left_out(rows):
    rewards = jnp.asarray([1.0, 1, 0, 1, 0, 0, 1, 1])
    kept = jnp.asarray([0.0, 0, 1, 1, 0, 0, 0, 0])
    scored = replace(rows, rewards=rewards, correct=rewards, weight=kept, advantages=rows.mask * kept[:, None])
    metrics = experience_metrics(scored, rows.weight)
    assert metrics["reward"] == metrics["correct_share"] == pytest.approx(5 / 8)
    assert metrics["constant_group_share"] == pytest.approx(3 / 4)
    assert metrics["kept_share"] == pytest.approx(1 / 4)
    assert metrics["completion_tokens"] == pytest.approx(31 / 8)
    assert metrics["truncated_share"] == pytest.approx(2 / 8)
    assert metrics["entropy_per_token"] == pytest.approx(2.7)
    assert metrics["advantage_abs_per_token"] == pytest.approx(8 / 31)
    assert "kl_reference_per_token" not in metrics


def test_the_drift_from_the_reference_is_a_mean_over_tokens(rows):
    reference = jnp.where(rows.mask > 0, -3.0, 9.0)
    scored = replace(rows, rewards=rows.weight, correct=rows.weight, reference_logprobs=reference)
    metrics = experience_metrics(scored, rows.weight)
    assert metrics["kl_reference_per_token"] == pytest.approx(0.3, rel=1e-5)
    assert "advantage_abs_per_token" not in metrics
