"""Functions that end, hang, eat memory or flood: each is a failure of its rows, and nothing is left behind."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from jaxrl_llm.rewards import Guarded, RewardError
from jaxrl_llm.rewards.host import Reading, answered
from jaxrl_llm.sandbox import facilities, missing

FUNCTIONS = """
import asyncio, os, subprocess, sys, time

def lengths(completions, *, by=1.0):
    return [by * len(text) for text in completions]

def exits(completions):
    sys.exit(3)

def interrupts(completions):
    raise KeyboardInterrupt

def raises(completions):
    raise LookupError("no such case")

def hangs(completions):
    time.sleep(60)

def spins(completions):
    while True:
        pass

def dies(completions):
    os._exit(7)

def dies_of_one(completions):
    if "bad" in completions:
        os.kill(os.getpid(), 11)
    return [1.0] * len(completions)

def eats(completions):
    hoard = []
    while True:
        hoard.append(bytearray(b"x" * (32 << 20)))

def floods(completions):
    for _ in range(40):
        print("y" * (1 << 20))
        sys.stderr.write("z" * 1000)
    return [1.0] * len(completions)

def starts_others(completions):
    child = subprocess.Popen(["sleep", "61"])
    print("child", child.pid, flush=True)
    time.sleep(60)

def one_exits(completion):
    if completion == "bad":
        sys.exit("of one row")
    return len(completion)

def one_hangs(completion):
    if completion == "bad":
        time.sleep(60)
    return len(completion)

async def judged(completion):
    if completion == "bad":
        raise SystemExit(1)
    await asyncio.sleep(0.01)
    return len(completion)

def evaluates(completions):
    return [eval(text) for text in completions]

def returns_text(completions):
    return "no list"
"""
TEXTS = ["a", "bad", "cc"]


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "guarded_functions.py").write_text(FUNCTIONS)
    sys.path.insert(0, str(folder))
    import guarded_functions

    yield guarded_functions
    sys.path.remove(str(folder))


@pytest.fixture
def ask(functions, tmp_path):
    """(name, reading's options) -> answers; all processes end with the test."""
    made: list[Guarded] = []

    def waiting():
        children = psutil.Process().children(recursive=True)
        return {child.pid for child in children if "jaxrl_llm.sandbox" in " ".join(child.cmdline())}

    before = waiting()

    def call(name, *, texts=TEXTS, memory=None, most_failed=1.0, stop=lambda: None, **options):
        guarded = Guarded(getattr(functions, name), name, memory, most_failed, tmp_path / "logs", stop)
        made.append(guarded)
        single = name.startswith(("one", "judged"))
        data = {"completion" if single else "completions": texts}
        return answered(Reading(guarded, name, **options), data, rows=len(texts), names=["rewards"])

    yield call
    for guarded in made:
        guarded.close()
    assert waiting() <= before


def log(folder: Path, name: str) -> str:
    return (folder / "logs" / f"{name}.log").read_text()


def test_a_function_is_called_as_in_this_process(functions, tmp_path):
    guarded = Guarded(partial(functions.lengths, by=2.0), "lengths")
    data = {"completions": TEXTS}
    for _ in range(2):
        found = answered(Reading(guarded, "lengths"), data, rows=3, names=["rewards"])
        assert found.values == {"rewards": [2.0, 6.0, 4.0]}
        assert found.failures == 0
    assert guarded._workers is not None
    (process,) = guarded._workers._processes
    guarded.close()
    assert process.process.returncode is not None
    assert guarded(completions=["abc"]) == [6.0]


# (function, options) -> what is said without a value on failure, failures with one (of three rows), what the log holds.
FAULTS = {
    "exits": ({}, "raised FunctionEnded: SystemExit(3) at row 0", 3, "SystemExit: 3"),
    "interrupts": ({}, "raised FunctionEnded: KeyboardInterrupt()", 3, "KeyboardInterrupt"),
    "raises": ({}, "raised LookupError: no such case at row 0", 3, "LookupError: no such case"),
    "hangs": ({"deadline_s": 0.3}, "took longer than its deadline of 0.3 s", 3, ""),
    "spins": ({"deadline_s": 0.3}, "took longer than its deadline of 0.3 s", 3, ""),
    "dies": ({}, "ended its process, which ended with status 7", 3, ""),
    "dies_of_one": ({}, "ended its process, which was killed by SIGSEGV", 1, ""),
    "eats": ({"memory": 1 << 30}, "of memory, more than its limit of 1.0", 3, ""),
    "one_exits": ({}, "raised FunctionEnded: SystemExit(of one row) at row 1", 1, "SystemExit: of one row"),
    "one_hangs": ({"deadline_s": 0.3}, "took longer than its deadline of 0.3 s at row 1", 1, "TimeoutError"),
    "judged": ({}, "raised FunctionEnded: SystemExit(1) at row 1", 1, "SystemExit: 1"),
    "returns_text": ({}, "returned a str for 3 rows", None, ""),
}


# A process takes a second or two to start: most cases are slow.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "raises",
            marks=[
                pytest.mark.slow,
                pytest.mark.fault(
                    "functions",
                    "raises",
                    "only the failing row fails (rows are retried one by one); the traceback is in `RUN/logs/NAME.log`",
                ),
            ],
        ),
        pytest.param("exits", marks=[pytest.mark.slow, pytest.mark.fault("functions", "`sys.exit`", "the same")]),
        pytest.param(
            "interrupts",
            marks=[pytest.mark.slow, pytest.mark.fault("functions", "raises `KeyboardInterrupt`", "the same")],
        ),
        pytest.param(
            "hangs",
            marks=[
                pytest.mark.fault(
                    "functions",
                    "hangs",
                    "its process is killed at `deadline_s` (default 300 s), all rows of the call fail",
                )
            ],
        ),
        pytest.param(
            "spins",
            marks=[
                pytest.mark.slow,
                pytest.mark.fault("functions", "an endless loop that never releases the interpreter lock", "the same"),
            ],
        ),
        pytest.param(
            "dies",
            marks=[
                pytest.mark.slow,
                pytest.mark.fault(
                    "functions",
                    "ends its process (`os._exit`)",
                    "the call is repeated with halves of the rows until the row is found",
                ),
            ],
        ),
        pytest.param(
            "dies_of_one",
            marks=[
                pytest.mark.slow,
                pytest.mark.fault(
                    "functions",
                    "crashes on one row (SIGSEGV)",
                    "the same: that row fails, the others keep their values",
                ),
            ],
        ),
        pytest.param(
            "eats",
            marks=[
                pytest.mark.slow,
                pytest.mark.fault(
                    "functions",
                    "needs more memory than `memory_gib` (default: half of the free memory)",
                    "its process is killed, all rows of the call fail",
                ),
            ],
        ),
        pytest.param(
            "one_exits",
            marks=[pytest.mark.fault("functions", "`sys.exit`, in a function of one row", "that row fails")],
        ),
        pytest.param(
            "one_hangs",
            marks=[
                pytest.mark.slow,
                pytest.mark.fault("functions", "hangs, in a function of one row", "that row fails at its deadline"),
            ],
        ),
        pytest.param(
            "judged",
            marks=[
                pytest.mark.slow,
                pytest.mark.fault("functions", "`SystemExit` in an `async` function", "that row fails"),
            ],
        ),
        pytest.param(
            "returns_text",
            marks=[
                pytest.mark.slow,
                pytest.mark.fault(
                    "functions",
                    "returns something other than a list of numbers",
                    "an error, with or without `value_on_failure`",
                ),
            ],
        ),
    ],
)
def test_a_fault_is_a_sentence_or_a_counted_failure(ask, tmp_path, name):
    options, said, failures, logged = FAULTS[name]
    started = time.monotonic()
    with pytest.raises(RewardError) as error:
        ask(name, **options)
    assert said in str(error.value)
    assert str(error.value).endswith(f"its traceback and output are in {tmp_path}/logs/{name}.log")
    assert logged in log(tmp_path, name)
    if failures is None:
        return
    found = ask(name, **options, value_on_failure=-1.0)
    assert found.failures == failures
    values = found.values["rewards"]
    assert [value == -1.0 for value in values] == ([True] * 3 if failures == 3 else [False, True, False])
    assert time.monotonic() - started < 60


