"""DPH-RL: which prompts are rehearsed, and which stored answers a step takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.selection import cycled_rows, near_perfect_groups

CORRECT = jnp.array([1.0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1])
GROUP, SAMPLE, WEIGHT = jnp.repeat(jnp.arange(2), 8), jnp.tile(jnp.arange(8), 2), jnp.ones(16)


def test_worked_example():
    first_four = near_perfect_groups(CORRECT, SAMPLE, GROUP, WEIGHT)
    np.testing.assert_array_equal(first_four, [1] * 8 + [0] * 8)
    seven_of_eight = near_perfect_groups(CORRECT, SAMPLE, GROUP, WEIGHT, attempts=8, min_correct=7)
    np.testing.assert_array_equal(seven_of_eight, [0] * 8 + [1] * 8)


def test_unsolved_prompts_are_explored():
    np.testing.assert_array_equal(near_perfect_groups(jnp.zeros(16), SAMPLE, GROUP, WEIGHT, min_correct=1), 0)


def test_bad_counts_are_named():
    with pytest.raises(ValueError, match="min_correct is 5; it must be between 1 and attempts, which is 4"):
        near_perfect_groups(CORRECT, SAMPLE, GROUP, WEIGHT, min_correct=5)


@pytest.mark.parametrize(("stored", "rows"), [(10, 4), (4, 10), (5, 5), (1, 3)])
def test_every_pass_over_the_stored_answers_takes_each_once(stored, rows):
    take = jax.jit(lambda step: cycled_rows(jax.random.key(3), step, stored=stored, rows_per_step=rows))
    sequence = np.concatenate([take(jnp.int32(step)) for step in range(2 * stored)])
    for start in range(0, len(sequence), stored):
        np.testing.assert_array_equal(np.sort(sequence[start : start + stored]), np.arange(stored))


def test_passes_are_ordered_differently_and_a_resumed_run_goes_on_where_it_was():
    key = jax.random.key(0)
    chunks = [np.asarray(cycled_rows(key, step, stored=20, rows_per_step=20)) for step in range(3)]
    assert (chunks[0] != chunks[1]).any()
    np.testing.assert_array_equal(cycled_rows(key, 2, stored=20, rows_per_step=20), chunks[2])


def test_nothing_to_rehearse_is_an_error():
    with pytest.raises(ValueError, match="stored is 0"):
        cycled_rows(jax.random.key(0), 0, stored=0, rows_per_step=2)
