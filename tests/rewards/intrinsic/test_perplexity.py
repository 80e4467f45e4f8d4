"""NOVER: perplexities of the reference answer under a proxy, compared within the group."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import perplexity_ranks, reasoning_perplexity

MARK = 4
NLL, THOUGHTS = jnp.array([0.3, 2.0, 1.5, 0.1]), [20, 10, 100, 50]
TOKENS = jnp.array([[MARK if place == size - 1 else 9 for place in range(100)] for size in THOUGHTS])
LENGTH, GROUP, WEIGHT = jnp.full(4, 100), jnp.zeros(4, jnp.int32), jnp.ones(4)
VALID = jnp.array([1.0, 1, 1, 0])
PPL = jnp.array([1.139257, 2.718282, 1.648721, 1.037746])
DIGITS = {"rtol": 1e-5, "atol": 1e-6}


def ranks(perplexity=PPL, valid=VALID, group=GROUP, weight=WEIGHT, **weights):
    return perplexity_ranks(perplexity, valid, TOKENS, LENGTH, group, weight, mark_id=MARK, **weights)


def test_worked_example():
    logprobs = -jnp.stack([NLL - 0.05, NLL + 0.05, jnp.full(4, 7.0)], axis=1)
    mask = jnp.array([[1.0, 1, 0]] * 4)
    np.testing.assert_allclose(reasoning_perplexity(logprobs, mask, TOKENS, LENGTH, mark_id=MARK), PPL, **DIGITS)
    np.testing.assert_allclose(ranks(), [2.5, 1.333333, 1.666667, 0], **DIGITS)
    parts = {
        "format_weight": [1, 1, 1, 0],
        "reasoning_weight": [1, 0.333333, 0.666667, 0],
        "efficiency_weight": [0.5, 0, 0, 0],
    }
    for name, expected in parts.items():
        alone = dict.fromkeys(parts, 0.0) | {name: 1.0}
        np.testing.assert_allclose(ranks(**alone), expected, **DIGITS)


def test_only_the_order_of_perplexities_matters_and_not_that_of_rows():
    np.testing.assert_array_equal(ranks(jnp.exp(PPL * 3)), ranks())
    order = jnp.array([2, 0, 3, 1])
    there = perplexity_ranks(PPL[order], VALID[order], TOKENS[order], LENGTH, GROUP, WEIGHT, mark_id=MARK)
    np.testing.assert_array_equal(there, ranks()[order])


def test_groups_do_not_see_each_other_and_absent_rows_are_nobody():
    alone = ranks(valid=jnp.ones(4), group=jnp.array([7, 7, 3, 3]))
    # In both groups of two the first sample of lower perplexity wins; it bests the other where that thought is longer.
    np.testing.assert_allclose(alone, [2.0, 1.5, 1.5, 2.0 + 1.0], **DIGITS)
    absent = ranks(valid=jnp.ones(4), weight=jnp.array([1.0, 1, 1, 0]))
    np.testing.assert_array_equal(absent, ranks())


def test_the_only_valid_sample_has_no_bonus_and_equal_ones_are_ranked_by_their_place():
    np.testing.assert_allclose(ranks(valid=jnp.array([0.0, 1, 0, 0])), [0, 2, 0, 0], **DIGITS)
    np.testing.assert_array_equal(ranks(valid=jnp.zeros(4)), 0)
    np.testing.assert_allclose(ranks(jnp.ones(4), jnp.ones(4)), [2, 1.75, 1.5, 1.25], **DIGITS)


def test_a_thought_that_was_cut_off_is_infinitely_perplexing_and_never_valid():
    mask = jnp.array([[1.0], [0.0]])
    found = reasoning_perplexity(jnp.array([[-1.0], [0.0]]), mask, TOKENS[:2], LENGTH[:2], mark_id=MARK)
    assert np.isfinite(found[0])
    assert np.isinf(found[1])
    rewards = ranks(jnp.array([1.0, jnp.inf, 2.0, 3.0]), jnp.ones(4))
    assert rewards[1] == 0
    assert np.isfinite(rewards).all()


def test_a_thought_of_one_token_has_no_discount():
    tokens = jnp.array([[MARK, 0], [9, MARK]])
    found = reasoning_perplexity(jnp.full((2, 1), -1.0), jnp.ones((2, 1)), tokens, jnp.array([1, 2]), mark_id=MARK)
    np.testing.assert_allclose(found, np.exp([1, 1 / (1 + np.log10(2))]), **DIGITS)


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        ranks(jnp.ones(3))
    with pytest.raises(AssertionError):
        reasoning_perplexity(jnp.ones((2, 1)), jnp.ones((2, 2)), TOKENS[:2], LENGTH[:2], mark_id=MARK)
