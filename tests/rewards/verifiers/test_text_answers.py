"""Host verifiers: the cards' examples, partial credit, and hostile text."""

from __future__ import annotations

import time

import pytest

from jaxrl_llm.rewards import (
    answer_order_share,
    answer_position_share,
    column_share,
    countdown,
    exact_match,
    extract_answer,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<t>1</t><a>132</a>", "132"),
        ("<a>1</a><a> 2 \n</a>", "2"),
        ("<a><a>2</a></a>", "2"),
        ("<a></a>", ""),
        ("<a>1</a><a>2", None),
        ("</a><a>", None),
        ("12", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_exact_match_compares_text():
    assert exact_match(["<a>12</a>", "<a>012</a>", "12"], ["12"] * 3) == [1, 0, 0]


@pytest.mark.parametrize(
    ("body", "completion", "reward"),
    [
        ("C:3 6 12>30", "<a>12*3-6</a>", 1),
        ("C:3 6 12>30", "<t>12-6=6;no</t><a>(12*3)-6</a>", 1),
        ("C:3 3 8 8>24", "<a>8/(3-8/3)</a>", 1),
        ("C:3 7 12>30", "<a>(12-7)*3+15</a>", 0.1),  # right value, wrong numbers
        ("C:3 6 12>30", "<a>12*3</a>", 0.1),  # a number is left
        ("C:3 3>9", "<a>3*3*3/3</a>", 0.1),  # a number is used too often
        ("C:3 6 12>30", "<a>12+3+6</a>", 0.1),  # wrong value
        ("C:3 6 12>30", "<a>12*3-6=30</a>", 0.1),  # illegal character
        ("C:3 6 12>30", "<a>12 * 3 - 6</a>", 0.1),
        ("C:3 6 12>30", "<a>-6+12*3</a>", 0.1),  # unary minus
        ("C:3 6 12>30", "<a>12/(6-3-3)</a>", 0.1),  # division by zero
        ("C:3 6 12>30", "<a>126</a>", 0.1),
        ("C:3 6 12>30", "<a></a>", 0.1),
        ("C:3 6 12>30", "<a>12*3-6", 0),
        ("C:3 6 12>30", "12*3-6", 0),
    ],
)
def test_countdown(body, completion, reward):
    assert countdown([completion], [body]) == [reward]


@pytest.mark.parametrize(
    "hostile", ["(" * 100_000, "9**9**9**9", "9" * 100_000, "__import__('os')", "1" + "*99" * 60_000, "((1" * 30]
)
def test_hostile_expressions_fail_at_once(hostile):
    started = time.perf_counter()
    assert countdown([f"<a>{hostile}</a>"], ["C:3 6>9"]) == [0.1]
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("body", ["A:1+2", "C:3 6", "C:3 x>9", "C:>3"])
def test_a_prompt_that_is_no_countdown_problem_is_an_error(body):
    with pytest.raises(ValueError, match="not a Countdown problem"):
        countdown(["<a>1</a>"], [body])


def test_share_of_positions():
    reference = ["1 3 5 9"] * 6
    texts = ["<a>1 3 5 9</a>", "<a>1 3 9 5</a>", "<a>1 3</a>", "<a>1 3 5 9 9 9 9 9</a>", "<a></a>", "1 3 5 9"]
    assert answer_position_share(texts, reference) == [1, 0.5, 0.5, 0.5, 0, 0]


def test_share_of_pairs_in_order():
    texts = ["<a>1 3 5</a>", "<a>5 3 1</a>", "<a>1 5 3</a>", "<a>1 3</a>", "<a>1 3 3</a>", "1 3 5"]
    assert answer_order_share(texts, ["1 3 5"] * 6) == pytest.approx([1, 0, 2 / 3, 0, 0, 0])
    assert answer_order_share(["<a>2 2 1</a>"], ["1 2 2"]) == pytest.approx([1 / 3])


def test_share_of_columns():
    items = [{"think": "7+5+0=12;4+8+1=13"}] * 6
    texts = [
        "<t>7+5+0=12;4+8+1=13</t><a>132</a>",
        "<t>7+5+0=12;4+8+1=14</t><a>142</a>",
        "<t>7+5+0=12</t><a>12</a>",
        "<t>7+5+0=12;4+8+1=13;1;1</t><a>132</a>",
        "<t>7+5+0=12;4+8+1=13",
        "<a>132</a>",
    ]
    assert column_share(texts, items) == [1, 0.5, 0.5, 0.5, 0, 0]
    assert column_share(["<t></t><a>U</a>"], [{"think": ""}]) == [1]


@pytest.mark.parametrize("reward", [exact_match, answer_position_share, answer_order_share])
def test_unequal_columns_are_an_error(reward):
    with pytest.raises(ValueError):
        reward(["<a>1</a>"], ["1", "2"])
