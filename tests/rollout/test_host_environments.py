"""Host environments: the same episodes as inside the program, and nothing that raises, hangs or dies stops a run."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from jaxrl_llm.data import CharacterTokenizer, tasks
from jaxrl_llm.data.tasks import grid
from jaxrl_llm.data.tasks.items import record
from jaxrl_llm.rollout import (
    EnvironmentFailure,
    HostEnvironment,
    StopReason,
    host_advanced,
    host_replayed,
    host_started,
    host_step,
    opened,
)
from jaxrl_llm.sandbox import facilities, missing

TOKENIZER = CharacterTokenizer()
ITEMS = [{"body": "one", "answer": "1"}, {"body": "two", "answer": "2"}, {"body": "three", "answer": "3"}]


def reset(item):
    if item["body"] == "hang":
        time.sleep(60)
    return {"item": item["body"], "turns": 0}


def step(state, text):
    """Counts; some texts ask for trouble."""
    if "hang" in text:
        time.sleep(60)
    if "raise" in text:
        raise RuntimeError("no such file")
    if "exit" in text:
        os._exit(3)
    state = {**state, "turns": state["turns"] + 1}
    strange = {
        "none": None,
        "nan": (state, "", float("nan"), False),
        "bytes": (state, b"", 0.0, False),
        "late": (state, "", 0.0, "no"),
        "lambda": (lambda: 0, "", 0.0, False),
        "slow": (state, "", 0.5, False, 2.5),
        "never": (state, "", 0.5, False, float("inf")),
        "before": (state, "", 0.5, False, -1.0),
    }
    for word, returned in strange.items():
        if word in text:
            return returned
    return state, f"<o>{state['turns']}</o>", 0.5, "stop" in text


ENVIRONMENT = HostEnvironment(
    reset, step, max_turns=3, max_turn_tokens=16, max_observation_tokens=8, end_of_turn_ids=(2, 12)
)


def padded(texts, width):
    rows = [TOKENIZER.encode(text) for text in texts]
    tokens = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return tokens, np.asarray([len(row) for row in rows])


def taken(environment, episodes, texts, call, room=None):
    tokens, length = padded(texts, environment.max_turn_tokens)
    codec = {"encode": TOKENIZER.encode, "decode": TOKENIZER.decode, "eos_ids": (2,)}
    episodes, observation, size = host_advanced(environment, episodes, tokens, length, room, call, **codec)
    return episodes, [TOKENIZER.decode(row[:n]) for row, n in zip(observation, size, strict=True)]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "logs" / "environment.log"


@pytest.fixture(scope="module")
def processes(log):
    """Two processes of the environment, which answer failures with an observation."""
    environment = ENVIRONMENT._replace(
        executor="process", workers=2, deadline_seconds=1.0, on_failure="observation", failure_ends=False
    )
    with opened(environment, log=log) as call:
        yield environment, call


def test_episodes_stop_for_the_same_reasons_as_inside_the_program():
    with opened(ENVIRONMENT) as call:
        episodes = host_started(ENVIRONMENT, [*ITEMS, *ITEMS[:2]], call)
        texts = ["slow<n>", "stop<n>", "stop<eos>", "a<n>", ""]
        episodes, seen = taken(ENVIRONMENT, episodes, texts, call, np.array([9, 9, 9, 3, 9]))
        assert seen == ["", "", "", "", ""]
        assert episodes.durations[:, 0].tolist() == [2.5, 0, 0, 0, 0]
        reasons = [StopReason.RUNNING, StopReason.ENVIRONMENT, StopReason.ANSWER, StopReason.TOKEN_LIMIT, 0]
        assert episodes.stop.tolist() == reasons
        assert episodes.turn_rewards[:, 0].tolist() == [0.5, 0.5, 0.5, 0.5, 0]
        for _ in range(4):
            episodes, _ = taken(ENVIRONMENT, episodes, ["a<n>"] * 5, call)
        assert episodes.turns.tolist() == [3, 1, 1, 1, 3]
        assert episodes.stop.tolist() == [StopReason.TURN_LIMIT, *reasons[1:4], StopReason.TURN_LIMIT]
        assert episodes.states[1] == {"item": "two", "turns": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise", "step raised RuntimeError: no such file for row 1 .*'raise'.*repair the function.*on_failure"),
        ("hang", "step had not returned after 0.2 s for row 1 .*deadline_seconds.*'process', which ends"),
        ("none", "step returned 'None', not"),
        ("nan", "returned the reward nan"),
        ("never", "returned the duration inf, not a finite number"),
        ("before", "returned the duration -1.0, which is below 0"),
        ("bytes", "returned the observation b'' of type bytes"),
        ("late", "returned done as 'no'"),
    ],
)
def test_a_failure_ends_the_run_with_a_sentence(text, message):
    environment = ENVIRONMENT._replace(deadline_seconds=0.2)
    begun = time.monotonic()
    with opened(environment) as call, pytest.raises(EnvironmentFailure, match=message):
        host_step(environment, [reset(item) for item in ITEMS], ["a", text, "b"], call)
    assert time.monotonic() - begun < 10


def test_a_failure_can_be_answered_instead(tmp_path):
    environment = ENVIRONMENT._replace(
        deadline_seconds=0.2, on_failure="observation", failure_reward=-1.0, failure_observation="<o>bad</o>"
    )
    log = tmp_path / "logs" / "environment.log"
    with opened(environment, log=log) as call:
        episodes = host_started(environment, ITEMS, call)
        episodes, seen = taken(environment, episodes, ["a<n>", "hang<n>", "raise<n>"], call)
        assert seen == ["<o>1</o>", "", ""]
        assert episodes.stop.tolist() == [StopReason.RUNNING, StopReason.ENVIRONMENT, StopReason.ENVIRONMENT]
        assert episodes.turn_rewards[:, 0].tolist() == [0.5, -1, -1]
        assert episodes.failures.tolist() == [0, 1, 1]
        going_on = environment._replace(failure_ends=False)
        episodes, seen = taken(going_on, host_started(environment, ITEMS, call), ["a<n>", "hang<n>", "raise<n>"], call)
        assert seen == ["<o>1</o>", "<o>bad</o>", "<o>bad</o>"]
        assert [state["turns"] for state in episodes.states] == [1, 0, 0]
    written = log.read_text()
    assert written.count("Traceback") == written.count("RuntimeError: no such file") == 2
    assert "in step" in written


def test_many_hanging_calls_cost_one_deadline_a_worker():
    environment = ENVIRONMENT._replace(deadline_seconds=0.1, workers=4, on_failure="observation")
    begun = time.monotonic()
    with opened(environment) as call:
        made = host_step(environment, [{"turns": 0}] * 12, ["hang", "a", "a"] * 4, call)
    assert [bool(step.failure) for step in made] == [True, False, False] * 4
    assert time.monotonic() - begun < 5


def test_a_reset_that_hangs_names_its_item():
    environment = ENVIRONMENT._replace(deadline_seconds=0.2)
    with opened(environment) as call, pytest.raises(EnvironmentFailure, match=r"reset .* row 1, item 'hang'"):
        host_started(environment, [ITEMS[0], {"body": "hang"}], call)


@pytest.mark.fault(
    "functions",
    "an environment in Python hangs, crashes, raises or returns an object that cannot be pickled",
    "the run ends and names the row, the state before the step is saved; with `on_failure: observation` only the turn "
    "of that row fails, and its process is replaced",
)
def test_processes_that_hang_or_die_are_replaced(processes, log):
    environment, call = processes
    texts = ["hang", "a", "exit", "raise", "lambda", "b"]
    made = host_step(environment, [{"turns": n} for n in range(6)], texts, call)
    assert [step.failure for step in made if not step.failure] == ["", ""]
    assert "not returned after 1 s" in made[0].failure
    assert "ended its process, which ended with status 3" in made[2].failure
    assert "no such file" in made[3].failure
    assert "returned a value that cannot be pickled" in made[4].failure
    assert [step.state["turns"] for step in made] == [0, 2, 2, 3, 4, 6]
    assert "Traceback (most recent call last)" in log.read_text()
    assert "no such file" in log.read_text()
    # All workers are there again.
    assert [step.failure for step in host_step(environment, [{"turns": 0}] * 3, ["a"] * 3, call)] == [""] * 3


def reads(state, text):
    """A turn that is a path: what the file says."""
    with open(text) as file:
        return state, file.read(8), 0.0, True


@pytest.mark.slow
def test_in_a_sandbox_an_environment_reads_no_files(tmp_path):
    if missing(facilities()):
        pytest.skip("this system isolates no code")
    (tmp_path / "secret").write_text("xyzzy")
    turns = [str(tmp_path / "secret"), os.__file__]
    environment = ENVIRONMENT._replace(
        executor="sandbox", step=reads, workers=1, deadline_seconds=5.0, on_failure="observation"
    )
    with opened(environment) as call:
        assert host_started(environment, ITEMS[:1], call).states == ({"item": "one", "turns": 0},)
        refused, read = host_step(environment, [1, 0], turns, call)
    assert refused.failure.startswith("raised FileNotFoundError") or "PermissionError" in refused.failure
    assert (read.failure, read.observation) == ("", 'r"""OS r')


