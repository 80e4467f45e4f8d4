"""Losses with one ratio a sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import policy_gradient, sequence_clipped_surrogate

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
ADVANTAGES = jnp.broadcast_to(jnp.array([1.0, -1.0, 0.5, -0.5])[:, None], MASK.shape)
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])


def value_and_grad(logprobs=LOGPROBS, advantages=ADVANTAGES, **hyper):
    return jax.value_and_grad(lambda x: sequence_clipped_surrogate(x, OLD, advantages, MASK, **hyper).value)(logprobs)


@pytest.mark.parametrize("ratio", ["geometric_mean", "token"])
def test_worked_example(ratio):
    value, gradient = value_and_grad(ratio=ratio, clip_low=0.1, clip_high=0.1)
    np.testing.assert_allclose(value, 0.11426, rtol=5.5e-6)
    expected = [
        [-0.0905753, -0.0905753, -0.0905753],
        [0.196039, 0.196039, 0],
        [-0.0445391, -0.0445391, -0.0445391],
        [0.127525, 0, 0],
    ]
    np.testing.assert_allclose(gradient, jnp.array(expected), rtol=5.5e-6, atol=1e-6)


def test_the_token_form_admits_advantages_of_tokens():
    varied = ADVANTAGES * jnp.array([1.0, 2.0, 3.0])
    shared = value_and_grad(advantages=varied, ratio="geometric_mean", clip_low=0.5, clip_high=5.0)
    own = value_and_grad(advantages=varied, ratio="token", clip_low=0.5, clip_high=5.0)
    np.testing.assert_allclose(shared[0], own[0], rtol=1e-6)
    np.testing.assert_allclose(shared[1][0], jnp.full(3, shared[1][0, 0]), rtol=1e-6)
    np.testing.assert_allclose(own[1][0, 1:] / own[1][0, 0], [2.0, 3.0], rtol=1e-5)


def test_the_product_is_the_exact_ratio_of_the_sequence():
    loss = sequence_clipped_surrogate(
        LOGPROBS,
        OLD,
        ADVANTAGES,
        MASK,
        ratio="product",
        clip_low=1.0,
        clip_high=99.0,
        aggregation="seq_mean_token_mean",
    )
    ratios = np.exp(np.array([0.25, 0.9, 0.2, 0.02]))
    np.testing.assert_allclose(loss.value, -(np.array([1.0, -1.0, 0.5, -0.5]) * ratios).mean(), rtol=1e-6)


@pytest.mark.parametrize("ratio, aggregation", [("geometric_mean", "seq_mean_token_mean"), ("token", "token_mean")])
def test_on_fresh_samples_the_gradient_is_that_of_reinforce(ratio, aggregation):
    _, gradient = value_and_grad(OLD, ratio=ratio, aggregation=aggregation)
    expected = jax.grad(lambda x: policy_gradient(x, ADVANTAGES, MASK, aggregation=aggregation).value)(OLD)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


def test_a_clipped_sequence_loses_the_gradient_of_all_its_tokens():
    loss = sequence_clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, clip_low=0.01, clip_high=0.07)
    # Rows 0 and 2 are good and have risen, by factors 1.087 and 1.069; row 1 is bad and has risen.
    assert [float(x) for x in loss.metrics["clip_share"]] == [1.0, 4.0]
    _, gradient = value_and_grad(clip_low=0.01, clip_high=0.07)
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.abs(gradient[2]).min() > 0


def test_a_token_weight_is_a_constant_factor():
    weight = jnp.array([[2.0], [0.0], [1.0], [1.0]]) * jnp.ones((1, 3))
    _, plain = value_and_grad()
    _, weighted = value_and_grad(token_weight=weight)
    np.testing.assert_allclose(weighted, plain * weight, rtol=1e-6)


def test_an_unknown_ratio_is_an_error():
    with pytest.raises(ValueError, match=r"ratio is 'mean'.*geometric_mean, token, product"):
        sequence_clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, ratio="mean")
