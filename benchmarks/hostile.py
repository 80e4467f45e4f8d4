"""Fuzzing of user inputs: each input is accepted, or refused with one short message of ours, within limits.

    python benchmarks/hostile.py [configs] [models] [templates] [jsonl] [--count N] [--seed N]

Inputs are shipped or well-formed ones with mutated values, types, names, nesting and bytes (see the folder `fuzzed`). A
case fails by an error that the package did not raise itself (a traceback), a message of more than 2,000 characters,
more than five seconds of CPU, or more than one gigabyte of memory. Exit status 1 if a case fails; `--only N` runs only
case N.
"""

from __future__ import annotations

import argparse
import json
import linecache
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fuzzed.config_cases import configs
from fuzzed.line_cases import lines_of_json
from fuzzed.model_cases import models
from fuzzed.mutations import Case
from fuzzed.template_cases import templates

ROOT = Path(__file__).parents[1]
LONGEST_MESSAGE = 2000
MOST_SECONDS = 5.0
MOST_BYTES = 2**30


class Outcome(NamedTuple):
    name: str
    kind: str  # "taken", "refused", or the failure
    seconds: float
    message: str


# ---- judging --------------------------------------------------------------------------------------------------------


def own(error: BaseException) -> bool:
    """Whether an error was raised by a `raise` statement of the package."""
    frames = traceback.extract_tb(error.__traceback__)
    innermost = frames[-1]
    package = str(ROOT / "jaxrl_llm")
    raised = (linecache.getline(innermost.filename, innermost.lineno or 0)).strip().startswith("raise")
    return isinstance(error, (ValueError, OSError)) and innermost.filename.startswith(package) and raised


def computed() -> float:
    """CPU seconds of this process and of its ended child processes."""
    return sum(os.times()[:4])


def judged(case: Case) -> Outcome:
    """The result of one input."""

    def hangs(*_: Any) -> None:
        raise TimeoutError("hangs")

    before = [(each, signal.signal(each, hangs)) for each in (signal.SIGALRM, signal.SIGPROF)]
    signal.setitimer(signal.ITIMER_PROF, 4 * MOST_SECONDS)
    signal.alarm(600)  # wall time, for inputs that make it wait
    start, message = computed(), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.run()
        kind = "taken"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        kind = "refused" if own(error) else "traceback"
        if kind == "traceback":
            message += "\n" + "".join(traceback.format_exception(error)[-3:])
        elif len(str(error)) > LONGEST_MESSAGE:
            kind = "long message"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for each, handler in before:
            signal.signal(each, handler)
    seconds = computed() - start
    return Outcome(case.name, "slow" if seconds > MOST_SECONDS else kind, seconds, message)


KINDS: dict[str, tuple[Callable[[random.Random, Path], Callable[[int], Case]], int]] = {
    "configs": (configs, 10_000),
    "models": (models, 300),
    "templates": (templates, 200),
    "jsonl": (lines_of_json, 200),
}


# ---- running --------------------------------------------------------------------------------------------------------


def outcomes(kind: str, count: int, seed: int, only: int | None = None) -> Iterator[Outcome]:
    """The outcomes of `count` inputs of a kind; each input depends only on the seed and its number."""
    with tempfile.TemporaryDirectory() as folder:
        random_ = random.Random()
        made = KINDS[kind][0](random_, Path(folder))
        for number in range(count) if only is None else [only]:
            random_.seed(f"{seed} {kind} {number}")
            yield judged(made(number))


def peak_bytes() -> int:
    """Peak memory of this process, or of its largest child process."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("kinds", nargs="*", default=[], help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument(
        "--count",
        type=int,
        help="inputs of each kind (default: " + ", ".join(f"{n} {k}" for k, (_, n) in KINDS.items()) + ")",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run only this input, and print its message")
    parser.add_argument("--messages", type=Path, help="file for all messages, one JSON object per line")
    options = parser.parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    status = 0
    for kind in options.kinds or KINDS:
        found, worst, shown = Counter(), Outcome("", "", 0.0, ""), Counter()
        for outcome in outcomes(kind, options.count or KINDS[kind][1], options.seed, options.only):
            found[outcome.kind] += 1
            worst = max(worst, outcome, key=lambda each: each.seconds)
            if options.messages:
                with options.messages.open("a") as out:
                    out.write(json.dumps(outcome._asdict()) + "\n")
            if options.only is not None:
                print(outcome.kind, outcome.message)
            elif outcome.kind not in ("taken", "refused"):
                status = 1
                place = outcome.message.rpartition("File ")[2][:120]
                shown[place] += 1
                if shown[place] == 1:
                    print(f"{outcome.name}\n  {outcome.kind}: {outcome.message[:3000]}", flush=True)
        memory = peak_bytes()
        status |= memory > MOST_BYTES
        print(
            f"{kind}: {dict(found)}; slowest {worst.seconds:.2f} s ({worst.name[:80]}); "
            f"peak memory {memory / 2**20:.0f} MiB"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
