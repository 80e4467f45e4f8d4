"""The process that `latex_match` asks: a line of JSON in, [answer, said], and one out. It imports nothing of jaxrl_llm.

The line out is true or false, or null where the answer is no mathematics that math-verify reads; a first one says that
the process is there.
"""

from __future__ import annotations

import json
import sys


def equal(answer: str, said: str) -> bool | None:
    """Whether two pieces of LaTeX are the same mathematics; None where the first is none."""
    from math_verify import parse, verify  # the extra math

    gold, target = parse(f"${answer}$"), parse(f"${said}$")
    return bool(target and verify(gold, target)) if gold else None


if __name__ == "__main__":
    import math_verify  # noqa: F401  # takes seconds, which are not those of the first comparison

    print("true", flush=True)
    for line in sys.stdin:
        try:
            said = equal(*json.loads(line))
        except Exception:  # of a package that is handed what a policy wrote
            said = False
        print(json.dumps(said), flush=True)
