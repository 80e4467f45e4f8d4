"""The built-in tokenizer: exact round trips, control tokens as single tokens, errors that name the place."""

from __future__ import annotations

import random

import pytest

from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.data.tokenizer import CHARACTERS, CONTROLS

TOKENIZER = CharacterTokenizer()


def test_vocabulary_is_every_character_and_every_control_token_once():
    assert TOKENIZER.vocabulary_size == len(CHARACTERS) + len(CONTROLS) == len(set(TOKENIZER.tokens)) == 100
    assert (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1, 2)
    assert set("0123456789azAZ+-*/%=()<>,.;:?!&~#|_'\" \n") <= set(CHARACTERS)


@pytest.mark.parametrize("control", CONTROLS)
def test_control_token_is_one_token(control):
    assert TOKENIZER.encode(f"1{control}2") == [TOKENIZER.id("1"), TOKENIZER.id(control), TOKENIZER.id("2")]
    assert TOKENIZER.decode([TOKENIZER.id(control)]) == control


@pytest.mark.parametrize("text", ["", "<", "<<a>>", "a<b>c", "</", "<t", "</t></t>", "<x>", "1<2>\n", "< a>"])
def test_angle_brackets_are_characters_where_no_control_token_stands(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_longest_match_wins():
    assert TOKENIZER.encode("<<a>>") == [TOKENIZER.id("<"), TOKENIZER.id("<a>"), TOKENIZER.id(">")]
    assert len(TOKENIZER.encode("<x>")) == 3


def test_random_round_trips():
    rng = random.Random(0)
    pieces = [*CHARACTERS, *CONTROLS, "<", ">"]
    for _ in range(200):
        text = "".join(rng.choices(pieces, k=30))
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    # Without angle brackets nothing can spell a control token, so ids come back exactly.
    harmless = [number for number, token in enumerate(TOKENIZER.tokens) if token not in "<>"]
    for _ in range(200):
        ids = rng.choices(harmless, k=30)
        assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids


@pytest.mark.parametrize(
    ("text", "place"), [("ab€c", "'€' at position 2"), ("<a>é", "'é' at position 3"), ("\t", "position 0")]
)
def test_unknown_character_is_named_with_its_position(text, place):
    with pytest.raises(ValueError, match=place):
        TOKENIZER.encode(text)


@pytest.mark.parametrize("ids", [[3, 100], [-1]])
def test_unknown_id_is_an_error(ids):
    with pytest.raises(ValueError, match="outside"):
        TOKENIZER.decode(ids)


def test_id_of_no_single_token_is_an_error():
    with pytest.raises(ValueError, match="'ab'"):
        TOKENIZER.id("ab")
