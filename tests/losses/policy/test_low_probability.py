"""Lp-Reg: rare but plausible tokens of bad answers are protected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import clipped_surrogate, lowest_token_proxy, min_p_logprobs, protected_surrogate
from jaxrl_llm.losses.divergences.divergence import LEAST_LOGPROB

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
ADVANTAGES = jnp.broadcast_to(jnp.array([1.0, -1, 0.5, -0.5])[:, None], MASK.shape)
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
PROXY = jnp.array([[-1.1, -0.6, -0.4], [-0.6, -1.2, 0], [-1.7, -0.3, -1.0], [-0.9, 0, 0]]) + 0.3
WEIGHT = jnp.ones(4)
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def test_worked_example():
    # The card selects by current probabilities, as the released code does.
    proxy = lowest_token_proxy(PROXY, LOGPROBS, ADVANTAGES, MASK, WEIGHT, share=0.7)
    np.testing.assert_array_equal(proxy > LEAST_LOGPROB, np.array([[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]]))
    loss = lambda x: protected_surrogate(x, OLD, ADVANTAGES, proxy, MASK)  # noqa: E731
    value, gradient = jax.value_and_grad(lambda x: loss(x).value)(LOGPROBS)
    np.testing.assert_allclose(value, 0.0146185, **DIGITS)
    expected = [
        [-0.149984, -0.100537, -0.116808],
        [-0.0168665, 0.4077, 0],
        [-0.0613984, -0.0788371, -0.0432667],
        [0.0347648, 0, 0],
    ]
    np.testing.assert_allclose(gradient, jnp.array(expected), **DIGITS)
    assert [float(x) for x in loss(LOGPROBS).metrics["protected_share"]] == [2, 9]


def test_worked_example_of_the_proxy():
    log_p = jax.nn.log_softmax(jnp.array([2.0, 1, -3]))
    np.testing.assert_allclose(min_p_logprobs(log_p, jnp.array(1)), -1.31326, **DIGITS)
    assert min_p_logprobs(log_p, jnp.array(2)) == LEAST_LOGPROB


def test_the_proxy_is_a_distribution_over_the_kept_symbols():
    log_p = jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(0), (4, 1, 20)))
    tokens = jnp.broadcast_to(jnp.arange(20), (4, 20))
    proxy = min_p_logprobs(jnp.broadcast_to(log_p, (4, 20, 20)), tokens, min_p=0.05)
    np.testing.assert_allclose(jnp.exp(proxy).sum(-1), 1.0, rtol=1e-5)
    kept = proxy > LEAST_LOGPROB
    assert 0 < kept.sum() < kept.size
    assert (jnp.where(kept, proxy - log_p[:, 0], 0) >= 0).all()


def test_the_lowest_tokens_are_counted_over_the_batch_and_only_bad_ones():
    chosen = lowest_token_proxy(PROXY, OLD, ADVANTAGES, MASK, WEIGHT, share=0.7) > LEAST_LOGPROB
    np.testing.assert_array_equal(chosen, np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]]))
    # An absent row is no part of the count: one token of two is one, and one alone protects nothing.
    fewer = lowest_token_proxy(PROXY, OLD, ADVANTAGES, MASK, WEIGHT.at[3].set(0), share=0.7)
    np.testing.assert_array_equal(fewer, LEAST_LOGPROB)
    # 0.01 * 300 is 3 in exact arithmetic.
    many = jnp.arange(300.0)[None]
    ones = jnp.ones((1, 300))
    chosen = lowest_token_proxy(many, -many, -ones, ones, jnp.ones(1))
    np.testing.assert_array_equal(chosen[0, -3:], [297, 298, 299])
    np.testing.assert_array_equal(chosen[0, :-3], LEAST_LOGPROB)


def test_ties_do_not_depend_on_the_order_of_rows():
    old = jnp.array([[-3.0], [-1], [-1], [-1]])
    ones = jnp.ones((4, 1))
    chosen = lowest_token_proxy(ones, old, -ones, ones, WEIGHT, share=0.5) > LEAST_LOGPROB
    assert chosen.all()


def test_without_protected_tokens_it_is_the_clipped_surrogate():
    nothing = jnp.full_like(PROXY, LEAST_LOGPROB)
    plain = clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, clip_low=1.0, clip_high=9.0)
    for loss in (
        protected_surrogate(LOGPROBS, OLD, ADVANTAGES, nothing, MASK),
        protected_surrogate(LOGPROBS, OLD, ADVANTAGES, PROXY, MASK, kl_coefficient=0.0),
    ):
        np.testing.assert_allclose(loss.numerator, plain.numerator, rtol=1e-6)


def test_protection_slows_the_fall_of_a_bad_token_and_leaves_good_ones_alone():
    plain = jax.grad(lambda x: protected_surrogate(x, OLD, ADVANTAGES, PROXY, MASK, kl_coefficient=0.0).value)(LOGPROBS)
    held = jax.grad(lambda x: protected_surrogate(x, OLD, ADVANTAGES, PROXY, MASK).value)(LOGPROBS)
    protected = np.asarray((LOGPROBS < PROXY) & (ADVANTAGES < 0) & (MASK > 0))
    assert (held[protected] < plain[protected]).all()
    np.testing.assert_array_equal(held[~protected], plain[~protected])


@pytest.mark.parametrize("gap", [-50.0, 3.0, 50.0, 1e4])
def test_far_proxies_have_finite_values_and_gradients(gap):
    loss = lambda x: protected_surrogate(x, OLD, ADVANTAGES, LOGPROBS + gap, MASK).value  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(LOGPROBS)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        lowest_token_proxy(PROXY, OLD, ADVANTAGES, MASK, WEIGHT, share=1.5)
    for hyper, message in (
        ({"kl_coefficient": -1.0}, r"kl_coefficient is -1\.0"),
        ({"value_limit": 0.0}, r"value_limit is 0\.0"),
        ({"clip_high": -1.0}, r"clip_high is -1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            protected_surrogate(LOGPROBS, OLD, ADVANTAGES, PROXY, MASK, **hyper)
