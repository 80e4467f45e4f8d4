"""Supervised learning on given tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.losses import negative_log_likelihood, policy_gradient

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])


def test_it_is_the_mean_cross_entropy_of_tokens():
    np.testing.assert_allclose(negative_log_likelihood(LOGPROBS, MASK).value, 0.781111, rtol=5.5e-6)


def test_it_is_reinforce_with_every_advantage_one():
    supervised = jax.value_and_grad(lambda x: negative_log_likelihood(x, MASK).value)(LOGPROBS)
    reinforce = jax.value_and_grad(lambda x: policy_gradient(x, jnp.ones_like(MASK), MASK).value)(LOGPROBS)
    for a, b in zip(supervised, reinforce, strict=True):
        np.testing.assert_array_equal(a, b)
