r"""Answers that are numbers, checked on the host by exact rational comparison.

A number is parsed from text by a small grammar and never evaluated as code. An answer with several numbers is invalid,
so that listing candidates earns 0. The grammar:

    signs        - and every dash or minus sign of Unicode in front of a number, and the words minus and negative; after
                 a number a dash is not a sign (3–5)
    digits       of every script; 1,234 and 1,23,456 are grouped, also by an apostrophe, _ or a thin or no-break space
                 (1'234); 1.234,56, 3,5 and 1 234 are no numbers
    fractions    1/2, \frac{1}{2}, ½; mixed 1 1/2, 1\frac{1}{2}, 1½
    powers       5e3, 5 \times 10^3, 5 × 10³, 10^3; other powers (2^3, 2³) are invalid
    scales       hundred to quadrillion, dozen, lakh, crore: in the plural, in capitals, several (2 hundred thousand);
                 20k, 20 k, 20 mn, 20 bn, 20 tn; 20K, 20M, 20B, 20T without a space (20 K are kelvin); another scale
                 is invalid: -illion, milliard, mio, mrd, lac, hundredths, 万, 億, тыс, млн, लाख, ...
    percent      %, percent, per cent, pct: a unit, or hundredths; ‰ is invalid
    currencies   any sign or name before or after the number, ignored; also between a sign and the number (-USD 5)
    units        words and symbols after the number, ignored (cm, km/h, m^2, m², °); a single letter that is no unit is
                 a variable (2x, 5i), which is invalid
    words        five, XII and 三 are no numbers
    expressions  3!, !3, |3|, 3i and 3 i are invalid; beside words ! is punctuation (it is 3!, 3 apples!)
    negations    "not 3", "isn't 3", "never 3" and numbers after !=, <=, >= or another inequality sign are
                 invalid
    equations    the number after the last equals sign (x = 3); bare numbers on both sides must agree to a hundredth
                 (1/3 = 0.33), so 2 = 3 is invalid
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Literal

from jaxrl_llm.data.final_answer import after_hashes, in_last_box, marked_answer
from jaxrl_llm.ranges import NonNegative, ranged

Extraction = Literal["any", "marked", "boxed", "hashes", "last"]

# Bounds on the size of numbers; without them one completion could stall the host.
_MOST_DIGITS = 400
_LARGEST_EXPONENT = 400

_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,133}(?!\d)|\d{1,2}(?:,\d{2}){1,200},\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_TEN_TO = r"\s*(?:\\times|\\cdot|[×·*x])\s*10\s*\^\s*(?:\{\s*(?P<braced>[-+]?\d+)\s*\}|(?P<bare>[-+]?\d+))"
_POWER = rf"(?:{_TEN_TO}|[eE](?P<e>[-+]?\d+))"
_LATEX_FRACTION = r"\\[dt]?frac\s*(?:\{\s*(?P<over>-?\d+)\s*\}\s*\{\s*(?P<under>-?\d+)\s*\}|(?P<o>\d)\s*(?P<u>\d))"
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "quadrillion": 10**15,
    "dozen": 12,
    "lakh": 10**5,
    "crore": 10**7,
}
# Suffixes directly after the digits; upper case distinguishes the last three from units.
_SUFFIXES = {"k": 10**3, "K": 10**3, "mn": 10**6, "bn": 10**9, "tn": 10**12, "M": 10**6, "B": 10**9, "T": 10**12}
_NUMBER = re.compile(
    # A sign between two operands is an operator; a space may follow a sign only at the start.
    r"(?P<sign>(?<![\w)\]}%.\s])[-+]\s?|(?<=\s)[-+](?=\S))?(?:\\?[$€£¥¢₩₹₽₺₫₱₦₪฿]\s?(?P<inner>[-+])?)?"
    # Not a digit of a word, of an exponent or of a version.
    rf"(?<![\w^.])(?<!\^\{{)(?:(?:(?P<whole>\d+)\s*)?{_LATEX_FRACTION}"
    rf"|(?P<mixed>\d+)\s+(?P<a>\d+)\s*/\s*(?P<b>\d+)(?![\d/])"
    rf"|(?P<digits>{_DIGITS})(?:\s*/\s*(?P<denominator>\d+(?:\.\d+)?)(?![\d/])|{_POWER})?)"
    # Not the basis of a power, nor a multiple of a root or of pi.
    r"(?![\d^]|\s*\^|\s*(?:\\pi|\\sqrt|π|√))"
    rf"(?:(?P<suffix>{'|'.join(_SUFFIXES)}|\s(?:k|mn|bn|tn))\b|(?P<scale>(?:(?:\s*|-)(?i:{'|'.join(_SCALES)})s?\b)+))?"
    r"(?P<percent>\s*\\?%|\s+(?i:per\s?cent|pct)\b)?"
)
# Typography that can be removed without changing the number.
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!]|\{,\}|,\\!|\\!,|[~\u00a0\u202f\u2009'’_])(?=\d{3}(?!\d))")
_SPACES = re.compile(r"\\[!,;: ]|\\q?quad\b|[~\u00a0\u202f\u2009]")
_WORDS = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_DECORATION = re.compile(r"\\(?:left|right|displaystyle)\b|\\[()\[\]]|\^\s*(?:\{\s*)?\\circ\s*\}?|\\circ\b|°|\*\*|`")
_SUPERSCRIPTS = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
# A letter of a script without spaces between words, directly before a number.
_UNSPACED = re.compile(r"(?<=[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])(?=[-+]?\d)")
_MINUS = re.compile(r"\b(?i:minus|negative)\s+(?=[\d.\\$€£¥₹])")
_SIGNED_CURRENCY = re.compile(r"(?<![\w)\]}%.])(-\s?)(?:[A-Z]{1,3}|Rs\.?|kr\.?)\s?(?=(?:[$€£¥₹]\s?)?\d)")
_STARS = re.compile(r"(?<=\d)(?:\*\*|\s\*\*\s)(?=\d)")
_TEN_ALONE = re.compile(
    r"(?<![\w.^*×·])(?<![x*×·]\s)(?<!times\s)(?<!cdot\s)10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+)(?![\d.]))"
)
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:\{\s*-?\d+\s*\}|-?\d+)")
# Next to a number these make it part of an expression, or a bound.
_OPERATORS = re.compile(r"\\(?![$%])|[+*^<>≤≥±√π∞‰|]|[-]\s*\Z")
# Negations; and signs with an equals sign that are not an equality.
_NEGATED = re.compile(r"\b(?i:not|never|nor|neither|cannot)\b|(?i:n['’]t)\b")
_UNEQUAL = re.compile(r"[!<>≠/~]=|=[<>]|≠")
# A bare number of an equation, and the tolerance between two of them.
_BARE = re.compile(r"[-\d.,/\s]+")
_AGREEMENT = Fraction(1, 100)
# After the number: an unknown scale, or a letter that is a variable and not a unit.
_OTHER_SCALES = (
    r"(?:[a-z]*illions?|[a-z]*illionen|mill(?:ion|iard)en?|milliards?|mil(?:ion|iard|joe?n|jard|h[aã]o|h[oõ]es)[a-z]*|"
    r"[mbt]ill(?:[oó]n|ones)|(?:ten|hundred|thousand|[a-z]*illion)ths?|mio|mrd|mld|mln|bln|lacs?|tausend|mille|mila|"
    r"per\s?mille?)\b|千(?![克米瓦卡])|百(?!分)|[万萬億亿兆만억조천백]|тыс|млн|млрд|"
    r"миллион|миллиард|триллион|लाख|करोड|हज़ार|हजार|ألف|مليون|مليار"
)
_UNKNOWN = re.compile(rf"\s*(?i:{_OTHER_SCALES})|(?:\s?[xyzi]|[a-zA-Z](?<![mgslhLVWJNdCF]))(?![A-Za-z0-9/^.°])")


@ranged
def number_match(
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    extraction: Extraction = "any",
    percent: Literal["unit", "hundredth", "either"] = "unit",
    tags: tuple[str, str] | None = None,
    rtol: NonNegative = 0.0,
    atol: NonNegative = 0.0,
) -> list[float]:
    r"""1 where the completion's final number is the reference answer, else 0.

        r = [ |number(completion) - number(answer)| <= atol + rtol * |number(answer)| ]

    of exact rational numbers: without tolerances 0.3333333 is not 1/3.

    Args:
      completions: decoded completions.
      answers: reference answers: a number each, or a solution with its answer after `####` or in a box.
      extraction: position of a completion's number: "boxed" in the last \boxed{}, "hashes" after the last `####`,
        "marked" after the last mark of either kind, "last" the last number of the text, "any" the last mark, or the
        last number without a mark.
      percent: "unit" reads 50% as 50, for problems that ask for a percentage; "hundredth" reads it as 1/2; "either"
        accepts both where only one side has the sign.
      tags: tags around an answer, such as ("<answer>", "</answer>"), as a third kind of mark; None for none.
      rtol, atol: tolerances, for references that are rounded decimals.

    Returns:
      One reward per row, 0 or 1. A completion without a number, with several in the marked text, or with an unclosed or
      other mark, gets 0.

    Raises:
      ValueError: for a reference answer that is not a number, or an unknown option.

    >>> number_match(["so it is 1,234.50 dollars.", "#### 3", "#### 1 2 3"], ["1234.5", "3", "3"])
    [1.0, 1.0, 0.0]
    """
    read = _extractor(extraction)
    if percent not in ("unit", "hundredth", "either"):
        raise ValueError(f"percent is {percent!r}; it must be 'unit', 'hundredth' or 'either'")
    absolute, relative = Fraction(atol), Fraction(rtol)
    rewards = []
    for row, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
        marked = marked_answer(answer)
        reference = answer if marked is None else marked
        if parsed_number(reference) is None:
            raise ValueError(
                f"the reference answer of row {row} is {answer[:80]!r}, which is not a number; use number_match for "
                "data whose answers are numbers, or set the data's answer field to the number"
            )
        said = _tagged(completion, tags) if tags and extraction in ("any", "marked") else None
        said = read(completion) if said is None else said
        same = False
        for mine, theirs in _readings(said or "", reference, percent):
            same |= mine is not None and theirs is not None and abs(mine - theirs) <= absolute + relative * abs(theirs)
        rewards.append(float(same))
    return rewards


def _readings(said: str, reference: str, percent: str) -> list[tuple[Fraction | None, Fraction | None]]:
    """Pairs of numbers to compare, one of which must agree: percent read as units, as hundredths, or as either."""
    both = [(parsed_number(said, percent=kind), parsed_number(reference, percent=kind)) for kind in _PERCENT]
    if percent != "either":
        return [both[_PERCENT.index(percent)]]
    has_sign = [unit != hundredth for unit, hundredth in zip(*both, strict=True)]
    return both if has_sign[0] != has_sign[1] else both[:1]


_PERCENT = ("unit", "hundredth")


def _tagged(text: str, tags: tuple[str, str]) -> str | None:
    """The text between the last closed pair of tags; None if another mark follows it."""
    closing = text.rfind(tags[1])
    opening = text.rfind(tags[0], 0, max(closing, 0))
    if closing < 0 or opening < 0 or marked_answer(text[closing:]) is not None:
        return None
    return text[opening + len(tags[0]) : closing].strip()


def extract_number(text: str, *, extraction: Extraction = "any") -> str | None:
    """The text of a completion's final number, for display and for votes; None without one.

    Args:
      text: decoded completion.
      extraction: as for `number_match`.

    >>> extract_number("She has 3 + 4 = 7 apples.")
    '7'
    """
    said = _extractor(extraction)(text)
    return None if said is None or parsed_number(said) is None else said


def parsed_number(text: str, *, percent: Literal["unit", "hundredth"] = "unit") -> Fraction | None:
    r"""The only number of a short text, exactly; None for no number, several, or other mathematics.

    The content of a box is read; of an equation, the side after the last equals sign.

    >>> parsed_number(r"x = -1\frac{1}{2}\text{ cm}"), parsed_number("3 or 4")
    (Fraction(-3, 2), None)
    """
    boxed = in_last_box(text)
    *sides, plain = (side.strip() for side in _plain(text if boxed is None else boxed).split("="))
    if sides and _UNEQUAL.search(text if boxed is None else boxed):
        return None
    value = _only_number(plain, percent)
    if value is not None and _BARE.fullmatch(plain):
        bare = [
            number for side in sides if _BARE.fullmatch(side) and (number := _only_number(side, percent)) is not None
        ]
        if any(abs(number - value) > _AGREEMENT * max(abs(number), abs(value)) for number in bare):
            return None
    return value


def _only_number(plain: str, percent: str) -> Fraction | None:
    """The only number of a text without typography and equals signs; None for no number, several, or other content."""
    found = list(_NUMBER.finditer(plain))
    if len(found) != 1:
        return None
    before, after = plain[: found[0].start()], plain[found[0].end() :]
    # A digit directly after a letter belongs to a unit such as m2.
    beside = re.sub(r"(?<=[A-Za-z])\d\b", "", before + "|" + after)
    factorial = before.endswith("!") or after.lstrip().startswith("!")
    if (
        _UNKNOWN.match(after)
        or _NEGATED.search(before)
        or _OPERATORS.search(before)
        or _OPERATORS.search(after)
        or any(character.isdigit() for character in beside)
        or (factorial and not any(character.isalpha() for character in before))
    ):
        return None
    return _value(found[0], percent)


def _plain(text: str) -> str:
    """The text without typography that does not change its number."""
    text = _THOUSANDS.sub("", _in_ascii(text).replace("\\$", "$"))
    text = _STARS.sub("^", _WORDS.sub(r" \1", _SPACES.sub(" ", text)))
    text = _SIGNED_CURRENCY.sub(r"\1", _MINUS.sub("-", _DECORATION.sub("", text)))
    return _TEN_ALONE.sub(r"1e\1\2", _UNIT_POWER.sub("", text)).strip().strip("$").strip()


def _in_ascii(text: str) -> str:
    """The text with Unicode dashes, digits, powers, separators and fractions in ASCII, without invisible characters."""
    if text.isascii():
        return text
    text = _SUPERSCRIPTS.sub(lambda run: f"^{{{unicodedata.normalize('NFKC', run.group())}}}", text)
    return _UNSPACED.sub(" ", "".join(map(_ascii, text)))


@cache
def _ascii(character: str) -> str:
    if character.isascii():
        return character
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    if character in "\u2212⁻" or category == "Pd":
        return "-"
    kind, _, parts = unicodedata.decomposition(character).partition(" ")
    if kind == "<wide>":
        return _ascii(chr(int(parts, 16)))
    if kind == "<fraction>":
        return " " + "".join(chr(int(part, 16)) for part in parts.split()).replace("\u2044", "/")
    digit = unicodedata.decimal(character, None)
    return {"٫": ".", "٬": ",", "\u2044": "/", "\u2215": "/"}.get(character, character) if digit is None else str(digit)


def _value(match: re.Match[str], percent: str) -> Fraction | None:
    part = match.groupdict()
    if sum(character.isdigit() for character in match.group()) > _MOST_DIGITS:
        return None
    over, under = part["over"] or part["o"], part["under"] or part["u"]
    exponent = int(part["braced"] or part["bare"] or part["e"] or 0)
    if abs(exponent) > _LARGEST_EXPONENT:
        return None
    try:
        if over:
            value = int(part["whole"] or 0) + Fraction(int(over), int(under))
        elif part["mixed"]:
            value = int(part["mixed"]) + Fraction(int(part["a"]), int(part["b"]))
        else:
            value = Fraction(part["digits"].replace(",", "")) / Fraction(part["denominator"] or 1)
    except ZeroDivisionError:
        return None
    value *= Fraction(10) ** exponent * _SUFFIXES.get((part["suffix"] or "").strip(), 1)
    for word in re.findall("|".join(_SCALES), (part["scale"] or "").lower()):
        value *= _SCALES[word]
    negative = "-" in ((part["sign"] or "") + (part["inner"] or ""))
    value = -value if negative else value
    return value / 100 if part["percent"] and percent == "hundredth" else value


def _last_number(text: str) -> str | None:
    found = list(_NUMBER.finditer(_plain(text)))
    return found[-1].group().strip() if found else None


def _marked_or_last(text: str) -> str | None:
    marked = marked_answer(text)
    # A truncated completion may have lost a part of the answer in its box.
    return _last_number(text) if marked is None and "\\boxed{" not in text else marked


_EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "any": _marked_or_last,
    "marked": marked_answer,
    "boxed": in_last_box,
    "hashes": after_hashes,
    "last": _last_number,
}


def _extractor(extraction: str) -> Callable[[str], str | None]:
    if extraction not in _EXTRACTORS:
        raise ValueError(f"extraction is {extraction!r}; it must be one of {', '.join(map(repr, _EXTRACTORS))}")
    return _EXTRACTORS[extraction]
