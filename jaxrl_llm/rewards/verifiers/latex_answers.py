r"""Answers that are mathematics beyond numbers, compared by the package math-verify: \frac{\sqrt 2}{2} is 1/\sqrt 2.

Some texts keep a computer algebra system busy for ever, so it runs in separate processes, one per core; a process whose
comparison takes too long is restarted.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
from collections.abc import Sequence

from jaxrl_llm.data.final_answer import marked_answer
from jaxrl_llm.ranges import Positive, ranged
from jaxrl_llm.rewards.verifiers.numbers import parsed_number
from jaxrl_llm.sandbox import Workers

_workers = Workers(
    {"equal": "jaxrl_llm.sandbox.latex_equality:equal"}, workers=min(8, os.cpu_count() or 1), memory_bytes=2 << 30
)
atexit.register(_workers.close)


@ranged
def latex_match(completions: Sequence[str], answers: Sequence[str], *, seconds: Positive = 5.0) -> list[float]:
    r"""1 where the completion's marked answer is mathematically equal to the reference answer, else 0.

    Numbers are compared as by `number_match`; everything else (sets, intervals, matrices, equations, expressions) by
    math-verify. Needs the extra `math`.

    Args:
      completions: decoded completions; the answer follows the last `####` or is in the last \boxed{}.
      answers: reference answers in LaTeX, or solutions with such a mark.
      seconds: time limit of a comparison; a longer one counts as unequal.

    Returns:
      One reward per row, 0 or 1. A completion without a mark gets 0.

    Raises:
      ValueError: without math-verify, or for a reference answer that math-verify cannot parse.

    >>> latex_match(["#### 0.5"], [r"\frac{1}{2}"])
    [1.0]
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("latex_match needs the package math-verify; install it with: pip install 'jaxrl_llm[math]'")
    pairs = [
        (marked_answer(answer) or answer, marked_answer(said))
        for said, answer in zip(completions, answers, strict=True)
    ]
    same = {
        (wanted, said): said is not None and (said == wanted or _same_number(said, wanted)) for wanted, said in pairs
    }
    # Samples of a prompt are often equal: each distinct pair is compared once.
    asked = [(wanted, said) for (wanted, said), equal in same.items() if said and not equal]
    same |= dict(zip(asked, _compared(asked, seconds), strict=True))
    for row, pair in enumerate(pairs):
        if same[pair] is None:
            raise ValueError(
                f"the reference answer of row {row} is {answers[row][:80]!r}, which math-verify "
                "cannot parse; write it in LaTeX, or use exact_match for text"
            )
    return [float(bool(same[pair])) for pair in pairs]


def _same_number(said: str, wanted: str) -> bool:
    number = parsed_number(said)
    return number is not None and number == parsed_number(wanted)


def _compared(pairs: Sequence[tuple[str, str | None]], seconds: float) -> list[bool | None]:
    """Equality of each (reference, answer) pair; False on timeouts and failures."""
    found = _workers("equal", list(pairs), seconds) if pairs else []
    return [False if one.late or one.error is not None else one.value for one in found]
