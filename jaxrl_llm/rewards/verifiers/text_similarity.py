"""Similarity of a text to a reference: equality without typography, overlap, edit distance."""

from __future__ import annotations

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

from jaxrl_llm.data.final_answer import marked_answer
from jaxrl_llm.data.tasks.items import tagged
from jaxrl_llm.ranges import NonNegative, ranged
from jaxrl_llm.rewards.verifiers.numbers import parsed_number

Tags = tuple[str, str] | Literal["marked"] | None
WordForm = Literal["exact", "f1"]
SimilarityForm = Literal["word_error", "edits", "rouge1", "rouge2", "rougeL", "rouge", "bleu", "chrf"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TO_SPACE = str.maketrans(string.punctuation, " " * len(string.punctuation))


def said(text: str, tags: Tags) -> str | None:
    """The compared part of a completion: inside the last pair of tags, after the last mark, or all of it.

    `tags` "marked" takes a box or the text after `####`; None takes the whole completion."""
    if tags is None:
        return text
    return marked_answer(text) if tags == "marked" else tagged(text, *tags)


def word_match(
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    form: WordForm = "exact",
    tags: Tags = None,
    separator: str | None = None,
    punctuation_to_space: bool = False,
) -> list[float]:
    """Equality, or F1, of the words of an answer and a reference.

        exact   1 where the words are equal in order
        f1      2 * c / (|p| + |r|), c the number of common words, |p| and |r| the numbers of words

    Words are those of the lower-case text without ASCII punctuation and without a, an, the. With several references the
    maximum counts.

    Args:
      completions: decoded completions.
      answers: reference answers.
      form: as above.
      tags: tags around the answer; "marked" takes the text after `####` or in a box; None the whole completion.
      separator: between several references in an answer, such as "|"; None is a single reference.
      punctuation_to_space: punctuation separates words, and articles are kept, as for search agents.

    Returns:
      One reward per row in [0, 1]; 0 without an answer; 1 where both have no words.

    Raises:
      ValueError: for an unknown form.

    >>> word_match(["The cat!", "dog"], ["cat", "cat"]), word_match(["the big cat"], ["cat sat"], form="f1")
    ([1.0, 0.0], [0.5])

    Reference: SQuAD (1606.05250).
    Certainty: verified
    """
    if form not in get_args(WordForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(WordForm))}")
    score = _f1 if form == "f1" else lambda one, other: float(one == other)
    rewards = []
    for text, answer in zip(completions, answers, strict=True):
        prediction = said(text, tags)
        words = None if prediction is None else _words(prediction, punctuation_to_space)
        references = [answer] if separator is None else answer.split(separator)
        rewards.append(
            0.0 if words is None else max(score(words, _words(one, punctuation_to_space)) for one in references)
        )
    return rewards


def _words(text: str, punctuation_to_space: bool) -> list[str]:
    if punctuation_to_space:
        return text.lower().translate(_TO_SPACE).split()
    return [word for word in text.lower().translate(_PUNCTUATION).split() if word not in ("a", "an", "the")]


def _f1(one: Sequence[str], other: Sequence[str]) -> float:
    if not one or not other:
        return float(not one and not other)
    return 2 * (Counter(one) & Counter(other)).total() / (len(one) + len(other))


def text_similarity(
    completions: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    *,
    form: SimilarityForm = "edits",
    field: str = "answer",
    tags: Tags = None,
) -> list[float | None]:
    """Similarity of a text to a reference text, in [0, 1].

        word_error               max(0, 1 - edits of words / words of the reference)
        edits                    1 - edits of characters / characters of the longer one
        rouge1, rouge2, rougeL   F of the words, the pairs of words, the longest common sequence (rouge-score)
        rouge                    the mean of the three
        bleu, chrf               of one sentence (sacrebleu), over 100

    An edit inserts, deletes or substitutes one. The last six forms need the extra `text`.

    Args:
      completions: decoded completions.
      items: records of the data, with the reference text under `field`.
      form: as above.
      field: such as "answer", or "think" for the reference scratchpad.
      tags: tags around the compared text; None takes the whole completion.

    Returns:
      One reward per row; 0 where the tags are missing, None where the record has no reference.

    Raises:
      ValueError: for an unknown form, or one whose package is missing.

    >>> text_similarity(["the cat sat"], [{"answer": "the cat sits there"}], form="word_error")
    [0.5]

    Reference: VideoRFT (2505.12434); ROUGE, Lin (2004); BLEU, Papineni et al. (2002); chrF, Popovic (2015).
    Certainty: verified
    """
    score = _similarity(form)
    rewards: list[float | None] = []
    for text, item in zip(completions, items, strict=True):
        reference, prediction = item.get(field), said(text, tags)
        rewards.append(None if reference is None else 0.0 if prediction is None else score(prediction, str(reference)))
    return rewards


