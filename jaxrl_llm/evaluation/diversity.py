"""Diversity of the samples of one prompt, by their answers and by their words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def answer_entropy(answers: Sequence[Hashable | None]) -> float:
    """Entropy in nats of the answers of one prompt's samples; samples without an answer are left out.

        H = -sum_a p(a) ln p(a)

    0 if all agree, or none has an answer; at most ln n.

    >>> round(answer_entropy([1, 1, 2, 2, None]), 6)
    0.693147
    """
    counts = np.asarray(list(Counter(answer for answer in answers if answer is not None).values()), np.float64)
    share = counts / max(counts.sum(), 1.0)
    return float(-(share * np.log(share)).sum()) + 0.0


def distinct_share(values: Sequence[Hashable]) -> float:
    """Number of different values divided by the number of values; 1 if all differ.

    >>> distinct_share(["a", "b", "a", "a"])
    0.5
    """
    return len(set(values)) / len(values) if len(values) else 0.0


def distinct_ngrams(texts: Sequence[str], *, n: int = 4) -> float:
    """Different n-grams divided by all n-grams of one prompt's samples: of words, or of characters for texts without
    spaces.

    1 if no n-gram occurs twice; 0 if no text has n words.

    >>> distinct_ngrams(["a b c", "a b d"], n=2)
    0.75

    Raises:
      ValueError: n < 1.

    Reference: A diversity-promoting objective function (1510.03055)
    Certainty: verified
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    grams: list[tuple[str, ...]] = []
    for text in texts:
        words = text.split() if " " in text else list(text)
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return distinct_share(grams)
