"""ProGRPO: advantages corrected by confidence."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import confidence_shaped, group_normalized, low_probability_confidence

DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}
REWARDS, GROUP, WEIGHT = jnp.array([1.0, 0, 0, 1]), jnp.zeros(4, jnp.int32), jnp.ones(4)
ANSWERS = jnp.log(jnp.array([[0.9], [0.4], [0.3], [0.2]]))
PROMPTS = jnp.log(jnp.full((4, 2), 0.5))
MASK, PROMPT_MASK = jnp.ones((4, 1)), jnp.ones((4, 2))


def shaped(rewards=REWARDS, group=GROUP, **hyper):
    advantages = group_normalized(rewards, group, WEIGHT)[:, None]
    return confidence_shaped(advantages, rewards, ANSWERS, PROMPTS, PROMPT_MASK, MASK, group, WEIGHT, **hyper)[:, 0]


def test_worked_example():
    np.testing.assert_allclose(shaped(), [0.746024, -0.836024, -0.806024, 0.956024], **DIGITS)
    confidence = low_probability_confidence(jnp.array([[-0.1, -2, -0.3, -1.5, -0.2]]), jnp.ones((1, 5)))
    np.testing.assert_allclose(confidence, [0.135335], **DIGITS)


def test_the_confidence_is_read_from_the_least_probable_tokens():
    logprobs = jnp.array([[-3.0, -0.1, -2.0, -0.2, -9.0], [-0.5, -9, -9, -9, -9], [-9, -9, -9, -9, -9]])
    mask = jnp.array([[1.0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    half = low_probability_confidence(logprobs, mask, share=0.5)
    np.testing.assert_allclose(half, np.exp([-2.5, -0.5, 0]), rtol=1e-6)
    # 0.1 * 30 is 3 tokens, not 4, although float32 has it above 3.
    falling = -jnp.arange(30.0)[None]
    np.testing.assert_allclose(low_probability_confidence(falling, jnp.ones((1, 30)), share=0.1), np.exp([-28.0]))


def test_of_two_correct_answers_the_less_confident_gains():
    advantages = shaped()
    assert advantages[3] > advantages[0]


def test_groups_without_a_reward_are_left_alone():
    two = jnp.array([0, 0, 1, 1])
    advantages = shaped(jnp.array([0.0, 0, 1, 1]), two)
    np.testing.assert_array_equal(advantages[:2], 0)
    np.testing.assert_allclose(advantages[2:], 0.3 * np.array([0.5 - 0.3, 0.5 - 0.2]), rtol=1e-5)


def test_alpha_zero_changes_nothing():
    np.testing.assert_array_equal(shaped(alpha=0.0), group_normalized(REWARDS, GROUP, WEIGHT))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"alpha is -0\.1"):
        shaped(alpha=-0.1)
    with pytest.raises(ValueError, match=r"share is 0\.0"):
        shaped(share=0.0)
