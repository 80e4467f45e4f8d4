"""Environments and tools in Python, which read and return text, with a deadline for every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrl_llm.rewards import RewardError
from jaxrl_llm.rollout.environment_checks import require_limits
from jaxrl_llm.rollout.environments import StopReason
from jaxrl_llm.rollout.host_calls import Caller, Executor, Returned, caller


class EnvironmentFailure(RewardError):
    """A host environment raised, hung, or returned an invalid value; the message names the row and the remedy."""


class HostEnvironment(NamedTuple):
    """An environment that runs on the host; `opened` checks it and makes it callable.

    Attributes:
      reset: record of the item -> state, any object.
      step: (state, text of the turn, including its end) -> (state, observation, reward, done), optionally followed by
        the duration of the turn in any unit. It must return a new state and not change the given one, else replay is
        not exact.
      max_turns: largest number of turns of an episode; it stops an environment that never ends.
      max_turn_tokens: largest number of tokens of a turn, including its end.
      max_observation_tokens: largest number of tokens of an observation.
      end_of_turn_ids: tokens that end a turn, as its last token; end of sequence must be included.
      deadline_seconds: longest duration of one call of `reset` or `step`.
      workers: number of simultaneous calls; None: 8 threads, or one process per core, at most 8.
      executor: "thread", "process" or "sandbox" (see `jaxrl_llm.rollout.host_calls.caller`). None: "process" if a
        config names the environment and its functions can be pickled, else "thread".
      on_failure: what happens if a call of `step` raises an exception, hangs or returns an invalid value: "error" ends
        the run with a message, its state before the step saved; "observation" continues with `failure_observation`.
      failure_observation: observation after such a turn.
      failure_reward: reward of such a turn.
      failure_ends: whether such a turn ends the episode; else the episode continues from the state before the turn.
    """

    reset: Callable[[Mapping[str, Any]], Any]
    step: Callable[[Any, str], tuple[Any, str, float, bool] | tuple[Any, str, float, bool, float]]
    max_turns: int = 0
    max_turn_tokens: int = 0
    max_observation_tokens: int = 0
    end_of_turn_ids: tuple[int, ...] = ()
    deadline_seconds: float = 10.0
    workers: int | None = None
    executor: Executor | None = None
    on_failure: Literal["error", "observation"] = "error"
    failure_observation: str = "<o>ERR</o>"
    failure_reward: float = 0.0
    failure_ends: bool = True


class HostStep(NamedTuple):
    """The result of one turn in an environment.

    Attributes:
      state: the next state of the environment.
      observation: text of the observation.
      reward: reward of the turn.
      done: whether the episode is over.
      failure: the error, if the observation is `failure_observation`; else empty.
      duration: duration of the turn; 0 if the environment reports none.
    """

    state: Any
    observation: str
    reward: float
    done: bool
    failure: str = ""
    duration: float = 0.0


class HostEpisodes(NamedTuple):
    """B running episodes: the counterpart of `Episodes` for host environments.

    Attributes:
      states: the environment's states, one per episode.
      turns: [B] number of turns taken.
      turn_rewards: [B, S] reward of each turn, 0 for turns that were not taken.
      durations: [B, S] duration of each turn, 0 for turns that were not taken.
      stop: [B] a `StopReason` for each episode.
      failures: [B] number of failed turns.
    """

    states: tuple[Any, ...]
    turns: np.ndarray
    turn_rewards: np.ndarray
    durations: np.ndarray
    stop: np.ndarray
    failures: np.ndarray


@contextmanager
def opened(
    environment: HostEnvironment, *, log: Path | None = None, stop: Callable[[], None] = lambda: None
) -> Iterator[Caller]:
    """A context with the caller of the environment's functions; its processes end with the context.

    Args:
      environment: the environment.
      log, stop: as for `caller`.

    Raises:
      ValueError: for an invalid limit, executor, deadline or `on_failure`.
    """
    require_limits(environment)
    if environment.on_failure not in ("error", "observation"):
        raise ValueError(f"on_failure is {environment.on_failure!r}; it must be 'error' or 'observation'")
    functions = {"reset": environment.reset, "step": environment.step}
    with caller(
        functions,
        executor=environment.executor,
        workers=environment.workers,
        deadline_seconds=environment.deadline_seconds,
        log=log,
        stop=stop,
    ) as call:
        yield call


def host_started(environment: HostEnvironment, items: Sequence[Mapping[str, Any]], call: Caller) -> HostEpisodes:
    """Episodes before their first turn, one per item (the samples of a prompt repeat its item).

    Raises:
      EnvironmentFailure: if `reset` raised or hung; the message names the first such item.
    """
    returned = call("reset", [(item,) for item in items])
    for row, result in enumerate(returned):
        if _failure(environment, result) is not None:
            raise EnvironmentFailure(
                f"the environment's reset {_failure(environment, result)} for row {row}, item "
                f"{str(items[row].get('body', items[row]))[:80]!r}; {_remedy(result)}"
            )
    rows = len(items)
    return HostEpisodes(
        states=tuple(result.value for result in returned),
        turns=np.zeros(rows, np.int32),
        turn_rewards=np.zeros((rows, environment.max_turns), np.float32),
        durations=np.zeros((rows, environment.max_turns), np.float32),
        stop=np.full(rows, StopReason.RUNNING, np.int32),
        failures=np.zeros(rows, np.int32),
    )


def host_step(
    environment: HostEnvironment, states: Sequence[Any], texts: Sequence[str], call: Caller
) -> list[HostStep]:
    """One turn of every episode, in parallel, each with its own deadline.

    Args:
      environment: the environment.
      states: state of each episode.
      texts: text of each episode's turn.
      call: the caller from `opened`.

    Raises:
      EnvironmentFailure: for a failure with `on_failure` "error"; the message names the first such row.
    """
    steps = []
    for row, result in enumerate(call("step", list(zip(states, texts, strict=True)))):
        failure = _failure(environment, result) or _not_a_step(result.value)
        if failure is None:
            state, observation, reward, done, *took = result.value
            duration = float(took[0]) if took else 0.0
            steps.append(HostStep(state, observation, float(reward), bool(done), duration=duration))
            continue
        if environment.on_failure == "error":
            raise EnvironmentFailure(
                f"the environment's step {failure} for row {row} (turn {texts[row][:80]!r}); {_remedy(result)}, or set "
                "on_failure to 'observation' to answer such turns with failure_observation"
            )
        ends = environment.failure_ends
        steps.append(HostStep(states[row], environment.failure_observation, environment.failure_reward, ends, failure))
    return steps


def host_advanced(
    environment: HostEnvironment,
    episodes: HostEpisodes,
    turn_tokens: np.ndarray,
    turn_length: np.ndarray,
    room: np.ndarray | None,
    call: Caller,
    *,
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> tuple[HostEpisodes, np.ndarray, np.ndarray]:
    """Episodes after one more turn of the running ones, and the observations to append: `advanced` for the host.

    Args:
      environment: the environment.
      episodes: before the turn.
      turn_tokens: [B, U] tokens of the policy's turn, right-padded.
      turn_length: [B] tokens of each turn; with 0 tokens no turn is taken.
      room: [B] tokens that still fit after each turn; None sets no limit.
      call: the caller from `opened`.
      encode: text of an observation -> token ids.
      decode: token ids of a turn -> text.
      eos_ids: ends of sequence, to distinguish the stop reasons ANSWER and ENVIRONMENT.
      pad_id: id of padding in observations.

    Returns:
      (episodes, observations [B, O], their lengths [B]); the length is 0 for a stopped episode.

    Raises:
      EnvironmentFailure: for a failure with `on_failure` "error", or an observation that cannot be encoded or is too
        long.
    """
    turn_tokens, turn_length = np.asarray(turn_tokens), np.asarray(turn_length)
    active = np.flatnonzero((episodes.stop == StopReason.RUNNING) & (turn_length > 0))
    texts = [decode(turn_tokens[row, : turn_length[row]].tolist()) for row in active]
    made = host_step(environment, [episodes.states[row] for row in active], texts, call)

    states = list(episodes.states)
    observations = np.full((len(states), environment.max_observation_tokens), pad_id, np.int32)
    lengths = np.zeros(len(states), np.int32)
    turns, rewards, durations, stop, failures = (np.array(part) for part in episodes[1:])
    for row, step in zip(active, made, strict=True):
        ids = _encoded(environment, step.observation, encode, int(row))
        ends_sequence = int(turn_tokens[row, turn_length[row] - 1]) in tuple(eos_ids)
        states[row] = step.state
        rewards[row, turns[row]], durations[row, turns[row]] = step.reward, step.duration
        turns[row] += 1
        failures[row] += bool(step.failure)
        if step.done:
            stop[row] = StopReason.ANSWER if ends_sequence else StopReason.ENVIRONMENT
        elif turns[row] >= environment.max_turns:
            stop[row] = StopReason.TURN_LIMIT
        elif room is not None and len(ids) >= room[row]:
            stop[row] = StopReason.TOKEN_LIMIT
        else:
            observations[row, : len(ids)] = ids
            lengths[row] = len(ids)
    return HostEpisodes(tuple(states), turns, rewards, durations, stop, failures), observations, lengths


def host_replayed(
    environment: HostEnvironment,
    episodes: HostEpisodes,
    texts: Sequence[Sequence[str]],
    up_to_turn: int | Sequence[int],
    call: Caller,
) -> HostEpisodes:
    """Episodes before a given turn, by replaying their recorded turns from the start.

    Args:
      environment: the environment; the replay is exact if its `step` depends only on state and text.
      episodes: at their start.
      texts: texts of the turns of each episode, in order.
      up_to_turn: number of turns to replay, one number or one per row.
      call: the caller from `opened`.
    """
    limits = np.broadcast_to(np.asarray(up_to_turn), len(texts))
    states = list(episodes.states)
    turns, rewards, durations, stop, failures = (np.array(part) for part in episodes[1:])
    for number in range(int(limits.max(initial=0))):
        rows = [
            row
            for row, taken in enumerate(texts)
            if number < min(len(taken), limits[row]) and stop[row] == StopReason.RUNNING
        ]
        made = host_step(environment, [states[row] for row in rows], [texts[row][number] for row in rows], call)
        for row, step in zip(rows, made, strict=True):
            states[row] = step.state
            rewards[row, number], durations[row, number] = step.reward, step.duration
            turns[row] += 1
            failures[row] += bool(step.failure)
            if step.done:
                stop[row] = StopReason.ENVIRONMENT
            elif turns[row] >= environment.max_turns:
                stop[row] = StopReason.TURN_LIMIT
    return HostEpisodes(tuple(states), turns, rewards, durations, stop, failures)


def _failure(environment: HostEnvironment, result: Returned) -> str | None:
    if result.late:
        return f"had not returned after {environment.deadline_seconds:g} s"
    return result.error


def _remedy(result: Returned) -> str:
    if result.late:
        return (
            "give the tool its own timeout, raise deadline_seconds, or set executor to 'process', which ends hanging "
            "calls"
        )
    return (
        "repair the function" if result.error is not None else "return a new state, a text, a finite number and a flag"
    )


def _not_a_step(value: Any) -> str | None:
    if not isinstance(value, tuple) or len(value) not in (4, 5):
        return f"returned {str(value)[:80]!r}, not (state, observation, reward, done)"
    _, observation, reward, done, *took = value
    if not isinstance(observation, str):
        return f"returned the observation {observation!r} of type {type(observation).__name__}, not text"
    for name, number in [("reward", reward), *(("duration", each) for each in took)]:
        known = isinstance(number, (int, float, np.integer, np.floating, np.bool_))
        if not known or not np.isfinite(float(number)):
            return f"returned the {name} {number!r}, not a finite number"
        if name == "duration" and number < 0:
            return f"returned the duration {number!r}, which is below 0"
    return None if isinstance(done, (bool, np.bool_)) else f"returned done as {done!r}, not True or False"


def _encoded(environment: HostEnvironment, text: str, encode: Callable[[str], list[int]], row: int) -> list[int]:
    try:
        ids = encode(text)
    except ValueError as error:
        raise EnvironmentFailure(f"the observation of row {row} cannot be encoded: {error}") from error
    if len(ids) > environment.max_observation_tokens:
        raise EnvironmentFailure(
            f"the observation of row {row}, {text[:80]!r}, has {len(ids)} tokens, but max_observation_tokens is "
            f"{environment.max_observation_tokens}; shorten it in the environment, or raise the limit"
        )
    return ids
