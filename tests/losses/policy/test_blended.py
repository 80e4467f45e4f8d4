"""Two advantages for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import blended_surrogate, clipped_surrogate

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
LOCAL = jnp.broadcast_to(jnp.array([1.0, -1.0, 0.5, -0.5])[:, None], MASK.shape)
GLOBAL = jnp.broadcast_to(jnp.array([-0.7, -0.7, 0.7, 0.7])[:, None], MASK.shape)
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])


def gradient(function, logprobs=LOGPROBS):
    return jax.grad(lambda x: function(x).value)(logprobs)


def test_it_is_the_blend_of_two_surrogates():
    w = jnp.array([0.6, 0.6, 0.2, 0.0])[:, None]
    options = {"aggregation": "seq_mean_token_mean", "dual_clip": 3.0}
    separate = [
        lambda x, a=a, b=b: clipped_surrogate(x, OLD, a, MASK, b * jnp.ones_like(MASK), **options)
        for a, b in ((LOCAL, w), (GLOBAL, 1 - w))
    ]
    blended = lambda x: blended_surrogate(x, OLD, w * LOCAL, (1 - w) * GLOBAL, MASK)  # noqa: E731
    value = sum(part(LOGPROBS).value for part in separate)
    np.testing.assert_allclose(blended(LOGPROBS).value, value, rtol=1e-5)
    np.testing.assert_allclose(gradient(blended), sum(map(gradient, separate)), rtol=1e-5, atol=1e-8)


def test_without_clipping_it_is_one_surrogate_of_the_sum():
    near = OLD + 0.05
    one = gradient(lambda x: clipped_surrogate(x, OLD, LOCAL + GLOBAL, MASK, aggregation="seq_mean_token_mean"), near)
    two = gradient(lambda x: blended_surrogate(x, OLD, LOCAL, GLOBAL, MASK), near)
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-7)


def test_a_group_without_local_advantage_still_learns():
    assert np.abs(gradient(lambda x: blended_surrogate(x, OLD, 0 * LOCAL, GLOBAL, MASK), OLD)).max() > 0


def test_each_side_is_clipped_by_its_own_sign():
    loss = blended_surrogate(LOGPROBS, OLD, LOCAL, -LOCAL, MASK)
    assert loss.metrics["local_clip_share"][0] == 3
    assert loss.metrics["global_clip_share"][0] == 2
    assert float(jnp.abs(gradient(lambda x: blended_surrogate(x, OLD, LOCAL, -LOCAL, MASK))).max()) > 0


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match=r"dual_clip is 0.5"):
        blended_surrogate(LOGPROBS, OLD, LOCAL, GLOBAL, MASK, dual_clip=0.5)
