"""Files of a run by their names, and what each of several processes brings to its address where they share no disk.

Each writes the arrays that its devices hold to a directory of its own, brings those and what it alone writes
(`own_folder`), and says which steps are there.
Process 0 brings all else, and the meta of a checkpoint, without which it is not taken, after the arrays of all.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

OWN = "host"  # folder of a run: what each of its processes writes by itself
BROUGHT = ".brought-"  # and the number of a process: what it says
# Chunks of arrays, in checkpoints and in what is written once beside them, and what orbax notes on those of a process.
_PARTS = re.compile(r"(checkpoints/\d+/state|frozen/[^/]+)/(.+/[\d.]+|array_metadatas/[^/]+)")


class Share(NamedTuple):
    """What one process brings.

    Attributes:
      process, processes: its number, and how many there are; at least two.
      start: tells this start of the run from others; the same for all processes.
    """

    process: int
    processes: int
    start: str

    @property
    def is_main(self) -> bool:
        """Whether it brings all but the arrays of others."""
        return self.process == 0

    @property
    def others(self) -> range:
        """The processes that bring nothing but arrays."""
        return range(1, self.processes)

    def brings(self, name: str) -> bool:
        """Whether a file of the run is brought by this process, which is another than process 0.

        >>> [Share(1, 2, "").brings(name) for name in ("host/1/stalled.txt", "host/0/x.log", "frozen/f/w/0")]
        [True, False, True]
        """
        return name.startswith(f"{OWN}/{self.process}/") or is_of_one_process(name)

    def say(self, fs: Any, root: str, steps: Collection[str]) -> None:
        """That all arrays of these steps which this process has are there; or that it is still at work."""
        said = {"start": self.start, "steps": list(steps), "at": time.time()}
        fs.pipe_file(f"{root}/{BROUGHT}{self.process}", json.dumps(said).encode())

    def said_by(self, fs: Any, root: str, process: int) -> dict[str, Any]:
        """What a process has said since this start of the run."""
        try:
            said = json.loads(fs.cat_file(f"{root}/{BROUGHT}{process}"))
        except (FileNotFoundError, ValueError):  # a local file may be there half
            said = {}
        return said if isinstance(said, dict) and said.get("start") == self.start else {"steps": []}

    def arrived(self, fs: Any, root: str) -> set[str]:
        """Steps whose arrays all others have brought."""
        return set.intersection(*(set(self.said_by(fs, root, other)["steps"]) for other in self.others))


def own_folder(directory: Path, process: int) -> Path:
    """Where a process writes what none of the others does: the run directory itself, `host/N` in it of process N > 0.

    >>> own_folder(Path("run"), 0).as_posix(), own_folder(Path("run"), 2).as_posix()
    ('run', 'run/host/2')
    """
    return directory / OWN / str(process) if process else directory


def is_of_one_process(name: str) -> bool:
    """Whether one process alone writes a file of a run.

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
    """The folders of checkpoints that files belong to, once each."""
    return sorted({step for name in names if (step := step_folder(name))})


def step_number(step: str) -> int:
    """Of the folder of a checkpoint."""
    return int(step.split("/")[1])
