"""Turns of a completion, compared with those of a reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import CharacterTokenizer, reference_response, tasks
from jaxrl_llm.rewards import reference_progress, separated_turns, turns

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
    assert TOKENIZER.id(";") == turns.SEPARATOR_ID
    item = tasks.task("addition").generate(level=3, count=1)[0]
    tokens, length = encoded([reference_response(item, True)], 48)
    assert separated_turns(tokens, length).max() == 2


@pytest.mark.parametrize("pad", [0, turns.SEPARATOR_ID])
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
@pytest.mark.parametrize("pad", [0, turns.SEPARATOR_ID])
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
