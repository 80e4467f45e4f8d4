"""Reasoning patterns of a text, by its phrases: a reward without a reference answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxrl_llm.ranges import Count, ranged

# Plain substrings of the lower-case text; some end with a blank or a comma.
PHRASES = (
    *("i need to", "we need to", "wait", "alternatively", "let me check", "let me see", "let's focus on"),
    *("we know that", "we can observe ", "we can see ", "let me try", "let's try", "let us try", "first, "),
    *("firstly, ", "next, ", "finally, ", "let us first", "let's first", "let me first", "try again", "still not"),
    *("not working", "not correct", "does not work", "doesn't work", "makes sense", "since we ", "because we "),
    *("consequently", "as a result", "thus", "therefore", "hence", "so that", "thereby", "if we", "given there "),
    *("for instance ", "for example "),
)


@ranged
def reasoning_patterns(
    completions: Sequence[str],
    *,
    phrases: tuple[str, ...] = PHRASES,
    enough: Count = 20,
    ngram: Count = 20,
    penalised: str = "user: ",
) -> list[float]:
    """Share of reasoning phrases in a completion, minus repetitions.

        r = max(0, min(1, distinct phrases / enough) - repeated word n-grams / n-grams
            - occurrences of `penalised`)

    Args:
      completions: decoded completions.
      phrases: in lower case; each counts once.
      enough: number of phrases for reward 1.
      ngram: n, in words; an n-gram that occurs more than once counts once.
      penalised: text whose occurrences are subtracted; "" for none.

    Returns:
      One reward per row in [0, 1].

    >>> reasoning_patterns(["Wait, so we need to add. Therefore 9. Alternatively let me check"])
    [0.25]

    Reference: reasoning-pattern reward (2505.22653).
    Certainty: verified
    """
    rewards = []
    for completion in completions:
        text = completion.lower()
        words = text.split()
        grams = Counter(tuple(words[k : k + ngram]) for k in range(len(words) - ngram + 1))
        repeated = sum(count > 1 for count in grams.values()) / max(grams.total(), 1)
        used = min(1.0, sum(phrase in text for phrase in phrases) / enough)
        rewards.append(max(0.0, used - repeated - (text.count(penalised) if penalised else 0)))
    return rewards
