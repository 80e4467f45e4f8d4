"""RL-PLUS and the rehearsal of DPH-RL: losses on tokens that the policy did not draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Source
from jaxrl_llm.losses import clipped_surrogate, divergence, external_surrogate, policy_gradient, rehearsal_divergence

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
REFERENCE = jnp.array([[-1.1, -0.6, -0.4], [-0.6, -1.2, 0], [-1.7, -0.3, -1.0], [-0.9, 0, 0]])
ADVANTAGES = jnp.broadcast_to(jnp.array([1.0, 1, -1, -1])[:, None], MASK.shape)
SAMPLED = jnp.where(MASK > 0, Source.SAMPLED, Source.PAD)
SOURCE = SAMPLED.at[1].set(jnp.where(MASK[1] > 0, Source.DEMONSTRATION, Source.PAD))
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def loss(logprobs, old=OLD, source=SOURCE, advantages=ADVANTAGES, **hyper):
    return external_surrogate(logprobs, old, advantages, source, MASK, **hyper)


def test_worked_example_of_rl_plus():
    hyper = {"aggregation": "token_sum_const", "max_completion_tokens": 3}
    value, gradient = jax.value_and_grad(lambda x: loss(x, **hyper).value)(LOGPROBS)
    np.testing.assert_allclose(value, -0.122193, **DIGITS)
    expected = [
        [-0.449953, -0.301612, -0.350424],
        [-0.148106, -0.313178, 0],
        [0.36839, 0.473023, 0.2596],
        [0.340067, 0, 0],
    ]
    np.testing.assert_allclose(gradient, jnp.array(expected), **DIGITS)


def test_without_demonstrations_it_is_the_plain_or_the_clipped_surrogate():
    plain = jax.grad(lambda x: loss(x, source=SAMPLED).value)(OLD)
    np.testing.assert_allclose(plain, jax.grad(lambda x: policy_gradient(x, ADVANTAGES, MASK).value)(OLD), rtol=1e-6)
    clipped = loss(LOGPROBS, source=SAMPLED, clip_low=0.2, clip_high=0.28)
    expected = clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.28)
    np.testing.assert_allclose(clipped.numerator, expected.numerator, rtol=1e-6)
    np.testing.assert_array_equal(clipped.metrics["clip_share"], expected.metrics["clip_share"])


def test_unlikely_tokens_of_a_demonstration_come_first_in_the_factor():
    everywhere = jnp.where(MASK > 0, Source.DEMONSTRATION, Source.PAD)
    shy = loss(LOGPROBS, source=everywhere).numerator
    alike = loss(LOGPROBS, source=everywhere, gamma=0.0).numerator
    assert shy != alike
    # Per unit of ratio, the pull is (1 - pi)^gamma: compare the two gradients token by token.
    pull = [jax.grad(lambda x, g=g: loss(x, source=everywhere, gamma=g).value)(LOGPROBS) for g in (0.5, 0.0)]
    share = np.asarray(pull[0])[np.asarray(MASK) > 0] / np.asarray(pull[1])[np.asarray(MASK) > 0]
    probability = np.exp(np.asarray(LOGPROBS)[np.asarray(MASK) > 0])
    np.testing.assert_allclose(share, np.sqrt(1 - probability), rtol=1e-5)


@pytest.mark.parametrize("old", [-50.0, -1.0, 0.0])
@pytest.mark.parametrize("current", [-50.0, -1.0, 0.0])
def test_the_ratio_of_a_demonstration_is_at_most_four_and_its_gradient_finite(old, current):
    everywhere = jnp.full((1, 1), Source.DEMONSTRATION)

    def value(x):
        ones = jnp.ones((1, 1))
        return external_surrogate(x, jnp.full((1, 1), old), ones, everywhere, ones, gamma=0.0).value

    result, gradient = jax.value_and_grad(value)(jnp.full((1, 1), current))
    assert -4.0 <= result <= 0.0
    # The gradient of a probability by its logarithm is itself, at pi = 1 too.
    np.testing.assert_allclose(gradient[0, 0], result, rtol=1e-6)


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match=r"gamma is -1\.0"):
        loss(LOGPROBS, gamma=-1.0)
    with pytest.raises(ValueError, match=r"clip_low is 0\.2 and clip_high is None; give both"):
        loss(LOGPROBS, clip_low=0.2)
    with pytest.raises(ValueError, match=r"clip_low is -0\.2"):
        loss(LOGPROBS, clip_low=-0.2, clip_high=0.2)


DPH = {
    "forward_kl": (
        {},
        0.0803722,
        [
            [0.0246003, -0.020141, 0.0179816],
            [-0.028798, 0.162178, 0],
            [-0.020141, 0.0315584, -0.0154769],
            [0.0141663, 0, 0],
        ],
    ),
    # The card's generator is twice the normalised divergence.
    "jensen_shannon": (
        {"generator": "jensen_shannon"},
        0.0443424 / 2,
        np.array(
            [
                [0.0128937, -0.0095511, 0.00931922],
                [-0.0132695, 0.096196, 0],
                [-0.0095511, 0.016722, -0.00744129],
                [0.00729128, 0, 0],
            ]
        )
        / 2,
    ),
}


@pytest.mark.parametrize("name", DPH)
def test_worked_example_of_dph_rl(name):
    hyper, value, gradient = DPH[name]
    rehearsal = rehearsal_divergence(**hyper)
    result = jax.value_and_grad(lambda x: rehearsal(x, REFERENCE, MASK).value)(LOGPROBS)
    np.testing.assert_allclose(result[0], value, **DIGITS)
    np.testing.assert_allclose(result[1], np.array(gradient), **DIGITS)


def test_worked_example_of_dph_rl_alpha():
    rehearsal = rehearsal_divergence(generator="alpha", alpha=1 - 0.2)
    np.testing.assert_allclose(rehearsal(LOGPROBS, REFERENCE, MASK).value, 0.0966954, **DIGITS)


def test_stored_answers_and_rollouts_of_one_batch_keep_means_of_their_own():
    # Rows 0 and 1 are rollouts; rows 2 and 3 stored answers, which the mask leaves out. Row 3 has weight 0.
    mask, written = MASK.at[2:].set(0), MASK.at[:2].set(0).at[3].set(0)
    policy = policy_gradient(LOGPROBS, ADVANTAGES, mask)
    alone = policy_gradient(LOGPROBS[:2], ADVANTAGES[:2], MASK[:2])
    np.testing.assert_array_equal(policy.value, alone.value)
    stored = rehearsal_divergence()(LOGPROBS, REFERENCE, written)
    expected = divergence(generator="forward_kl", samples="reference", value_limit=10.0)
    expected = expected(LOGPROBS[2:3], REFERENCE[2:3], MASK[2:3])
    np.testing.assert_allclose(stored.value, expected.value, rtol=1e-6)
    assert stored.denominator == 3  # the row of weight 0 is absent


def test_nothing_pulls_before_the_policy_has_moved():
    gradient = jax.grad(lambda x: rehearsal_divergence()(x, REFERENCE, MASK).value)(REFERENCE)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_a_bad_generator_is_named():
    with pytest.raises(ValueError, match="backward_kl"):
        rehearsal_divergence(generator="backward_kl")
