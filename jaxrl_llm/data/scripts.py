"""The script (writing system) of each token of a vocabulary, to measure language mixing of a policy."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

# Script by the first word of a letter's Unicode name. Latin and Greek are not counted: formulas of all languages use
# them.
_SCRIPTS = {"CJK": 1, "HIRAGANA": 1, "KATAKANA": 1, "HANGUL": 2, "CYRILLIC": 3, "ARABIC": 4, "HEBREW": 5, "THAI": 6}
_SCRIPTS |= {"DEVANAGARI": 7, "BENGALI": 8, "TAMIL": 9, "TELUGU": 10, "GUJARATI": 11, "KANNADA": 12, "MALAYALAM": 13}
_SCRIPTS |= {"GEORGIAN": 14, "ARMENIAN": 15, "ETHIOPIC": 16, "KHMER": 17, "LAO": 18, "MYANMAR": 19, "SINHALA": 20}


def script_number(text: str) -> int:
    """The number of the script of a text's first letter that has one, other than Latin and Greek; 0 for none.

    >>> script_number("да"), script_number("x = 2"), script_number("の") == script_number("中")
    (3, 0, True)
    """
    for letter in text:
        if letter > "\u0370" and letter.isalpha():
            number = _SCRIPTS.get(unicodedata.name(letter, "").partition(" ")[0], 0)
            if number:
                return number
    return 0


def token_scripts(pieces: Sequence[bytes | None]) -> Int[np.ndarray, "V"] | None:
    """`script_number` of each token of a vocabulary; None if all are 0.

    Args:
      pieces: bytes of each token; incomplete characters have no script.
    """
    numbers = np.array([script_number((piece or b"").decode(errors="ignore")) for piece in pieces], np.int32)
    return numbers if numbers.any() else None
