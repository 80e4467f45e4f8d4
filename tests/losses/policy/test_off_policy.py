"""REINFORCE on old samples: which gradients survive, with which weight, and what many updates on a batch need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import cispo, clipped_surrogate, masked_policy_gradient, policy_gradient

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
ADVANTAGES = jnp.broadcast_to(jnp.array([1.0, -1.0, 0.5, -0.5])[:, None], MASK.shape)
OUTCOMES = jnp.sign(ADVANTAGES)
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}
TOPR = {"clip_low": 0.0, "clip_high": 0.0, "negative_clip_low": 1.0, "negative_clip_high": 0.0}


def value_and_grad(function, logprobs=LOGPROBS):
    return jax.value_and_grad(lambda x: function(x).value)(logprobs)


def rec(**hyper):
    return lambda x: masked_policy_gradient(x, OLD, ADVANTAGES, MASK, **hyper)


GOLDENS = {
    "rec_one_side_importance": (
        rec(),
        LOGPROBS,
        0.109527,
        [[0, -0.100537, -0.116808], [0, 0.4077, 0], [-0.0613984, 0, -0.0432667], [0.0566779, 0, 0]],
    ),
    "rec_ring": (
        rec(keep="ring", importance="none"),
        LOGPROBS,
        0.145556,
        [[0, -0.111111, -0.111111], [0, 0.111111, 0], [-0.0555556, 0, 0], [0.0555556, 0, 0]],
    ),
    "topr_sequence": (
        lambda x: cispo(x, LOGPROBS, OUTCOMES, MASK, level="sequence", **TOPR),
        OLD,
        0.429116,
        [
            [-0.111111, -0.111111, -0.111111],
            [0.0451744, 0.0451744, 0],
            [-0.111111, -0.111111, -0.111111],
            [0.108911, 0, 0],
        ],
    ),
    "topr_token": (
        lambda x: cispo(x, OLD, OUTCOMES, MASK, **TOPR),
        LOGPROBS,
        0.374079,
        [
            [-0.111111, -0.111111, -0.111111],
            [0.07448, 0.111111, 0],
            [-0.111111, -0.111111, -0.111111],
            [0.111111, 0, 0],
        ],
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_worked_example(name):
    function, logprobs, loss, gradient = GOLDENS[name]
    value, grad = value_and_grad(function, logprobs)
    np.testing.assert_allclose(value, loss, **DIGITS)
    np.testing.assert_allclose(grad, jnp.array(gradient), **DIGITS)


def test_one_side_with_the_ratio_has_the_gradient_of_the_clipped_surrogate():
    for low, high in ((0.2, 0.2), (0.1, 0.28), (0.5, 0.0)):
        _, expected = value_and_grad(
            lambda x, low=low, high=high: clipped_surrogate(x, OLD, ADVANTAGES, MASK, clip_low=low, clip_high=high)
        )
        _, gradient = value_and_grad(rec(clip_low=low, clip_high=high))
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


def test_everything_kept_with_weight_one_is_reinforce():
    plain = value_and_grad(lambda x: policy_gradient(x, ADVANTAGES, MASK))
    free = value_and_grad(rec(keep="all", importance="none"))
    np.testing.assert_array_equal(free[1], plain[1])
    assert rec(keep="all")(LOGPROBS).metrics["clip_share"][0] == 0


def test_what_each_mask_keeps():
    # Ratios 1.35, 0.90, 1.05 / 0.67, 3.67 / 1.11, 1.42, 0.78 / 1.02; rows 1 and 3 have negative advantages.
    kept = {
        "two_side": [[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 0]],
        "one_side": [[0, 1, 1], [0, 1, 0], [1, 0, 1], [1, 0, 0]],
        "ring": [[0, 1, 1], [0, 1, 0], [1, 0, 0], [1, 0, 0]],
    }
    for keep, expected in kept.items():
        _, gradient = value_and_grad(rec(keep=keep, importance="none"))
        np.testing.assert_array_equal(np.asarray(gradient) != 0, np.array(expected) > 0, err_msg=keep)
        assert rec(keep=keep)(LOGPROBS).metrics["clip_share"][0] == 9 - np.sum(expected)


def test_advantage_weighting_multiplies_by_a_constant():
    _, plain = value_and_grad(rec(keep="all", importance="none"))
    _, weighted = value_and_grad(rec(keep="all", importance="advantage", advantage_temperature=0.5))
    np.testing.assert_allclose(weighted, plain * jnp.exp(ADVANTAGES / 0.5), rtol=1e-6)


def test_the_drift_penalty_pulls_back_every_token():
    _, without = value_and_grad(rec(keep="two_side"))
    _, pulled = value_and_grad(rec(keep="two_side", drift_penalty=0.1))
    np.testing.assert_allclose(pulled - without, 0.2 * (LOGPROBS - OLD) * MASK / 9, rtol=1e-5, atol=1e-7)


def test_topr_weighs_good_samples_by_one_whatever_the_ratio():
    for shift in (-3.0, 3.0):
        _, gradient = value_and_grad(lambda x: cispo(x, OLD, OUTCOMES, MASK, level="sequence", **TOPR), OLD + shift)
        np.testing.assert_allclose(gradient[0], -1 / 9, rtol=1e-6)
        assert 0 < gradient[1, 0] <= 1 / 9 + 1e-7


def test_off_policy_reinforce_diverges_on_bad_samples_and_topr_does_not():
    outcomes = jnp.array([[-1.0], [-1.0]])
    mask, old = jnp.ones((2, 1)), jnp.log(jnp.array([[0.4], [0.4]]))
    logprob = lambda x: jax.nn.log_sigmoid(x)  # noqa: E731

    def descend(loss):
        x = jnp.full((2, 1), float(np.log(0.4 / 0.6)))
        step = jax.jit(lambda x: x - 5.0 * jax.grad(lambda z: loss(logprob(z)).value)(x))
        for _ in range(200):
            x = step(x)
        return float(loss(logprob(x)).value)

    plain = descend(lambda lp: policy_gradient(lp, outcomes, mask))
    tapered = descend(lambda lp: cispo(lp, old, outcomes, mask, level="sequence", **TOPR))
    assert plain < -100
    assert -0.1 < tapered < 0


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"keep": "both"}, "keep is 'both'.*two_side"),
        ({"importance": "sequence"}, "importance is 'sequence'"),
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"keep": "ring", "ring_low": 0.1}, "ring_low is 0.1"),
        ({"advantage_temperature": 0.0}, "advantage_temperature is 0.0"),
        ({"drift_penalty": -1.0}, "drift_penalty is -1.0"),
    ],
)
def test_bad_hyper_parameters_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        rec(**hyper)(LOGPROBS)


def test_an_unknown_level_is_named():
    with pytest.raises(ValueError, match=r"level is 'row'.*token, sequence"):
        cispo(LOGPROBS, OLD, ADVANTAGES, MASK, level="row")
