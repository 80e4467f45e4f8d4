"""Where Linux is not: what it alone has is left out, or something else stands for it."""

from __future__ import annotations

import errno
import importlib.util
import resource
import socket
import subprocess
import sys
from unittest import mock

from jaxrl_llm.parallel import roll_call
from jaxrl_llm.reporting import machine_report, ownership
from jaxrl_llm.run import failures
from jaxrl_llm.sandbox import isolation, template_rendering

# Runs programs as on macOS: without the calls, the limits and the folders of Linux.
WITHOUT_LINUX = """
import os, resource, sys
from jaxrl_llm.sandbox import isolation, programs, runner
sys.platform, isolation.libc = "darwin", None
for name in ("NPROC", "MSGQUEUE", "MEMLOCK"):
    delattr(resource, f"RLIMIT_{name}")
for name in ("setresuid", "setresgid", "sched_getaffinity", "O_PATH"):
    delattr(os, name)
listed, os.listdir = os.listdir, lambda path=".": 1 / 0 if str(path).startswith("/proc") else listed(path)
limited = resource.setrlimit
def limit(which, pair):
    if which == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    limited(which, pair)
resource.setrlimit = limit
assert not isolation.facilities()
isolation.adopt_orphans()
for source, verdict in (("print(6 * 7)", "pass"), ("while True: pass", "timeout"), ("open('/root/x')", "")):
    told = runner.run(source, isolation.Limits(seconds=1.0), isolation.facilities(), {"stdin": ""})
    assert told["setup"] is None, told
    assert verdict in ("", programs._verdict(told, programs.Program(source))[0]), told
print("as it should be")
"""


def test_programs_run_without_what_linux_alone_has():
    done = subprocess.run([sys.executable, "-c", WITHOUT_LINUX], capture_output=True, text=True, timeout=60)
    assert done.stdout == "as it should be\n", done.stderr


def test_without_linux_nothing_isolates_and_that_is_said(monkeypatch):
    monkeypatch.setattr(isolation.sys, "platform", "darwin")
    assert isolation.missing(isolation.facilities.__wrapped__()) == ["your files", "the network", "other processes"]


def test_memory_that_cannot_be_limited_does_not_keep_templates_from_being_rendered(monkeypatch):
    def refused(*_):
        raise ValueError("current limit exceeds maximum limit")  # as macOS says

    monkeypatch.setattr(resource, "setrlimit", refused)
    template_rendering.limit_memory.__wrapped__()


def test_a_silent_machine_is_noticed_by_the_name_that_the_system_has_for_it(monkeypatch):
    monkeypatch.delattr(roll_call.socket, "TCP_KEEPIDLE", raising=False)
    monkeypatch.setattr(roll_call.socket, "TCP_KEEPALIVE", 0x10, raising=False)
    connection = mock.Mock()
    assert roll_call._lively(connection) is connection
    assert mock.call(socket.IPPROTO_TCP, 0x10, roll_call.SILENCE // 2) in connection.setsockopt.mock_calls


def test_errors_that_a_system_does_not_know_are_left_out(monkeypatch):
    monkeypatch.delattr(errno, "EREMOTEIO", raising=False)
    described = importlib.util.spec_from_file_location("failures_elsewhere", failures.__file__)
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    assert module.passing(OSError(errno.EIO, "input/output error"))


def test_what_a_machine_says_of_itself_needs_no_proc(monkeypatch):
    monkeypatch.setattr(ownership, "Path", mock.Mock(side_effect=FileNotFoundError))
    assert ownership._machine() == ""
    assert not ownership._is_over(ownership._me() | {"pid": 2**22 + 1}), "it is waited for instead"
    monkeypatch.setattr(sys, "platform", "darwin")
    in_bytes = machine_report.peak_memory()
    monkeypatch.setattr(sys, "platform", "linux")
    assert machine_report.peak_memory() >= 1024 * in_bytes
    assert machine_report.memory_in_use()["host_memory_gib"] > 0