@pytest.mark.fault(
    "functions", "floods standard output", "the output goes to `RUN/logs/NAME.log`, which is truncated at 16 MiB"
)
@pytest.mark.slow
def test_a_flood_of_output_is_cut(ask, tmp_path):
    assert ask("floods").values == {"rewards": [1.0] * 3}
    assert (tmp_path / "logs" / "floods.log").stat().st_size < 40 << 20


@pytest.mark.fault("functions", "starts processes", "they are killed with its own process, daemons included")
@pytest.mark.slow
def test_what_a_function_has_started_ends_with_it(ask, tmp_path):
    with pytest.raises(RewardError, match="deadline"):
        ask("starts_others", deadline_s=2.0)
    child = int(log(tmp_path, "starts_others").split()[1])
    for _ in range(50):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the process that the function has started lives on")


@pytest.mark.fault(
    "functions",
    "fails for more than `faults.most_failed_share` of the rows",
    "the run ends, even with `value_on_failure`",
)
def test_too_many_failures_are_an_error(ask):
    assert ask("one_exits", value_on_failure=0.0, most_failed=0.4).failures == 1
    with pytest.raises(
        RewardError, match=r"failed for 1 of 3 rows, more than the share of 0.3 that faults.most_failed"
    ):
        ask("one_exits", value_on_failure=0.0, most_failed=0.3)


@pytest.mark.slow
def test_a_run_that_wants_to_stop_does_not_wait(ask):
    class Stop(Exception):
        pass

    asked_at = time.monotonic() + 3

    def stop():
        if time.monotonic() > asked_at:
            raise Stop

    with pytest.raises(Stop):
        ask("hangs", stop=stop)
    assert time.monotonic() < asked_at + 20


@pytest.mark.fault(
    "functions",
    "executes code written by a model, with `executor: sandbox`",
    "it has no access to files, environment variables and the network",
)
@pytest.mark.slow
def test_in_a_sandbox_a_function_runs_what_a_model_wrote(functions, tmp_path, monkeypatch):
    if missing(facilities()):
        pytest.skip("this system isolates no code")
    monkeypatch.setenv("A_SECRET", "xyzzy")
    (tmp_path / "secret").write_text("xyzzy")
    told = {
        "1 + 1": 2.0,
        f"len(open({str(tmp_path / 'secret')!r}).read())": -1.0,
        "len(__import__('os').environ['A_SECRET'])": -1.0,
        "__import__('socket').socket().fileno()": -1.0,
    }
    guarded = Guarded(functions.evaluates, "evaluates", isolated=True)
    reading = Reading(guarded, "evaluates", value_on_failure=-1.0)
    found = answered(reading, {"completions": [*told]}, rows=len(told), names=["rewards"])
    guarded.close()
    assert found.values == {"rewards": [*told.values()]}
    assert found.failures == 3


def test_functions_of_the_main_script_are_refused():
    def local(completions):
        return []

    with pytest.raises(Exception, match="local"):
        Guarded(local, "local")
    local.__module__ = "__main__"
    with pytest.raises(ValueError, match="define it in a module of its own"):
        Guarded(local, "local")
