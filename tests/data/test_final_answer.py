"""Where the final answer of a worked solution stands."""

from __future__ import annotations

import pytest

from jaxrl_llm.data.final_answer import after_hashes, in_last_box, marked_answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("48/2=24\n#### 72", "72"),
        ("#### 1\n#### 2", "2"),
        ("####  -3 \nmore", "-3"),
        ("####72", "72"),
        ("####", ""),
        ("#### \n\n5", "5"),
        ("### 72", None),
        ("", None),
    ],
)
def test_after_hashes(text, answer):
    assert after_hashes(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{72}", "72"),
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox {3}", "3"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{2}}", "2"),
        (r"}\boxed{4}", "4"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        (r"\boxed 5", None),
        ("{5}", None),
        ("", None),
    ],
)
def test_last_box(text, answer):
    assert in_last_box(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"#### 1 \boxed{2}", "2"),
        (r"\boxed{2} #### 1", "1"),
        (r"#### 1 \boxed{2", r"1 \boxed{2"),
        (r"#### \boxed{2}", "2"),
        ("five", None),
    ],
)
def test_the_last_mark_wins(text, answer):
    assert marked_answer(text) == answer


def test_many_open_boxes_take_no_long():
    assert in_last_box(r"\boxed{" * 100_000) is None
