"""Kernel mechanisms that isolate a process from files, network and other processes.

    namespaces   a separate file system root with Python alone, a network without interfaces, and separate process ids
    landlock     access to files other than the listed ones is denied, as are signals to processes outside
    seccomp      system calls that ordinary programs do not need (sockets, ptrace, mounts, ...) kill the process
    user         if root starts the code, it runs as a user without files, so that the limit on processes applies

They are used by system calls, without further packages. If user namespaces are allowed, no privileges are needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from jaxrl_llm.sandbox.system_calls import call, checked, filtered, libc, prctl

FOLDER = "/box"  # the only writable folder in a separate root
_NEW_NAMESPACES = 1 << 17 | 1 << 26 | 1 << 27 | 1 << 29 | 1 << 30  # mounts, host name, IPC, processes, network
_NEW_USER = 1 << 28
_READ_ONLY, _NO_SUID, _NO_DEV = 1, 2, 4  # flags of mount and mount_setattr
_BIND, _RECURSIVE, _PRIVATE, _AT_RECURSIVE = 1 << 12, 1 << 14, 1 << 18, 0x8000
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class SandboxError(ValueError):
    """The requested isolation is not available, or could not be set up."""


@dataclass(frozen=True)
class Limits:
    """Limits of one run of a program.

    Attributes:
      seconds: wall-clock time from start to end; also the CPU time of each process.
      memory_bytes: address space of each process, and memory of all processes together.
      file_bytes: size of each file; with namespaces, all files together are limited to four times this size.
      output_bytes: size of standard output, and of standard error.
      processes: number of simultaneous processes and threads.
    """

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    processes: int = 16

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; it must be above 0 and finite")


# ---- available facilities -------------------------------------------------------------------------------------------

# Resource -> sets of facilities, each of which protects it.
_KEEPS = {
    "your files": ({"namespaces"}, {"landlock"}),
    "the network": ({"namespaces"}, {"seccomp"}),
    "other processes": ({"namespaces"}, {"landlock signals", "seccomp"}, {"user", "seccomp"}),
}


def missing(found: Collection[str]) -> list[str]:
    """The resources that these facilities do not protect.

    >>> missing({"landlock", "seccomp"})
    ['other processes']
    """
    return [what for what, sets in _KEEPS.items() if not any(each <= {*found} for each in sets)]


@functools.cache
def facilities() -> frozenset[str]:
    """The working facilities: some of namespaces, landlock, landlock signals, seccomp, user.

    Each is tested in a short-lived process. Must be called in a single-threaded process.
    """
    tries: dict[tuple[str, ...], Callable[[], object]] = {
        ("namespaces", "user"): lambda: entered({"namespaces", "user"}),
        ("namespaces",): lambda: entered({"namespaces"}),
        ("landlock", "landlock signals"): lambda: _landlocked(readable(), "/", signals=True),
        ("landlock",): lambda: _landlocked(readable(), "/", signals=False),
        ("seccomp",): filtered,
        ("user",): _as_nobody,
    }
    found = set[str]()
    for names, attempt in tries.items():
        if sys.platform == "linux" and not {*names} <= found and _works(attempt):
            found |= {*names}
    return frozenset(found)


def _works(attempt: Callable[[], object]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            attempt()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def readable() -> list[str]:
    """Files and folders that a Python program needs: the interpreter, its packages and the system libraries."""
    paths = [*_SYSTEM, *(os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, sys.exec_prefix))]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


# ---- isolation of a process -----------------------------------------------------------------------------------------


def entered(
    using: Collection[str],
    limits: Limits | None = None,
    *,
    folder: str = FOLDER,
    report: int | None = None,
    lasting: bool = False,
) -> str:
    """Fork, isolate the child and return in it; this process waits for the child and exits with its status.

    Args:
      using: facilities.
      limits: limits of each process; None: no limits.
      folder: the writable folder without namespaces; with namespaces, a new folder in memory replaces it.
      report: file descriptor to which {"status": wait status of the child} is written as a line of JSON.
      lasting: whether the process serves several calls; then CPU time and address space are not limited here.

    Returns:
      The writable folder.

    Raises:
      OSError: if the kernel refuses a facility.
    """
    parents = [os.getppid(), os.getpid()]
    if "namespaces" in using:
        _new_namespaces(as_root="user" in using)
        _in_child(None)
        folder = FOLDER
        _own_root(limits or Limits(), 0 if "user" not in using else _nobody(parents[1]))
    _in_child(report, first="namespaces" in using)
    os.chdir(folder if os.path.isdir(folder) else "/")
    if limits is not None:
        # In a new user namespace, or as a new user, the count of processes starts at 0.
        beside = 0 if {"namespaces", "user"} & {*using} else _tasks_of(os.getuid())
        _limited(limits, beside, lasting=lasting)
    if "user" in using:
        if folder != FOLDER:
            os.chown(folder, _nobody(parents[1]), -1)
        _as_nobody(_nobody(parents[1]))
    if sys.platform == "linux":
        prctl(38, 1)  # no new privileges
    if "landlock" in using:
        _landlocked(readable(), folder, signals="landlock signals" in using)
    if "namespaces" in using and "user" not in using:
        _without_capabilities()
    if "seccomp" in using:
        # The kernel does not limit the processes of root, so forks are forbidden instead.
        filtered(parents, forks="user" in using or os.getuid() != 0)
    return folder


def die_with_parent() -> None:
    """Make Linux kill this process when the thread that started it ends."""
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL)


def adopt_orphans() -> None:
    """On Linux, make orphaned descendants children of this process instead of process 1."""
    if sys.platform == "linux":
        libc.prctl(36, 1)


def _in_child(report: int | None, *, first: bool = False) -> None:
    """Fork and return in the child; the parent waits for the child and exits with its status.

    The parent may be the first process of a process namespace.
    """
    child = os.fork()
    if child == 0:
        die_with_parent()
        return
    try:
        if sys.platform == "linux":
            prctl(4, 0)  # processes of the same user cannot trace it
        pid = None
        while pid != child:  # orphans become children of the first process of a namespace
            pid, status = os.wait()
        if first and os.getpid() == 1:
            with contextlib.suppress(OSError):
                os.kill(-1, signal.SIGKILL)  # so that only this process can write to the report
        if report is not None:
            os.write(report, b"\n" + json.dumps({"status": status}).encode() + b"\n")
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    except BaseException:
        os._exit(70)


def _tasks_of(user: int) -> int:
    """Number of processes and threads of a user."""
    found = 0
    for pid in os.listdir("/proc") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):
            if pid.isdigit() and os.stat(f"/proc/{pid}").st_uid == user:
                found += len(os.listdir(f"/proc/{pid}/task"))
    return found


def _limited(limits: Limits, beside: int, *, lasting: bool) -> None:
    for name, value in {
        **({} if lasting else {"AS": limits.memory_bytes, "CPU": math.ceil(limits.seconds)}),
        "FSIZE": limits.file_bytes,
        **({"NPROC": limits.processes + beside} if sys.platform == "linux" else {}),
        "NOFILE": 256,
        "CORE": 0,
        "MEMLOCK": 1 << 16,
        "MSGQUEUE": 1 << 16,
    }.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS does not have all of them
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value + (name == "CPU")))


# ---- users and namespaces -------------------------------------------------------------------------------------------


def _nobody(number: int) -> int:
    """An unused user id, different for each run, since the kernel counts processes per user."""
    return 1 << 30 | number


def _as_nobody(user: int = _nobody(0)) -> None:
    if os.getuid() != 0:
        raise PermissionError("only root can change to another user")
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if not os.access(os.__file__, os.R_OK):
        raise PermissionError("only root can read the installation of Python")


def _new_namespaces(*, as_root: bool) -> None:
    user, group = os.getuid(), os.getgid()
    checked("unshare", libc.unshare(_NEW_NAMESPACES | (0 if as_root else _NEW_USER)))
    if not as_root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _own_root(limits: Limits, owner: int) -> None:
    """Enter a read-only root with only Python, and one folder in memory that `owner` (0: this user) can write to."""
    paths = readable()
    _mount("none", "/", "", _RECURSIVE | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NO_SUID | _NO_DEV, "size=1m,mode=755")
    os.mkdir("/tmp/before")
    call("pivot_root", b"/tmp", b"/tmp/before")
    os.chdir("/")
    for path in (*paths, *_DEVICES):
        before = f"/before{path}"
        if os.path.islink(before):
            os.symlink(os.readlink(before), path)
        elif os.path.exists(before) and not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if os.path.isdir(before):
                os.mkdir(path)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
            _mount(before, path, "", _BIND | _RECURSIVE)
            if path in paths:
                _set_attributes(path, _READ_ONLY | _NO_SUID | _NO_DEV, _AT_RECURSIVE)
    os.mkdir(FOLDER)
    if not os.path.exists("/tmp"):
        os.symlink(FOLDER, "/tmp")
    checked("umount", libc.umount2(b"/before", 2))  # lazily, with all mounts below it
    os.rmdir("/before")
    _set_attributes("/", _READ_ONLY | _NO_SUID | _NO_DEV, 0)
    whose = f",uid={owner},gid={owner}" if owner else ""
    options = f"size={4 * limits.file_bytes},nr_inodes=4096,mode=700{whose}"
    _mount("tmpfs", FOLDER, "tmpfs", _NO_SUID | _NO_DEV, options)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    given = (source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None)
    checked(f"mount {target}", libc.mount(*given))


def _set_attributes(path: str, attributes: int, flags: int) -> None:
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    call("mount_setattr", -100, path.encode(), flags, wanted, len(wanted))


def _without_capabilities() -> None:
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    call("capset", header, nothing)


# ---- landlock -------------------------------------------------------------------------------------------------------

_READ = 1 | 1 << 2 | 1 << 3  # execute, read a file, list a folder
_READ_WRITE_FILE = 1 << 1 | 1 << 2


def _landlocked(paths: Sequence[str], folder: str, *, signals: bool) -> None:
    """Limit this process to reading these paths, and to reading and writing the folder."""
    version = call("landlock_create_ruleset", None, 0, 1)
    if signals and version < 6:
        raise OSError("this version of Landlock cannot restrict signals")
    every = (1 << 13) - 1 | (1 << 13 if version > 1 else 0) | (1 << 14 if version > 2 else 0)
    every |= 1 << 15 if version > 4 else 0
    network, scoped = 3 if version > 3 else 0, 3 if signals else 0
    attributes = struct.pack("QQQ", every, network, scoped)[: 24 if version > 5 else 16 if version > 3 else 8]
    rules = call("landlock_create_ruleset", attributes, len(attributes), 0)
    writable = every & ~(1 | 1 << 6 | 1 << 11 | 1 << 15)  # not executing, nor making or controlling devices
    given = [*((path, _READ) for path in paths), *((path, _READ_WRITE_FILE) for path in _DEVICES), (folder, writable)]
    for path, rights in given:
        if os.path.exists(path):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights if os.path.isdir(path) else rights & (_READ_WRITE_FILE | 1 | 1 << 14)
            call("landlock_add_rule", rules, 1, struct.pack("=Qi", allowed & every, place), 0)
            os.close(place)
    prctl(38, 1)
    call("landlock_restrict_self", rules, 0)
    os.close(rules)
