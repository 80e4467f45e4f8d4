"""Larger advantages for improbable right answers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import novelty_sharpened

GROUP = np.zeros(4, np.int32)
WEIGHT = np.ones(4, np.float32)
# Those of `group_normalized` for the rewards 1, 0, 0, 1.
ADVANTAGES = np.float32([[0.866024], [-0.866024], [-0.866024], [0.866024]])
SCORES = np.float32([[-0.2], [-0.5], [-0.6], [-0.9]])
MASK = np.ones((4, 1), np.float32)


def test_worked_example():
    published = novelty_sharpened(ADVANTAGES, SCORES, GROUP, MASK, WEIGHT)[:, 0]
    np.testing.assert_allclose(published, [0.866024, -0.866024, -0.866024, 1.29904], rtol=5.5e-6)
    milder = novelty_sharpened(ADVANTAGES, SCORES, GROUP, MASK, WEIGHT, strength=1.0, cap=1.0)[:, 0]
    np.testing.assert_allclose(milder, [0.866024, -0.866024, -0.866024, 1.16134], rtol=5.5e-6)


def test_only_improbable_right_answers_gain():
    rng = np.random.default_rng(0)
    advantages = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    logprobs = jnp.asarray(rng.uniform(-3, 0, (8, 3)), jnp.float32)
    group, ones = jnp.repeat(jnp.arange(2), 4), jnp.ones((8, 3))
    change = novelty_sharpened(advantages, logprobs, group, ones, jnp.ones(8)) - advantages
    score = logprobs.mean(1).reshape(2, 4)
    improbable = (score < score.mean(1, keepdims=True)).reshape(8, 1)
    np.testing.assert_array_equal(change > 0, (advantages > 0) & improbable)
    assert (change >= 0).all()


def test_the_bonus_is_bounded_by_the_advantage():
    unlikely = np.float32([[-0.2], [-0.5], [-0.6], [-60.0]])
    for cap in (0.1, 1.0):
        gained = novelty_sharpened(ADVANTAGES, unlikely, GROUP, MASK, WEIGHT, strength=50.0, cap=cap)[3, 0]
        np.testing.assert_allclose(gained, ADVANTAGES[3, 0] * (1 + cap), rtol=1e-6)


def test_length_does_not_count_as_novelty():
    once = novelty_sharpened(ADVANTAGES, SCORES, GROUP, MASK, WEIGHT)
    twice = novelty_sharpened(
        jnp.tile(ADVANTAGES, (1, 2)),
        jnp.tile(SCORES, (1, 2)),
        GROUP,
        jnp.array([[1.0, 1], [1, 1], [1, 0], [1, 0]]),
        WEIGHT,
    )
    np.testing.assert_allclose(twice[:, 0], once[:, 0], rtol=1e-6)


def test_a_group_of_equal_likelihood_or_of_one_is_untouched():
    for scores, group in ((jnp.full((4, 1), -0.3), GROUP), (SCORES, jnp.arange(4))):
        np.testing.assert_array_equal(novelty_sharpened(ADVANTAGES, scores, group, MASK, WEIGHT), ADVANTAGES)


def test_impossible_answers_are_finite():
    sharpened = novelty_sharpened(ADVANTAGES, np.float32([[-1e4], [-0.5], [-0.6], [-0.9]]), GROUP, MASK, WEIGHT)
    assert np.isfinite(sharpened).all()


@pytest.mark.parametrize("name", ["strength", "cap"])
def test_a_bonus_is_not_negative(name):
    with pytest.raises(ValueError, match=f"{name} is -1.0"):
        novelty_sharpened(ADVANTAGES, SCORES, GROUP, MASK, WEIGHT, **{name: -1.0})
