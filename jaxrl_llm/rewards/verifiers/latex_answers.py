r"""Answers that are mathematics beyond numbers, compared by the package math-verify: \frac{\sqrt 2}{2} is 1/\sqrt 2.

What a policy writes may keep a computer algebra system busy for ever, so it runs in a process of its own, which is
ended and started anew where one comparison takes too long.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.data.final_answer import marked_answer
from jaxrl_llm.ranges import Positive, ranged
from jaxrl_llm.rewards.verifiers.numbers import parsed_number

_START_SECONDS = 60.0
_worker: subprocess.Popen[str] | None = None
_one_at_a_time = threading.Lock()


@ranged
def latex_match(completions: Sequence[str], answers: Sequence[str], *, seconds: Positive = 5.0) -> list[float]:
    r"""1 where the completion's marked answer is the same mathematics as the reference answer, else 0.

    Numbers are compared as by `number_match`; everything else (sets, intervals, matrices, equations, expressions) by
    math-verify. Needs the extra `math`.

    Args:
      completions: decoded completions; the answer stands behind the last `####` or in the last \boxed{}.
      answers: reference answers in LaTeX, or solutions with such a mark.
      seconds: that a comparison may take; a longer one counts as unequal.

    Returns:
      One reward a row, 0 or 1. A completion without a mark gets 0.

    Raises:
      ValueError: without math-verify, or for a reference answer that is no mathematics it reads.

    >>> latex_match(["#### 0.5"], [r"\frac{1}{2}"])
    [1.0]
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("latex_match needs the package math-verify; install it with: pip install 'jaxrl_llm[math]'")
    rewards = []
    for row, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
        said, wanted = marked_answer(completion), marked_answer(answer) or answer
        same = said is not None and (said == wanted or _same_number(said, wanted))
        if said and not same:
            same = _compared(wanted, said, seconds)
        if same is None:
            raise ValueError(
                f"the reference answer of row {row} is {answer[:80]!r}, which is no mathematics that "
                "math-verify reads; write it in LaTeX, or use exact_match for text"
            )
        rewards.append(float(same))
    return rewards


def _same_number(said: str, wanted: str) -> bool:
    number = parsed_number(said)
    return number is not None and number == parsed_number(wanted)


def _compared(answer: str, said: str, seconds: float) -> bool | None:
    """What the process says; False where it takes too long or dies of it."""
    with _one_at_a_time:
        process = _running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([answer, said]) + "\n")
            process.stdin.flush()
            line = _line(process, seconds)
        except BrokenPipeError:
            line = ""
        if not line:
            _end()
            return False
        return json.loads(line)


def _running() -> subprocess.Popen[str]:
    global _worker
    if _worker is None or _worker.poll() is not None:
        _end()
        # -P: modules beside the file, such as numbers, must not hide those of the standard library.
        _worker = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("latex_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if not _line(_worker, _START_SECONDS):
            _end()
            raise ValueError("latex_match could not start math-verify; try: python -c 'import math_verify'")
    return _worker


def _line(process: subprocess.Popen[str], seconds: float) -> str:
    """The next line that it prints; "" where it takes longer, or is gone."""
    assert process.stdout is not None
    return process.stdout.readline() if select.select([process.stdout], [], [], seconds)[0] else ""


@atexit.register
def _end() -> None:
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.communicate()
        _worker = None
