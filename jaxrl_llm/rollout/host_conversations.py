"""Conversations with an environment written in Python: the turns of `generate_turns`, with the host between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.environments import StopReason
from jaxrl_llm.rollout.host_calls import Caller
from jaxrl_llm.rollout.host_environments import HostEnvironment, HostEpisodes, host_advanced, host_started
from jaxrl_llm.rollout.turns import Speech, Talk, begun, heard, recorded, spoken, with_metrics


class HostTurns(NamedTuple):
    """The programs of conversations with a host environment, compiled once and used for every batch.

    Attributes:
      environment: what answers.
      speech: how the policy's part is written.
      start: (params, prompts, key, step, number of the first sample) -> talk.
      say: (params, talk, turns taken, running rows) -> (talk, tokens of the turn, how many, room behind it).
      hear: (params, talk, observation, its length) -> talk.
      finish: (talk, facts of the episodes) -> experience.
      encode: ids of an observation's text.
      decode: text of a turn's ids.
    """

    environment: HostEnvironment
    speech: Speech
    start: Callable[..., Talk]
    say: Callable[..., tuple[Talk, Array, Array, Array]]
    hear: Callable[..., Talk]
    finish: Callable[[Talk, Mapping[str, Any]], Experience]
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def host_turns(
    model: Model,
    environment: HostEnvironment,
    *,
    samples_per_prompt: int,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    temperature: float | Float[Array, "G"] = 1.0,
    constrain: Callable[[PyTree], PyTree] = lambda rows: rows,
) -> HostTurns:
    """The programs that `host_generate_turns` runs.

    Args:
      model: the policy.
      environment: what answers.
      samples_per_prompt, max_completion_tokens, eos_ids, pad_id, temperature, constrain: as for `generate_turns`.
      encode: ids of an observation's text.
      decode: text of a turn's ids.

    Raises:
      ValueError: for limits that cannot be.
    """
    speech = Speech(model, environment, samples_per_prompt, max_completion_tokens, tuple(eos_ids), pad_id, constrain)
    speech.check()

    def say(params, talk, turns, running):
        talk, tokens, length = spoken(speech, params, talk, turns, running)
        return talk, tokens, length, max_completion_tokens - talk.decoding.written.length

    def finish(talk, facts):
        failures = facts["failures"].astype(jnp.float32)
        told = {name: facts[name] for name in ("turns", "turn_rewards", "durations", "stop")}
        rows = recorded(talk, **told, solved=(facts["turn_rewards"].sum(axis=1) >= 1).astype(jnp.float32))
        return with_metrics(rows, {"failures_per_episode": (failures, jnp.ones_like(failures))})

    return HostTurns(
        environment,
        speech,
        jax.jit(
            lambda params, prompts, key, step, first: begun(speech, params, prompts, key, step, temperature, first)
        ),
        jax.jit(say, donate_argnums=1),
        jax.jit(partial(heard, speech), donate_argnums=1),
        jax.jit(finish),
        encode,
        decode,
    )


def host_generate_turns(
    turns: HostTurns,
    params: PyTree,
    prompts: Prompts,
    items: Sequence[Mapping[str, Any]],
    key: Array,
    step: Array | int,
    call: Caller,
    *,
    first_sample: int | Int[Array, "..."] = 0,
    present: np.ndarray | None = None,
) -> Experience:
    """As `generate_turns`, with an environment on the host.

    Args:
      turns: from `host_turns`.
      params: parameters of the policy.
      prompts: N left-padded prompts.
      items: the record of each prompt.
      key: the run's key.
      step: training step.
      call: from `opened(turns.environment)`.
      first_sample: number of the first sample of a prompt; it addresses the random keys. One number, or one a prompt.
      present: [N] False for prompts that fill a batch up: the environment never hears of them. None for all.

    Returns:
      `Experience` as from `generate_turns`. An episode whose rewards add up to at least 1 is solved.

    Raises:
      EnvironmentFailure: for what the environment does wrong, unless it is answered.
    """
    talk = turns.start(params, prompts, key, jnp.asarray(step, jnp.int32), jnp.asarray(first_sample, jnp.int32))
    per_row = [item for item in items for _ in range(turns.speech.samples_per_prompt)]
    here = np.arange(len(per_row))
    if present is not None:
        here = np.flatnonzero(np.repeat(present, turns.speech.samples_per_prompt))
    episodes = _filled_up(host_started(turns.environment, [per_row[row] for row in here], call), here, len(per_row))
    while np.any(running := episodes.stop == StopReason.RUNNING):
        talk, *said = turns.say(params, talk, episodes.turns, running)
        tokens, length, room = jax.device_get(said)
        episodes, observation, observed = host_advanced(
            turns.environment,
            episodes,
            tokens,
            length,
            room,
            call,
            encode=turns.encode,
            decode=turns.decode,
            eos_ids=turns.speech.eos_ids,
            pad_id=turns.speech.pad_id,
        )
        talk = turns.hear(params, talk, observation, observed)
    return turns.finish(talk, _facts(episodes))


def _filled_up(episodes: HostEpisodes, here: np.ndarray, rows: int) -> HostEpisodes:
    """Episodes of all rows; rows outside of `here` count as stopped before their first turn."""
    states: list[Any] = [None] * rows
    for row, state in zip(here, episodes.states, strict=True):
        states[row] = state
    stop = np.full(rows, StopReason.ENVIRONMENT, np.int32)
    stop[here] = episodes.stop
    nothing = np.zeros((rows, episodes.turn_rewards.shape[1]), np.float32)
    return HostEpisodes(tuple(states), np.zeros(rows, np.int32), nothing, nothing, stop, np.zeros(rows, np.int32))


def host_turns_shapes(turns: HostTurns, params: PyTree, prompts: Prompts, key: Array, step: Array) -> Experience:
    """Shapes of the result of `host_generate_turns`; no environment is called."""
    talk = jax.eval_shape(turns.start, params, prompts, key, step, jnp.int32(0))
    rows = talk.group.shape[0]
    number = np.zeros(rows, np.int32)
    nothing = np.zeros((rows, turns.environment.max_turns), np.float32)
    return jax.eval_shape(turns.finish, talk, _facts(HostEpisodes((), number, nothing, nothing, number, number)))


def _facts(episodes: HostEpisodes) -> dict[str, np.ndarray]:
    return {name: part for name, part in episodes._asdict().items() if name != "states"}
