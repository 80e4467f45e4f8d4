"""What a batch says about itself: over which rows and tokens a number is a mean."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxrl_llm.training.metrics import constant_group_share, experience_metrics


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
