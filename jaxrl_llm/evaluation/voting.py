"""Majority voting among the samples of a prompt, and their agreement.

An answer is any hashable canonical form; None is a sample without a parsable answer. Samples with equal answers form a
class; None forms no class: such a sample is one of the k voters, but has no vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Float

Answers = Sequence[Sequence[Hashable | None]]


def majority_at_k(answers: Answers, gold: Sequence[Hashable], k: int) -> Float[np.ndarray, "N"]:
    """maj@k of each prompt: the probability that the majority of k of its samples is the reference answer.

        maj@k = E_I [ 1{gold is among the most frequent classes of I} / (number of classes tied at the top) ]

    over all k-subsets I of the n samples. A subset's credit depends only on its votes per class, which follow a
    multivariate hypergeometric law, so the expectation is computed exactly from the class counts, without enumeration
    or sampling.

    >>> majority_at_k(["a b a c a b".split(), [1, 2, 2, None]], gold=["a", 1], k=3).round(6).tolist()
    [0.6, 0.25]

    Args:
      answers: for each prompt, the canonical answers of its samples; prompts may have different numbers of samples.
      gold: the canonical reference answer of each prompt.
      k: number of voters.

    Returns:
      maj@k in [0, 1], float64, one per prompt; maj@1 is the accuracy.

    Raises:
      ValueError: k < 1, k > n, prompts and references of different number, or a reference of None.

    Reference: Self-consistency (2203.11171)
    Certainty: verified
    """
    _check(answers, gold)
    if k != int(k) or k < 1:
        raise ValueError(f"k={k!r} must be a whole number of at least 1: it is the number of voters.")
    for row, samples in enumerate(answers):
        if len(samples) < k:
            raise ValueError(
                f"k={k} is more than the {len(samples)} samples of prompt {row}: draw at least {k} samples a prompt, "
                f"or ask for k <= {len(samples)}."
            )
    return np.asarray([_majority(samples, g, int(k)) for samples, g in zip(answers, gold, strict=True)], np.float64)


def mean_majority_at_k(answers: Answers, gold: Sequence[Hashable], k: int) -> float:
    """Mean over prompts of `majority_at_k`.

    Args:
      answers, gold, k: as in `majority_at_k`.

    Returns:
      The mean in [0, 1].

    Raises:
      ValueError: as `majority_at_k`, and where there is no prompt.

    Reference: Self-consistency (2203.11171)
    Certainty: verified
    """
    values = majority_at_k(answers, gold, k)
    if values.size == 0:
        raise ValueError("answers=[] holds no prompt, so there is no mean: evaluate on at least one prompt.")
    return float(values.mean())


def consensus(answers: Answers, gold: Sequence[Hashable]) -> Float[np.ndarray, "N"]:
    """cons@n of each prompt: whether the majority of all its samples is the reference answer.

        cons@n = 1{gold is among the most frequent classes} / (number of classes tied at the top)

    >>> consensus([[1, 2, 2, 1]], gold=[1]).tolist()
    [0.5]

    Args:
      answers, gold: as in `majority_at_k`.

    Returns:
      cons@n in [0, 1], float64, one per prompt.

    Raises:
      ValueError: a prompt without samples, prompts and references of different number, or a reference of None.

    Reference: Self-consistency (2203.11171)
    Certainty: verified
    """
    _check(answers, gold)
    _check_samples(answers)
    return np.asarray([_consensus(samples, g) for samples, g in zip(answers, gold, strict=True)], np.float64)


def agreement(answers: Answers) -> Float[np.ndarray, "N"]:
    """Share of each prompt's samples that give its most frequent answer.

        agreement = max_class count / n

    n counts all samples, so unparsable samples lower the agreement, and it is 0 if no sample parses.

    >>> agreement([[1, 2, 2, None]]).tolist()
    [0.5]

    Args:
      answers: as in `majority_at_k`.

    Returns:
      Agreement in [0, 1], float64, one per prompt.

    Raises:
      ValueError: a prompt without samples.

    Reference: Self-consistency (2203.11171)
    Certainty: verified
    """
    _check(answers)
    _check_samples(answers)
    return np.asarray([max(_classes(samples).values(), default=0) / len(samples) for samples in answers], np.float64)


def weighted_vote(answers: Sequence[Hashable | None], weights: Sequence[Any]) -> Hashable | None:
    """The answer of one prompt's samples with the largest sum of weights; ties are won by the first.

        argmax_a sum_i w_i 1{answer_i = a}

    With equal weights it is the majority. It is better than the majority if higher weights indicate right answers.

    >>> weighted_vote(["4", "5", "4", "5", "5"], [0.9, 0.2, 0.8, 0.3, 0.4])
    '4'

    Args:
      answers: canonical answers; None has no vote.
      weights: at least 0, one per sample: a stated confidence, or a likelihood.

    Returns:
      The answer; None if no sample has one.

    Raises:
      ValueError: for different lengths, or a weight that is negative or not finite.

    Reference: Self-consistency (2203.11171), weighted sum
    Certainty: recalled
    """
    if len(answers) != len(weights):
        raise ValueError(f"there are {len(answers)} answers and {len(weights)} weights; give one weight a sample")
    totals: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight {weight} must be finite and at least 0; give 0 to a sample without confidence")
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return max(totals, key=totals.__getitem__, default=None)


def vote_reward_accuracy(answers: Answers, gold: Sequence[Hashable]) -> Float[np.ndarray, "N"]:
    """Accuracy of a majority-vote reward: the share of each prompt's samples that it judges correctly.

        mean_i 1{ 1{answer_i = label} = 1{answer_i = gold} },   label = the most frequent answer; ties are won by the
        first

    With a wrong label it is still high if the label is rare among the samples: all others get the reward of a wrong
    answer, which is correct for wrong ones.

    >>> vote_reward_accuracy([[1, 2, 2, 3, 4], [1, 1, 2, None, 1]], gold=[5, 1]).tolist()
    [0.6, 1.0]

    Args:
      answers, gold: as in `majority_at_k`.

    Returns:
      A share in [0, 1], float64, one per prompt.

    Raises:
      ValueError: as `consensus`.

    Reference: TTRL (2504.16084), reward accuracy
    Certainty: verified
    """
    _check(answers, gold)
    _check_samples(answers)
    found = []
    for samples, right in zip(answers, gold, strict=True):
        label = weighted_vote(samples, [1.0] * len(samples))
        found.append(np.mean([(a is not None and a == label) == (a == right) for a in samples]))
    return np.asarray(found, np.float64)


def _classes(samples: Sequence[Hashable | None]) -> Counter:
    return Counter(answer for answer in samples if answer is not None)


def _consensus(samples: Sequence[Hashable | None], gold: Hashable) -> float:
    classes = _classes(samples)
    top = max(classes.values(), default=0)
    return 1.0 / sum(votes == top for votes in classes.values()) if 0 < top == classes[gold] else 0.0


def _majority(samples: Sequence[Hashable | None], gold: Hashable, k: int) -> float:
    n, classes = len(samples), _classes(samples)
    if k == n:
        return _consensus(samples, gold)
    for_gold = classes.pop(gold, 0)
    unparsable = n - for_gold - classes.total()
    credit = 0.0
    # Gold gets `top` votes; the other k - top voters must give no class more than that.
    for top in range(1, min(for_gold, k) + 1):
        for tied, ways in enumerate(_completions(list(classes.values()), unparsable, k - top, top)):
            credit += comb(for_gold, top) * ways / comb(n, k) / (1 + tied)
    return credit


def _completions(counts: list[int], free: int, voters: int, top: int) -> list[int]:
    """Ways to choose `voters` of sum(counts) + free samples with at most `top` of a class, by classes at exactly `top`.

        [z^voters y^tied] (1 + z)^free * prod_m ( sum_{x<top} C(m, x) z^x + y C(m, top) z^top )

    Whole numbers, which Python keeps exact.
    """
    # ways[tied][used]: a class at the top takes `top` voters, so no more than voters // top can be.
    ways = [[0] * (voters + 1) for _ in range(voters // top + 1)]
    ways[0] = [comb(free, used) for used in range(voters + 1)]
    for count in counts:
        below = [comb(count, x) for x in range(min(count, top - 1, voters) + 1)]
        at_top = comb(count, top)
        before, ways = ways, []
        for tied in range(len(before)):
            row = [
                sum(b * before[tied][used - x] for x, b in enumerate(below[: used + 1])) for used in range(voters + 1)
            ]
            if tied and at_top:
                for used in range(top, voters + 1):
                    row[used] += at_top * before[tied - 1][used - top]
            ways.append(row)
    return [row[voters] for row in ways]


def _check(answers: Answers, gold: Sequence[Hashable] | None = None) -> None:
    for row, samples in enumerate(answers):
        if isinstance(samples, str) or not isinstance(samples, Sequence):
            raise ValueError(
                f"answers[{row}]={samples!r} must be the list of one prompt's answers. `answers` holds one list a "
                "prompt: wrap the answers of a single prompt in a list."
            )
    if gold is None:
        return
    if isinstance(gold, str) or len(answers) != len(gold):
        raise ValueError(
            f"gold={gold!r} must hold one reference answer for each of the {len(answers)} prompts in `answers`."
        )
    if any(g is None for g in gold):
        row = next(row for row, g in enumerate(gold) if g is None)
        raise ValueError(
            f"gold[{row}]=None is no answer: None marks samples that could not be parsed. Drop the prompt, or repair "
            "the canonical form of its reference answer."
        )


def _check_samples(answers: Answers) -> None:
    for row, samples in enumerate(answers):
        if not samples:
            raise ValueError(
                f"answers[{row}]=[] holds no sample: draw at least one for each prompt, or drop the prompt."
            )
