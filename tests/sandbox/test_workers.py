"""Functions in other processes: what becomes of calls, what isolated ones may answer, that nothing is left behind."""

from __future__ import annotations

import os
import sys
import time

import psutil
import pytest

from jaxrl_llm.sandbox import Workers, facilities, missing
from jaxrl_llm.sandbox.workers import BARE

FUNCTIONS = """
import os, sys, time

class Evil:
    def __reduce__(self):
        return os.system, ("touch {owned}",)

def plus(x, y=1):
    return x + y

def sleeps(x):
    time.sleep(60)

def exits(x):
    os._exit(x)

def closes(x):
    os.closerange(3, 4096)
    time.sleep(60)

def raises(x):
    raise SystemExit(x)

def odd(x):
    return Evil() if x else lambda: 0

def hoards(x):
    x = bytearray(b"x" * x)
    time.sleep(60)

def daemon(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(path, "w") as file:
                file.write(str(os.getpid()))
            time.sleep(60)
        os._exit(0)
    time.sleep(60)

def evaluates(text):
    return eval(text)

def lies(x):
    for file in range(3, 4096):
        try:
            os.write(file, b"\\x7f\\xff\\xff\\xff" + bytes(100))
        except OSError:
            pass
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "worker_functions.py").write_text(FUNCTIONS.replace("{owned}", str(folder / "owned")))
    sys.path.insert(0, str(folder))
    import worker_functions

    yield {name: each for name, each in vars(worker_functions).items() if callable(each) and name != "Evil"}
    assert not (folder / "owned").exists()
    sys.path.remove(str(folder))


@pytest.fixture(scope="module", autouse=True)
def short_waits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrl_llm.sandbox.workers.END_SECONDS", 0.2)
        yield


@pytest.fixture(scope="module")
def workers(functions):
    made = Workers(functions, workers=2, memory_bytes=200 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def isolated(functions):
    if missing(facilities()):
        pytest.skip("this system isolates no code")
    made = Workers(functions, environment=BARE, isolated=True)
    yield made
    made.close()


def test_answers_come_in_the_order_of_the_calls(workers):
    assert [found.value for found in workers("plus", [(n,) for n in range(5)], 5.0)] == [1, 2, 3, 4, 5]
    assert workers("plus", [], 5.0) == []
    assert len(workers._processes) == 2


def test_what_becomes_of_calls_that_fail(workers):
    late, good, dead = (workers(name, [(n,)], 0.4)[0] for name, n in (("sleeps", 1), ("plus", 1), ("exits", 3)))
    assert (late.late, late.ended, good.value) == (True, True, 2)
    assert (dead.error, dead.crashed) == ("ended its process, which ended with status 3", True)
    assert workers("closes", [(1,)], 20.0)[0].error == "ended its process, which had closed its connection"
    assert workers("raises", [(3,)], 5.0)[0].error == "raised SystemExit: 3"
    assert workers("odd", [(0,)], 5.0)[0].error.startswith("returned a value that cannot be pickled")
    assert workers("plus", [(lambda: 0,)], 5.0)[0].error.startswith(
        "was not called, as its arguments cannot be pickled"
    )
    assert "GiB of memory, more than its limit of 0.2" in workers("hoards", [(300 << 20,)], 20.0)[0].error
    assert workers("plus", [(1, 1)] * 3, 5.0)[2].value == 2


def test_what_a_process_has_started_ends_with_it(workers, tmp_path):
    assert workers("daemon", [(str(tmp_path / "pid"),)], 0.7)[0].late
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.02)
    pytest.fail("the daemon lives on")


def test_an_isolated_process_has_nothing_and_cannot_harm_by_its_answer(isolated, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("xyzzy")
    monkeypatch.setenv("A_SECRET", "xyzzy")
    said = {
        "1 + 1": None,
        f"open({str(tmp_path / 'secret')!r}).read()": "Error: ",
        "__import__('os').environ['A_SECRET']": "KeyError",
        f"__import__('os').kill({os.getpid()}, 9)": "",
        "__import__('socket').socket()": "ended its process, which was killed by SIGSYS",
    }
    for text, error in said.items():
        (found,) = isolated("evaluates", [(text,)], 5.0)
        assert (found.error is None) == (error is None), text
        assert error is None or error in found.error, found
    (evil,) = isolated("odd", [(1,)], 5.0)
    assert "posix.system is not plain data" in evil.error
    (lie,) = isolated("lies", [(1,)], 5.0)
    assert lie.ended
    assert lie.error.startswith("returned an answer that cannot be read")
    assert isolated("plus", [(1,)], 5.0)[0].value == 2


def test_what_cannot_be_sent_or_does_not_start_is_said(functions):
    with pytest.raises(ValueError, match="f cannot be sent to a process: "):
        Workers({"f": lambda: 0})
    with pytest.raises(ValueError, match=r"for f did not start: it raised ModuleNotFoundError: No module"):
        Workers({"f": "nowhere:f"})("f", [()], 1.0)
