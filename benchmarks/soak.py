"""Many runs in one process: its memory, descriptors, threads and child processes must not grow.

    python benchmarks/soak.py --minutes 120 [CONFIG [section.key=value ...]]

Each round trains a small run from start to end (asynchronous checkpoints, evaluation, samples, a reward in a separate
process) in a fresh directory and clears jax's compiled programs. A line per round has the resources held after it. The
first rounds, which fill allocators and caches, are omitted: the median memory of the rounds after a fifth of the time
is compared with that of the last fifth. Exit status 1 if memory grew by more than 2% or other resources remain.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from jaxrl_llm.commands.arguments import loaded_config
from jaxrl_llm.run.train import train

SMALL = [
    *("warm_start.steps=10", "training.steps=10", "checkpoints.every_steps=2", "evaluation.problems=16"),
    *("evaluation.every_steps=4", "reporting.samples_every_steps=3", "task.train_items=256"),
]
REWARD = '''"""A reward of text, called in a separate process."""


def digits(completions):
    return [sum(letter.isdigit() for letter in text) / 20 for text in completions]
'''
FIELDS = ("mib", "descriptors", "threads", "children")


def held() -> dict[str, float]:
    """Resources of this process: resident memory in MiB after garbage collection, open files, threads, children."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
        "children": len(children),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", default=["configs/demo.yaml", *SMALL], help="the config and its overrides")
    parser.add_argument("--minutes", type=float, default=120.0)
    options = parser.parse_args(arguments)
    started, rounds = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "soak_reward.py").write_text(REWARD)
        sys.path.insert(0, folder)
        while (passed := time.monotonic() - started) < 60 * options.minutes:
            path, *overrides = options.words
            overrides += [
                f"run_dir={folder}/round_{len(rounds)}",
                "rewards=[exact_answer, {python: 'soak_reward:digits', weight: 0.1}]",
            ]
            train(loaded_config([path, *overrides]), console=Console(file=io.StringIO()))
            jax.clear_caches()
            rounds.append({"round": len(rounds), "minutes": round(passed / 60, 1), **held()})
            print(json.dumps(rounds[-1]), flush=True)
    if len(rounds) < 10:
        print(f"only {len(rounds)} rounds: too few to compare")
        return 1
    part = max(len(rounds) // 5, 2)
    early, late = rounds[part : 2 * part], rounds[-part:]
    grew = {name: [statistics.median(one[name] for one in some) for some in (early, late)] for name in FIELDS}
    for name, (before, after) in grew.items():
        print(f"{name:12s} {before:10.1f} -> {after:10.1f}")
    # XLA starts and ends threads itself: their number may be as large as in any early round.
    left = [name for name in FIELDS[1:] if grew[name][1] > max(one[name] for one in early)]
    return int(grew["mib"][1] > 1.02 * grew["mib"][0] or bool(left))


if __name__ == "__main__":
    sys.exit(main())