def _similarity(form: str) -> Callable[[str, str], float]:
    if form not in get_args(SimilarityForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(SimilarityForm))}")
    if form == "word_error":
        return lambda one, other: max(0.0, 1 - _edits(one.split(), other.split()) / max(len(other.split()), 1))
    if form == "edits":
        return lambda one, other: 1 - _edits(one, other) / max(len(one), len(other), 1)
    package, installed = ("rouge_score", "rouge-score") if form.startswith("rouge") else ("sacrebleu", "sacrebleu")
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"form is {form!r}, which needs {installed}; install it with: pip install 'jaxrl_llm[text]'")
    if form.startswith("rouge"):
        from rouge_score import rouge_scorer  # the extra text

        kinds = ["rouge1", "rouge2", "rougeL"] if form == "rouge" else [form]
        scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=False)
        return lambda one, other: sum(s.fmeasure for s in scorer.score(other, one).values()) / len(kinds)
    import sacrebleu  # the extra text

    metric = sacrebleu.BLEU(effective_order=True) if form == "bleu" else sacrebleu.CHRF()
    return lambda one, other: metric.sentence_score(one, [other]).score / 100


# Longest compared texts: the cost grows with the product of the lengths.
_MOST_SIGNS = 4096


def _edits(one: Sequence[str], other: Sequence[str]) -> int:
    """Levenshtein distance."""
    one, other = one[:_MOST_SIGNS], other[:_MOST_SIGNS]
    row = list(range(len(other) + 1))
    for i, sign in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (sign != wanted))
    return row[-1]


@ranged
def relative_error(
    completions: Sequence[str], answers: Sequence[str], *, tags: Tags = "marked", eps: NonNegative = 1e-9
) -> list[float]:
    """1 minus the relative error of a number, for measured quantities.

        r = 1 - min(1, (|said - answer| + eps) / (|answer| + eps))

    Args:
      completions: decoded completions.
      answers: numbers.
      tags: tags around the number; "marked" takes the text after `####` or in a box; None the whole completion.
      eps: avoids a division by 0.

    Returns:
      One reward per row in [0, 1]; 0 without a number.

    Raises:
      ValueError: for a reference answer that is not a number.

    >>> [round(r, 6) for r in relative_error(["#### 1.1", "#### 5", "it is 2"], ["1", "2", "2"])]
    [0.9, 0.0, 0.0]

    Reference: VideoRFT (2505.12434).
    Certainty: verified
    """
    rewards, least = [], Fraction(eps)
    for row, (text, answer) in enumerate(zip(completions, answers, strict=True)):
        if (wanted := parsed_number(answer)) is None:
            raise ValueError(
                f"the reference answer of row {row} is {answer[:80]!r}, which is not a number; write one number"
            )
        number = parsed_number(said(text, tags) or "")
        rewards.append(
            0.0 if number is None else 1 - float(min(1, (abs(number - wanted) + least) / (abs(wanted) + least)))
        )
    return rewards


def choice_match(
    completions: Sequence[str], answers: Sequence[str], *, tags: Tags = None, options: str = "ABCDEFGHIJ"
) -> list[float]:
    r"""1 where a completion chooses the option of the reference, else 0.

    The choice is the letter in the tags or the mark; in a whole completion that in the last mark, else after the last
    "answer is" or "answer:", else in its only line. Case, brackets and text after the letter are ignored: "(B) Paris",
    "B. Paris". Two letters are no choice.

    Args:
      completions: decoded completions.
      answers: letters, such as "B".
      tags: tags around the choice; "marked" takes only the text after `####` or in a box; None searches the whole
        completion.
      options: letters that may be chosen.

    Returns:
      One reward per row, 0 or 1.

    Raises:
      ValueError: for a reference answer that is not an option.

    >>> choice_match(["The answer is (B).", r"\boxed{C}", "A or B"], ["B", "C", "A"])
    [1.0, 1.0, 0.0]
    """
    rewards = []
    for row, (text, answer) in enumerate(zip(completions, answers, strict=True)):
        if (wanted := _option(answer, options)) is None:
            raise ValueError(
                f"the reference answer of row {row} is {answer[:80]!r}, which is not one of the options "
                f"{', '.join(options)}"
            )
        place = said(text, tags)
        if tags is None and (place := marked_answer(text)) is None:
            *before, behind = _ANSWER_IS.split(text)
            lines = [line for line in behind.splitlines() if line.strip()]
            place = lines[0] if lines and (before or len(lines) == 1) else None
            rewards.append(float(place is not None and _option(place, options, loose=bool(before)) == wanted))
            continue
        rewards.append(float(place is not None and _option(place, options) == wanted))
    return rewards


_ANSWER_IS = re.compile(r"\b(?:answer|option|choice)s?(?: is\b:?|:)", re.I)
_DECORATED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s?\{|[{}$*`\"']")
_CHOICE = re.compile(r"(?:option |choice )?(?:\(([a-z])\)|\[([a-z])\]|([a-z])(?=$|[.:,)]))[.:,)]?", re.I)
_NEXT = re.compile(r"\s*(?:or|and|/|&)\s*[(\[]?[a-z](?![a-z])", re.I)


def _option(text: str, options: str, *, loose: bool = False) -> str | None:
    """The letter that a short text chooses; with `loose` it may precede a word."""
    plain = _DECORATED.sub("", text).strip()
    read = _CHOICE.match(plain)
    if read is None and loose:
        read = re.match(r"([A-Z])(?=\s)", plain)
    if read is None:
        return None
    letter = next(part for part in read.groups() if part).upper()
    rest = plain[read.end() :].strip(" .()[]")
    several = _NEXT.match(plain[read.end() :]) or (len(rest) == 1 and rest.upper() in options.upper())
    return letter if letter in options.upper() and not several else None
