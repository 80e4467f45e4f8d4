"""Judges: worked examples, what they answer parsed strictly, the cache, the budget, tournaments, criteria."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import rewards
from jaxrl_llm.advantages import group_normalized
from jaxrl_llm.endpoints import EndpointError
from jaxrl_llm.rewards.judges.asked import is_refusal, judge_of, parsed_object
from jaxrl_llm.rewards.judges.ratings import consistent_criteria, rubric_score
from jaxrl_llm.rewards.judges.tournaments import tournament_rewards
from jaxrl_llm.run.recipes import reward_terms
from jaxrl_llm.run.setup import verdict_views
from jaxrl_llm.signatures import declared_widths

sys.path.insert(0, str(Path(__file__).parents[3] / "docs" / "examples"))
from judge_stand_in import StandIn, rated_sum

POINTS = np.array([[0, 12, 8, 15], [8, 0, 11, 14], [12, 9, 0, 10], [5, 6, 10, 0]], float)


def matches(pairs):
    return [(POINTS[i, j], POINTS[j, i]) for i, j in pairs]


@pytest.fixture
def served():
    made = []

    def serve(reply, **options):
        made.append(StandIn(reply, **options).start())
        return made[-1]

    yield serve
    for server in made:
        server.shutdown()
        server.server_close()


def by_length(question):
    """Rates an answer by its length."""
    answer = question.split("Answer:\n")[1].split("\n")[0]
    return json.dumps({"rating": min(5, max(1, len(answer)))})


ROWS = {"prompts": ["2+2?"] * 3, "answers": ["4"] * 3}


def test_a_template_names_texts_and_columns_of_the_data():
    given = {"template": "{prompt}<t>{think}</t>?", "says": "{completion}{level}", "think": ["a", "b"], "level": [1, 2]}
    found = rewards.filled_text(["p", "q"], ["x", "y"], ["1", "2"], **given)
    assert found == [("p<t>a</t>?", "x1"), ("q<t>b</t>?", "y2")]
    known = "name {thought}, which is neither a text nor a column of the data; there are answer, completion, prompt"
    with pytest.raises(ValueError, match=re.escape(known)):
        rewards.filled_text(["p"], ["x"], template="{thought}")


def test_worked_examples():
    probs = jnp.array([[0.05, 0.1, 0.2, 0.4, 0.05], [0.0] * 5])
    np.testing.assert_allclose(rewards.expected_rating(probs), [0.59375, np.nan], rtol=1e-6)
    compared = rewards.unbiased_comparison(jnp.array([0.8, 0.9]), jnp.array([0.3, 0.8]))
    np.testing.assert_allclose(compared + 0.5, [0.75, 0.55], rtol=1e-6)
    assert rubric_score([1, 0, 1, 1], [5, 3, 2, -4]) == 0.3
    assert rubric_score([0, 1], [5, -4], clip=True) == 0.0
    assert rubric_score([1], [-4]) == 0.0
    rate, kept = consistent_criteria([[1, 1], [0, 1], [0, 0]], [1, 0, 1])
    assert (rate.tolist(), kept.tolist()) == ([1, 0.5, 0], [True, False, False])


@pytest.mark.parametrize(
    ("scheme", "expected", "played", "advantages"),
    [
        ("round_robin", [1, 1, 0.333333, 0], 6, [0.833332, 0.833332, -0.499999, -1.166664]),
        ("anchor", [0.666667, 0.333333, 1, 0], 3, [0.387297, -0.387297, 1.161892, -1.161892]),
        ("single_elimination", [0.666667, 0.333333, 1, 0], 6, [0.387297, -0.387297, 1.161892, -1.161892]),
    ],
)
def test_worked_example_of_the_tournaments(scheme, expected, played, advantages):
    found, count = tournament_rewards(4, matches, scheme=scheme)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert count == played
    group = jnp.zeros(4, jnp.int32)
    np.testing.assert_allclose(group_normalized(jnp.array(found), group, jnp.ones(4)), advantages, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
@pytest.mark.parametrize("scheme", ["round_robin", "anchor", "single_elimination", "swiss"])
def test_the_best_of_a_transitive_order_wins(scheme, size):
    strength = np.random.default_rng(size).permutation(size)
    pairs_seen = []

    def play(pairs):
        pairs_seen.extend(pairs)
        return [(float(strength[i]), float(strength[j])) for i, j in pairs]

    found, played = tournament_rewards(size, play, scheme=scheme)
    assert played == len(pairs_seen)
    assert np.argmax(found) == np.argmax(strength)
    assert all(0 <= one <= 1 for one in found)
    if scheme == "single_elimination":
        assert played == 2 * size - 2
    ties, _ = tournament_rewards(size, lambda pairs: [(5.0, 5.0)] * len(pairs), scheme="round_robin")
    assert ties == [0.0] * size


def test_one_player_is_no_tournament():
    with pytest.raises(ValueError, match="a tournament has 1 players"):
        tournament_rewards(1, matches)


def test_answers_are_parsed_strictly():
    assert parsed_object('```json\n{"rating": 4}\n```') == {"rating": 4}
    for prose in ('The rating is {"rating": 4}', "4", "[4]", "", "{" * 3000):
        assert parsed_object(prose) is None
    assert is_refusal("I\u2019m sorry, but no")
    for rating in (rewards.stated_rating, rewards.expected_rating):
        with pytest.raises(ValueError, match="highest must be above lowest"):
            rating([], lowest=5, highest=1)
    assert rewards.stated_rating(["132=1", "1", "=1=0", "13=2"], lowest=0, highest=1, after="=") == [1, None, 0, None]
    assert rewards.stated_rating(['{"rating": 4}', "5", "7", "well, 4", '{"rating": true}', None]) == [
        0.75,
        1.0,
        None,
        None,
        None,
        None,
    ]


def test_a_judge_rates_once_and_remembers(served, tmp_path):
    server = served(by_length, latency=0.02)
    described = server.described(cache=tmp_path / "judge.sqlite", concurrency=2)
    texts = ["abc", "a", "abc"]
    rate = rewards.judge_rating(judge=described)
    assert rate(completions=texts, **ROWS) == [0.5, 0.0, 0.5]
    assert sum(server.asked.values()) == 2  # equal questions are one
    assert rate(completions=texts, **ROWS) == [0.5, 0.0, 0.5]
    again = rewards.judge_rating(judge=described)
    assert again(completions=texts, **ROWS) == [0.5, 0.0, 0.5]
    assert sum(server.asked.values()) == 2
    assert again.report()["calls"] == 0
    assert rate.report() | {"cost": 0} == {
        "calls": 2, "cached": 2, "refused": 0, "unreadable": 0, "prompt_tokens": 20, "completion_tokens": 10, "cost": 0,
    }  # fmt: skip
    many = rewards.judge_rating(judge=server.described(concurrency=3))
    many(prompts=["p"] * 12, answers=[""] * 12, completions=[f"{n:03d}" for n in range(12)])
    assert server.most == 3


def test_votes_and_what_cannot_be_read(served):
    votes = iter(["3", "prose", '{"rating": 5}', '{"rating": 1}', "I'm sorry, I cannot"])
    server = served(lambda question: next(votes, "no"))
    rate = rewards.judge_rating(judge=server.described(temperature=1.0, concurrency=1, attempts=2), votes=2)
    one = {name: rows[:1] for name, rows in ROWS.items()}
    assert rate(completions=["x"], **one) == [0.75]  # 3, then prose and 5
    assert rewards.judge_rating(judge=server.described(), lowest=1)(completions=["y"], **one) == [0.0]
    silent = rewards.judge_rating(judge=server.described(temperature=1.0))
    assert silent(completions=["z"], **one) == [None]
    assert silent.report()["refused"] == 1
    assert silent.report()["unreadable"] == 2


def test_a_rubric_is_scored_criterion_by_criterion(served):
    server = served(lambda question: json.dumps({"met": "short" in question.split("Criterion:")[1]}))
    judged = rewards.judge_rubric(judge=server.described())
    rubric = [{"criterion": "is short", "points": 3}, {"criterion": "is kind", "points": 2}]
    assert judged(prompts=["p"], completions=["c"], rubric=[rubric]) == [0.6]
    for wrong in ("be kind", [{"criterion": "is kind"}], [], [{"criterion": "x", "points": float("nan")}]):
        with pytest.raises(ValueError, match="the rubric of row 0 holds"):
            judged(prompts=["p"], completions=["c"], rubric=[wrong])


def test_a_tournament_asks_in_both_orders(served):
    def reply(question):
        first = question.split("First answer:\n")[1].split("\n")[0]
        second = question.split("Second answer:\n")[1].split("\n")[0]
        return json.dumps({"first": min(10, len(first) + 3), "second": len(second)})  # it likes what stands first

    server = served(reply)
    judged = rewards.judge_tournament(judge=server.described(), scheme="round_robin")
    texts, group = ["a", "abc", "ab", "x"], [0, 0, 0, 1]
    assert judged(prompts=["p"] * 4, completions=texts, group=group) == [0.0, 1.0, 0.5, None]
    unreadable = rewards.judge_tournament(judge=served(lambda question: "well").described(), scheme="round_robin")
    assert unreadable(prompts=["p"] * 2, completions=["a", "b"], group=[0, 0]) == [0.0, 0.0]


def test_a_judge_that_is_down_over_budget_or_no_chat_endpoint(served):
    one = {name: rows[:1] for name, rows in ROWS.items()}
    down = rewards.judge_rating(judge={"url": "http://127.0.0.1:9", "model": "m", "retries": 0})
    with pytest.raises(EndpointError, match=r"could not be reached for a judgement .* correct judge.url"):
        down(completions=["x"], **one)
    server = served(by_length)
    poor = rewards.judge_rating(judge=server.described(budget=20, concurrency=1))
    with pytest.raises(rewards.JudgeError, match=r"judge[.]budget is 20 tokens, and 30 are used up after 2 calls"):
        poor(completions=["x", "xy", "xyz"], **ROWS)
    other = rewards.judge_rating(judge=served(lambda question: {"result": 3}).described())
    with pytest.raises(EndpointError, match="without choices"):
        other(completions=["x"], **one)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: rewards.judge_rating(judge={"url": "http://x", "modle": "m"}),
            "judge.modle is not a field",
        ),
        (lambda: rewards.judge_rating(judge={"url": "http://x"}), "judge has no model"),
        (lambda: rewards.judge_rating(judge={"url": "x", "model": "m"}), "judge.url is 'x'"),
        (
            lambda: rewards.judge_rating(judge={"network": "j", "votes": 2}),
            "judge.votes is not a field",
        ),
        (
            lambda: rewards.judge_rating(judge={"url": "http://x", "model": "m"}, votes=3),
            "votes is 3 with judge.temperature 0",
        ),
        (
            lambda: rewards.judge_rating(judge={"url": "http://x", "model": "m"}, template="{promt}"),
            "template cannot be filled",
        ),
        (
            lambda: rewards.judge_rating(judge={"url": "http://x", "model": "m"}, lowest=5),
            "highest must be above lowest",
        ),
        (lambda: rewards.judge_tournament(judge={"url": "http://x", "model": "m"}, scheme="cup"), "scheme is 'cup'"),
        (lambda: judge_of({"url": "http://x", "model": "m", "budget": 0}, "judge"), "judge.budget is 0"),
    ],
)
def test_judges_that_are_described_wrongly(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_a_network_of_the_run_may_be_the_judge():
    entry = {"judge_rating": {"judge": {"network": "critic", "max_completion_tokens": 8}, "name": "opinion"}}
    (term,) = reward_terms([entry])
    assert term.on_host
    views = verdict_views([term])
    view = views["opinion_verdict"]
    assert (view.written_by, view.temperature, view.max_completion_tokens) == ("critic", 0.0, 8)
    (question,) = view.function(prompts=["2+2?"], completions=["4"], answers=["4"])
    assert "2+2?" in question
    assert term.function(opinion_verdict_text=['{"rating": 5}', "prose"]) == [1.0, None]
    assert partial(rewards.stated_rating, lowest=0)(verdict_text=["0"]) == [0.0]


def test_a_tournament_plays_the_rounds_of_all_groups_at_once(served):
    server = served(lambda question: json.dumps({"first": 4, "second": 6}), latency=0.05)
    judged = rewards.judge_tournament(judge=server.described(concurrency=12), scheme="anchor")
    texts = [f"answer {number}" for number in range(12)]
    assert len(judged(prompts=["p"] * 12, completions=texts, group=[0, 1, 2, 3] * 3)) == 12
    assert server.most > 4  # four matches of a group


def test_steps_are_judged_one_by_one(served):
    def reply(question):
        step = question.split("\nStep:\n")[1].split("\n")[0]
        return "hm" if step == "c" else json.dumps({"rating": 3 if step == "ab" else 1})

    class Letters:
        decode = staticmethod(lambda ids: "".join(map(chr, ids)))

    judged = rewards.judge_turns(judge=served(reply).described(), tokenizer=Letters, max_turns=3, lowest=0, highest=3)
    assert declared_widths(judged) == (3,)
    tokens = np.array([[*map(ord, "abxcd")], [*map(ord, "e....")]])
    turn, mask = np.array([[0, 0, 0, 1, 2], [0, 0, 0, 0, 0]]), np.array([[1, 1, 0, 1, 1], [1] * 5])
    found = judged(["p"] * 2, ["a"] * 2, tokens, np.array([5, 1]), turn, mask)
    np.testing.assert_allclose(found, [[1, np.nan, 1 / 3], [1 / 3, np.nan, np.nan]], rtol=1e-6)
    with pytest.raises(ValueError, match="highest must be above lowest"):
        rewards.judge_turns(judge=served(reply).described(), tokenizer=Letters, max_turns=3, highest=0)


def test_rubrics_are_written_by_contrast_and_kept_where_they_hold(served):
    def reply(question):
        if "Better answer" in question:
            return "no" if "mute" in question else json.dumps({"rules": ["is long", " "], "principles": ["is kind"]})
        first = question.split("First answer:\n")[1].split("\n")[0]
        second = question.split("Second answer:\n")[1].split("\n")[0]
        return json.dumps({"better": "first" if len(first) > len(second) else "second"})

    pairs = [
        {"prompt": "p", "chosen": "a long one", "rejected": "short"},
        {"prompt": "p", "chosen": "short", "rejected": "a long one"},  # the criteria name the other
        {"prompt": "mute", "chosen": "a", "rejected": "b"},
    ]
    found = rewards.contrastive_rubrics(pairs, judge=served(reply).described())
    assert found == [[{"criterion": "is long", "points": 2.0}, {"criterion": "is kind", "points": 1.0}], None, None]
    with pytest.raises(ValueError, match="pair 0 has no text 'rejected'"):
        rewards.contrastive_rubrics([{"prompt": "p", "chosen": "a"}], judge=served(reply).described())


def test_the_stand_in_rates_sums(served):
    rate = rewards.judge_rating(judge=served(rated_sum).described())
    texts = ["<t>..</t><a>4</a>", "<a>5</a>", ""]
    assert rate(prompts=["A:2+2"] * 3, answers=[""] * 3, completions=texts) == [1.0, 0.0, 0.0]


def test_a_critique_is_worth_what_a_person_says_too():
    items = [{"think": "3+5=1; 1*2=2"}, {"think": "3+5=1;1*2=2"}, {"think": ""}, {}, {"think": "1"}]
    said = ["<t>3+5=1;1*2=2;X</t><a>A</a>", "<t>3+5=1;a;b;c</t>", "<t></t>", "<t>1</t>", "1"]
    # Of three arguments two are among the person's two: the card's 0.8; of four, one: 0.333333.
    found = rewards.critique_overlap(said, items)
    assert found[2:] == [0.0, None, 0.0]
    np.testing.assert_allclose(found[:2], [0.8, 1 / 3])
    assert rewards.critique_overlap(["1 "], items[4:], tags=None) == [1.0]
    assert rewards.critique_overlap(["<t>1;1;1</t>"], items[4:]) == [0.5], "an argument that is repeated counts once"
    with pytest.raises(ValueError, match="separator is empty"):
        rewards.critique_overlap(said, items, separator="")
