"""The cost of isolation: ordinary programs in the sandbox, compared with a plain subprocess of Python.

    python benchmarks/sandbox.py
    python benchmarks/sandbox.py --repetitions 50

Each program is run in both ways alternately. Medians of wall seconds, one program at a time; the last column is the
time in the sandbox relative to `subprocess.run([python, "-I", program])`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxrl_llm.sandbox import Program, facilities, run_programs

PROGRAMS = {
    "nothing": "pass",
    "reads and prints": "print(sum(map(int, input().split())))",
    "sorts 200,000 numbers": "import random; sorted(random.random() for _ in range(200_000))",
    "counts primes below 20,000": "print(sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(2, 20_000)))",
    "imports the standard library": "import asyncio, dataclasses, decimal, fractions, heapq, itertools, json, re",
    "imports NumPy": "import numpy as np; print(np.arange(1000).sum())",
    "a second of loops": "import time\nend = time.perf_counter() + 1\nwhile time.perf_counter() < end: pass",
    "writes and reads 4 MB": "open('a', 'wb').write(bytes(4 << 20)); print(len(open('a', 'rb').read()))",
}
STDIN = "1 2 3\n"


def plain(source: str) -> None:
    """Run the program in a subprocess, from a file in a fresh folder, like a grader without a sandbox."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(source)
        subprocess.run(
            [sys.executable, "-I", "program.py"],
            cwd=folder,
            env={"PATH": os.defpath},
            input=STDIN.encode(),
            capture_output=True,
            check=True,
            timeout=60,
        )


def isolated(source: str) -> None:
    (outcome,) = run_programs([Program(source, STDIN)])
    assert outcome is not None
    assert outcome.verdict == "pass", outcome


def seconds(does: Callable[[str], None], source: str) -> float:
    started = time.perf_counter()
    does(source)
    return time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repetitions", type=int, default=20)
    repetitions = options.parse_args().repetitions
    console = Console()
    console.print(
        f"isolated by {', '.join(sorted(facilities()))}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    table = Table("program", "subprocess, ms", "sandbox, ms", "sandbox / subprocess")
    for name, source in PROGRAMS.items():
        times: dict[Callable[[str], None], list[float]] = {plain: [], isolated: []}
        for repetition in range(repetitions + 1):
            for does, laps in times.items():
                lap = seconds(does, source)
                laps += [lap] if repetition else []  # the first one is a warm-up
        bare, boxed = (1000 * statistics.median(laps) for laps in times.values())
        table.add_row(name, f"{bare:.1f}", f"{boxed:.1f}", f"{boxed / bare:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
