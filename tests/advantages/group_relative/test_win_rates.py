"""Win rates against the other answers of a prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import leave_one_out, score_win_rate, win_rate

CYCLE = jnp.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])
LADDER = jnp.array([[0.5, 0.8, 0.9], [0.2, 0.5, 0.6], [0.1, 0.4, 0.5]])
SAMPLE, GROUP, WEIGHT = jnp.arange(3), jnp.zeros(3, jnp.int32), jnp.ones(3)


def test_worked_example():
    np.testing.assert_allclose(win_rate(CYCLE, SAMPLE, GROUP, WEIGHT), [0.5, 0.5, 0.5])
    np.testing.assert_allclose(win_rate(LADDER, SAMPLE, GROUP, WEIGHT), [0.85, 0.4, 0.25], rtol=1e-6)


def test_columns_are_sample_numbers_wherever_the_rows_stand():
    preferences = jnp.concatenate([CYCLE, LADDER])
    sample, group = jnp.array([0, 1, 2, 0, 1, 2]), jnp.array([5, 5, 5, 1, 1, 1])
    order = jnp.array([4, 0, 5, 2, 3, 1])
    rates = win_rate(preferences[order], sample[order], group[order], jnp.ones(6))
    np.testing.assert_allclose(rates, np.array([0.5, 0.5, 0.5, 0.85, 0.4, 0.25])[order], rtol=1e-6)


def test_absent_rivals_do_not_count_and_a_lone_answer_draws():
    rates = win_rate(LADDER.at[:, 1].set(jnp.nan), SAMPLE, GROUP, jnp.array([1.0, 0, 1]))
    np.testing.assert_allclose(rates, [0.9, 0, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(win_rate(LADDER, SAMPLE, jnp.arange(3), WEIGHT), 0.5)


def test_a_score_counts_by_its_order():
    scores = jnp.array([0.1, 5.0, 0.1, -3])
    group, weight = jnp.zeros(4, jnp.int32), jnp.ones(4)
    rates = score_win_rate(scores, group, weight)
    np.testing.assert_allclose(rates, [0.5, 1, 0.5, 0], atol=1e-7)
    np.testing.assert_allclose(score_win_rate(jnp.arctan(scores) * 9 + 2, group, weight), rates)
    soft = score_win_rate(scores, group, weight, temperature=2.0)
    expected = [
        np.mean([1 / (1 + np.exp(-(a - b) / 2)) for j, b in enumerate(scores) if j != i]) for i, a in enumerate(scores)
    ]
    np.testing.assert_allclose(soft, expected, rtol=1e-5)


def test_on_a_cycle_self_play_stays_mixed_where_a_fitted_score_would_not():
    # Three answers that beat each other in a circle; on average answer 0 wins most.
    beats = jnp.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
    samples = 64
    group, weight = jnp.zeros(samples, jnp.int32), jnp.ones(samples)

    @jax.jit
    def average_policy(fitted):
        def step(scores, key):
            policy = jax.nn.softmax(scores)
            answer = jax.random.categorical(key, scores, shape=(samples,))
            played = win_rate(beats[answer][:, answer], jnp.arange(samples), group, weight)
            advantage = leave_one_out(jnp.where(fitted, beats.mean(1)[answer], played), group, weight)
            gradient = (advantage[:, None] * (jax.nn.one_hot(answer, 3) - policy)).mean(0)
            return scores + 0.3 * gradient, policy

        return jax.lax.scan(step, jnp.zeros(3), jax.random.split(jax.random.key(0), 4000))[1][2000:].mean(0)

    assert float(average_policy(True)[0]) > 0.9
    assert float(average_policy(False).max()) < 0.6


def test_any_group_baseline_may_follow():
    assert float(jnp.abs(leave_one_out(win_rate(CYCLE, SAMPLE, GROUP, WEIGHT), GROUP, WEIGHT)).max()) == 0


def test_a_negative_temperature_is_named():
    with pytest.raises(ValueError, match=r"temperature is -1.0"):
        score_win_rate(jnp.zeros(3), GROUP, WEIGHT, temperature=-1.0)
