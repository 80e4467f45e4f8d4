"""Voting: the worked examples, the definition by enumeration, ties, unparsable samples, and what is refused."""

from __future__ import annotations

import time
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.evaluation import agreement, consensus, majority_at_k, mean_majority_at_k, pass_at_k


def credit(subset, gold):
    """Credit of one set of voters, straight from the definition."""
    votes = Counter(answer for answer in subset if answer is not None)
    top = [answer for answer in votes if votes[answer] == max(votes.values())]
    return 1 / len(top) if gold in top else 0.0


def test_worked_examples():
    np.testing.assert_allclose(majority_at_k([["a", "b", "a", "c", "a", "b"]], ["a"], 3), [0.6], atol=1e-12)
    np.testing.assert_allclose(majority_at_k([[1, 2, 2, 1]], [1], 4), [0.5], atol=1e-12)
    np.testing.assert_allclose(consensus([[1, 2, 2, 1]], [1]), [0.5], atol=1e-12)


answers_of_one_prompt = st.lists(st.sampled_from([None, 1, 2, 3, 4, 5]), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(answers=answers_of_one_prompt, data=st.data())
def test_equals_enumeration_over_all_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    enumerated = np.mean([credit(subset, 1) for subset in combinations(answers, k)])
    np.testing.assert_allclose(majority_at_k([answers], [1], k), [enumerated], atol=1e-12)
    np.testing.assert_allclose(consensus([answers], [1]), [credit(answers, 1)], atol=1e-12)


@given(answers=answers_of_one_prompt)
def test_maj_at_1_is_the_accuracy(answers):
    accuracy = np.mean([answer == 1 for answer in answers])
    np.testing.assert_allclose(majority_at_k([answers], [1], 1), [accuracy], atol=1e-12)
    np.testing.assert_allclose(majority_at_k([answers], [1], 1), pass_at_k([answers.count(1)], len(answers), 1))


@settings(max_examples=30, deadline=None)
@given(answers=answers_of_one_prompt, data=st.data())
def test_the_classes_share_one_vote(answers, data):
    """Over all possible references the credit sums to the chance that any of the k voters has an answer."""
    k = data.draw(st.integers(1, len(answers)))
    total = sum(majority_at_k([answers], [gold], k)[0] for gold in {a for a in answers if a is not None})
    parsable = len(answers) - answers.count(None)
    np.testing.assert_allclose(total, pass_at_k([parsable], len(answers), k)[0], atol=1e-12)


def test_order_of_samples_and_names_of_answers_do_not_matter():
    answers = [1, 2, 2, None, 1, 3, 1, 2]
    renamed = [{1: "one", 2: "two", 3: "three", None: None}[a] for a in reversed(answers)]
    np.testing.assert_allclose(majority_at_k([answers], [1], 5), majority_at_k([renamed], ["one"], 5), atol=1e-12)


def test_unparsable_samples_form_no_class():
    np.testing.assert_allclose(consensus([[None, None, None, 7]], [7]), [1.0])
    np.testing.assert_allclose(majority_at_k([[None, None, None, 7]], [7], 2), [0.5], atol=1e-12)
    np.testing.assert_allclose(majority_at_k([[None, None]], [7], 2), [0.0])
    np.testing.assert_allclose(majority_at_k([[None, None]], [7], 1), [0.0])
    np.testing.assert_allclose(agreement([[None, None, None, 7], [None, None], [7, 7]]), [0.25, 0.0, 1.0])


def test_a_majority_beats_the_accuracy_and_a_minority_loses():
    likely, unlikely = ["a"] * 12 + ["b"] * 4, ["a"] * 4 + ["b"] * 12
    assert majority_at_k([likely], ["a"], 5)[0] > 0.75
    assert majority_at_k([unlikely], ["a"], 5)[0] < 0.25


def test_mean_counts_every_prompt_the_same():
    answers, gold = [["a", "a", "b"], ["b"] * 7], ["a", "a"]
    assert mean_majority_at_k(answers, gold, 3) == pytest.approx(0.5)


def test_many_samples_are_exact_and_quick():
    """256 samples, 64 voters: C(256, 64) subsets could never be listed; equal classes must share the vote equally."""
    answers = [i % 4 for i in range(256)]
    started = time.monotonic()
    np.testing.assert_allclose(majority_at_k([answers] * 2, [0, 3], 64), [0.25, 0.25], atol=1e-9)
    singletons = list(range(64))
    np.testing.assert_allclose(majority_at_k([singletons], [0], 32), [1 / 64], atol=1e-12)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("answers", "gold", "k", "message"),
    [
        ([[1, 2]], [1], 3, "k=3 is more than the 2 samples of prompt 0"),
        ([[1, 2]], [1], 0, "k=0"),
        ([[1, 2]], [1, 2], 1, "one reference answer for each of the 1 prompts"),
        ([[1, 2]], [None], 1, r"gold\[0\]=None"),
        (["a", "b"], ["a", "b"], 1, "one list a prompt"),
        ([1, 2], [1, 2], 1, "one list a prompt"),
    ],
)
def test_bad_input_is_refused_by_name(answers, gold, k, message):
    with pytest.raises(ValueError, match=message):
        majority_at_k(answers, gold, k)


def test_prompts_without_samples_are_refused():
    for call in (lambda: consensus([[]], [1]), lambda: agreement([[]]), lambda: mean_majority_at_k([], [], 1)):
        with pytest.raises(ValueError, match="holds no"):
            call()
