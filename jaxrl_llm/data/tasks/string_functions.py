"""String composition: `F:K(M(abgd))` -> adgb; functions with arbitrary one-letter names, innermost first."""

from __future__ import annotations

from random import Random

from jaxrl_llm.data.tasks.items import Item, Task, equality, require_bool, require_subset

_LETTERS = "abcdefgh"
_NEXT = str.maketrans(_LETTERS, _LETTERS[1:] + _LETTERS[:1])
_PREVIOUS = str.maketrans(_LETTERS, _LETTERS[-1:] + _LETTERS[:-1])
_MIRROR = str.maketrans(_LETTERS, _LETTERS[::-1])


def _ends_swapped(word: str) -> str:
    return word if len(word) < 2 else word[-1] + word[1:-1] + word[0]


def _pairs_swapped(word: str) -> str:
    return "".join(word[k : k + 2][::-1] for k in range(0, len(word), 2))


FUNCTIONS = {
    "K": lambda word: word[::-1],
    "L": lambda word: "".join(sorted(word)),
    "M": lambda word: word[1:] + word[:1],
    "N": lambda word: word[-1:] + word[:-1],
    "O": lambda word: word.translate(_NEXT),
    "P": lambda word: word.translate(_PREVIOUS),
    "Q": _ends_swapped,
    "R": lambda word: word + word[-1],
    "S": lambda word: word[1:] or word,
    "T": _pairs_swapped,
    "U": lambda word: "".join(dict.fromkeys(word)),
    "V": lambda word: word.translate(_MIRROR),
}
NAMES = "".join(FUNCTIONS)


def item(functions: str, word: str, *, scratchpad: bool = True) -> Item:
    """The problem f1(f2(...(word))) for a string of function names, outermost first.

    >>> item("VTU", "aabch").think
    'U(aabch)=abch;T(abch)=bahc;V(bahc)=ghaf'
    """
    level, value, written = len(functions), word, []
    for name in reversed(functions):
        result = FUNCTIONS[name](value)
        written.append(f"{name}({value})={result}")
        value = result
    body = "F:" + "(".join([*functions, word]) + ")" * level
    think = ";".join(written) if scratchpad else ""
    return Item(body, think, value, "composition", level, f"composition-{level}")


def task(*, functions: str = NAMES, scratchpad: bool = True) -> Task:
    """Compositions of `level` functions, drawn with replacement, of a word of 3 to 6 letters.

    K reverses, L sorts, M rotates left, N rotates right, O takes the next letter, P the previous one, Q swaps first
    and last, R repeats the last letter, S drops the first, T swaps neighbours in pairs, U keeps first occurrences,
    V mirrors the alphabet.

    Args:
      functions: names of the functions to draw from, for example "KLMNOPQ" to reserve the others for a test.
      scratchpad: write every intermediate word before the answer.
    """
    functions = require_subset("functions", functions, NAMES)
    require_bool("scratchpad", scratchpad)

    def draw(rng: Random, level: int) -> Item:
        word = "".join(rng.choices(_LETTERS, k=rng.randint(3, 6)))
        return item("".join(rng.choices(functions, k=level)), word, scratchpad=scratchpad)

    return Task(
        name="composition",
        draw=draw,
        verify=equality,
        levels=tuple(range(1, 7)),
        last_level=12,
        description="nested string functions; the level is the depth",
        options={"functions": functions, "scratchpad": scratchpad},
        scratchpad=scratchpad,
    )
