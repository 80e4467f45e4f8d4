"""Turns of a completion, compared with those of a reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import generalized_advantages
from jaxrl_llm.data import CharacterTokenizer, reference_response, tasks
from jaxrl_llm.rewards import (
    duration_weights,
    episode_reward,
    normalized_turn_rewards,
    reference_progress,
    self_correction_rewards,
    separated_turns,
    turn_end_rewards,
)
from jaxrl_llm.rewards.process.turn_rewards import SEPARATOR_ID

TOKENIZER = CharacterTokenizer()


def encoded(texts, width=24, pad=0):
    rows = [TOKENIZER.encode(text) for text in texts]
    tokens = np.full((len(rows), width), pad, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)


def progress(texts, references, max_turns=3, pad=0):
    tokens, length = encoded(texts, pad=pad)
    demonstration = encoded(references, 20, pad)
    return reference_progress(
        tokens, length, separated_turns(tokens, length), *demonstration, max_turns=max_turns
    ).tolist()


def test_the_default_separator_is_that_of_a_scratchpad():
    assert TOKENIZER.id(";") == SEPARATOR_ID
    item = tasks.task("addition").generate(level=3, count=1)[0]
    tokens, length = encoded([reference_response(item, True)], 48)
    assert separated_turns(tokens, length).max() == 2


@pytest.mark.parametrize("pad", [0, SEPARATOR_ID])
def test_a_separator_belongs_to_the_turn_that_it_ends(pad):
    tokens, length = encoded(["12;3;4", ";;", "1", ""], 8, pad)
    wanted = [[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 2, 2, 2, 2, 2], [0] * 8, [0] * 8]
    assert separated_turns(tokens, length).tolist() == wanted


@pytest.mark.parametrize(
    ("text", "rewards"),
    [
        ("a1;b2;c3", [1, 1, 1]),
        ("a1;b2;c3;d", [1, 1, 0]),
        ("a1;b2", [1, 0, 0]),  # the reference goes on
        ("a1;b2;", [1, 1, 0]),
        ("a1;b;c3", [1, 0, 1]),
        ("a1;xyz;c3", [1, 0, 1]),  # a turn is compared with its own, wherever it begins
        ("a1a1;b2;c3", [0, 1, 1]),
        ("b2;a1;c3", [0, 0, 1]),
        (";a1;b2;c3", [0, 0, 0]),
        ("", [0, 0, 0]),
    ],
)
@pytest.mark.parametrize("pad", [0, SEPARATOR_ID])
def test_turns_that_the_reference_took(text, rewards, pad):
    assert progress([text], ["a1;b2;c3"], pad=pad) == [rewards]
    assert progress([text], ["a1;b2;c3"], max_turns=2, pad=pad) == [rewards[:2]]


def test_turns_that_neither_took_earn_nothing():
    assert progress(["a;b", "a;b;"], ["a;b", "a;b;"], max_turns=4) == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_empty_shapes():
    empty, length = jnp.zeros((2, 0), jnp.int32), jnp.zeros(2, jnp.int32)
    assert separated_turns(empty, length).shape == (2, 0)
    assert reference_progress(empty, length, empty, *encoded(["1", "2"]), max_turns=2).tolist() == [[0, 0], [0, 0]]


def test_no_turns_are_refused():
    with pytest.raises(ValueError, match=r"max_turns is 0.*at least 1"):
        progress(["a"], ["a"], max_turns=0)


# ---- rewards of turns -----------------------------------------------------------------------------------------------

TURN = jnp.array([[0, 0, 0, 1, 1, 1, 2, 2, 2]])
MASK = jnp.array([[1.0, 1, 1, 0, 1, 1, 0, 1, 0]])
SCORES = jnp.array([[0.2, 0.3, 0.5]])


def test_rewards_stand_at_the_ends_of_turns():
    dense = turn_end_rewards(SCORES, TURN, MASK)
    np.testing.assert_allclose(dense[0], [0, 0, 0.2, 0, 0, 0.3, 0, 0.5, 0], rtol=1e-6)
    single = turn_end_rewards(SCORES, TURN, MASK, density="single")
    np.testing.assert_allclose(single[0], [0, 0, 0, 0, 0, 0, 0, 1.0, 0], rtol=1e-6)


def test_a_turn_that_was_not_taken_or_has_no_place_gives_nothing():
    mask = MASK.at[0, :3].set(0)
    np.testing.assert_allclose(turn_end_rewards(SCORES, TURN, mask).sum(), 0.8, rtol=1e-6)
    np.testing.assert_allclose(turn_end_rewards(SCORES[:, :2], TURN, MASK).sum(), 0.5, rtol=1e-6)
    np.testing.assert_array_equal(turn_end_rewards(SCORES, TURN, MASK * 0, density="single"), 0)


def test_masked_gae_carries_over_observations():
    rewards = jnp.array([[0.0, 0, 0, 0, 0, 1]])
    values, mask = jnp.array([[0.5, 0.4, 0.9, 0.9, 0.3, 0.6]]), jnp.array([[1.0, 1, 0, 0, 1, 1]])
    placed = turn_end_rewards(jnp.array([[0.0, 1.0]]), jnp.array([[0, 0, 0, 0, 1, 1]]), mask)
    np.testing.assert_array_equal(placed, rewards)
    advantages, _ = generalized_advantages(placed, values, mask, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages[0], [0.4187, 0.546, 0, 0, 0.68, 0.4], rtol=2e-6)


def test_scores_of_a_won_episode_are_shared_out_and_those_of_a_lost_one_measured_by_what_there_was():
    scores = jnp.array([[1.0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    found = normalized_turn_rewards(scores, jnp.array([1.0, 0, 1]), attainable=4.0)
    np.testing.assert_allclose(found, [[1 / 3, 0, 1 / 3, 1 / 3], [0.25, 0, 0, 0], [0, 0, 0, 0]], rtol=1e-6)


def test_the_reward_of_an_episode_is_the_sum_or_one_turn():
    rewards = jnp.array([[1.0, 0, 0.5], [0, 2, 0]])
    assert episode_reward(rewards).tolist() == [1.5, 2]
    assert episode_reward(rewards, turn=1).tolist() == [0, 2]
    assert episode_reward(rewards, turn=-1).tolist() == [0.5, 0]


FIRST, SECOND = [0.0, 0, 1, 1], [0.0, 1, 0, 1]


def self_corrected(stage, **options):
    """The card's example: KL 0.1 of the first turn, spread over two tokens, and 0.2 of the second."""
    turn, mask = jnp.tile(jnp.array([0, 0, 0, 1]), (4, 1)), jnp.tile(jnp.array([1.0, 1, 0, 1]), (4, 1))
    old = jnp.tile(jnp.array([-1.0, -2.0, 50.0, -0.5]), (4, 1))
    reference = old - jnp.array([0.04, 0.06, 7.0, 0.2])
    rewards = jnp.stack([jnp.array(FIRST), jnp.array(SECOND)], axis=1)
    return self_correction_rewards(rewards, turn, mask, old, reference, stage=stage, **options)


