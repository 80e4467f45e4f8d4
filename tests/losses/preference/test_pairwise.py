"""Pairs of answers: worked examples, invariance to reward shifts, and leave-one-out REINFORCE as their limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import kl_penalized_sequence_rewards, pairwise_surrogate, policy_gradient

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
GROUP = jnp.array([0, 0, 44, 44])
REWARDS = jnp.array([1.0, 0, 0.5, 1])
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
REFERENCE = jnp.array([[-1.1, -0.6, -0.4], [-0.6, -1.2, 0], [-1.7, -0.3, -1.0], [-0.9, 0, 0]])
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}
FORMS = ("joint", "separate")


def value_and_grad(logprobs=LOGPROBS, old=OLD, rewards=REWARDS, group=GROUP, mask=MASK, **hyper):
    return jax.value_and_grad(lambda x: pairwise_surrogate(x, old, rewards, group, mask, **hyper).value)(logprobs)


def test_worked_example():
    tail = [[0.789548, 0.789548, 0], [0.15576, 0.15576, 0.15576], [-0.15576, 0, 0]]
    value, gradient = value_and_grad()
    np.testing.assert_allclose(value, 0.541243, **DIGITS)
    np.testing.assert_allclose(gradient, [[-0.789548] * 3, *tail], **DIGITS)
    value, gradient = value_and_grad(form="separate")
    np.testing.assert_allclose(value, 0.0516673, **DIGITS)
    np.testing.assert_allclose(gradient, [[0, 0, 0], *tail], **DIGITS)


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_added_to_the_rewards_of_a_prompt_changes_nothing(form):
    shifted = value_and_grad(rewards=REWARDS + jnp.array([4.0, 4, -8, -8]), form=form)
    plain = value_and_grad(form=form)
    np.testing.assert_allclose(shifted[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(shifted[1], plain[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 3)])
def test_on_fresh_samples_it_is_leave_one_out_reinforce(form, sizes):
    rng = np.random.default_rng(1)
    rows = sum(sizes)
    group = np.repeat([50, 3, 7], sizes)
    rewards = rng.normal(size=rows)
    old = jnp.asarray(rng.uniform(-2, -0.1, (rows, 3)), jnp.float32)
    mask = jnp.asarray(np.arange(3) < rng.integers(1, 4, rows)[:, None], jnp.float32)
    leave_one_out = np.zeros(rows)
    for i in range(rows):
        others = (group == group[i]) & (np.arange(rows) != i)
        leave_one_out[i] = rewards[i] - rewards[others].mean() if others.any() else 0.0
    paired = jnp.asarray(mask * (np.bincount(group)[group] > 1)[:, None])
    signal = jnp.broadcast_to(jnp.asarray(leave_one_out, jnp.float32)[:, None], old.shape)
    expected = jax.grad(lambda x: policy_gradient(x, signal, paired, aggregation="seq_mean_token_sum").value)(old)
    _, gradient = value_and_grad(old, old, jnp.asarray(rewards, jnp.float32), jnp.asarray(group), mask, form=form)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_equal_rewards_lone_answers_and_absent_partners_give_zero(form):
    for changed in (
        {"rewards": jnp.array([1.0, 1, 0, 0])},
        {"group": jnp.arange(4)},
        {"mask": MASK * jnp.array([1.0, 0, 0, 1])[:, None]},
    ):
        value, gradient = value_and_grad(form=form, **changed)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)
    assert pairwise_surrogate(LOGPROBS, OLD, REWARDS, jnp.arange(4), MASK).denominator == 0


def test_joint_clipping_stops_a_pair_that_has_moved_far_enough():
    apart = OLD + jnp.array([0.3, -0.3, 0, 0])[:, None] * MASK  # the better answer up, the worse one down
    _, gradient = value_and_grad(apart)
    np.testing.assert_array_equal(gradient[:2], 0)
    _, back = value_and_grad(OLD - (apart - OLD))
    assert np.abs(back[:2][MASK[:2] > 0]).min() > 0


@pytest.mark.parametrize("form", FORMS)
def test_extreme_ratios_are_finite(form):
    for shift in (-800.0, 800.0):
        value, gradient = value_and_grad(LOGPROBS.at[::2].add(shift), form=form)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_the_reward_pays_for_the_divergence_of_the_whole_completion():
    rewards = kl_penalized_sequence_rewards(REWARDS, OLD, REFERENCE, MASK, kl_coefficient=0.5)
    difference = [-0.1, -0.3, -0.3, 0.1]
    np.testing.assert_allclose(rewards, REWARDS - 0.5 * jnp.array(difference), rtol=1e-5)
    outside = kl_penalized_sequence_rewards(REWARDS, jnp.where(MASK > 0, OLD, jnp.nan), REFERENCE, MASK)
    assert np.isfinite(outside).all()


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match=r"form is 'both'.*separate, joint"):
        value_and_grad(form="both")
    with pytest.raises(ValueError, match=r"clip is -0.1"):
        value_and_grad(clip=-0.1)
