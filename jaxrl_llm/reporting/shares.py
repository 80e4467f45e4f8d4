"""Which files of a run each process uploads if the run is at an address and each process has its own disk.

Each process writes the arrays of its devices to its own disk, uploads these and the files that only it writes
(`own_folder`), and then reports which steps it has uploaded. Process 0 uploads all other files. It uploads the metadata
of a checkpoint, without which the checkpoint is incomplete, after all processes have uploaded their arrays.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

OWN = "host"  # folder of a run with the files of processes other than 0
BROUGHT = ".brought-"  # followed by the number of a process: the file with its report
# Chunks of arrays, in checkpoints and in frozen parts, and the notes of orbax on the arrays of one process.
_PARTS = re.compile(r"(checkpoints/\d+/state|frozen/[^/]+)/(.+/[\d.]+|array_metadatas/[^/]+)")


class Share(NamedTuple):
    """The uploads of one process.

    Attributes:
      process, processes: its number, and the number of processes, at least two.
      start: id of this start of the run; the same for all processes.
    """

    process: int
    processes: int
    start: str

    @property
    def is_main(self) -> bool:
        """Whether it is process 0, which uploads all files but those of other processes."""
        return self.process == 0

    @property
    def others(self) -> range:
        """The other processes."""
        return range(1, self.processes)

    def brings(self, name: str) -> bool:
        """Whether this process, which is not process 0, uploads a file of the run.

        >>> [Share(1, 2, "").brings(name) for name in ("host/1/stalled.txt", "logs/x.log", "frozen/f/w/0")]
        [True, False, True]
        """
        return name.startswith(f"{OWN}/{self.process}/") or is_of_one_process(name)

    def say(self, fs: Any, root: str, steps: Collection[str]) -> None:
        """Report that this process has uploaded its arrays of these steps, and that it is still running."""
        report = {"start": self.start, "steps": list(steps), "at": time.time()}
        fs.pipe_file(f"{root}/{BROUGHT}{self.process}", json.dumps(report).encode())

    def said_by(self, fs: Any, root: str, process: int) -> dict[str, Any]:
        """The last report of a process in this start of the run; one without steps if there is none."""
        try:
            report = json.loads(fs.cat_file(f"{root}/{BROUGHT}{process}"))
        except (FileNotFoundError, ValueError):  # a local file may be incomplete
            report = {}
        return report if isinstance(report, dict) and report.get("start") == self.start else {"steps": []}

    def arrived(self, fs: Any, root: str) -> set[str]:
        """Steps whose arrays all other processes have uploaded."""
        return set.intersection(*(set(self.said_by(fs, root, other)["steps"]) for other in self.others))


def own_folder(directory: Path, process: int) -> Path:
    """The folder of files that only this process writes: the run directory for process 0, `host/N` in it for N > 0.

    >>> own_folder(Path("run"), 0).as_posix(), own_folder(Path("run"), 2).as_posix()
    ('run', 'run/host/2')
    """
    return directory / OWN / str(process) if process else directory


def is_of_one_process(name: str) -> bool:
    """Whether a file of a run is a part that only one process writes.

    >>> is_of_one_process("checkpoints/20/state/params.w/0.1"), is_of_one_process("checkpoints/20/state/_METADATA")
    (True, False)
    """
    return _PARTS.fullmatch(name) is not None


def step_folder(name: str) -> str | None:
    """The folder of a checkpoint that a file belongs to; None for another file.

    >>> step_folder("checkpoints/20/state/d/1"), step_folder("metrics.jsonl")
    ('checkpoints/20/', None)
    """
    folder, _, rest = name.partition("/")
    step, inside, _ = rest.partition("/")
    return f"{folder}/{step}/" if folder == "checkpoints" and inside and step.isdecimal() else None


def step_folders(names: list[str]) -> list[str]:
    """The distinct folders of checkpoints that files belong to."""
    return sorted({step for name in names if (step := step_folder(name))})


def step_number(step: str) -> int:
    """The step of the folder of a checkpoint."""
    return int(step.split("/")[1])
