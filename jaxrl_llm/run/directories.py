"""The run directory of several processes: process 0 writes its records, all write its checkpoints.

All processes share one directory, or, for a run at an address, each has one on a private disk.
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
import psutil

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
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs", "hfs"})


class Unwritten(RunDirectory):
    """Replaces the run directory in processes that do not write records: all calls do nothing."""

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
    """A context in which this run owns its address; yields None for a local directory.

    Processes that share a disk write checkpoints to one working copy, which process 0 uploads; the others get None.
    With private disks each process has a working copy and uploads its share.

    Raises:
      ValueError: if only some of the processes share a working copy, a new run has an address that is not empty, or
        there is nothing to resume.
      OwnedError: if another process owns it.
      PassingError: if the final upload fails.
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
    """The reason, as seen by this process, why a new run cannot use an address."""
    if hosts.is_main() and mirror.there():
        return "is not empty"
    return f"has a working copy in {mirror.directory}" if mirror.computed() else None


def _share(config: Config) -> Share | None:
    """The share that this process uploads with private disks; None with a shared disk. All processes must call it.

    Raises:
      ValueError: if some processes share a disk and others do not.
    """
    if jax.process_count() == 1:
        return None
    here, own = config.directory, jax.process_index()
    start = hosts.said_by_all(uuid.uuid4().hex)[0]
    marks = [f".{here.name}.{start}.{number}" for number in range(jax.process_count())]
    here.parent.mkdir(parents=True, exist_ok=True)
    (here.parent / marks[own]).touch()
    hosts.meet("working copies are marked")
    until = time.monotonic() + (0.0 if _is_local(here.parent) else _SECONDS)
    # On network file systems a listing is fresher than the cached attributes of a name.
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


def _is_local(folder: Path) -> bool:
    """Whether a folder is on a local file system, where files of other processes are visible at once."""
    try:
        kinds = {mounted.mountpoint: mounted.fstype for mounted in psutil.disk_partitions(all=True)}
    except (OSError, RuntimeError):  # the system does not list them
        return False
    place = folder.resolve()
    return next((kinds[str(at)] in _LOCAL for at in (place, *place.parents) if str(at) in kinds), False)


@contextmanager
def run_directory(
    path: Path, config: Mapping[str, Any], *, resume_step: int | None, mirror: Mirror | None = None, **logging: Any
) -> Iterator[RunDirectory]:
    """The run directory for the process that writes records, else `Unwritten`. All processes must call it.

    Args:
      path, config, resume_step, **logging: as for `RunDirectory`.
      mirror: uploads it to an address at once, so that a restart after a kill finds that the run has begun.

    Raises:
      ValueError: as `RunDirectory`, or if the processes do not share the directory.
    """
    # Opened first, by one process: a new run needs it empty, and checkpoints create a directory in it.
    with ExitStack() as stack:
        if hosts.is_main() and resume_step is None:  # a run that goes on is owned from where its state is looked for
            require_new(path)
            with _named_as_run_dir(path):
                path.mkdir(parents=True, exist_ok=True)
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


def require_new(path: Path) -> None:
    """Raise ValueError for a run directory that holds something, or cannot be looked into."""
    with _named_as_run_dir(path):
        require_empty(path)


@contextmanager
def _named_as_run_dir(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if (clause := storage_fault(error)) is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        name = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
        raise ValueError(f"run_dir={name} cannot be made: {clause}; give another run_dir") from None


def require_shared(path: Path) -> None:
    """Raise ValueError unless this process can see the path that process 0 has written."""
    if not _seen(path):
        raise ValueError(
            f"process {jax.process_index()} does not see {path}, which process 0 does; give a run_dir on a disk "
            "that all hosts share"
        )


def _seen(path: Path) -> bool:
    """Whether a path exists; waits, since network file systems may show it with a delay."""
    until = time.monotonic() + _SECONDS
    while not path.exists():
        if jax.process_count() == 1 or time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def at_hand(path: str | Path) -> Path:
    """A local path; for a run or checkpoint at an address, the path of a fresh local copy."""
    run, inside, step = str(path).rstrip("/").partition("/checkpoints")
    return local_copy(run) / (inside + step).lstrip("/") if is_address(run) else Path(path)


def is_step(path: Path) -> bool:
    """Whether a path names a checkpoint of an existing run; the checkpoint itself may be missing."""
    return natural(path.name) is not None and path.parent.name == "checkpoints" and path.parent.is_dir()


def is_run(path: Path) -> bool:
    """Whether a path is a run or one of its checkpoints, and not a model directory."""
    return is_step(path) or (path.is_dir() and not (path / "config.json").is_file())
