"""Rule deduction: `L:a,~b;a&~b>c;c>~d;d>e?d` -> F. Facts, rules and a query under open-world semantics."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from jaxrl_llm.data.tasks.items import Item, Task, equality, require_bool, require_choice, require_int

ATOMS = "abcdefgh"


class Rule(NamedTuple):
    """If every literal of the body is known, the head follows."""

    body: tuple[str, ...]
    head: str

    def __str__(self) -> str:
        return "&".join(self.body) + ">" + self.head


class _Domain(NamedTuple):
    second_literal: float  # probability of a second literal in a body
    negative: float  # probability of a negated literal
    negative_head: float
    fewest_facts: int
    distractors: tuple[int, int]
    unknown: float  # probability of the answer U


_DOMAINS = {
    "general": _Domain(0.5, 0.5, 0.5, 1, (0, 6), 1 / 3),
    "chain": _Domain(0.0, 0.0, 0.0, 1, (0, 6), 1 / 3),
    "conjunctive": _Domain(1.0, 0.0, 0.0, 2, (0, 6), 1 / 3),
    "negated": _Domain(0.5, 0.5, 1.0, 1, (0, 6), 1 / 3),
    "uncertain": _Domain(0.5, 0.5, 0.5, 1, (4, 6), 2 / 3),
}


def complement(literal: str) -> str:
    """The negation of a literal: `~a` for `a` and `a` for `~a`."""
    return literal[1:] if literal.startswith("~") else "~" + literal


def closure(facts: Sequence[str], rules: Sequence[Rule]) -> tuple[dict[str, int], list[Rule]]:
    """(all literals that follow from the facts, with the round in which they are derived; the rules in firing order).

    A round fires, in listing order, every rule whose body was known before the round and whose head is not known yet.
    Facts have depth 0. There is no negation as failure.
    """
    depth = dict.fromkeys(facts, 0)
    fired: list[Rule] = []
    rounds = 0
    while True:
        rounds += 1
        known = set(depth)
        before = len(fired)
        for rule in rules:
            if rule.head not in depth and known.issuperset(rule.body):
                depth[rule.head] = rounds
                fired.append(rule)
        if len(fired) == before:
            return depth, fired


class Deduction(NamedTuple):
    """The result of a query.

    Attributes:
      answer: T (the query follows), F (its complement follows) or U (neither does).
      depth: round in which the query or its complement is derived; None for U.
      think: the fired rules in order, separated by `;`.
    """

    answer: str
    depth: int | None
    think: str


def deduction(facts: Sequence[str], rules: Sequence[Rule], query: str) -> Deduction:
    """Answer, depth and scratch of a query."""
    depth, fired = closure(facts, rules)
    think = ";".join(map(str, fired))
    if query in depth:
        return Deduction("T", depth[query], think)
    if complement(query) in depth:
        return Deduction("F", depth[complement(query)], think)
    return Deduction("U", None, think)


def problem(body: str) -> tuple[list[str], list[Rule], str]:
    """Facts, rules and query of a body.

    >>> problem("L:a;b>c?c")
    (['a'], [Rule(body=('b',), head='c')], 'c')
    """
    statement, _, query = body.strip().removeprefix("L:").partition("?")
    facts, *rules = statement.split(";")
    pairs = [rule.split(">") for rule in rules if rule]
    return facts.split(","), [Rule(tuple(premises.split("&")), head) for premises, head in pairs], query


def _signed(rng: Random, atom: str, negative: float) -> str:
    return "~" + atom if rng.random() < negative else atom


def _rules(rng: Random, atoms: list[str], facts: list[str], level: int, extra: int, domain: _Domain) -> list[Rule]:
    """A chain of `level` rules over new atoms and `extra` distractors, shuffled."""
    known, rules = list(facts), []
    for atom in atoms:
        body = [known[-1]]
        if len(known) > 1 and rng.random() < domain.second_literal:
            body.append(rng.choice(known[:-1]))
            rng.shuffle(body)
        known.append(_signed(rng, atom, domain.negative_head))
        rules.append(Rule(tuple(body), known[-1]))
    while len(rules) < level + extra:
        size = 2 if rng.random() < domain.second_literal else 1
        *premises, head = rng.sample(ATOMS, size + 1)
        body = tuple(_signed(rng, atom, domain.negative) for atom in premises)
        rule = Rule(body, _signed(rng, head, domain.negative_head))
        if rule not in rules:
            rules.append(rule)
    rng.shuffle(rules)
    return rules


def _attempt(rng: Random, level: int, label: str, extra: int, domain: _Domain) -> tuple[str, str] | None:
    """(body, scratch) of one random problem with this answer; None if the draw has another answer."""
    facts_count = rng.randint(domain.fewest_facts, min(3, len(ATOMS) - level))
    atoms = rng.sample(ATOMS, facts_count + level)
    facts = [_signed(rng, atom, domain.negative) for atom in atoms[:facts_count]]
    rules = _rules(rng, atoms[facts_count:], facts, level, extra, domain)
    depth, fired = closure(facts, rules)
    if any(complement(literal) in depth for literal in depth):
        return None
    if label == "U":
        decided = {literal[-1] for literal in depth}
        mentioned = {literal[-1] for rule in rules for literal in (*rule.body, rule.head)}
        # Atoms that occur in a rule are preferred: an atom that occurs nowhere is trivially U.
        open_atoms = [a for a in ATOMS if a in mentioned - decided] or [a for a in ATOMS if a not in decided]
        choices = [_signed(rng, rng.choice(open_atoms), 0.5)] if open_atoms else []
    else:
        choices = [literal for literal, found in depth.items() if found == level]
    if not choices:
        return None
    query = rng.choice(choices)
    query = complement(query) if label == "F" else query
    return f"L:{','.join(facts)};{';'.join(map(str, rules))}?{query}", ";".join(map(str, fired))


def task(*, domain: str = "general", distractors: int | None = None, scratchpad: bool = True) -> Task:
    """Queries that take `level` rounds of deduction; the answers T, F and U are equally frequent.

    Args:
      domain: "general" (bodies of one or two literals, any sign), "chain" (one-literal bodies, nothing negated),
        "conjunctive" (two-literal bodies, nothing negated), "negated" (every rule concludes a negated literal) or
        "uncertain" (4 to 6 distractors, two thirds of the answers are U).
      distractors: number of additional rules over random literals, 0 to 6; None draws the number.
      scratchpad: write the fired rules before the answer.
    """
    require_choice("domain", domain, tuple(_DOMAINS))
    if distractors is not None:
        require_int("distractors", distractors, low=0, high=6)
    require_bool("scratchpad", scratchpad)
    chosen = _DOMAINS[domain]

    def draw(rng: Random, level: int) -> Item | None:
        # The answer and the number of distractors are drawn first, so that discarded draws do not change their shares.
        label = "U" if rng.random() < chosen.unknown else rng.choice("TF")
        extra = rng.randint(*chosen.distractors) if distractors is None else distractors
        for _ in range(200):
            found = _attempt(rng, level, label, extra, chosen)
            if found is not None:
                body, think = found
                return Item(body, think if scratchpad else "", label, "deduction", level, _domain_name(domain, level))
        return None

    return Task(
        name="deduction",
        draw=draw,
        verify=equality,
        levels=tuple(range(5)),
        # Each fact and each link of the chain needs its own atom, and the answer U needs a further one.
        last_level=len(ATOMS) - 1 - chosen.fewest_facts,
        description="what follows from facts and rules; the level is the depth of the deduction",
        options={"domain": domain, "distractors": distractors, "scratchpad": scratchpad},
        scratchpad=scratchpad,
    )


def _domain_name(domain: str, level: int) -> str:
    return f"deduction-{level}" if domain == "general" else f"deduction-{domain}"
