"""Token-level policy losses: worked examples, and what each does to a ratio far from 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import cispo, clipped_surrogate, policy_gradient, sapo

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
ADVANTAGES = jnp.broadcast_to(jnp.array([1.0, -1.0, 0.5, -0.5])[:, None], MASK.shape)
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
# No printed number of six digits is off by more than this.
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def value_and_grad(function, logprobs=LOGPROBS):
    return jax.jit(jax.value_and_grad(lambda x: function(x).value))(logprobs)


def ratio_method(method, **hyper):
    return lambda x: method(x, OLD, ADVANTAGES, MASK, **hyper)


GOLDENS = {
    "reinforce": (
        lambda x: policy_gradient(x, ADVANTAGES, MASK),
        0.212222,
        [
            [-0.111111, -0.111111, -0.111111],
            [0.111111, 0.111111, 0],
            [-0.0555556, -0.0555556, -0.0555556],
            [0.0555556, 0, 0],
        ],
    ),
    "ppo_dual_clip": (
        ratio_method(clipped_surrogate, clip_low=0.2, clip_high=0.28, dual_clip=3.0),
        -0.0564437,
        [[0, -0.100537, -0.116808], [0, 0, 0], [-0.0613984, 0, -0.0432667], [0.0566779, 0, 0]],
    ),
    "dapo": (
        ratio_method(clipped_surrogate, clip_low=0.2, clip_high=0.28, dual_clip=10.0),
        0.0179226,
        [[0, -0.100537, -0.116808], [0, 0.4077, 0], [-0.0613984, 0, -0.0432667], [0.0566779, 0, 0]],
    ),
    "stable_reinforce_preclip": (
        ratio_method(clipped_surrogate, log_ratio_limit=float(np.log(1000.0)), aggregation="seq_mean_token_mean"),
        0.294679,
        [[0, -0.0754031, -0.0876059], [0, 0.458662, 0], [-0.0460488, 0, -0.03245], [0.127525, 0, 0]],
    ),
    "cispo": (
        ratio_method(cispo, clip_low=0.2, clip_high=0.28),
        0.24208,
        [
            [-0.142222, -0.100537, -0.116808],
            [0.0888889, 0.142222, 0],
            [-0.0613984, -0.0711111, -0.0444444],
            [0.0566779, 0, 0],
        ],
    ),
    "dispo": (
        ratio_method(cispo, clip_low=0.1, clip_high=0.3, negative_clip_low=0.8, negative_clip_high=2.0),
        0.206159,
        [
            [-0.144444, -0.100537, -0.116808],
            [0.07448, 0.333333, 0],
            [-0.0613984, -0.0722222, -0.05],
            [0.0566779, 0, 0],
        ],
    ),
    "sapo": (
        ratio_method(sapo),
        0.099259,
        [
            [-0.109115, -0.0752327, -0.0875484],
            [0.0813292, 0.0988988, 0],
            [-0.0459217, -0.056606, -0.0320563],
            [0.127511, 0, 0],
        ],
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_worked_example(name):
    function, loss, gradient = GOLDENS[name]
    value, grad = value_and_grad(function)
    np.testing.assert_allclose(value, loss, **DIGITS)
    np.testing.assert_allclose(grad, jnp.array(gradient), **DIGITS)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "dr_grpo"])
def test_on_fresh_samples_every_token_method_has_the_gradient_of_reinforce(aggregation):
    _, expected = value_and_grad(lambda x: policy_gradient(x, ADVANTAGES, MASK, aggregation=aggregation), OLD)
    for method in (clipped_surrogate, cispo, sapo):
        _, gradient = value_and_grad(ratio_method(method, aggregation=aggregation), OLD)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7, err_msg=method.__name__)


def test_cispo_keeps_the_gradient_of_every_token_where_ppo_drops_some():
    _, kept = value_and_grad(ratio_method(cispo, clip_low=0.2, clip_high=0.28))
    _, clipped = value_and_grad(ratio_method(clipped_surrogate, clip_high=0.28))
    assert (np.asarray(kept)[np.asarray(MASK) > 0] != 0).all()
    assert (np.asarray(clipped)[np.asarray(MASK) > 0] == 0).sum() == 3


def test_a_weight_that_follows_no_ratio_is_not_clipped():
    # TOPR: good samples have no ratio, bad ones one between 0 and 1.
    old = jnp.log(jnp.asarray([[0.5, 0.5, 0.5, 0.5]]))
    now = jnp.log(jnp.asarray([[0.6, 0.4, 0.6, 0.4]]))
    advantages, mask = jnp.asarray([[1.0, 1.0, -1.0, -1.0]]), jnp.ones((1, 4))
    topr = cispo(now, old, advantages, mask, clip_low=0, clip_high=0, negative_clip_low=1.0, negative_clip_high=0.0)
    clipped, count = topr.metrics["clip_share"]
    assert (float(clipped), float(count)) == (1.0, 4.0)  # the third rose above 1


def test_dispo_with_equal_bounds_is_cispo():
    plain = value_and_grad(ratio_method(cispo, clip_low=0.2, clip_high=0.28))
    four = value_and_grad(
        ratio_method(cispo, clip_low=0.2, clip_high=0.28, negative_clip_low=0.2, negative_clip_high=0.28)
    )
    np.testing.assert_array_equal(plain[1], four[1])


def test_clip_share_counts_the_tokens_without_gradient():
    loss = clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    assert [float(x) for x in loss.metrics["clip_share"]] == [3.0, 9.0]
    assert [float(x) for x in loss.metrics["dual_clip_share"]] == [1.0, 9.0]
    _, gradient = value_and_grad(ratio_method(clipped_surrogate, clip_low=0.2, clip_high=0.28, dual_clip=3.0))
    assert (np.asarray(gradient)[np.asarray(MASK) > 0] == 0).sum() == 4
    # CISPO: of ratios 1.35, 0.90, 1.05 / 0.67, 3.67 / 1.11, 1.42, 0.78 / 1.02 the 1st, 4th, 5th, 7th and 8th are cut.
    assert [
        float(x) for x in cispo(LOGPROBS, OLD, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.28).metrics["clip_share"]
    ] == [5, 9]


def test_the_two_sided_clip_caps_what_a_bad_likely_token_costs():
    capped = clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, clip_high=0.28, ratio_cap=2.0)
    plain = clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, clip_high=0.28)
    # Only token [1, 1] has a ratio (3.669) above 2; its advantage is -1.
    np.testing.assert_allclose(plain.numerator - capped.numerator, np.exp(1.3) - 2.0, rtol=1e-5)
    _, gradient = value_and_grad(ratio_method(clipped_surrogate, clip_high=0.28, ratio_cap=2.0))
    assert gradient[1, 1] == 0
    assert capped.metrics["clip_share"][0] == plain.metrics["clip_share"][0] + 1


def test_a_token_weight_is_a_constant_factor_on_each_token():
    weight = jnp.array([[1.0, 2, 0], [0.5, 1, 9], [1, 1, 1], [3, 9, 9]])
    for method in (clipped_surrogate, cispo, sapo):
        _, plain = value_and_grad(ratio_method(method))
        _, weighted = value_and_grad(ratio_method(method, token_weight=weight))
        np.testing.assert_allclose(weighted, plain * weight, rtol=1e-6, err_msg=method.__name__)
        through = jax.grad(lambda w, m=method: m(LOGPROBS, OLD, ADVANTAGES, MASK, w).value)(weight)
        np.testing.assert_array_equal(through, 0)


def test_no_gradient_reaches_advantages_or_old_logprobs():
    for method in (clipped_surrogate, cispo, sapo):
        both = jax.grad(lambda old, a, m=method: m(LOGPROBS, old, a, MASK).value, argnums=(0, 1))(OLD, ADVANTAGES)
        for gradient in both:
            np.testing.assert_array_equal(gradient, 0)


def test_the_off_policy_threshold_drops_bad_sequences_left_behind_and_keeps_good_ones():
    # Rows 0 (good) and 1 (bad) have both fallen by 0.5 nats a token, row 3 (bad) hardly.
    moved = OLD - jnp.array([0.5, 0.5, 0.0, 0.1])[:, None] * MASK
    plain = ratio_method(clipped_surrogate, clip_low=0.9)
    masked = ratio_method(clipped_surrogate, clip_low=0.9, off_policy_threshold=0.3)
    _, everywhere = value_and_grad(plain, moved)
    _, gradient = value_and_grad(masked, moved)
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.abs(everywhere[1, :2]).min() > 0
    for row in (0, 2, 3):
        np.testing.assert_array_equal(gradient[row], everywhere[row])
    assert masked(moved).denominator == plain(moved).denominator


def test_a_log_ratio_of_800_has_a_finite_loss_and_no_gradient():
    for sign in (1.0, -1.0):
        for method in (clipped_surrogate, sapo):
            value, gradient = value_and_grad(ratio_method(method), OLD + 800.0 * sign)
            assert np.isfinite(value)
            np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, clip_low=-0.1), "clip_low is -0.1"),
        (lambda: clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, dual_clip=1.0), "dual_clip is 1.0; .* above 1"),
        (lambda: clipped_surrogate(LOGPROBS, OLD, ADVANTAGES, MASK, ratio_cap=1.1), "ratio_cap is 1.1"),
        (lambda: cispo(LOGPROBS, OLD, ADVANTAGES, MASK, negative_clip_high=-1.0), "clip_high is -1.0"),
        (lambda: sapo(LOGPROBS, OLD, ADVANTAGES, MASK, negative_temperature=0.0), "negative_temperature is 0.0"),
    ],
)
def test_bad_hyper_parameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        policy_gradient(LOGPROBS, ADVANTAGES[:, 0], MASK)
    with pytest.raises(AssertionError):
        clipped_surrogate(LOGPROBS, OLD[:, :2], ADVANTAGES, MASK)
