"""The entropy bonus."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.losses import entropy_bonus

MASK = jnp.array([[1.0, 1, 1], [1, 0, 0]])
ENTROPY = jnp.array([[0.3, 0.6, 0.9], [2.0, 7.0, 7.0]])


def test_the_loss_is_minus_the_mean_entropy_of_the_tokens_that_count():
    np.testing.assert_allclose(entropy_bonus(ENTROPY, MASK).value, -0.95, rtol=1e-6)
    np.testing.assert_allclose(entropy_bonus(ENTROPY, MASK, aggregation="seq_mean_token_mean").value, -1.3, rtol=1e-6)


def test_minimising_it_raises_entropy():
    @jax.jit
    def bonus(logits):
        log_p = jax.nn.log_softmax(logits)
        return entropy_bonus(-(jnp.exp(log_p) * log_p).sum(-1), jnp.ones((1, 1))).value

    logits = jnp.array([[[2.0, 0.0, -1.0]]])
    assert bonus(logits - 0.5 * jax.grad(bonus)(logits)) < bonus(logits)
    np.testing.assert_allclose(bonus(jnp.zeros((1, 1, 3))), -np.log(3.0), rtol=1e-6)
