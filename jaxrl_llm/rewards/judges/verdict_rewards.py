"""Comparison of answers by a reference answer, and rewards of a judge's verdicts and critiques."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, ranged
from jaxrl_llm.rewards.verifiers.text_answers import extract_answer
from jaxrl_llm.rewards.verifiers.text_similarity import SimilarityForm, Tags, said, text_similarity

CritiqueForm = Literal["verdict", "refine", "delta", "correct"]


@ranged
def closer_than_opponent(
    completions: Sequence[str],
    opponent_text: Sequence[str | None],
    items: Sequence[Mapping[str, Any]],
    *,
    form: SimilarityForm = "edits",
    field: str = "answer",
    tags: Tags = None,
    least_gap: NonNegative = 0.0,
) -> list[float | None]:
    """A rule-based judge of pairs: whether the completion or its opponent is nearer to the reference.

        P = 1 where s > s_opponent + least_gap, 0 where s < s_opponent - least_gap, else 1/2

    with s the similarity to the reference (`text_similarity`).

    Args:
      completions: decoded completions.
      opponent_text: a network's text for the view `opponent`; None leaves the row out.
      items: records of the data, with the reference text under `field`.
      form, field, tags: of the similarity.
      least_gap: largest difference that counts as a tie.

    Returns:
      One share of wins per row, for the field `win_share`; None without an opponent or a reference.

    Raises:
      ValueError: as for `text_similarity`.

    Reference: the judge of pairs in Nash-MD (2312.00886) and XPO (2405.21046), by a rule.
    Certainty: verified
    """
    others = [text if text is not None else "" for text in opponent_text]
    own, other = (text_similarity(texts, items, form=form, field=field, tags=tags) for texts in (completions, others))
    found: list[float | None] = []
    for one, two, text in zip(own, other, opponent_text, strict=True):
        if one is None or two is None or text is None:
            found.append(None)
        else:
            found.append(0.5 if abs(one - two) <= least_gap else float(one > two))
    return found


def differing_answers(completions: Sequence[str], opponent_text: Sequence[str | None]) -> dict[str, list[float]]:
    """Pairs without labels: a newer model's answer is preferred to an older one's where they differ.

        win_share = 1,   weight = 1[the completion has an answer, which is not the opponent's]

    No verifier is used, so errors of the newer model are reinforced too: monitor held-out accuracy.

    Args:
      completions: decoded completions of the newer model.
      opponent_text: text of the older one for the view `opponent`; None makes no pair.

    Returns:
      `win_share` and `weight` of each row, for a loss of pairs such as `exploratory_preference` with alpha 0, which is
      DPO.

    >>> said = lambda answers: ["" if answer is None else f"<a>{answer}</a>" for answer in answers]
    >>> differing_answers(said([4, 7, None, 2]), said([5, 7, 1, None]))["weight"]
    [1.0, 0.0, 0.0, 1.0]

    Reference: self-reinforcement (2405.04086).
    Certainty: recalled
    """
    weight = []
    for completion, text in zip(completions, opponent_text, strict=True):
        own, other = (extract_answer(one or "") for one in (completion, text))
        weight.append(float(bool(own) and text is not None and own != other))
    return {"win_share": [1.0] * len(weight), "weight": weight}


def verdict_question(
    prompts: Sequence[str], completions: Sequence[str], *, question: str = "{prompt}\n{completion}\nRight? yes or no:"
) -> list[str]:
    """The prompt of a judge with the completion in it: a view on which a network samples a verdict.

    Args:
      prompts, completions: of the rows.
      question: format with {prompt} and {completion}.

    Raises:
      ValueError: for a question without the completion.
    """
    if "{completion}" not in question:
        raise ValueError(
            f"question is {question!r}, without {{completion}}; add {{completion}} where the completion goes"
        )
    # Nested splits, so that braces inside the inserted texts are left unchanged.
    parts = [part.split("{prompt}") for part in question.split("{completion}")]
    return [c.join(p.join(part) for part in parts) for p, c in zip(prompts, completions, strict=True)]


def verdict_agreement(
    verdict_text: Sequence[str | None], correct: Sequence[float], *, right: str = "yes", wrong: str = "no"
) -> list[float | None]:
    """Reward of a verdict: 1 where it agrees with the verifier, else 0.

    Args:
      verdict_text: a network's text for the view `verdict`; None was not sampled.
      correct: 1 where the first reward, the verifier, found the completion right.
      right, wrong: beginning of each verdict; other texts get 0.

    Returns:
      One reward per row, for a field such as `verdict_reward`; None where no verdict was sampled.

    Reference: SPARK (2509.22624), point-wise.
    Certainty: verified
    """
    expected = [right if one > 0 else wrong for one in correct]
    return [
        None if text is None else float(text.strip().startswith(word))
        for text, word in zip(verdict_text, expected, strict=True)
    ]


def ranking_agreement(
    quality: Float[Array, "B"], rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Agreement of scores with the true order of a prompt's samples: each row's part of Kendall's tau-a.

        r_i = mean over the other samples j of sign(q_i - q_j) * sign(r_i - r_j)

    in [-1, 1]; ties count 0, and the mean over a group is its tau-a.

    Args:
      quality: scores of a judge, or of the policy as its own judge; NaN gets -1.
      rewards: true scores of the samples, such as a verifier's.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One reward per row; 0 where a row has no other sample.

    Reference: URPO (2507.17515).
    Certainty: reconstructed
    """
    chex.assert_equal_shape([quality, rewards, group, weight])
    there = weight > 0
    readable = there & ~jnp.isnan(quality)
    q, r = jnp.where(readable, quality, 0.0), jnp.where(there, rewards, 0.0).astype(jnp.float32)
    others = there[:, None] & there[None] & (group[:, None] == group[None]) & ~jnp.eye(len(group), dtype=bool)
    signs = jnp.sign(q[:, None] - q[None]) * jnp.sign(r[:, None] - r[None])
    signs = jnp.where(readable[None] & readable[:, None], signs, 0.0)
    count = others.sum(1)
    mean = jnp.where(others, signs, 0.0).sum(1) / jnp.maximum(count, 1)
    return jnp.where(there & (count > 0), jnp.where(readable, mean, -1.0), 0.0)


def stated_verdict(
    completions: Sequence[str | None],
    *,
    right: str = "Y",
    wrong: str = "N",
    tags: tuple[str, str] | None = ("<a>", "</a>"),
) -> list[float | None]:
    """Verdict of a critique on an answer: 1 for right, 0 for wrong, None unless it states exactly one verdict.

    Args:
      completions: critiques; by `reads` also texts of another network or the reference verdicts (`reads: {completions:
        answers}, tags: null`).
      right, wrong: the two verdicts.
      tags: around the verdict, once in the text; None takes the whole text.

    Returns:
      One verdict per row, for the field `verdict`, which is NaN for None.

    >>> stated_verdict(["<t>1+1=2</t><a>Y</a>", "<a>N</a>", "<a>N</a><a>N</a>", "Y"])
    [1.0, 0.0, None, None]

    Reference: Critique-RL (2510.24320), Critique-Coder (2509.22824).
    Certainty: verified
    """
    meaning = {right: 1.0, wrong: 0.0}
    once = [text if text is None or tags is None or text.count(tags[0]) == 1 else None for text in completions]
    return [None if text is None else meaning.get((said(text, tags) or "").strip()) for text in once]


def right_verdict(
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    right: str = "Y",
    wrong: str = "N",
    tags: tuple[str, str] | None = ("<a>", "</a>"),
) -> list[float | None]:
    """Whether a critique's verdict equals the reference verdict.

        r = 1[verdict = reference verdict],   0 without a verdict

    Args:
      completions: critiques.
      answers: reference verdicts.
      right, wrong, tags: as in `stated_verdict`.

    Returns:
      One reward per row; None where the reference is not a verdict, as in rows of ordinary problems.

    >>> right_verdict(["<a>Y</a>", "<a>Y</a>", "?", "<a>5</a>"], ["Y", "N", "N", "5"])
    [1.0, 0.0, 0.0, None]

    Reference: Critique-Coder (2509.22824).
    Certainty: verified
    """
    found = stated_verdict(completions, right=right, wrong=wrong, tags=tags)
    known = stated_verdict(answers, right=right, wrong=wrong, tags=None)
    return [None if one is None else float(own == one) for own, one in zip(found, known, strict=True)]


@ranged
def critique_reward(
    verdict: Float[Array, "B"],
    original_correct: Float[Array, "B"],
    refined_correct: Float[Array, "B"] | None = None,
    *,
    form: CritiqueForm = "refine",
    bonus: NonNegative = 0.2,
) -> Float[Array, "B"]:
    """Reward of a critic, from its verdict and from the answer refined by its critique.

        verdict   1 where the verdict is right, else -1
        refine    -1 where it is wrong, else bonus + refined
        delta     -1 where it is wrong, else bonus + refined - original
        correct   -1 where it is wrong, else bonus + (1 from wrong to right, 0.2 from right to right, else 0)

    Critique-RL trains with `verdict` first, then with one of the others.

    Args:
      verdict: 1 says that the answer is right, 0 that it is wrong; NaN is a missing verdict, which counts as wrong.
      original_correct: 1 where the answer is right.
      refined_correct: 1 where the refined answer is right; not needed for `verdict`.
      form: as above.
      bonus: reward of a right verdict.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for an unknown form, a missing `refined_correct`, or a negative bonus.

    Reference: Critique-RL (2510.24320); verdicts alone: WebArbiter (2601.21872), Critique-Coder (2509.22824).
    Certainty: verified
    """
    if form not in get_args(CritiqueForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(CritiqueForm))}")
    if refined_correct is None and form != "verdict":
        raise ValueError(f"form is {form!r}, which needs refined_correct; fill it first, or take form 'verdict'")
    refined = original_correct if refined_correct is None else refined_correct
    chex.assert_equal_shape([verdict, original_correct, refined])
    before, after = original_correct.astype(jnp.float32), refined.astype(jnp.float32)
    right = jnp.isfinite(verdict) & ((verdict > 0.5) == (before > 0.5))
    earned = {
        "verdict": jnp.ones_like(before),
        "refine": bonus + after,
        "delta": bonus + after - before,
        "correct": bonus + after * jnp.where(before > 0.5, 0.2, 1.0),
    }[form]
    return jnp.where(right, earned, -1.0)


