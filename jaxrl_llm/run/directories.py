"""The run directory of several processes: one writes its records, and all see it, because all write its checkpoints."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm.parallel import hosts
from jaxrl_llm.reporting import RunDirectory
from jaxrl_llm.reporting.ownership import owned
from jaxrl_llm.reporting.run_directory import require_empty
from jaxrl_llm.run.failures import storage_fault

_SECONDS = 10.0  # in which a file of one host is seen by another


class Unwritten(RunDirectory):
    """Stands for a run directory whose records another process writes: what is handed to it goes nowhere."""

    def __init__(self, path: Path):
        self.path = path

    def _append(self, name: str, records: Any) -> None:
        pass

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def write_samples(self, step: int, samples: Any) -> None:
        pass

    def write_start(self, record: Mapping[str, Any]) -> None:
        pass

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def run_directory(
    path: Path, config: Mapping[str, Any], *, resume_step: int | None, **logging: Any
) -> Iterator[RunDirectory]:
    """The records of a run: of the process that writes, or `Unwritten`. All processes must call it.

    Args:
      path, config, resume_step, **logging: as for `RunDirectory`.

    Raises:
      ValueError: as `RunDirectory` does, or where the processes do not see the same directory.
    """
    # Opened first, and by one: a new run wants it empty, and checkpoints make a directory in it.
    with ExitStack() as stack:
        if hosts.is_main() and resume_step is None:  # a run that goes on is owned from where its state is looked for
            try:
                require_empty(path)
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if (clause := storage_fault(error)) is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                name = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
                raise ValueError(f"run_dir={name} cannot be made: {clause}; give another run_dir") from None
            stack.enter_context(owned(path))
        opened = RunDirectory(path, config, resume_step=resume_step, **logging) if hosts.is_main() else Unwritten(path)
        directory = stack.enter_context(opened)
        hosts.meet("the run directory is open")
        require_shared(path / "config.yaml")
        yield directory


def require_shared(path: Path) -> None:
    """Raises ValueError unless what lies at this path, as the process that writes sees it, is seen by this one."""
    until = time.monotonic() + _SECONDS
    while not path.exists():  # network file systems may say for a while that it is not there
        if jax.process_count() == 1 or time.monotonic() > until:
            raise ValueError(
                f"process {jax.process_index()} does not see {path}, which process 0 does; give a run_dir on a disk "
                "that all hosts share"
            )
        time.sleep(0.1)