def test_what_does_not_pickle_is_refused_before_a_process_starts():
    environment = ENVIRONMENT._replace(executor="process", step=lambda state, text: (state, "", 0.0, True))
    with pytest.raises(ValueError, match=r"cannot be sent to a process.*top level of a module"), opened(environment):
        pass


def test_observations_that_do_not_fit_or_cannot_be_encoded_are_named():
    with opened(ENVIRONMENT) as call:
        episodes = host_started(ENVIRONMENT, ITEMS[:1], call)
        short = ENVIRONMENT._replace(max_observation_tokens=2)
        with pytest.raises(
            EnvironmentFailure, match="row 0, '<o>1</o>', has 3 tokens, but max_observation_tokens is 2"
        ):
            taken(short, episodes, ["a<n>"], call)
        odd = ENVIRONMENT._replace(on_failure="observation", failure_observation="§")
        with pytest.raises(EnvironmentFailure, match="row 0 cannot be encoded: character '§'"):
            taken(odd, episodes, ["raise<n>"], call)


def test_replay_to_a_turn_and_the_grid_as_a_host_environment():
    environment = HostEnvironment(
        grid.episode, grid.turn, max_turns=12, max_turn_tokens=8, max_observation_tokens=7, end_of_turn_ids=(2, 12)
    )
    items = tasks.task("grid", size=3).generate(level=3, count=4)
    ways = [[f"<a>{move}</a><n>" for move in grid.shortest_path(item.answer.split("/"))] for item in items]
    with opened(environment) as call:
        start = host_started(environment, [record(item, n) for n, item in enumerate(items)], call)
        episodes, history = start, []
        for number in range(3):
            history.append(episodes)
            episodes, _ = taken(environment, episodes, [way[number] for way in ways], call)
        assert episodes.turn_rewards[:, :3].tolist() == [[0, 0, 1]] * 4
        for number, wanted in enumerate([*history, episodes]):
            found = host_replayed(environment, start, ways, number, call)
            assert found.states == wanted.states
            np.testing.assert_array_equal(found.turn_rewards, wanted.turn_rewards)
            np.testing.assert_array_equal(found.stop, wanted.stop)
        ragged = host_replayed(environment, start, ways, [0, 1, 2, 3], call)
        assert ragged.turns.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_turns": 0}, "max_turns is 0"),
        ({"max_observation_tokens": None}, "max_observation_tokens is None"),
        ({"deadline_seconds": 0}, "deadline_seconds is 0"),
        ({"deadline_seconds": float("inf")}, "deadline_seconds is inf"),
        ({"workers": 0}, "workers is 0"),
        ({"executor": "fibre"}, "executor is 'fibre'"),
        ({"on_failure": "ignore"}, "on_failure is 'ignore'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message), opened(ENVIRONMENT._replace(**changes)):
        pass
