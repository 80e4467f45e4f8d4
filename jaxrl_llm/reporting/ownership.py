"""One process at a time writes a run directory: a file lock, and a heartbeat where locks are not available.

The kernel holds the lock and releases it when the process ends, also after a kill. Network file systems may have no
locks, or locks within one machine only; there the owner rewrites the file every few seconds to show that it is running.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

FILE = ".owner"
BEAT_SECONDS = 5.0


class OwnedError(ValueError):
    """Another process owns the run directory."""


@contextlib.contextmanager
def owned(directory: Path, *, say: Callable[[str], Any] = print, beat: float = BEAT_SECONDS) -> Iterator[None]:
    """Own a run directory during a block.

    Args:
      directory: it exists.
      say: receives a message while the call waits for an owner on another host.
      beat: seconds between two heartbeats; after three without a change, an owner on another host counts as ended.

    Raises:
      OwnedError: if another process owns it; names that process.
    """
    path = directory / FILE
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        held, locked = _said(path), _lock(file)
        if locked is False:
            raise OwnedError(_refusal(directory, held))
        if held and (held.get("host") != socket.gethostname() or locked is None):
            say(f"{directory} was left by {_who(held)} without a word; waiting {3 * beat:g} s whether it still lives")
            time.sleep(3 * beat)
            if _said(path) != held:
                raise OwnedError(_refusal(directory, _said(path)))
        mine = _me()
        stop = threading.Event()
        _write(file, mine | {"beat": 0})
        tell = partial(_write, file)
        beating = threading.Thread(target=_beat, args=(tell, mine, stop, beat), name="owner", daemon=True)
        beating.start()
        try:
            yield
        finally:
            stop.set()
            beating.join()
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
    finally:
        os.close(file)


@contextlib.contextmanager
def owned_place(fs: Any, name: str, where: str, *, say: Callable[[str], Any], beat: float) -> Iterator[None]:
    """Own an address during a block, by heartbeats alone, because such storage has no locks.

    If two processes begin at the same moment, the one that wrote last owns the address.

    Args:
      fs: a file system of fsspec.
      name: of the object that the owner rewrites.
      where: the address as messages show it.
      say, beat: as for `owned`.

    Raises:
      OwnedError: if another process owns it; names that process.
    """

    def said() -> dict[str, Any]:
        try:
            found = json.loads(fs.cat_file(name))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(text: dict[str, Any]) -> None:
        fs.pipe_file(name, json.dumps(text).encode() + b"\n")

    if (held := said()) and not _is_over(held):
        say(f"{where} was left by {_who(held)} without a word; waiting {3 * beat:g} s whether it still lives")
        time.sleep(3 * beat)
        if (found := said()) != held:
            raise OwnedError(_refusal(where, found))
    mine, stop = _me(), threading.Event()
    write(mine | {"beat": 0})
    if {**(found := said()), "beat": 0} != mine | {"beat": 0}:
        raise OwnedError(_refusal(where, found))
    beating = threading.Thread(target=_beat, args=(write, mine, stop, beat), name="owner", daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        with contextlib.suppress(Exception):
            fs.rm_file(name)


def _me() -> dict[str, Any]:
    now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    named = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "token": uuid.uuid4().hex}
    return named | {"machine": _machine()}


def _machine() -> str:
    """Identifier of the boot and container in which process numbers are unique; "" if it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_over(held: dict[str, Any]) -> bool:
    """Whether an owner is known to have ended: it ran on this machine, and no process here has its number."""
    pid = held.get("pid")
    return held.get("machine") == (_machine() or None) and isinstance(pid, int) and not psutil.pid_exists(pid)


def _lock(file: int) -> bool | None:
    """Whether this process has the lock; None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _beat(write: Callable[[dict[str, Any]], None], mine: dict[str, Any], stop: threading.Event, seconds: float) -> None:
    count = 0
    while not stop.wait(seconds):
        count += 1
        with contextlib.suppress(Exception):  # storage that fails is noticed by whoever writes the run
            write(mine | {"beat": count})


def _write(file: int, said: dict[str, Any]) -> None:
    text = json.dumps(said).encode() + b"\n"
    os.pwrite(file, text, 0)
    os.ftruncate(file, len(text))


def _said(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _who(held: dict[str, Any]) -> str:
    return f"process {held.get('pid', '?')} on {held.get('host', '?')}, running since {held.get('since', '?')}"


def _refusal(directory: Path | str, held: dict[str, Any]) -> str:
    return (
        f"run directory {directory} belongs to {_who(held)}; wait for it, stop it (kill {held.get('pid', 'PID')}), or "
        "give another run_dir"
    )
