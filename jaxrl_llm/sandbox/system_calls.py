"""Linux system calls by number: calls without a glibc function, and a seccomp filter of forbidden ones."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

libc = ctypes.CDLL(None, use_errno=True)

# Name, number on x86-64, number on arm64 of calls that kill the process: sockets, access to other processes, mounts,
# kernel facilities, and memory that limits of a process do not include (memfd_create, shmget).
_FORBIDDEN = """
socket 41 198, connect 42 203, accept 43 202, bind 49 200, listen 50 201, accept4 288 242, ptrace 101 117,
process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, kcmp 312 272,
pidfd_send_signal 424 424, pidfd_getfd 438 438, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51,
open_tree 428 428, move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433,
mount_setattr 442 442, unshare 272 97, setns 308 268, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282,
add_key 248 217, request_key 249 218, keyctl 250 219, io_uring_setup 425 425, io_uring_enter 426 426,
io_uring_register 427 427, kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, finit_module 313 273,
delete_module 176 106, reboot 169 142, swapon 167 224, swapoff 168 225, sethostname 170 161, setdomainname 171 162,
setpriority 141 140, ioprio_set 251 30,
settimeofday 164 170, clock_settime 227 112, iopl 172 -, ioperm 173 -, modify_ldt 154 -, acct 163 89,
quotactl 179 60, quotactl_fd 443 443, syslog 103 116, name_to_handle_at 303 264, open_by_handle_at 304 265,
fanotify_init 300 262, migrate_pages 256 238, move_pages 279 239, memfd_create 319 279, memfd_secret 447 447,
shmget 29 194
"""
_OTHERS = """
capset 126 91, fork 57 -, vfork 58 -, clone 56 220, clone3 435 435, pivot_root 155 41, mount_setattr 442 442,
landlock_create_ruleset 444 444, landlock_add_rule 445 445, landlock_restrict_self 446 446
"""
_SIGNALS = "kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240"
# Calls allowed only on the process itself (first argument 0), since they can affect all processes of its user.
_OWN = """
prlimit64 302 261, sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274
"""
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LAST_CALL = 462  # calls with larger numbers fail with ENOSYS
_NEW_ANY = 0x7E020000  # all CLONE_NEW... flags of clone
_THREAD = 0x10000
_KILL, _ALLOW, _NOT_PERMITTED, _NOT_NOW, _NOT_THERE = 0x80000000, 0x7FFF0000, 0x50001, 0x5000B, 0x50026
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def call(name: str, *arguments: object) -> int:
    """The result of a system call; integers are passed as C's long.

    Raises:
      OSError: if it fails.
    """
    number = _numbers(_OTHERS, _machine()[0])[name]
    given = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return checked(name, libc.syscall(ctypes.c_long(number), *given))


def prctl(option: int, value: int) -> None:
    """Set an option of this process.

    Raises:
      OSError: if it fails.
    """
    checked("prctl", libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def checked(what: str, result: int) -> int:
    """The result of a C function.

    Raises:
      OSError: if it is negative.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def filtered(protected: Sequence[int] = (), *, forks: bool = True) -> None:
    """Install a filter that kills this process for forbidden system calls, and for signals to protected processes.

    Args:
      protected: ids of processes; process 1 and signals to all processes are always protected.
      forks: whether new processes may be started; threads are always allowed.

    Raises:
      OSError: if the kernel does not support such a filter.
    """
    column, architecture = _machine()
    nr, first = 0, 16  # offsets of the number and of the first argument, lower half
    others = _numbers(_OTHERS, column)
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, nr)]
    code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]  # x32, which has other numbers
    code += [(_AT_LEAST, 0, 1, _LAST_CALL + 1), (_RETURN, 0, 0, _NOT_THERE)]
    # A filter cannot read the flags of clone3; without it glibc uses clone.
    code += [(_EQUAL, 0, 1, others["clone3"]), (_RETURN, 0, 0, _NOT_THERE)]
    for number in _numbers(_FORBIDDEN, column).values():
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _KILL)]
    otherwise = [(_RETURN, 0, 0, _ALLOW if forks else _NOT_NOW)]
    told = [(_LOAD, 0, 0, first), (_ANY_BIT, 0, 1, _NEW_ANY), (_RETURN, 0, 0, _KILL)]
    told += [(_ANY_BIT, 0, 1, _THREAD), (_RETURN, 0, 0, _ALLOW), *otherwise]
    for number in (others[name] for name in ("fork", "vfork") if name in others):
        code += [(_EQUAL, 0, 1, number), *otherwise]
    code += [(_EQUAL, 0, len(told), others["clone"]), *told]
    told = [(_LOAD, 0, 0, first), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _NOT_PERMITTED), (_RETURN, 0, 0, _ALLOW)]
    for number in _numbers(_OWN, column).values():
        code += [(_EQUAL, 0, len(told), number), *told]
    told = [(_LOAD, 0, 0, first)]
    for process in dict.fromkeys((1, 0xFFFFFFFF, *protected)):
        told += [(_EQUAL, 0, 1, process), (_RETURN, 0, 0, _KILL)]
    told += [(_RETURN, 0, 0, _ALLOW)]
    for number in _numbers(_SIGNALS, column).values():
        code += [(_EQUAL, 0, len(told), number), *told]
    code += [(_RETURN, 0, 0, _ALLOW)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(packed))
    prctl(38, 1)
    checked("seccomp", libc.prctl(22, 2, program, 0, 0))


def _machine() -> tuple[int, int]:
    """(column of the numbers, number of the architecture in seccomp)."""
    if platform.machine() not in _MACHINES or struct.calcsize("P") != 8:
        raise OSError(f"seccomp filters are not supported on {platform.machine()}")
    return _MACHINES[platform.machine()]


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = (row.split() for row in table.split(","))
    return {name: int(numbers[column]) for name, *numbers in rows if numbers[column] != "-"}
