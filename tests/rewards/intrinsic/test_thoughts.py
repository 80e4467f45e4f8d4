"""Where a thought ends, and the reference answer behind it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import answer_after_thought, thought_length, thought_mask

# Two prompts of 3 and 2 tokens; the mark is 4. The second row's thought is never closed, the third's mark is padding.
PROMPT = jnp.array([[1, 20, 21], [0, 1, 22], [1, 23, 24]])
PROMPT_LENGTH = jnp.array([3, 2, 3])
TOKENS = jnp.array([[3, 30, 4, 40, 2], [3, 31, 32, 33, 34], [3, 2, 4, 0, 0]])
LENGTH = jnp.array([5, 5, 2])
ANSWER = jnp.array([[50, 51, 0], [52, 0, 0], [53, 54, 55]])
ANSWER_LENGTH = jnp.array([2, 1, 3])
ROWS = (PROMPT, PROMPT_LENGTH, TOKENS, LENGTH, ANSWER, ANSWER_LENGTH)


def sequences(view):
    """Of each row (prompt, what is scored), as the lists that lengths cut out."""
    return [
        (
            view.prompt_tokens[row, view.prompt_tokens.shape[1] - int(view.prompt_length[row]) :].tolist(),
            view.tokens[row, : int(view.length[row])].tolist(),
        )
        for row in range(len(view.length))
    ]


def test_worked_example():
    view = answer_after_thought(*ROWS, mark_id=4, opening_ids=(5,), closing_ids=(6, 2))
    assert sequences(view) == [
        ([1, 20, 21, 3, 30, 4], [5, 50, 51, 6, 2]),
        ([1, 22], [5, 52, 6, 2]),
        ([1, 23, 24], [5, 53, 54, 55, 6, 2]),
    ]
    np.testing.assert_array_equal(view.mask, [[1, 1, 1, 1, 1, 0], [0] * 6, [0] * 6])
    np.testing.assert_array_equal(thought_length(TOKENS, LENGTH, mark_id=4), [3, 0, 0])


def test_without_tags_the_answer_alone_is_scored():
    view = answer_after_thought(*ROWS, mark_id=4)
    assert [scored for _, scored in sequences(view)] == [[50, 51], [52], [53, 54, 55]]
    np.testing.assert_array_equal(view.mask[0], [1, 1, 0])


def test_padding_is_never_read():
    def view(pad):
        padded = (jnp.where(jnp.arange(3) < 3 - PROMPT_LENGTH[:, None], pad, PROMPT), PROMPT_LENGTH)
        padded += (jnp.where(jnp.arange(5) < LENGTH[:, None], TOKENS, pad), LENGTH)
        padded += (jnp.where(jnp.arange(3) < ANSWER_LENGTH[:, None], ANSWER, pad), ANSWER_LENGTH)
        return answer_after_thought(*padded, mark_id=4, closing_ids=(6,))

    assert sequences(view(4)) == sequences(view(0))  # 4 is the mark
    wide = [jnp.pad(PROMPT, ((0, 0), (2, 0))), PROMPT_LENGTH, jnp.pad(TOKENS, ((0, 0), (0, 3))), LENGTH]
    wide += [jnp.pad(ANSWER, ((0, 0), (0, 1))), ANSWER_LENGTH]
    assert sequences(answer_after_thought(*wide, mark_id=4, closing_ids=(6,))) == sequences(view(0))


def test_an_answer_of_no_tokens_has_nothing_that_counts():
    view = answer_after_thought(*ROWS[:-1], jnp.zeros(3, jnp.int32), mark_id=4)
    np.testing.assert_array_equal(view.length, 0)
    np.testing.assert_array_equal(view.mask, 0)


def test_the_first_mark_ends_the_thought_and_belongs_to_it():
    tokens, mask = jnp.array([[9, 4, 9, 4]]), jnp.array([[0.0, 1, 1, 1]])
    np.testing.assert_array_equal(thought_mask(tokens, jnp.array([4]), mask, mark_id=4), [[0, 1, 0, 0]])
    np.testing.assert_array_equal(thought_mask(tokens, jnp.array([1]), mask, mark_id=4), [[0, 0, 0, 0]])


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        thought_mask(TOKENS, LENGTH, jnp.ones((3, 4)), mark_id=4)
    with pytest.raises(AssertionError):
        answer_after_thought(*ROWS[:-1], jnp.zeros(2, jnp.int32), mark_id=4)
