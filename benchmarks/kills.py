"""A run that is killed again and again ends with the numbers of one that was not.

    python benchmarks/kills.py --kills 50 [--processes 2] [CONFIG [section.key=value ...]]

SIGKILL comes at random moments of a run: while it starts, compiles, steps, and writes checkpoints in the background.
Each time the same command goes on with it. Metrics, samples, and every array of the last checkpoint are compared with
those of a run without kills, bit for bit. Exit status 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.reporting.metric_table import OF_MACHINE
from jaxrl_llm.reporting.run_directory import read_records
from jaxrl_llm.run import checkpoints, integrity

ROOT = Path(__file__).parents[1]
SMALL = [
    *("warm_start.steps=10", "training.steps=10", "checkpoints.every_steps=2", "evaluation.problems=16"),
    *("evaluation.every_steps=4", "reporting.samples_every_steps=3", "task.train_items=256"),
]


def started(words: list[str], processes: int, log: Path) -> list[subprocess.Popen]:
    """The processes of one start of the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = []
    for number in range(processes):
        several = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process-id", str(number)]
        command = [sys.executable, "-m", "jaxrl_llm", "train", *words, *(several if processes > 1 else [])]
        with log.open("ab") as out:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            made.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
    return made


def ended(processes: list[subprocess.Popen], seconds: float | None) -> list[int]:
    """Exit statuses; after so many seconds one of the processes is killed."""
    until = None if seconds is None else time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        if until is not None and time.monotonic() > until:
            random.choice(processes).kill()
            until = None
        time.sleep(0.02)
    return [process.returncode for process in processes]


def numbers(run: Path) -> dict[str, object]:
    """All that a run has computed."""
    folder = run / "checkpoints"
    last = checkpoints.latest_step(folder)
    assert last is not None
    damage = integrity.verified(folder, last).damage
    summary = json.loads((run / "summary.json").read_text())
    return {
        "metrics": [
            {name: value for name, value in line.items() if name not in OF_MACHINE}
            for line in read_records(run / "metrics.jsonl")
        ],
        "samples": read_records(run / "samples.jsonl"),
        "arrays": damage or checkpoints.read_digests(folder, last),
        "evaluation": (summary["before"], summary["after"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG [key=value ...]", default=[str(ROOT / "configs" / "demo.yaml"), *SMALL]
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        run = lambda name: [*options.words, f"run_dir={folder}/{name}", "--resume-if-started"]  # noqa: E731
        ended(started(run("warm"), options.processes, log), None)  # fills the store of compiled programs
        began = time.monotonic()
        statuses = ended(started(run("whole"), options.processes, log), None)
        whole, expected = time.monotonic() - began, numbers(Path(folder) / "whole")
        assert statuses == [0] * options.processes, statuses
        kills = lives = wrong = 0
        while kills < options.kills:
            lives += 1
            words, done = run(f"killed{lives}"), False
            while not done:
                left = kills < options.kills
                made = started(words, options.processes, log)
                statuses = ended(made, random.uniform(0.2, 1.2) * whole if left else None)
                killed = -9 in statuses
                kills += killed
                done = statuses == [0] * options.processes
                if not done and not killed:
                    print(f"ended with {statuses}: {log.read_text()[-2000:]}")
                    return 1
            found = numbers(Path(folder) / f"killed{lives}")
            differ = [name for name in expected if found[name] != expected[name]]
            wrong += bool(differ)
            print(
                f"run {lives}: after {kills} kills {'differs in ' + ', '.join(differ) if differ else 'is equal'}",
                flush=True,
            )
        print(f"{kills} kills over {lives} runs of {options.processes} processes: {wrong} runs differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
