"""Rule deduction: rounds, open-world semantics, and what each domain promises."""

from __future__ import annotations

from collections import Counter

import pytest

from jaxrl_llm.data import tasks
from jaxrl_llm.data.tasks.deduction import Rule, closure, complement, deduction, problem


@pytest.mark.parametrize(
    ("body", "answer", "depth", "think"),
    [
        ("L:a,~b;a&~b>c;c>~d;d>e?d", "F", 2, "a&~b>c;c>~d"),
        ("L:a;a>b;b>c;c>d?d", "T", 3, "a>b;b>c;c>d"),
        ("L:a;b>c?c", "U", None, ""),
        # A rule listed late fires early: the scratch follows the rounds, not the listing.
        ("L:a;b>c;a>b?c", "T", 2, "a>b;b>c"),
        # Two ways to c: the shorter one settles its depth, and the longer rule never fires.
        ("L:a;b>c;a>b;a>c?c", "T", 1, "a>b;a>c"),
        # Open world: that b is not known does not make ~b known.
        ("L:a;~b>c?c", "U", None, ""),
        ("L:~a;?a", "F", 0, ""),
        ("L:a;?a", "T", 0, ""),
        # Two rules with one head in one round: the first listed fires.
        ("L:a,b;b>c;a>c?c", "T", 1, "b>c"),
    ],
)
def test_answers_depths_and_scratch(body, answer, depth, think):
    assert deduction(*problem(body)) == (answer, depth, think)


def test_a_head_found_in_a_round_is_not_used_in_the_same_round():
    depth, fired = closure(["a"], [Rule(("a",), "b"), Rule(("b",), "c"), Rule(("b", "c"), "~d")])
    assert depth == {"a": 0, "b": 1, "c": 2, "~d": 3}
    assert [str(rule) for rule in fired] == ["a>b", "b>c", "b&c>~d"]


@pytest.mark.parametrize("domain", ["general", "chain", "conjunctive", "negated", "uncertain"])
@pytest.mark.parametrize("level", [0, 1, 4])
def test_items_follow_from_their_own_text(domain, level):
    for item in tasks.task("deduction", domain=domain).generate(level=level, count=80):
        facts, rules, query = problem(item.body)
        found = deduction(facts, rules, query)
        assert (found.answer, found.think) == (item.answer, item.think)
        assert found.depth == (None if item.answer == "U" else level)
        known, _ = closure(facts, rules)
        assert not any(complement(literal) in known for literal in known)
        assert 1 <= len(facts) <= 3
        assert len({fact[-1] for fact in facts}) == len(facts)
        assert level <= len(rules) <= level + 6
        assert len(set(rules)) == len(rules)
        assert all(1 <= len(rule.body) <= 2 for rule in rules)


def test_answers_are_one_third_each():
    counts = Counter(item.answer for item in tasks.task("deduction").generate(level=2, count=1500))
    assert all(abs(counts[answer] / 1500 - 1 / 3) < 0.05 for answer in "TFU")


def test_domains_hold_what_they_are_named_for():
    def rules_of(domain):
        items = tasks.task("deduction", domain=domain).generate(level=3, count=100)
        assert {item.domain for item in items} == {f"deduction-{domain}"}
        return [rule for item in items for rule in problem(item.body)[1]], items

    rules, _ = rules_of("chain")
    assert all(len(rule.body) == 1 and "~" not in str(rule) for rule in rules)
    rules, _ = rules_of("conjunctive")
    assert all(len(rule.body) == 2 and "~" not in str(rule) for rule in rules)
    rules, _ = rules_of("negated")
    assert all(rule.head.startswith("~") for rule in rules)
    rules, items = rules_of("uncertain")
    assert sum(item.answer == "U" for item in items) > 50
    assert all(len(problem(item.body)[1]) >= 3 + 4 for item in items)


@pytest.mark.parametrize("distractors", [0, 6])
def test_number_of_distractors(distractors):
    items = tasks.task("deduction", distractors=distractors).generate(level=2, count=40)
    assert all(len(problem(item.body)[1]) == 2 + distractors for item in items)