def test_both_stages_of_self_correction_in_one_run():
    mask = jnp.array([[1.0, 1.0, 1.0, 1.0]])
    rewards, turn = jnp.array([[0.0, 1.0]]), jnp.array([[0, 0, 1, 1]])
    old, reference = jnp.full((1, 4), -0.5), jnp.full((1, 4), -0.6)
    given = (rewards, turn, mask, old, reference)
    for step, stage in ((0, "first"), (4, "first"), (5, "second"), (6, "second")):
        together = self_correction_rewards(*given, jnp.int32(step), first_stage_steps=5)
        np.testing.assert_array_equal(together, self_correction_rewards(*given, stage=stage))
    np.testing.assert_allclose(self_correction_rewards(*given, stage="first"), [[-0.02, 1]], rtol=1e-5)
    with pytest.raises(ValueError, match="first_stage_steps is 5"):
        self_correction_rewards(*given, first_stage_steps=5)


def test_self_correction_example():
    one, two = self_corrected("first"), self_corrected("second")
    np.testing.assert_allclose(one[:, 0], [-0.01] * 4, rtol=1e-5)
    np.testing.assert_allclose(one[:, 1], SECOND)
    np.testing.assert_allclose(two[:, 0], [-0.001, -0.001, 0.999, 0.999], rtol=2e-5)
    np.testing.assert_allclose(two[:, 1], [-0.002, 10.998, -10.002, 0.998], rtol=1e-5)
    np.testing.assert_allclose(self_corrected("second", alpha=0.0, kl_coefficient=0.0)[:, 1], SECOND)


