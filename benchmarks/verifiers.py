"""Throughput of rewards that read text: verifiers of text and mathematics, and a judge at an endpoint.

    python benchmarks/verifiers.py
    python benchmarks/verifiers.py --completions 512 --characters 2000   # a quick look

Completions have reasoning of the given length with tags and a LaTeX answer, right or wrong, in groups of eight. One of
them has an answer that a computer algebra system would evaluate without end. The judge is the example server of
docs/examples with a latency; its second epoch repeats the requests of the first.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxrl_llm import rewards

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))
from judge_stand_in import StandIn

ENDLESS = r"9^{9^{9^{9^{9}}}} + \sum_{n=1}^{10^{12}} \frac{1}{n^{n!}}"
WORDS = (
    "so we add",
    "both sides",
    "and then divide",
    "by the sum",
    "of the first term",
    "which gives",
    "the same value",
)


def completions(count: int, characters: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """(completions, reference answers); half of the answers are right, written differently from the reference."""
    rng, texts, answers = random.Random(seed), [], []
    for number in range(count):
        problem = random.Random(number // 8)
        a, b, c = problem.randint(2, 60), problem.randint(2, 60), problem.randint(2, 9)
        reference = (rf"\frac{{{a}}}{{{b}}}", rf"{a}\sqrt{{{c}}}", f"({a},{b}]", f"{a * b}")[number // 8 % 4]
        right = (rf"\frac{{{2 * a}}}{{{2 * b}}}", rf"\sqrt{{{a * a * c}}}", f"({a}, {b}]", f"{a * b:,}")[
            number // 8 % 4
        ]
        wrong = rng.choice((str(a + b), rf"\frac{{{a}}}{{{b + 1}}}", f"({b},{a}]", rf"{a}\sqrt{{{c + 1}}}"))
        said = right if rng.random() < 0.5 else wrong
        thought = " ".join(rng.choices(WORDS, k=characters // 4))
        end = rf"</think><answer>\boxed{{{ENDLESS if number == count // 2 else said}}}</answer>"
        texts.append(f"<think>{thought}"[: characters - len(end)] + end)
        answers.append(reference)
    return texts, answers


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds of wall time, result of the call)."""
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--completions", type=int, default=4096)
    parser.add_argument("--characters", type=int, default=2000)
    parser.add_argument("--judged", type=int, default=512)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds of one judgement")
    parser.add_argument("--concurrency", type=int, default=32)
    options = parser.parse_args(given)
    texts, answers = completions(options.completions, options.characters)
    table = Table("what", "completions", "seconds", "a second", "result")

    def row(what: str, count: int, seconds: float, result: str) -> None:
        table.add_row(what, f"{count:,}", f"{seconds:.1f}", f"{count / max(seconds, 1e-9):,.0f}", result)

    seconds, found = timed(lambda: rewards.tag_format(texts))
    row("tag_format", len(texts), seconds, f"mean {sum(found) / len(found):.3f}")
    total = seconds
    rewards.latex_match([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"])  # starts the processes
    seconds, found = timed(lambda: rewards.latex_match(texts, answers))
    row("latex_match", len(texts), seconds, f"mean {sum(found) / len(found):.3f}; endless: {found[len(texts) // 2]:g}")
    row("both", len(texts), total + seconds, "60 s is the bar" if options.completions == 4096 else "")

    served = StandIn(lambda question: json.dumps({"rating": 1 + len(question) % 5}), options.latency).start()
    judged = [f"{number}: {text[:200]}" for number, text in enumerate(texts[: options.judged])]
    with tempfile.TemporaryDirectory() as folder:
        described = served.described(concurrency=options.concurrency, cache=str(Path(folder) / "answers.sqlite"))
        for epoch in ("first", "second"):
            rate = rewards.judge_rating(judge=described)  # a new one, as in another run
            data = {"prompts": [""] * len(judged), "answers": [""] * len(judged), "completions": judged}
            seconds, _ = timed(lambda rate=rate, data=data: rate(**data))
            least = len(judged) * options.latency / options.concurrency
            share = f"{least / seconds:.0%} of the concurrency" if epoch == "first" else "nothing was asked"
            asked = rate.report()
            row(
                f"judge, {epoch} epoch",
                len(judged),
                seconds,
                f"{asked['calls']:.0f} calls, {share if asked['calls'] or epoch == 'second' else ''}, "
                f"{served.most} at once",
            )
    tournament = rewards.judge_tournament(judge=served.described(concurrency=options.concurrency))
    data = {"prompts": ["p"] * len(judged), "completions": judged, "group": [n // 8 for n in range(len(judged))]}
    seconds, _ = timed(lambda: tournament(**data))
    calls = tournament.report()["calls"]
    share = calls * options.latency / options.concurrency / seconds
    row("tournaments of 8", len(judged), seconds, f"{calls:.0f} calls, {share:.0%} of the concurrency")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
