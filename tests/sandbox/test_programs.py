"""Programs of a model: verdicts, and hostile programs, which must not change the host."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import tempfile
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest

from jaxrl_llm.sandbox import Limits, Program, SandboxError, facilities, missing, python_tool, run_programs
from jaxrl_llm.sandbox.isolation import FOLDER

SMALL = Limits(seconds=2.0, memory_bytes=256 << 20, processes=8)
# All kinds of isolation that this machine supports; each must contain all hostile programs.
WAYS = {
    "everything": frozenset(),
    "landlock and seccomp": frozenset({"namespaces", "user"}),
    "namespaces alone": frozenset({"landlock", "landlock signals", "seccomp"}),
}


def isolated(without=frozenset()):
    return not missing(facilities() - without)


if not isolated():  # isolation is not supported here
    pytestmark = pytest.mark.skip(reason="this system isolates no code")


def ran(source, *, limits=SMALL, without=frozenset(), **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of features that are disabled on purpose
        (outcome,) = run_programs([Program(source, **how)], limits=limits, without=without)
    assert outcome is not None
    return outcome


# ---- ordinary programs ----------------------------------------------------------------------------------------------

ORDINARY = {
    "input and output": (Program("print(input()[::-1])", "abc\n"), "pass", "", "cba\n"),
    "tests": (Program("def f(x): return 2 * x", tests="assert f(2) == 4"), "pass", "", ""),
    "a test fails": (Program("def f(x): return x", tests="assert f(2) == 4, 'no'"), "fail", "AssertionError: no", ""),
    "its own assertion": (Program("assert False", tests=""), "error", "AssertionError", ""),
    "leaves early": (Program("import sys; sys.exit(0)", tests="1"), "error", "exited before its tests", ""),
    "leaves at once": (Program("import os; os._exit(0)", tests="1"), "error", "exited before its tests", ""),
    "a status": (Program("raise SystemExit(3)"), "error", "ended with status 3", ""),
    "an exception": (Program("print(1); 1 / 0"), "error", "ZeroDivisionError: division by zero", "1\n"),
    "no Python": (Program("x = ("), "error", "does not compile: SyntaxError", ""),
    "a crash": (Program("import ctypes; ctypes.string_at(0)"), "error", "was killed by SIGSEGV", ""),
    "a loop": (Program("while True: pass"), "timeout", "took too long", ""),
    "a file": (Program("open('a', 'w').write('x'); print(open('a').read())"), "pass", "", "x\n"),
    "a missing file": (Program("open('a')"), "error", "FileNotFoundError", ""),
    "a child": (Program("import subprocess as s; s.run(['echo', 'hi'], check=True)"), "pass", "", "hi\n"),
    "a thread": (
        Program("import threading as t, time; t.Thread(target=lambda: (time.sleep(0.05), print(2))).start()"),
        "pass",
        "",
        "2\n",
    ),
    "asyncio": (Program("import asyncio; asyncio.run(asyncio.sleep(0)); print(__name__)"), "pass", "", "__main__\n"),
    "a signal without a name": (Program("import os; os.kill(os.getpid(), 40)"), "error", "was killed by signal 40", ""),
    "forges its report": (
        Program('import os\nos.write(3, b\'{"setup": "x", "done": true, "value": [[[]]]}\')\nos._exit(0)', tests="1"),
        "error",
        "exited before its tests",
        "",
    ),
    "returns no JSON": (Program("def f(): return {1, 2}", call=("f", ())), "error", "TypeError", ""),
    "forges a value": (
        Program('import os\nos.write(3, b\'{"value": "[7"}\')\nos._exit(0)', call=("f", ())),
        "error",
        "returned a value that JSON cannot represent",
        "",
    ),
    "surrogates": (Program("print('\\udce9')"), "pass", "", "\ufffd\n"),
}


def test_verdicts_of_ordinary_programs():
    programs = [program for program, *_ in ORDINARY.values()]
    for name, outcome in zip(ORDINARY, run_programs(programs, limits=SMALL), strict=True):
        _, verdict, detail, stdout = ORDINARY[name]
        assert outcome is not None, name
        assert (outcome.verdict, outcome.stdout) == (verdict, stdout), (name, outcome)
        assert outcome.detail.startswith(detail), (name, outcome)
        assert bool(outcome.detail) == (verdict != "pass"), (name, outcome)


def test_a_call_returns_its_value_and_each_program_starts_afresh():
    called = Program("import os\nopen('a', 'x')\ndef f(x, y): return {'sum': x + y}", call=("f", (1, 2.5)))
    first, second = run_programs([called, called], limits=SMALL)
    assert first is not None
    assert second is not None
    assert first.value == second.value == {"sum": 3.5}


def test_a_tool_tells_the_policy_what_it_has_printed():
    assert python_tool("print(2 ** 10)") == "1024\n"
    assert python_tool("print('a' * 100)\n1 / 0", most_characters=40).endswith("division by zero\n")
    assert "\n...\n" in python_tool("print('a' * 100)", most_characters=40)


def test_the_environment_with_a_tool_answers_code_by_what_it_prints(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs" / "examples"))
    example = importlib.import_module("python_tool")
    state = example.reset({"answer": "42"})
    assert example.step(state, "So\n```python\nprint(6 * 7)\n```\n") == (state, "\nOutput:\n42\n\n", 0.0, False)
    assert example.step(state, "It is #### 42") == (state, "", 1.0, True)


# ---- hostile programs -----------------------------------------------------------------------------------------------

LATE = ("error", "timeout")  # a timeout is possible on a busy machine
HOSTILE = {
    # resources of the machine
    "loop that catches all": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timeout",
    ),
    "sleeps": ("import time; time.sleep(60)", "timeout"),
    "ignores signals": (
        "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: time.sleep(1)",
        "timeout",
    ),
    "memory at once": ("x = bytearray(10 ** 10)", "error"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(b'x' * (8 << 20)))", LATE),
    "memory of many": (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = bytearray(b'x' * (150 << 20))\n"
        "        time.sleep(60)\ntime.sleep(60)",
        "error",
    ),
    "memory of no process": ("import os\nwhile True: os.write(os.memfd_create('x'), bytes(8 << 20))", "forbidden"),
    "output": ("while True: print('x' * 100000)", "error"),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 100000)", "error"),
    "report": ("import os\nwhile True: os.write(3, b'x' * 100000)", "error"),
    "a large file": ("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))", LATE),
    "many files": ("n = 0\nwhile True:\n    open(str(n), 'wb').write(bytes(8 << 20)); n += 1", LATE),
    "many descriptors": ("x = []\nwhile True: x.append(open('/dev/null'))", "error"),
    "deep recursion": ("import sys; sys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", LATE),
    # bombs
    "a zip bomb": (
        "import io, zipfile\nb = io.BytesIO()\nz = zipfile.ZipFile(b, 'w', zipfile.ZIP_DEFLATED)\n"
        "with z.open('x', 'w') as f:\n    for _ in range(100): f.write(bytes(1 << 20))\nz.close()\n"
        "zipfile.ZipFile(b).extractall()",
        LATE,
    ),
    "a zip bomb in memory": (
        "import zlib\nd = zlib.compress(bytes(40 << 20), 1)\nx = [zlib.decompress(d) for _ in range(9)]",
        LATE,
    ),
    "a regex bomb": ("import re; re.match('(a+)+$', 'a' * 64 + 'b')", "timeout"),
    "a pickle bomb": ("import pickle; pickle.loads(b'cbuiltins\\nbytearray\\n(L10000000000L\\ntR.')", "error"),
    "a pickle with a command": (
        "import pickle\nif pickle.loads(b'cos\\nsystem\\n(S\"echo owned > /etc/owned\"\\ntR.'):\n"
        "    raise PermissionError(1, 'no')",
        "forbidden",
    ),
    "a big number": ("print(len(str(9 ** 9 ** 9)))", "timeout"),
    # files of others
    "home": ("import os; print(open(os.path.expanduser('{home}/secret')).read())", "forbidden"),
    "the folder it was started from": ("print(open('{cwd}/pyproject.toml').read())", ("forbidden", "error")),
    "passwords": ("print(open('/etc/shadow').read())", "forbidden"),
    "write outside": ("open('{home}/written', 'w')", "forbidden"),
    "write into Python": ("import os; open(os.__file__, 'a')", "forbidden"),
    "delete": ("import shutil; shutil.rmtree('{home}')", "forbidden"),
    "a link out": ("import os; os.symlink('{home}/secret', 'l'); print(open('l').read())", "forbidden"),
    "a way up": ("print(open('../../../../../../..{home}/secret').read())", "forbidden"),
    "a hard link": ("import os; os.link('{home}/secret', 'l')", ("forbidden", "error")),
    # the network
    "a socket": ("import socket; socket.create_connection(('127.0.0.1', {port}))", "forbidden"),
    "a name": ("import urllib.request; urllib.request.urlopen('http://example.com', timeout=1)", "forbidden"),
    "a socket of the system": ("import socket; socket.socket(socket.AF_UNIX).connect('/run/docker.sock')", "forbidden"),
    "a server": ("import socket; socket.socket().bind(('', 0))", "forbidden"),
    # other processes
    "kill its parent": ("import os; os.kill(os.getppid(), 9)", "forbidden"),
    "kill the first": ("import os; os.kill(1, 9)", "forbidden"),
    "kill all": ("import os; os.kill(-1, 9)", "forbidden"),
    "kill the caller": ("import os; os.kill({pid}, 9)", ("forbidden", "error")),
    "limit the caller": (
        "import resource; resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
        ("forbidden", "error"),
    ),
    "trace its parent": (
        "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) < 0: raise PermissionError(1, 'no')",
        "forbidden",
    ),
    # the kernel
    "mounts": ("import ctypes; ctypes.CDLL(None).mount(b'/', b'{box}', None, 4096, None)", "forbidden"),
    "new namespaces": ("import ctypes; ctypes.CDLL(None).unshare(0x10000000)", "forbidden"),
    "a system call by number": ("import ctypes; ctypes.CDLL(None).syscall(425, 8, 0)", "forbidden"),
    "becomes root": ("import os; os.setuid(0) if os.getuid() else os._exit(1)", ("forbidden", "error")),
}
FAST = {
    "memory at once",
    "output",
    "home",
    "delete",
    "a link out",
    "a socket",
    "kill all",
    "new namespaces",
    "many files",
}
# Forbidden only by a filter of system calls; without one they fail or have no effect outside.
BY_FILTER = {
    "memory of no process": ("error", "timeout"),
    "a socket": ("error",),
    "a name": ("error",),
    "a server": ("pass",),
    "kill its parent": ("pass", "forbidden"),
    "kill the first": ("pass", "forbidden"),
    "kill all": ("error",),
    "a socket of the system": ("error",),
    "mounts": ("pass",),
    "new namespaces": ("pass",),
    "a system call by number": ("pass",),
}


@pytest.fixture(scope="module")
def host():
    """A home with a secret, an open port, and the state to compare afterwards."""
    home = Path(tempfile.mkdtemp(dir="/var/tmp"))  # programs have their own /tmp
    (home / "secret").write_text("xyzzy-" * 3)
    heard = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.1)
        stop = threading.Event()

        def listen():
            while not stop.is_set():
                try:
                    heard.append(server.accept())
                except TimeoutError:
                    continue

        listener = threading.Thread(target=listen)
        listener.start()
        yield {"home": home, "cwd": os.getcwd(), "port": server.getsockname()[1], "pid": os.getpid(), "box": FOLDER}
        stop.set()
        listener.join()
    shutil.rmtree(home)
    assert heard == []


def attacked(source, host, **how):
    for name, value in host.items():
        source = source.replace("{" + name + "}", str(value))
    os.environ["A_SECRET_OF_THE_HOST"] = "xyzzy-env"
    children = len(psutil.Process().children(recursive=True))
    outcome = ran(source, **how)
    assert "xyzzy" not in outcome.stdout + outcome.stderr
    assert [path.name for path in host["home"].iterdir()] == ["secret"]
    assert (host["home"] / "secret").read_text() == "xyzzy-" * 3
    assert not Path("/etc/owned").exists()
    deadline = time.monotonic() + 5  # the kernel ends processes asynchronously
    while len(psutil.Process().children(recursive=True)) > children and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(psutil.Process().children(recursive=True)) <= children
    return outcome


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in HOSTILE])
def test_hostile_programs_are_contained(name, host):
    source, verdict = HOSTILE[name]
    started = time.monotonic()
    outcome = attacked(source, host)
    assert outcome.verdict in (verdict if isinstance(verdict, tuple) else (verdict,)), outcome
    assert time.monotonic() - started < 30


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way != "everything"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained_by_part_of_what_there_is(name, way, host):
    if not isolated(WAYS[way]):
        pytest.skip("this way does not isolate here")
    source, verdict = HOSTILE[name]
    if "{pid}" in source and way == "namespaces alone":
        source = source.replace("{pid}", "4194000")
    outcome = attacked(source, host, without=WAYS[way])
    expected = verdict if isinstance(verdict, tuple) else (verdict,)
    if way == "namespaces alone":
        expected += BY_FILTER.get(name, ())
    assert outcome.verdict in expected, outcome


# For a shared machine: a program that ends even if the sandbox fails.
FORKS = """
import os, time
for _ in range(300):
    try:
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
    except OSError:
        pass
