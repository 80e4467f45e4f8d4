"""Every number of an evaluation, from records written by hand, against counting in the slowest way."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from jaxrl_llm.evaluation import measured
from jaxrl_llm.evaluation.comparison import compared, forgetting
from jaxrl_llm.evaluation.measures import episode_means

ANSWERS = {  # by problem: (reference, greedy, [(answer, log-probability, confidence, reward)])
    0: ("7", "7", [("7", -1.0, 0.9, 1.0), ("7", -2.0, 0.8, 0.5), ("3", -3.0, None, 0.0), (None, -8.0, 0.1, None)]),
    1: ("5", "4", [("4", -1.0, 0.7, 0.2), ("4", -1.5, 0.6, 0.4), ("5", -0.5, 0.9, 0.6), ("5", -4.0, 0.2, 0.8)]),
    2: ("1", "2", [("2", -1.0, 0.5, 0.1), ("3", -1.0, 0.5, 0.1), ("2", -1.0, 0.5, 0.1), ("9", -1.0, 0.5, 0.1)]),
}


def sample(gold, answer, logprob=-1.0, confidence=None, reward=None, tokens=4):
    text = f"the answer is {answer}"
    found = {"completion": text, "correct": answer == gold, "answer": answer, "tokens": tokens, "truncated": False}
    return found | {"logprob": logprob, "confidence": confidence, "rewards": {"close": reward}}


def records():
    found = []
    for number, (gold, greedy, samples) in ANSWERS.items():
        drawn = [sample(gold, *each, tokens=2 + place) for place, each in enumerate(samples)]
        entry = {"item_id": number, "prompt": f"problem {number}", "answer": gold, "columns": {"level": number % 2}}
        found.append(entry | {"greedy": sample(gold, greedy), "samples": drawn})
    return found


@pytest.fixture(scope="module")
def numbers():
    return measured(records(), (1, 2, 4), by=["level"])


def test_an_environments_metric_is_a_mean_over_the_episodes_that_have_it():
    found = [
        {"episodes": {"calls": [6.0, 4.0], "won": [0.0, 0.0]}},
        {"episodes": {"calls": [3.0, 2.0], "won": [0.0, 0.0]}},
    ]
    assert episode_means(found) == {"calls": 1.5}  # no episode has a value of the other one
    assert episode_means([{}]) == {}


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(numbers):
    for k in range(1, 5):
        expected = np.mean(
            [
                np.mean([any(each[0] == gold for each in subset) for subset in combinations(samples, k)])
                for gold, _, samples in ANSWERS.values()
            ]
        )
        assert numbers["pass_at_k"][str(k)]["mean"] == pytest.approx(expected)
        low, high = numbers["pass_at_k"][str(k)]["interval"]
        assert low <= expected <= high
    assert numbers["greedy"] == pytest.approx(1 / 3)


def test_majorities_are_counted_over_all_subsets(numbers):
    credit = []
    for gold, _, samples in ANSWERS.values():
        for subset in combinations([each[0] for each in samples], 2):
            votes = Counter(a for a in subset if a is not None)
            top = [a for a, count in votes.items() if count == max(votes.values())]
            credit.append((gold in top) / max(len(top), 1))
    assert numbers["maj@2"] == pytest.approx(np.mean(credit))


def test_weighted_votes_and_best_of_n_follow_their_weights(numbers):
    # By likelihood per token: 7 wins; 5 has e^(-.5/4) + e^(-4/5), and 4 e^(-1/2) + e^(-1.5/3); 2 wins wrongly.
    five, four = math.exp(-0.5 / 4) + math.exp(-4 / 5), math.exp(-1 / 2) + math.exp(-1.5 / 3)
    assert numbers["weighted@4"] == pytest.approx((1 + (five > four)) / 3)
    assert "weighted_stated@4" not in numbers  # one sample states no confidence
    assert numbers["best_by_close@4"] == pytest.approx(2 / 3)
    assert numbers["best@4"] == pytest.approx((1 + 1 + 0) / 3)


def test_a_vote_rewards_some_samples_rightly(numbers):
    # 7 wins and is right: all four are. 4 and 5 tie and 4 came first: none is. 2 wins wrongly: 3 and 9 are.
    assert numbers["vote_reward_accuracy@4"] == pytest.approx((1 + 0 + 0.5) / 3)


def test_means_of_a_reward_leave_out_where_it_does_not_apply(numbers):
    assert numbers["reward/close"] == pytest.approx(np.mean([0.5, 0.5, 0.1]))


def test_calibration_counts_samples_that_state_nothing_apart(numbers):
    stated = numbers["calibration"]["stated"]
    assert stated["missing_share"] == pytest.approx(1 / 12)
    pairs = [(c, a == gold) for gold, _, samples in ANSWERS.values() for a, _, c, _ in samples if c is not None]
    assert stated["brier"] == pytest.approx(np.mean([(c - right) ** 2 for c, right in pairs]))
    assert sum(each["count"] for each in stated["reliability"]) == len(pairs)


def test_spread_and_lengths(numbers):
    assert numbers["distinct_answers"] == pytest.approx((2 + 2 + 3) / 3)
    assert numbers["no_answer_share"] == pytest.approx(1 / 12)
    entropies = [-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)), math.log(2), 1.5 * math.log(2)]
    assert numbers["answer_entropy"] == pytest.approx(np.mean(entropies))
    assert numbers["lengths"]["mean"] == pytest.approx(3.5)
    assert numbers["lengths"]["of_right"] == pytest.approx(np.mean([2, 3, 4, 5]))


def test_parts_are_measured_as_if_alone(numbers):
    alone = measured([records()[1]], (1, 2, 4))
    part = numbers["by"]["level"]["1"]
    assert part["problems"] == 1
    assert all(part[name] == pytest.approx(alone[name]) for name in ("greedy", "pass@2", "maj@4"))
    with pytest.raises(ValueError, match=r"no column 'source' in item 0; its columns are level"):
        measured(records(), (1,), by=["source"])


def test_everything_is_plain_json(numbers):
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers


def test_no_records_and_a_k_above_the_samples_are_refused():
    with pytest.raises(ValueError, match="no records"):
        measured([], (1,))
    with pytest.raises(ValueError, match="k=5"):
        measured(records(), (5,))


# ---- comparisons ----------------------------------------------------------------------------------------------------


def test_a_comparison_pairs_problems_whatever_their_order():
    better = records()
    better[2]["greedy"] = sample("1", "1")
    found = compared(records(), better[::-1])
    assert (found["only_first"], found["only_second"], found["problems"]) == (0, 1, 3)
    row = found["metrics"]["greedy"]
    assert row["difference"] == pytest.approx(1 / 3)
    assert row["interval"][0] == 0
    assert row["p"] == 1.0  # one problem proves nothing
    assert found["metrics"]["pass@4"]["difference"] == 0


def test_rewards_are_compared_where_both_have_them_and_they_apply():
    other = records()
    for each in other[1]["samples"]:
        each["rewards"]["close"] += 0.2
    for each in other[0]["samples"]:
        each["rewards"]["close"] = None
    row = compared(records(), other)["metrics"]["reward/close"]
    assert [row[name] for name in ("first", "second", "difference")] == pytest.approx([0.3, 0.4, 0.1])
    assert row["interval"] == pytest.approx([0.0, 0.2])
    for each in (sample for record in other for sample in record["samples"]):
        each["rewards"] = {"another": 1.0}
    assert not any(name.startswith("reward/") for name in compared(records(), other)["metrics"])


def test_other_problems_cannot_be_compared():
    with pytest.raises(ValueError, match="3 and 2 problems"):
        compared(records(), records()[:2])
    other = records()
    other[1]["prompt"] = "another"
    with pytest.raises(ValueError, match=r"item 1 is 'problem 1' in the first .* 'another' in the second"):
        compared(records(), other)


def test_forgetting_is_what_was_lost_since_the_best():
    history = [{"a": 0.5, "b": 0.1}, {"a": 0.9, "b": 0.2}, {"a": 0.6, "b": 0.2}]
    assert forgetting(history) == pytest.approx(0.15)
    with pytest.raises(ValueError, match="1 checkpoint;"):
        forgetting(history[:1])
    with pytest.raises(ValueError, match="use the same"):
        forgetting([{"a": 1.0}, {"b": 1.0}])