def test_an_attempt_that_was_not_made_is_not_fined():
    turn, mask = jnp.zeros((1, 3), jnp.int32), jnp.array([[1.0, 1, 0]])
    nothing = jnp.zeros((1, 3))
    shaped = self_correction_rewards(jnp.array([[1.0, 0.0]]), turn, mask, nothing, nothing)
    assert shaped.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: turn_end_rewards(SCORES, TURN, MASK, density="sparse"), "density is 'sparse'"),
        (lambda: normalized_turn_rewards(SCORES, jnp.ones(1), attainable=0.0), "attainable is 0.0"),
        (lambda: episode_reward(SCORES, turn=3), "turn is 3, but episodes have up to 3 turns"),
        (lambda: self_corrected("third"), "stage is 'third'"),
        (
            lambda: self_correction_rewards(SCORES, TURN, MASK, MASK, MASK),
            "turn_rewards has 3 turns; self-correction compares two",
        ),
    ],
)
def test_options_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def probability_of_the_slow_arm(weighted, updates=500, actors=8, window=10):
    """Of two arms of 1 and 10 ticks that pay 0.5 and 0.8, after REINFORCE on what finishes within a window."""
    ticks, pays, rng, logit = np.array([1, 10]), np.array([0.5, 0.8]), np.random.default_rng(0), 0.0
    weights, mask = jax.jit(duration_weights), jnp.ones((80, 1))
    for _ in range(updates):
        share = 1 / (1 + np.exp(-logit))
        arms = (rng.random((actors, window)) < share).astype(int)
        there = (np.cumsum(ticks[arms], axis=1) <= window).ravel()
        paid = (rng.random(arms.shape) < pays[arms]).ravel()
        counted = there.astype(np.float32)
        w = weights(ticks[arms].ravel().astype(np.float32), mask, counted)[:, 0] if weighted else counted
        logit += 0.15 * float((np.asarray(w) * paid * (arms.ravel() - share) * counted).sum() / max(counted.sum(), 1))
    return 1 / (1 + np.exp(-logit))


def test_weights_of_actions_and_of_whole_rows():
    weights = jax.jit(duration_weights, static_argnames="whole_rows")
    durations, turn, mask = jnp.array([[1.0, 10], [4, 5]]), jnp.array([[0, 1], [0, 1]]), jnp.ones((2, 2))
    np.testing.assert_allclose(weights(durations, mask, jnp.ones(2), turn), [[0.2, 2], [0.8, 1]])  # of the card
    np.testing.assert_allclose(weights(durations, mask, jnp.ones(2), turn, whole_rows=True), [[1.1] * 2, [0.9] * 2])
    np.testing.assert_allclose(weights(durations, mask, jnp.array([1, 0]), turn, whole_rows=True), [[1, 1], [0, 0]])
    np.testing.assert_allclose(weights(durations * 0, mask, jnp.ones(2), turn, whole_rows=True), 1)
    np.testing.assert_allclose(weights(durations.sum(1), mask, jnp.ones(2)), [[1.1] * 2, [0.9] * 2])
    with pytest.raises(ValueError, match="durations has 2 turns per row, which needs turn"):
        duration_weights(durations, mask, jnp.ones(2))


def test_what_takes_long_is_learned_where_durations_count():
    assert probability_of_the_slow_arm(weighted=False) < 0.1
    assert probability_of_the_slow_arm(weighted=True) > 0.9
