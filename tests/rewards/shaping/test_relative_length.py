"""Lengths beside those of the other samples: worked examples, and where there is nothing to compare."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import relative_length_rewards

CORRECT, LENGTH = jnp.array([1.0, 1, 0, 0]), jnp.array([10, 30, 10, 50])
GROUP, ONES, NOTHING = jnp.zeros(4, int), jnp.ones(4), jnp.zeros(4)


def made(rewards=NOTHING, correct=CORRECT, length=LENGTH, group=GROUP, weight=ONES, **hyper):
    return relative_length_rewards(rewards, correct, length, group, weight, **hyper)


def test_worked_examples():
    np.testing.assert_allclose(made(), [0.5, 0, 0, -0.5], atol=1e-7)
    np.testing.assert_allclose(made(short_gain=0.5), [0.25, 0, 0, -0.5], atol=1e-7)
    np.testing.assert_allclose(made(CORRECT, coefficient=0.2), [1.1, 1, 0, -0.1], atol=1e-7)


def test_a_long_right_answer_can_lose():
    np.testing.assert_allclose(made(correct=ONES), [0.5, 0, 0.5, -0.5], atol=1e-7)


def test_equal_lengths_lone_samples_and_no_coefficient_leave_rewards_alone():
    for changed in ({"length": jnp.full(4, 7)}, {"group": jnp.arange(4)}, {"coefficient": 0.0}):
        np.testing.assert_array_equal(made(CORRECT, **changed), CORRECT)


def test_lengths_are_compared_within_the_group_and_up_to_a_constant():
    lengths, groups = jnp.concatenate([LENGTH, 100 + LENGTH]), jnp.array([0] * 4 + [1] * 4)
    both = relative_length_rewards(jnp.zeros(8), jnp.tile(CORRECT, 2), lengths, groups, jnp.ones(8))
    np.testing.assert_allclose(both, jnp.tile(made(), 2), atol=1e-7)


def test_absent_rows_do_not_count():
    longer = made(length=LENGTH.at[3].set(900), weight=ONES.at[3].set(0))
    np.testing.assert_allclose(longer, [0.5, -0.5, 0, 0], atol=1e-7)
    np.testing.assert_array_equal(made(weight=NOTHING), 0)


@pytest.mark.parametrize("name", ["coefficient", "short_gain"])
def test_bad_settings_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} is -1\.0.*at least 0"):
        made(**{name: -1.0})
