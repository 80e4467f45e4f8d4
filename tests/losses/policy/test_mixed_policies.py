"""Replayed samples and two anchors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import clipped_surrogate, convex_kl, kl_estimate, mixed_policy_surrogate

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
ADVANTAGES = jnp.broadcast_to(jnp.array([1.0, -1.0, 0.5, -0.5])[:, None], MASK.shape)
BEHAVIOUR = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
REFERENCE = jnp.array([[-1.1, -0.6, -0.4], [-0.6, -1.2, 0], [-1.7, -0.3, -1.0], [-0.9, 0, 0]])
START = LOGPROBS + 0.1  # the policy that the update starts from
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def test_worked_example():
    def objective(x):
        surrogate = mixed_policy_surrogate(x, START, BEHAVIOUR, ADVANTAGES, MASK)
        return surrogate.value + 0.01 * convex_kl(x, REFERENCE, START, MASK).value

    value, gradient = jax.value_and_grad(objective)(LOGPROBS)
    np.testing.assert_allclose(value, 0.00897195, **DIGITS)
    expected = [
        [-0.149942, -0.100719, -0.116789],
        [0.0742272, 0.000271255, 0],
        [-0.0615798, -0.0787726, -0.043415],
        [0.0566822, 0, 0],
    ]
    np.testing.assert_allclose(gradient, expected, **DIGITS)


def test_on_fresh_samples_it_is_the_clipped_surrogate():
    options = {"clip_low": 0.2, "clip_high": 0.28}
    mixed = lambda x: mixed_policy_surrogate(x, BEHAVIOUR, BEHAVIOUR, ADVANTAGES, MASK, **options)  # noqa: E731
    plain = lambda x: clipped_surrogate(x, BEHAVIOUR, ADVANTAGES, MASK, **options)  # noqa: E731
    assert mixed(LOGPROBS).numerator == plain(LOGPROBS).numerator
    assert mixed(LOGPROBS).metrics["clip_share"] == plain(LOGPROBS).metrics["clip_share"]
    np.testing.assert_array_equal(
        jax.grad(lambda x: mixed(x).value)(LOGPROBS), jax.grad(lambda x: plain(x).value)(LOGPROBS)
    )


def test_a_replayed_sample_is_clipped_around_where_the_update_starts():
    # The policy has moved far from the one that drew the samples: PPO's clip would drop every good token.
    start, mask = BEHAVIOUR + 1.0, jnp.ones_like(BEHAVIOUR)
    good = jnp.ones_like(BEHAVIOUR)
    mixed = jax.grad(lambda x: mixed_policy_surrogate(x, start, BEHAVIOUR, good, mask).value)(start)
    plain = jax.grad(lambda x: clipped_surrogate(x, BEHAVIOUR, good, mask).value)(start)
    np.testing.assert_array_equal(plain, 0)
    np.testing.assert_allclose(mixed, -np.e / 12, rtol=1e-6)


def test_the_convex_combination_runs_from_one_anchor_to_the_other():
    both = lambda share: convex_kl(LOGPROBS, REFERENCE, START, MASK, share=share).value  # noqa: E731
    np.testing.assert_allclose(both(1.0), kl_estimate(LOGPROBS, REFERENCE, MASK).value, rtol=1e-6)
    np.testing.assert_allclose(both(0.0), kl_estimate(LOGPROBS, START, MASK).value, rtol=1e-6)
    np.testing.assert_allclose(both(0.25), 0.25 * both(1.0) + 0.75 * both(0.0), rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mixed_policy_surrogate(START, START, START, START, MASK, clip_high=-1.0), "clip_high is -1.0"),
        (lambda: convex_kl(START, START, START, MASK, share=1.5), "share is 1.5"),
    ],
)
def test_bad_hyper_parameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
