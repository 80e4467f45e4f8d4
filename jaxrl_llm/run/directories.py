"""The run directory of several processes: one writes its records, all write its checkpoints.

All see one directory; or, of a run at an address, each has one on a disk of its own.
"""

from __future__ import annotations

import errno
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm.addresses import is_address
from jaxrl_llm.bounds import natural
from jaxrl_llm.config import Config
from jaxrl_llm.parallel import hosts
from jaxrl_llm.reporting import RunDirectory
from jaxrl_llm.reporting.mirror import Mirror, local_copy
from jaxrl_llm.reporting.ownership import owned
from jaxrl_llm.reporting.run_directory import require_empty
from jaxrl_llm.reporting.shares import Share
from jaxrl_llm.run.failures import PassingError, storage_fault

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
def mirrored(config: Config, resume: bool, say: Callable[[str], Any]) -> Iterator[Mirror | None]:
    """Own the address of a run for the length of a block; None where it is a local directory.

    Of several processes that share a disk, all write checkpoints to one working copy, and process 0 alone brings them
    to the address; the others get None. Where each has a disk of its own, each has a working copy and brings its share.

    Raises:
      ValueError: where some of the processes share a working copy and others do not, a new run would be written to a
        place that is not empty, or there is nothing to resume.
      OwnedError: when another process has it.
      PassingError: when the address cannot be written at the end.
    """
    if not is_address(config.place):
        yield None
        return
    share = _share(config)
    if share is None and not hosts.is_main():
        hosts.first_failure(None)
        hosts.meet("the run is fetched")
        yield None
        return
    mirror = Mirror(config.place, config.directory, say, share)
    if problem := hosts.first_failure(None if resume else _in_the_way(mirror)):
        raise ValueError(f"run_dir={config.place!r} {problem}: resume that run, or remove it, or give another run_dir")
    if resume and hosts.is_main():
        mirror.fetch()
    try:
        with mirror.kept():
            if not resume and hosts.is_main():
                mirror.begin()
            hosts.meet("the run is fetched")
            if not hosts.is_main():
                mirror.fetch() if resume else mirror.begin()
            yield mirror
    except ConnectionError as error:
        raise PassingError(str(error)) from error


def _in_the_way(mirror: Mirror) -> str | None:
    """What keeps a new run from an address, as this process sees it."""
    if hosts.is_main() and mirror.there():
        return "is not empty"
    return f"has a working copy in {mirror.directory}" if mirror.computed() else None


def _share(config: Config) -> Share | None:
    """What this process brings where each has a disk of its own; None where all have one. All must call it.

    Raises:
      ValueError: where some share a disk and others do not.
    """
    if jax.process_count() == 1:
        return None
    here, own = config.directory, jax.process_index()
    start = hosts.said_by_all(uuid.uuid4().hex)[0]
    marks = [f".{here.name}.{start}.{number}" for number in range(jax.process_count())]
    here.parent.mkdir(parents=True, exist_ok=True)
    (here.parent / marks[own]).touch()
    hosts.meet("working copies are marked")
    until = time.monotonic() + _SECONDS
    # A listing is fresher than what a network file system remembers of a name.
    while not (there := set(marks) & set(os.listdir(here.parent))) >= set(marks) and time.monotonic() < until:
        time.sleep(0.1)
    seen = [json.loads(said) for said in hosts.said_by_all(json.dumps([mark in there for mark in marks]))]
    (here.parent / marks[own]).unlink(missing_ok=True)
    if all(map(all, seen)):
        return None
    if all(sum(of_one) == 1 for of_one in seen):
        return Share(own, len(marks), start)
    groups = sorted({", ".join(str(number) for number, one in enumerate(of_one) if one) for of_one in seen})
    raise ValueError(
        f"run_dir={config.place!r} is an address: its processes work in {here}, on one disk that all share or on a "
        f"disk of each, but here share one: {'; '.join(groups)}. Let XDG_CACHE_HOME name a directory that all share, "
        "or another one for each process"
    )


@contextmanager
def run_directory(
    path: Path, config: Mapping[str, Any], *, resume_step: int | None, mirror: Mirror | None = None, **logging: Any
) -> Iterator[RunDirectory]:
    """The records of a run: of the process that writes, or `Unwritten`. All processes must call it.

    Args:
      path, config, resume_step, **logging: as for `RunDirectory`.
      mirror: brings it to an address: at once, so that whoever comes after a kill finds that the run has begun.

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
        if mirror is not None and mirror.apart:
            path.mkdir(parents=True, exist_ok=True)
        else:
            require_shared(path / "config.yaml")
        if mirror is not None:
            mirror.push_later()
        yield directory


def require_shared(path: Path) -> None:
    """Raises ValueError unless what lies at this path, as the process that writes sees it, is seen by this one."""
    if not _seen(path):
        raise ValueError(
            f"process {jax.process_index()} does not see {path}, which process 0 does; give a run_dir on a disk "
            "that all hosts share"
        )


def _seen(path: Path) -> bool:
    """Whether a path is there; network file systems may say for a while that it is not."""
    until = time.monotonic() + _SECONDS
    while not path.exists():
        if jax.process_count() == 1 or time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def at_hand(path: str | Path) -> Path:
    """A path on this machine: of a run, or one of its checkpoints, at an address, that of the copy, made anew."""
    run, inside, step = str(path).rstrip("/").partition("/checkpoints")
    return local_copy(run) / (inside + step).lstrip("/") if is_address(run) else Path(path)


def is_step(path: Path) -> bool:
    """Whether a path names one checkpoint of a run that is here, which may be gone itself."""
    return natural(path.name) is not None and path.parent.name == "checkpoints" and path.parent.is_dir()


def is_run(path: Path) -> bool:
    """Whether a path is a run or names a checkpoint of one, and no model directory."""
    return is_step(path) or (path.is_dir() and not (path / "config.json").is_file())