time.sleep(3)
"""


@pytest.mark.parametrize("way", [pytest.param(w, marks=[] if w == "everything" else [pytest.mark.slow]) for w in WAYS])
def test_a_fork_bomb_is_bounded_and_gone_afterwards(way, host):
    if not isolated(WAYS[way]):
        pytest.skip("this way does not isolate here")
    threading.Thread(target=(most := Most()).watch, daemon=True).start()
    limits = Limits(seconds=1.0, processes=8)
    outcome = attacked(FORKS, host, limits=limits, without=WAYS[way])
    most.done = True
    assert outcome.verdict == "timeout"
    assert most.found <= limits.processes + 8  # including the supervising processes


class Most:
    """The largest number of processes below this one."""

    found, done = 0, False

    def watch(self):
        while not self.done:
            self.found = max(self.found, len(psutil.Process().children(recursive=True)))
            time.sleep(0.02)


@pytest.mark.slow
def test_daemons_end_with_their_program(host):
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(50)\n"
    for way in WAYS.values():
        if isolated(way):
            outcome = attacked(daemon, host, without=way)
            assert outcome.verdict == "pass" or outcome.detail.startswith("BlockingIOError"), outcome


def test_a_program_sees_neither_environment_nor_processes_nor_files(host):
    look = (
        "import os; print(sorted(os.environ)); print(os.listdir('/')); print(os.getpid() < 10); print(os.listdir('.'))"
    )
    if "namespaces" not in facilities():
        pytest.skip("the files that are there are seen, not read")
    outcome = attacked(look, host, without={"landlock", "landlock signals"})
    environment, root, first, folder = outcome.stdout.splitlines()
    assert "A_SECRET" not in environment
    assert "proc" not in root
    assert "home" not in root
    assert (first, folder) == ("True", "['program.py']")


def test_without_isolation_code_is_refused_unless_it_is_allowed(recwarn):
    program, nothing = Program("print(1)"), frozenset(facilities())
    with pytest.raises(SandboxError, match="no protection of your files, the network, other processes"):
        run_programs([program], without=nothing)
    with pytest.warns(RuntimeWarning, match="is run without landlock, namespaces, seccomp: no protection of your"):
        (outcome,) = run_programs([program], without=nothing, allow_unisolated=True)
    assert outcome is not None
    assert (outcome.verdict, outcome.stdout) == ("pass", "1\n")


def test_limits_that_cannot_be_are_refused():
    for name in ("seconds", "memory_bytes", "processes"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be above 0"):
            Limits(**{name: 0})