def critique_overlap(
    completions: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    *,
    field: str = "think",
    separator: str = ";",
    tags: Tags = ("<t>", "</t>"),
) -> list[float | None]:
    """F1 of the arguments of a critique and a human critique.

        F1 = 2 * matches / (arguments of the critique + arguments of the human one),   0 where both have none

    Beside the reward of the verdict, with a weight such as 0.5, a right verdict for wrong reasons earns less. Arguments
    are the texts between separators, compared without space and case; the paper extracts and matches them with a model.

    Args:
      completions: decoded completions.
      items: records of the data, with the human critique under `field`.
      field: of the critique; a record without it leaves the row out.
      separator: between arguments.
      tags: tags around the critique in a completion; None takes all of it. A completion without the tags has no
        argument.

    Returns:
      One reward per row in [0, 1]; None without a human critique.

    Raises:
      ValueError: for an empty separator.

    Reference: RM-NLHF (2601.07349).
    Certainty: reconstructed
    """
    if not separator:
        raise ValueError("separator is empty; give the text between arguments, such as ';'")

    def arguments(text: str | None) -> Counter[str]:
        parts = [" ".join(part.lower().split()) for part in (text or "").split(separator)]
        return Counter(part for part in parts if part)

    found: list[float | None] = []
    for completion, item in zip(completions, items, strict=True):
        if item.get(field) is None:
            found.append(None)
            continue
        stated = arguments(said(completion, tags))
        expected = arguments(str(item[field]))
        count = stated.total() + expected.total()
        found.append(2 * (stated & expected).total() / count if count else 0.0)
    return found


@ranged
def attribute_reward(reward_scores: Float[Array, "B A"], *, weights: tuple[float, ...]) -> Float[Array, "B"]:
    """The weighted sum of the attribute scores of the network `reward`.

        r = sum_a weights_a * s_a

    Args:
      reward_scores: of a head with one output per attribute.
      weights: one per attribute, such as (0.65, 0.8, 0.45, 0.55, -0.4) for helpfulness, correctness, coherence,
        complexity and verbosity.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for another number of weights than of attributes.

    Reference: HelpSteer (2311.09528).
    Certainty: verified
    """
    chex.assert_rank(reward_scores, 2)
    if len(weights) != reward_scores.shape[1]:
        raise ValueError(
            f"weights has {len(weights)} numbers, but the head has {reward_scores.shape[1]} outputs; give one for each"
        )
    return reward_scores.astype(jnp.float32) @ jnp.asarray(weights, jnp.float32)
