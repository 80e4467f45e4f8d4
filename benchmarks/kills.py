"""Repeated kills of a run: the resumed run must end with the same numbers as one without kills.

    python benchmarks/kills.py --kills 50 [--processes 2 [--apart]] [--work DIRECTORY] [CONFIG [section.key=value ...]]

SIGKILL is sent in each phase of a run in turn, at a random time: while it starts, while it compiles (with an empty
compilation cache), between steps, and while a checkpoint is written in the background. Each time the run is resumed
with the same command. Metrics, samples, and every array of the last checkpoint are compared with those of a run without
kills, bit for bit. Exit status 1 if anything differs.

With `--apart` each process has its own home directory, and the run is at an address (`file://...`), which is compared.

Progress is stored in `--work DIRECTORY`; with `--seconds` the work is done in portions, each of which continues there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from jaxrl_llm.reporting.metric_table import OF_MACHINE
from jaxrl_llm.reporting.run_directory import read_records
from jaxrl_llm.run import checkpoints, integrity

ROOT = Path(__file__).parents[1]
PHASES = ("start", "compile", "step", "write")
SET_UP = b"sequences per update"  # printed after the set-up, before compilation
SECONDS_OF_COMPILING, SECONDS_OF_A_STEP, SECONDS_OF_A_WRITE = 4.0, 0.2, 0.1


@dataclass
class Tally:
    """Progress: kills by phase, kills that left an incomplete checkpoint, finished runs, and runs that differ."""

    kills: dict[str, int] = field(default_factory=dict)
    half_written: int = 0
    lives: int = 0
    different: list[str] = field(default_factory=list)
    set_up_seconds: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.kills.values())

    def write(self, file: Path) -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)))
        part.replace(file)


class Place(NamedTuple):
    """The directories of a run.

    Attributes:
      name: value of `run_dir`.
      result: the directory of the finished run.
      copies: the directories that its processes write to, that of process 0 first.
      homes: XDG_CACHE_HOME of each process; empty if they share a disk.
    """

    name: str
    result: Path
    copies: tuple[Path, ...]
    homes: tuple[Path, ...]


def place_of(folder: Path, name: str, processes: int, apart: bool) -> Place:
    """Directories of a run whose processes write to one directory, or each to its own (`apart`) and to an address."""
    result = folder / name
    if not apart:
        return Place(str(result), result, (result,), ())
    homes = tuple(folder / "homes" / f"{name}-{number}" for number in range(processes))
    copies = tuple(home.joinpath("jaxrl_llm", "runs", "file", *result.parts[1:]) for home in homes)
    return Place(f"file://{result}", result, copies, homes)


def started(words: Sequence[str], processes: int, place: Place, log: Path, programs: Path) -> list[subprocess.Popen]:
    """The processes of one start of a run, with `programs` as their compilation cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    made = []
    for number in range(processes):
        several = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process-id", str(number)]
        several += ["--start-timeout", "40"]  # a process may be killed before it connects
        command = [sys.executable, "-m", "jaxrl_llm", "train", *words, f"run_dir={place.name}", "--resume-if-started"]
        command += several if processes > 1 else []
        own = {"XDG_CACHE_HOME": str(place.homes[number])} if place.homes else {}
        with log.open("ab") as out:
            made.append(subprocess.Popen(command, cwd=ROOT, env=environment | own, stdout=out, stderr=out))
    return made


def half_written(place: Place) -> set[tuple[str, int]]:
    """Incomplete checkpoints: being written, or left by a kill."""
    found = set()
    for path in (path for copy in place.copies for path in (copy / "checkpoints").glob("*orbax-checkpoint-tmp*")):
        with contextlib.suppress(FileNotFoundError):  # it may have been completed
            found.add((path.name, path.stat().st_ino))
    return found


def lines(place: Place) -> int:
    """Number of recorded steps."""
    file = place.copies[0] / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def event(phase: str, run: Place, log: Path, draw: random.Random) -> Callable[[], bool]:
    """A function that returns whether the given phase of a newly started run has begun."""
    if phase == "compile":
        said = log.stat().st_size if log.is_file() else 0
        return lambda: log.is_file() and SET_UP in log.read_bytes()[said:]
    if phase == "step":
        least = lines(run) + draw.randint(1, 4)
        return lambda: lines(run) >= least
    if phase == "write":
        seen, number = half_written(run), draw.randint(1, 2)

        def written() -> bool:
            seen.update(half_written(run))
            return len(seen) - before >= number and bool(half_written(run))

        before = len(seen)
        return written
    return lambda: True


