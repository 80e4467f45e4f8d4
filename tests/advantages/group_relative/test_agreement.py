"""Advantages for prompts whose samples agree."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import (
    answer_entropy,
    batch_normalized_accuracy,
    consistency_blended,
    group_normalized,
    local_share,
)
from jaxrl_llm.rewards import majority_match, paired_majority_match
from jaxrl_llm.statistics import subgroup_ids

ANSWER = jnp.array([0, 0, 1, 2, 2, 2])
CORRECT = jnp.array([1.0, 1, 0, 0, 0, 0])
GROUP = jnp.array([4, 4, 4, 1, 1, 1])
WEIGHT = jnp.ones(6)
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}
DATA = (CORRECT, ANSWER, GROUP, WEIGHT)


def test_worked_example():
    np.testing.assert_allclose(answer_entropy(ANSWER, GROUP, WEIGHT), [0.918296] * 3 + [0] * 3, **DIGITS)
    batch_wide = [0.707105] * 3 + [-0.707105] * 3
    np.testing.assert_allclose(batch_normalized_accuracy(CORRECT, GROUP, WEIGHT), batch_wide, **DIGITS)
    share = np.array([0.603075, 0.603075, 0, 0, 0, 0])
    np.testing.assert_allclose(local_share(*DATA), share, **DIGITS)
    local = np.array([0.577349, 0.577349, -1.1547, 0, 0, 0])
    np.testing.assert_allclose(consistency_blended(*DATA, part="local"), share * local, **DIGITS)
    np.testing.assert_allclose(consistency_blended(*DATA, part="global"), (1 - share) * batch_wide, **DIGITS)
    np.testing.assert_allclose(consistency_blended(*DATA), share * local + (1 - share) * batch_wide, **DIGITS)


def test_groups_of_equal_rewards_still_get_an_advantage():
    rewards = jnp.array([1.0, 1, 1, 0, 0, 0])
    advantages = consistency_blended(rewards, ANSWER, GROUP, WEIGHT)
    assert (advantages[:3] > 0).all()
    assert (advantages[3:] < 0).all()


def test_the_modes():
    shares = {mode: np.asarray(local_share(*DATA, mode=mode)) for mode in ("soft", "forced", "global")}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    np.testing.assert_allclose(shares["soft"], [sigmoid(0.418296)] * 3 + [sigmoid(-0.5)] * 3, rtol=1e-5)
    np.testing.assert_allclose(shares["forced"], [sigmoid(0.418296)] * 3 + [0] * 3, rtol=1e-5)
    np.testing.assert_array_equal(shares["global"], 0)
    script = local_share(*DATA, mode="soft", sharpness=5.0, threshold=1.0)
    np.testing.assert_allclose(script[0], sigmoid(5 * (0.918296 - 1)), rtol=1e-5)


def test_entropy_is_one_bit_a_doubling():
    for answers in (1, 2, 4, 8):
        entropy = answer_entropy(jnp.arange(8) % answers, jnp.zeros(8, jnp.int32), jnp.ones(8))
        np.testing.assert_allclose(entropy, np.log2(answers), rtol=1e-6, atol=0)


def test_scattered_answers_lower_the_accuracy_of_a_prompt():
    rewards, group = jnp.array([1.0, 1, 0, 0, 1, 1, 0, 0]), jnp.repeat(jnp.arange(2), 4)
    answers = jnp.array([0, 0, 1, 1, 0, 0, 1, 2])
    plain = batch_normalized_accuracy(rewards, group, jnp.ones(8))
    np.testing.assert_array_equal(plain, 0)
    discounted = batch_normalized_accuracy(rewards, group, jnp.ones(8), answers, discount_disagreement=True)
    assert discounted[0] > 0 > discounted[4]
    # With G answers all different and one right, the discounted accuracy is 1 / G^2.
    lam = (1 - 1 / 4) / 2
    assert 0.25 * (1 - lam * 2) == pytest.approx(1 / 16)


def test_the_majority_is_right():
    answers = jnp.array([3, 5, -1, 5, 3, 7])  # a tie of two votes each
    matches = majority_match(answers, jnp.zeros(6, jnp.int32), jnp.ones(6))
    np.testing.assert_array_equal(matches, [1, 0, 0, 0, 1, 0])


@pytest.mark.parametrize(
    ("answers", "weight", "matches"),
    [
        ([4, 2, 2, 4], [1, 1, 1, 1], [0, 1, 1, 0]),  # ties go to the lowest id
        ([4, 2, 2, 4], [1, 0, 1, 1], [1, 0, 0, 1]),  # an absent row has no vote
        ([4, 2, 2, 4], [1, 2, 0, 0.5], [0, 1, 0, 0]),  # votes weigh what their rows do
        ([-1, -1, -1, 9], [1, 1, 1, 1], [0, 0, 0, 1]),  # no answer is never the majority
        ([-1, -1, -1, -1], [1, 1, 1, 1], [0, 0, 0, 0]),
        ([1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]),
        ([8, 7, 6, 5], [1, 1, 1, 1], [0, 0, 0, 1]),
        ([2**30 + 1, 2**30, 2**30 + 1, 2**30], [1, 1, 1, 1], [0, 1, 0, 1]),
    ],
)
def test_majorities(answers, weight, matches):
    got = majority_match(jnp.array(answers), jnp.full(4, 2), jnp.array(weight, jnp.float32))
    np.testing.assert_array_equal(got, matches)


def test_each_group_has_its_own_majority():
    rng = np.random.default_rng(1)
    group, answers, weight = rng.integers(0, 6, 48), rng.integers(-1, 4, 48), rng.integers(0, 2, 48).astype(np.float32)
    got = np.asarray(majority_match(jnp.asarray(answers), jnp.asarray(group), jnp.asarray(weight)))
    for number in range(6):
        votes = answers[(group == number) & (weight > 0) & (answers >= 0)]
        label = np.bincount(votes).argmax() if votes.size else -2
        rows = group == number
        np.testing.assert_array_equal(got[rows], (answers[rows] == label) & (weight[rows] > 0))
    order = rng.permutation(48)
    shuffled = majority_match(jnp.asarray(answers[order]), jnp.asarray(group[order]), jnp.asarray(weight[order]))
    np.testing.assert_array_equal(shuffled, got[order])


def test_subgroups_are_parts_of_groups():
    rng = np.random.default_rng(0)
    group, key = rng.integers(0, 5, 30), rng.integers(-3, 4, 30)
    ids = np.asarray(subgroup_ids(jnp.asarray(group), jnp.asarray(key)))
    same = (group[:, None] == group) & (key[:, None] == key)
    np.testing.assert_array_equal(ids[:, None] == ids, same)
    assert ids.min() >= 0
    assert ids.max() < 30


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"mode is 'soft with zero'.*soft_with_zero"):
        local_share(*DATA, mode="soft with zero")
    with pytest.raises(ValueError, match=r"part is 'all'"):
        consistency_blended(*DATA, part="all")
    with pytest.raises(ValueError, match=r"discount_disagreement is True, but there is no answer_id"):
        batch_normalized_accuracy(CORRECT, GROUP, WEIGHT, discount_disagreement=True)


PAIR = jnp.array([3, 3, 5, -1, 5, 5, 3, 5])
WORDING, OTHER = jnp.repeat(jnp.arange(2), 4), 1 - jnp.repeat(jnp.arange(2), 4)


def test_worked_example_of_co_reward():
    rewards = paired_majority_match(PAIR, WORDING, OTHER, jnp.ones(8))
    np.testing.assert_array_equal(rewards, [0, 0, 1, 0, 0, 0, 1, 0])
    alone = [-0.499999, -0.499999, 1.499997, -0.499999]
    np.testing.assert_allclose(group_normalized(rewards, WORDING, jnp.ones(8)), alone * 2, **DIGITS)


def test_wordings_may_change_places_and_one_that_is_its_own_pair_is_a_majority_vote():
    order = jnp.array([4, 5, 6, 7, 0, 1, 2, 3])
    swapped = paired_majority_match(PAIR[order], WORDING[order], OTHER[order], jnp.ones(8))
    np.testing.assert_array_equal(swapped, paired_majority_match(PAIR, WORDING, OTHER, jnp.ones(8))[order])
    own = paired_majority_match(PAIR, WORDING, WORDING, jnp.ones(8))
    np.testing.assert_array_equal(own, majority_match(PAIR, WORDING, jnp.ones(8)))


def test_a_wording_without_answers_or_a_pair_labels_nothing():
    silent = jnp.where(WORDING == 1, -1, PAIR)
    np.testing.assert_array_equal(paired_majority_match(silent, WORDING, OTHER, jnp.ones(8)), 0)
    absent = paired_majority_match(PAIR, WORDING, OTHER, jnp.where(WORDING == 1, 0.0, 1.0))
    np.testing.assert_array_equal(absent, 0)
    np.testing.assert_array_equal(paired_majority_match(PAIR, WORDING, jnp.full(8, -1), jnp.ones(8)), 0)
    with pytest.raises(AssertionError):
        paired_majority_match(PAIR, WORDING, OTHER[:4], jnp.ones(8))
