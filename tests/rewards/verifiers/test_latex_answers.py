"""Answers in LaTeX: the same mathematics in other words, and what would keep a computer algebra system busy."""

from __future__ import annotations

import time

import pytest

from jaxrl_llm.rewards import latex_match
from jaxrl_llm.rewards.verifiers import latex_answers
from jaxrl_llm.run.recipes import reward_terms


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        (r"so \boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}", 1.0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1.0),
        (r"\boxed{(1, 2]}", r"(1, 2]", 1.0),
        (r"\boxed{[1, 2)}", r"(1, 2]", 0.0),
        (r"\boxed{2\sqrt{3}}", r"thus \boxed{\sqrt{12}}", 1.0),
        ("#### 50%", "50", 1.0),  # as number_match has it
        ("#### 20k", "20000", 1.0),
        (r"\boxed{x + 1}", "x + 2", 0.0),
        ("x + 1", "x + 1", 0.0),  # no mark
        (r"\boxed{}", "x + 1", 0.0),
        (r"\boxed{\begin{pmatrix}", "x + 1", 0.0),
    ],
)
def test_the_same_mathematics(completion, answer, reward):
    assert latex_match([completion], [answer]) == [reward]


def test_a_comparison_that_takes_too_long_is_ended_and_the_next_one_answered():
    assert latex_match([r"\boxed{y}"], ["x"]) == [0.0]  # the process is there
    (process,), started = latex_answers._workers._processes, time.monotonic()
    endless = r"\boxed{\sum_{k=1}^{10^{9}} \frac{\sin(k^{k})}{\cos(k!)+7^{7^{7^{7}}}}}"
    assert latex_match([endless], [r"9^{9^{9^{9}}}"], seconds=0.2) == [0.0]
    assert time.monotonic() - started < 5
    assert latex_match([r"\boxed{1/x}"], [r"\frac{1}{x}"]) == [1.0]
    assert latex_answers._workers._processes != [process]


def test_a_process_that_dies_is_started_again():
    latex_match([r"\boxed{y}"], ["x"])
    (process,) = latex_answers._workers._processes
    process.process.kill()
    process.process.wait()
    assert latex_match([r"\boxed{1/x}"], [r"\frac{1}{x}"]) == [1.0]


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"the reference answer of row 0 is '.*', which math-verify cannot parse"):
        latex_match([r"\boxed{1}"], [r"\text{}"])
    with pytest.raises(ValueError, match="seconds is 0; it must be above 0"):
        latex_match(["1"], ["1"], seconds=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs the package math-verify; install it with: pip install 'jaxrl_llm\[math\]'"
    ):
        latex_match(["1"], ["1"])


def test_recipes_can_name_it():
    (term,) = reward_terms([{"latex_match": {"seconds": 2}}])
    assert term.on_host
