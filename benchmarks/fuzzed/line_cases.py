"""Fuzzed JSONL files of problems and of judged completions."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from fuzzed.mutations import Case, damaged, mutated


def lines_of_json(random_: random.Random, folder: Path) -> Callable[[int], Case]:
    """Files of problems and of judged completions: mutated records, damaged bytes, and paths that are not files."""
    from jaxrl_llm.data import fields_of, problem_sets
    from jaxrl_llm.data.written import judged_groups

    turn = {"role": "user", "content": "What is 2+3?"}
    records = {
        "prompt": {"prompt": "What is 2+3?", "answer": "5", "level": 1, "source": {"name": "x"}},
        "gsm8k": {"question": "What is 2+3?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
        "messages": {"messages": [turn, {"role": "assistant", "content": "It is \\\\boxed{5}."}], "answer": "5"},
        "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "rankings": {"prompt": "a", "completions": ["b", "c", "d"]},
        "ratings": {"prompt": "a", "completion": "b", "rating": 3.5},
        "labels": {"prompt": "a", "completion": "b", "label": True},
        "steps": {"prompt": "a", "steps": ["b", "c"], "labels": [1, 0]},
    }
    whole: tuple[Callable[[bytes], bytes], ...] = (
        lambda lines: b"[" * 100_000,
        lambda lines: b'{"a":' * 100_000,
        lambda lines: b"{bad}\n" * 1_000_000,
        lambda lines: lines.decode("utf-8", "replace").encode("utf-16"),
        lambda lines: b"\xef\xbb\xbf" + lines,
        lambda lines: b'{"prompt": "' + b"x" * 20_000_000 + b'", "answer": "5"}',
        lambda lines: b'{"prompt": "\\ud800", "answer": "5"}\n' + lines,
        lambda lines: b'{"prompt": "a", "prompt": "b", "answer": "5"}\n' + lines,
        lambda lines: b'{"prompt": "a", "answer": NaN}\n' + lines,
        lambda lines: b'{"prompt": "a", "answer": ' + b"9" * 10_000 + b"}\n" + lines,
        lambda lines: b'{"prompt": "a", "answer": 1e999}\n' + lines,
        lambda lines: b"\x00" * 1_000_000,
        lambda lines: b"\n" * 5_000_000,
        lambda lines: b"[" + b",".join(lines.strip().split(b"\n")) + b"]",
        lambda lines: b"",
    )
    file = folder / "lines.jsonl"

    def case(number: int) -> Case:
        kind = random_.choice(list(records))
        made = [copy.deepcopy(records[kind]) for _ in range(40)]
        for place, record in enumerate(made):
            for key, value in record.items():
                if isinstance(value, str) and key in ("prompt", "question"):
                    record[key] = f"{value} {place}"
                elif kind == "messages" and key == "messages":
                    record[key] = [{"role": "user", "content": f"What is {place}+3?"}, *value[1:]]
        for _ in range(random_.choice((0, 1, 1, 3, 40))):
            place = random_.randrange(len(made))
            made[place] = mutated(random_, made[place], ("prompt", "answer", "messages", "role", "content", "label"))
        content = b"\n".join(json.dumps(record).encode() for record in made) + b"\n"
        way = random_.random()
        if way < 0.3:
            content = damaged(random_, content)
        elif way < 0.5:
            content = random_.choice(whole)(content)
        special = random_.random()

        def run() -> None:
            if file.is_dir():
                file.rmdir()
            file.unlink(missing_ok=True)
            if special < 0.02:
                os.mkfifo(file)
            elif special < 0.03:
                file.mkdir()
            elif special < 0.04:
                file.symlink_to("/dev/zero")
            else:
                file.write_bytes(content)
            if kind in ("prompt", "gsm8k", "messages"):
                problem_sets(file, fields_of(kind))
            else:
                judged_groups(file, kind)  # type: ignore[arg-type]

        return Case(f"jsonl {number}: {kind}", run)

    return case
