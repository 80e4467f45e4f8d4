"""Rewards of hints that are lists of keywords, by a reference text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.ranges import ranged


@ranged
def keyword_rewards(
    completions: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    *,
    field: str = "answer",
    separator: str = ";",
    positive: float = 1.0,
    negative: float = -0.2,
    avoid: tuple[str, ...] = (),
) -> list[float]:
    """The mean of `keyword_values` over a completion's keywords.

    Directional stimulus prompting adds it to the reward of a frozen model's answer to the hint.

    Args:
      completions: decoded completions, each a list of keywords.
      items: records of the data.
      field: field of a record with the reference text.
      separator: between keywords.
      positive, negative: values of a keyword.
      avoid: keywords with value `negative`.

    Returns:
      One reward per row.

    Raises:
      ValueError: for an empty separator, or a record without the field.

    Reference: directional stimulus prompting (2302.11520).
    Certainty: verified
    """
    if not separator:
        raise ValueError("keyword_rewards.separator is empty; give the text between keywords")
    found = []
    for completion, item in zip(completions, items, strict=True):
        if field not in item:
            raise ValueError(f"keyword_rewards.field is {field!r}, which a record lacks; it has {sorted(item)}")
        keywords = completion.split(separator)
        values = keyword_values(keywords, str(item[field]), positive=positive, negative=negative, avoid=avoid)
        found.append(sum(values) / len(values))
    return found


def keyword_values(
    keywords: Sequence[str], reference: str, *, positive: float = 1.0, negative: float = -0.2, avoid: Sequence[str] = ()
) -> list[float]:
    """`negative` for invalid keywords, else `positive`.

    Invalid are keywords that are empty, in `avoid`, part of an earlier one, or not in the reference; case is ignored.

    >>> keyword_values(["Paris", "", "paris", "Rome"], "The mayor of Paris spoke.")
    [1.0, -0.2, -0.2, -0.2]
    """
    text, left_out = reference.lower(), {word.lower() for word in avoid}
    said = [keyword.strip().lower() for keyword in keywords]
    return [
        positive
        if word and word not in left_out and word in text and not any(word in earlier for earlier in said[:number])
        else negative
        for number, word in enumerate(said)
    ]
