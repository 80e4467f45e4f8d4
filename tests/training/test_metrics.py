"""What a batch says about itself: over which rows and tokens a number is a mean."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxrl_llm.experience import Source
from jaxrl_llm.training.metrics import constant_group_share, experience_metrics, reward_metrics, source_metrics


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
    scored = rows.filled(rewards=rewards, correct=rewards, weight=kept, advantages=rows.mask * kept[:, None])
    metrics = experience_metrics(scored, rows.weight)
    assert metrics["reward"] == metrics["correct_share"] == pytest.approx(5 / 8)
    assert metrics["constant_group_share"] == pytest.approx(3 / 4)
    assert metrics["kept_share"] == pytest.approx(1 / 4)
    assert metrics["completion_tokens"] == pytest.approx(31 / 8)
    assert metrics["truncated_share"] == pytest.approx(2 / 8)
    assert metrics["entropy_per_token"] == pytest.approx(2.7)
    assert metrics["advantage_abs_per_token"] == pytest.approx(8 / 31)
    assert "kl_reference_per_token" not in metrics


def test_rewards_are_seen_apart(rows):
    nan = jnp.nan
    components = jnp.asarray([[1.0, 2, nan, 4], [nan] * 4]).T
    weight = jnp.asarray([1.0, 1.0, 1.0, 0.0])
    found = {name: float(value) for name, value in reward_metrics(components, weight, ["a", "b"]).items()}
    assert found == pytest.approx(
        {"reward/a": 1.5, "reward/a_std": 0.5, "reward/a_applies": 2 / 3}
        | {f"reward/b{x}": 0 for x in ("", "_std", "_applies")}
    )
    rewards = jnp.asarray([1.0, 1, 0, 1, 0, 0, 1, 1])
    scored = rows.filled(rewards=rewards, correct=rewards, reward_components=rewards[:, None])
    metrics = experience_metrics(scored, rows.weight, ["exact"])
    assert metrics["reward/exact"] == metrics["reward"]
    assert metrics["reward/exact_std"] == metrics["reward_std"] == pytest.approx(rewards.std())


def test_rows_without_a_reward_count_in_the_shares_alone(rows):
    """The first two of eight rows have no reward, and so no weight after the sum of rewards."""
    unrated = jnp.zeros(8).at[:2].set(1)
    rewards = jnp.where(unrated > 0, jnp.nan, 1.0)
    scored = rows.replace(weight=1 - unrated).filled(
        rewards=jnp.nan_to_num(rewards), correct=1 - unrated, reward_components=rewards[:, None], unrated=unrated
    )
    metrics = experience_metrics(scored, scored.weight, ["exact"])
    assert metrics["reward/exact_applies"] == metrics["kept_share"] == 0.75
    assert metrics["reward"] == metrics["reward/exact"] == 1


def test_sources_are_seen_apart(rows):
    rewards = jnp.asarray([1.0, 1, 0, 1, 0, 0, 1, 1])
    scored = rows.filled(rewards=rewards, correct=rewards * 0, source_id=jnp.asarray([0, 0, 0, 0, 1, 1, -1, 1]))
    found = source_metrics(scored, jnp.ones(8).at[5].set(0), ["a", "b", "c"])
    numbers = {name: [float(found[f"source/{one}/{name}"]) for one in "abc"] for name in ("share", "reward")}
    assert numbers["share"] == pytest.approx([4 / 7, 2 / 7, 0])
    assert numbers["reward"] == pytest.approx([3 / 4, 1 / 2, 0])
    assert found["source/a/completion_tokens"] == pytest.approx(float(rows.length[:4].mean()))
    assert found["source/a/correct_share"] == 0


def test_what_a_tool_answers_is_no_token_of_the_policy(rows):
    source = jnp.where(jnp.arange(rows.tokens.shape[1]) == 1, Source.OBSERVATION, rows.source)
    talked = experience_metrics(rows.replace(source=source), rows.weight)
    assert talked["completion_tokens"] == pytest.approx(31 / 8 - float((rows.length > 1).mean()))


def test_the_drift_from_the_reference_is_a_mean_over_tokens(rows):
    reference = jnp.where(rows.mask > 0, -3.0, 9.0)
    scored = rows.filled(rewards=rows.weight, correct=rows.weight, reference_logprobs=reference)
    metrics = experience_metrics(scored, rows.weight)
    assert metrics["kl_reference_per_token"] == pytest.approx(0.3, rel=1e-5)
    assert "advantage_abs_per_token" not in metrics


def test_rows_without_rewards_say_nothing_of_them(rows):
    metrics = experience_metrics(rows, rows.weight)
    assert not {"reward", "correct_share", "constant_group_share"} & metrics.keys()
    assert metrics["completion_tokens"] == pytest.approx(31 / 8)
