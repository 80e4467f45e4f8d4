"""Lexical diversity of a text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?\n]")


def lexical_signals(text: str) -> list[float]:
    """Five signals of diversity in [0, 1].

        distinct words / words;  distinct pairs of words / pairs, within sentences;  entropy of the words / log(words);
        1 - min(K / 10^4, 1) with Yule's K = 10^4 (sum_w n_w^2 - n) / n^2;
        the mean of 1 - Jaccard over sentences that follow one another (0 with one sentence)

    Words are runs of letters and digits in lower case; a sentence ends at . ! ? or a line's end. Fewer than two words
    give 0.

    Reference: MultiRole-R1 (2507.20187).
    Certainty: reconstructed
    """
    sentences = [found for part in _SENTENCE_END.split(text) if (found := _WORD.findall(part.lower()))]
    words = [word for sentence in sentences for word in sentence]
    count = len(words)
    if count < 2:
        return [0.0] * 5
    times = Counter(words)
    pairs = [pair for sentence in sentences for pair in pairwise(sentence)]
    entropy = -sum(n / count * math.log(n / count) for n in times.values()) / math.log(count)
    yule = (sum(n * n for n in times.values()) - count) / count**2
    neighbours = [1 - len({*one} & {*two}) / len({*one} | {*two}) for one, two in pairwise(sentences)]
    return [
        len(times) / count,
        len(set(pairs)) / len(pairs) if pairs else 0.0,
        entropy,
        1 - min(yule, 1.0),
        sum(neighbours) / len(neighbours) if neighbours else 0.0,
    ]


def lexical_diversity(completions: Sequence[str]) -> list[float]:
    """The mean of `lexical_signals`: a reward beside accuracy, with a small weight (0.1 to accuracy's 0.9).

        r = mean of the five signals

    With a larger weight the policy games it with random words.

    Args:
      completions: decoded completions.

    Returns:
      One reward per row in [0, 1].

    Reference: MultiRole-R1 (2507.20187).
    Certainty: reconstructed
    """
    return [sum(lexical_signals(text)) / 5 for text in completions]