def ended(processes: list[subprocess.Popen], begun: Callable[[], bool] | None = None, delay: float = 0.0) -> list[int]:
    """Exit statuses of the processes, one of which is killed `delay` seconds after `begun` returns True."""
    until = None
    while any(process.poll() is None for process in processes):
        if begun is not None and until is None and begun():
            until = time.monotonic() + delay
        if begun is not None and until is not None and time.monotonic() >= until:
            random.choice([process for process in processes if process.poll() is None] or processes).kill()
            begun = None
        time.sleep(0.002)
    return [process.returncode for process in processes]


def numbers(run: Path) -> dict[str, object]:
    """The computed numbers of a run: metrics, samples and arrays."""
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


def whole_run(words: list[str], processes: int, folder: Path, tally: Tally, apart: bool) -> dict[str, object]:
    """Numbers of a run without kills; its second start measures the duration of the set-up."""
    for name in ("warm", "whole"):  # the first run fills the compilation cache
        run, log = place_of(folder, name, processes, apart), folder / f"{name}.log"
        if (run.result / "summary.json").is_file():
            continue
        begun, began = event("compile", run, log, random.Random()), time.monotonic()
        made = started(words, processes, run, log, folder / "programs")
        while not begun() and any(process.poll() is None for process in made):
            time.sleep(0.02)
        tally.set_up_seconds = time.monotonic() - began
        statuses = ended(made)
        assert statuses == [0] * processes, f"{statuses}: {log.read_text()[-2000:]}"
        tally.write(folder / "tally.json")
    return numbers(folder / "whole")


def lived(
    words: list[str], processes: int, folder: Path, tally: Tally, run: Place, most: int, until: float
) -> str | None:
    """Kill and resume a run until it is finished; returns "", the error of a failed run, or None if time is over."""
    log, draw = folder / "killed.log", random.Random()
    while time.monotonic() < until:
        draw.seed(f"{tally.count} {tally.lives}")
        phase, begun = PHASES[tally.count % len(PHASES)], None
        longest = {
            "start": tally.set_up_seconds,
            "compile": SECONDS_OF_COMPILING,
            "step": SECONDS_OF_A_STEP,
            "write": SECONDS_OF_A_WRITE,
        }[phase]
        if tally.count < most:
            begun = event(phase, run, log, draw)
        with tempfile.TemporaryDirectory() as empty:
            cold = phase == "compile" and begun is not None
            made = started(words, processes, run, log, Path(empty) if cold else folder / "programs")
            left = half_written(run)
            statuses = ended(made, begun, draw.uniform(0, longest))
        if statuses == [0] * processes:
            return ""
        if -9 not in statuses:
            return f"ended with {statuses}: {log.read_text()[-2000:]}"
        tally.kills[phase] = tally.kills.get(phase, 0) + 1
        tally.half_written += bool(half_written(run) - left)
        tally.write(folder / "tally.json")
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    own = [str(ROOT / "benchmarks" / "kills.yaml")]
    parser.add_argument("words", nargs="*", metavar="CONFIG [key=value ...]", default=own)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--apart", action="store_true", help="each process has its own disk")
    parser.add_argument("--work", type=Path, help="directory from which an interrupted command continues")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="duration of a portion; a run may exceed it"
    )
    options = parser.parse_args(arguments)
    if options.apart and options.processes == 1:
        parser.error("--apart needs --processes of at least 2")
    until = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as kept:
        folder = (options.work or Path(kept)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "tally.json"
        tally = Tally(**json.loads(file.read_text())) if file.is_file() else Tally()
        expected = whole_run(options.words, options.processes, folder, tally, options.apart)
        while tally.count < options.kills:
            run = place_of(folder, f"killed{tally.lives}", options.processes, options.apart)
            failed = lived(options.words, options.processes, folder, tally, run, options.kills, until)
            if failed is None:
                print(f"{tally.count} kills so far; run the same command with --work {folder} to continue")
                return 0
            if failed:
                print(failed)
                return 1
            found = numbers(run.result)
            differ = [name for name in expected if found[name] != expected[name]]
            tally.different += [f"run {tally.lives}: {', '.join(differ)}"] * bool(differ)
            said = f"differs in {', '.join(differ)}" if differ else "is equal"
            print(f"run {tally.lives}: after {tally.count} kills {said}", flush=True)
            tally.lives += 1
            tally.write(file)
        by_phase = ", ".join(f"{phase} {count}" for phase, count in Counter(tally.kills).items())
        ran = f"{options.processes} processes" + " with a disk each" * options.apart
        print(
            f"{tally.count} kills ({by_phase}; {tally.half_written} left a checkpoint half-written) over "
            f"{tally.lives} runs of {ran}: {len(tally.different)} runs differ"
        )
    return int(bool(tally.different))


if __name__ == "__main__":
    sys.exit(main())
