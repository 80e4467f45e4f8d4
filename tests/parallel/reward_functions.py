"""Rewards that any policy can raise, for runs over several processes; REWARD_SECONDS and REWARD_FAILS spoil them."""

import os
import time


def even_share(tokens, mask):
    """Share of even token ids: traceable."""
    return ((tokens % 2 == 0) * mask).sum(-1) / mask.sum(-1)


def second_vowel(completion):
    """Whether the second letter is a vowel, of one completion at a time; None where there is none before n."""
    return float(completion[1] in "aeiou") if completion[1:2] and completion[1] < "n" else None


def first_letter(completions):
    """The first letter of each, as text."""
    return [text[:1] for text in completions]


def vowel_share(completions, answers):
    """Share of vowels: on the host."""
    time.sleep(float(os.environ.get("REWARD_SECONDS", "0")))
    if os.environ.get("REWARD_FAILS") and len(completions) > 2:  # not where it is tried on two rows
        raise RuntimeError("the judge is out of office")
    assert len(completions) == len(answers)
    return [sum(letter in "aeiouAEIOU02468" for letter in text) / max(1, len(text)) for text in completions]
