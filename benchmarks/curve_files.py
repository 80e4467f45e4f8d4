"""Files of judged completions for `curves.py`, from answers that a policy has sampled.

Right answers are better than wrong ones. A file is written once beside the checkpoints of the policy.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrl_llm.commands.model_files import score_file
from jaxrl_llm.evaluation.suites import Evaluation
from jaxrl_llm.run.evaluated import evaluated, prepared

# Problems, samples of each, and most likely tokens at a position of stored distributions.
PROBLEMS, SAMPLES, TOP = 1000, 8, 10

Line = dict[str, Any]


class Answered(NamedTuple):
    """A problem with sampled answers of both kinds; `worked` is the reference's thought."""

    prompt: str
    right: list[str]
    wrong: list[str]
    worked: str

    @property
    def nearest_first(self) -> list[str]:
        """Different wrong answers, those that resemble the right answer most first."""
        return sorted(dict.fromkeys(self.wrong), key=lambda text: -self.likeness(text))

    def likeness(self, text: str) -> float:
        """Share of characters in common with the right answer, in order."""
        return difflib.SequenceMatcher(None, self.right[0], text, autojunk=False).ratio()


def pairs(one: Answered) -> list[Line]:
    """A right and a wrong answer, with another right one of the same policy as the reference."""
    return [{"prompt": one.prompt, "chosen": one.right[0], "rejected": one.wrong[0], "reference": one.right[-1]}]


def graded_pairs(one: Answered) -> list[Line]:
    """Pairs with a margin from 1 to 3: the less the wrong answer resembles the right one, the larger."""
    return [line | {"margin": 1.0 + 2.0 * (1.0 - one.likeness(line["rejected"]))} for line in pairs(one)]


def labels(one: Answered) -> list[Line]:
    """Both answers, with a label each."""
    return [{"prompt": one.prompt, "completion": text, "label": label} for text, label in _both(one, True, False)]


def ratings(one: Answered) -> list[Line]:
    """Both answers, rated 4 and 0 for help, and from 0 to 4 for their length."""
    longest = max(len(one.right[0]), len(one.wrong[0]))
    return [
        {"prompt": one.prompt, "completion": text, "rating": help_}
        | {"helpfulness": help_, "verbosity": round(4.0 * len(text) / longest, 2)}
        for text, help_ in _both(one, 4.0, 0.0)
    ]


def rankings(one: Answered) -> list[Line]:
    """A right answer, the wrong one that resembles it most, and the one that does least."""
    wrong = one.nearest_first
    if len(wrong) < 2:
        return []
    return [{"prompt": one.prompt, "completions": [one.right[0], wrong[0], wrong[-1]]}]


def verdicts(one: Answered) -> list[Line]:
    """Both answers in an order that depends on the problem, and which is better."""
    good, bad = one.right[0], one.wrong[0]
    if sum(map(ord, one.prompt)) % 2:
        return [{"prompt": one.prompt, "first": good, "second": bad, "better": "first"}]
    return [{"prompt": one.prompt, "first": bad, "second": good, "better": "second"}]


def steps(one: Answered) -> list[Line]:
    """Both answers in steps. A step is right if it is empty or the reference has it, the answer if it is right."""
    lines, known = [], [*one.worked.split(";"), ""]
    for text, right in _both(one, 1, 0):
        parts = re.findall(r"[^;]*;|[^;]+$", text)
        thought = [re.sub(r"^<t>|;$", "", part) for part in parts[:-1]]
        last, _, answer = parts[-1].removeprefix("<t>").partition("</t>")
        given = [int(step in known) for step in thought] + ([int(last in known)] if answer else []) + [right]
        texts = [*parts[:-1], f"{parts[-1].partition('</t>')[0]}</t>", answer] if answer else parts
        lines.append({"prompt": one.prompt, "steps": texts, "labels": given})
    return lines


def demonstrations(one: Answered) -> list[Line]:
    """The right answer alone."""
    return [{"prompt": one.prompt, "completion": one.right[0]}]


KINDS: dict[str, Callable[[Answered], list[Line]]] = {
    "pairs": pairs,
    "graded_pairs": graded_pairs,
    "labels": labels,
    "ratings": ratings,
    "rankings": rankings,
    "verdicts": verdicts,
    "steps": steps,
    "distributions": demonstrations,
}


def written(run: Path, kind: str) -> Path:
    """The file of a kind, from answers of a run's policy to problems of its training split."""
    file = run / f"{kind}.jsonl"
    if file.exists():
        return file
    lines = [line for one in answered(run) for line in KINDS[kind](one)]
    made = file.with_name(f"{file.name}.{os.getpid()}")  # several processes may want it at once
    made.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if kind == "distributions":
        lines = score_file(str(run), str(made), temperature=1.0, batch=64, dtype=None, top=TOP)
        made.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made.rename(file)
    return file


def answered(run: Path) -> Iterator[Answered]:
    """Problems that a run's policy answers in both ways."""
    one = Evaluation(split="train", problems=PROBLEMS, samples=SAMPLES, k=(1,))
    subject = evaluated(str(run))
    ready = prepared(one, subject)
    worked = {str(item["body"]): str(item.get("think", "")) for item in ready.items}
    for batch in ready.records(subject.policy.params, ready.items, jax.random.key(0)):
        for record in batch:
            whole = [each for each in record["samples"] if not each["truncated"]]
            said = {
                correct: [each["completion"] for each in whole if each["correct"] == correct]
                for correct in (True, False)
            }
            if said[True] and said[False]:
                yield Answered(record["prompt"], said[True], said[False], worked.get(record["prompt"], ""))


def _both(one: Answered, right: Any, wrong: Any) -> list[tuple[str, Any]]:
    return [(one.right[0], right), (one.wrong[0], wrong)]
