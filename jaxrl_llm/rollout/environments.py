"""Environments in JAX: pure functions of one episode, which are mapped over the rows of a batch.

An episode starts with `reset`. Each `step` takes the tokens of a turn of the policy and returns an observation, a
reward and `done`, until the episode is done or a limit is reached. These functions do not sample the turns, so they can
be used in a rollout, to replay an episode up to a turn, and to check a recorded conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.experience import KeyUse, Prompts, Source
from jaxrl_llm.rollout.sampling import row_keys


class StopReason(IntEnum):
    """Why an episode ended."""

    RUNNING = 0
    ANSWER = 1  # the environment ended the episode after a turn with end of sequence
    ENVIRONMENT = 2  # the environment ended the episode after another turn
    TURN_LIMIT = 3
    TOKEN_LIMIT = 4  # no room for an observation and a further turn


class Start(NamedTuple):
    """The start of an episode: one row of `Prompts`.

    Attributes:
      prompt_tokens: [P] left-padded.
      prompt_length: number of tokens of the prompt without padding.
      answer_tokens: [A] reference answer, right-padded; the policy does not see it.
      answer_length: number of its tokens without padding.
      prompt_id: stable id of the prompt.
    """

    prompt_tokens: Int[Array, "P"]
    prompt_length: Int[Array, ""]
    answer_tokens: Int[Array, "A"]
    answer_length: Int[Array, ""]
    prompt_id: Int[Array, ""]


class Step(NamedTuple):
    """The result of a turn.

    Attributes:
      state: the next state of the environment, of the same structure, shapes and types.
      observation: [O] tokens, right-padded.
      observation_length: number of tokens of the observation; not read if the episode is done.
      reward: of the turn.
      done: whether the episode is over.
      duration: duration of the turn, in any unit; 0 if the environment reports none.
    """

    state: PyTree
    observation: Int[Array, "O"]
    observation_length: Int[Array, ""]
    reward: Float[Array, ""]
    done: Bool[Array, ""]
    duration: Float[Array, ""] | float = 0.0


class Environment(NamedTuple):
    """An environment in JAX; `environment_checks.require_environment` checks it.

    Attributes:
      reset: (start, key) -> state.
      step: (state, turn tokens [max_turn_tokens] right-padded, their number, key) -> `Step`. The token that ends the
        turn is included; the padding must not be read.
      max_turns: largest number of turns of an episode; it stops an environment that never ends.
      max_turn_tokens: largest number of tokens of a turn, its end included.
      max_observation_tokens: O, largest number of tokens of an observation.
      end_of_turn_ids: tokens that end a turn, as its last token. End of sequence must be included, since a policy can
        always sample it; `step` decides whether it also ends the episode.
      metrics: final state -> named (value, count) pairs of an episode, averaged as sum of values over sum of counts.
        Names of numbers that are not shares end in `_per_episode`.
      solved: final state -> whether the episode was solved, independent of reward shaping; None: solved if its rewards
        sum to at least 1.
    """

    reset: Callable[[Start, Array], PyTree]
    step: Callable[[PyTree, Array, Array, Array], Step]
    max_turns: int = 0
    max_turn_tokens: int = 0
    max_observation_tokens: int = 0
    end_of_turn_ids: tuple[int, ...] = ()
    metrics: Callable[[PyTree], dict[str, tuple[Array, Array]]] = lambda state: {}
    solved: Callable[[PyTree], Array] | None = None


@struct.dataclass
class Episodes:
    """B running episodes.

    Attributes:
      state: the environment's, one row per episode.
      keys: one key per episode, from (run key, step, prompt id, sample); the key of a turn is folded with its index.
      turns: turns taken.
      turn_rewards: reward of each turn, 0 for turns that were not taken.
      durations: duration of each turn, 0 for turns that were not taken.
      stop: a `StopReason` for each episode.
    """

    state: PyTree
    keys: Array
    turns: Int[Array, "B"]
    turn_rewards: Float[Array, "B S"]
    durations: Float[Array, "B S"]
    stop: Int[Array, "B"]


class Turns(NamedTuple):
    """The tokens of the policy, turn by turn.

    Attributes:
      tokens: right-padded; the end of each turn is included.
      length: tokens in each turn, 0 for turns that were not taken.
    """

    tokens: Int[Array, "B S U"]
    length: Int[Array, "B S"]


def started(
    environment: Environment,
    prompts: Prompts,
    key: Array,
    step: Array | int,
    sample: Int[Array, "B"],
) -> Episodes:
    """Episodes before their first turn.

    Args:
      environment: the environment.
      prompts: one row per episode (the samples of a prompt repeat its row).
      key: the run's key.
      step: training step.
      sample: number of the sample within its group.
    """
    rows = prompts.tokens.shape[0]
    chex.assert_shape(sample, (rows,))
    keys = row_keys(jax.random.fold_in(key, KeyUse.ENVIRONMENT), step, prompts.prompt_id, sample)
    start = starts(prompts)
    return Episodes(
        state=jax.vmap(environment.reset)(start, jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys)),
        keys=keys,
        turns=jnp.zeros(rows, jnp.int32),
        turn_rewards=jnp.zeros((rows, environment.max_turns), jnp.float32),
        durations=jnp.zeros((rows, environment.max_turns), jnp.float32),
        stop=jnp.full(rows, StopReason.RUNNING, jnp.int32),
    )


def starts(prompts: Prompts) -> Start:
    """The start of an episode for each row of prompts."""
    return Start(
        prompts.tokens, prompts.length, prompts.answer_tokens, prompts.answer_length, jnp.asarray(prompts.prompt_id)
    )


def advanced(
    environment: Environment,
    episodes: Episodes,
    turn_tokens: Int[Array, "B U"],
    turn_length: Int[Array, "B"],
    room: Int[Array, "B"] | None = None,
    *,
    eos_ids: Sequence[int] = (),
) -> tuple[Episodes, Int[Array, "B O"], Int[Array, "B"]]:
    """Episodes after one more turn of the running ones, and the observations to append to their rows.

    Args:
      environment: the environment.
      episodes: before the turn. Stopped episodes are unchanged.
      turn_tokens: tokens of the policy, right-padded.
      turn_length: tokens of each turn; with 0 tokens no turn is taken.
      room: tokens that still fit after each turn; None sets no limit.
      eos_ids: ends of sequence, to distinguish the stop reasons ANSWER and ENVIRONMENT.

    Returns:
      (episodes, observations, their lengths). The length is 0 for a stopped episode; if it is positive, the observation
      and at least one token of a further turn fit.
    """
    chex.assert_shape(turn_tokens, (None, environment.max_turn_tokens))
    chex.assert_equal_shape_prefix([turn_tokens, turn_length, episodes.stop], 1)
    active = (episodes.stop == StopReason.RUNNING) & (turn_length > 0)
    keys = jax.vmap(jax.random.fold_in)(episodes.keys, episodes.turns + 1)
    made = jax.vmap(environment.step)(episodes.state, turn_tokens, turn_length, keys)

    last = jnp.take_along_axis(turn_tokens, jnp.maximum(turn_length - 1, 0)[:, None], axis=1)[:, 0]
    said = jnp.isin(last, jnp.asarray(eos_ids, turn_tokens.dtype)) if eos_ids else jnp.zeros(last.shape, bool)
    observed = jnp.clip(made.observation_length, 0, environment.max_observation_tokens)
    fits = jnp.ones(last.shape, bool) if room is None else observed < room
    conditions = [made.done & said, made.done, episodes.turns + 1 >= environment.max_turns, ~fits]
    reasons = (StopReason.ANSWER, StopReason.ENVIRONMENT, StopReason.TURN_LIMIT, StopReason.TOKEN_LIMIT)
    stop = jnp.select(conditions, [jnp.int32(reason) for reason in reasons], jnp.int32(StopReason.RUNNING))
    here = active[:, None] & (jnp.arange(environment.max_turns) == episodes.turns[:, None])
    episodes = replace(
        episodes,
        state=jax.tree.map(lambda new, old: _chosen(active, new, old), made.state, episodes.state),
        turns=episodes.turns + active,
        turn_rewards=jnp.where(here, made.reward.astype(jnp.float32)[:, None], episodes.turn_rewards),
        durations=jnp.where(here, jnp.asarray(made.duration, jnp.float32)[:, None], episodes.durations),
        stop=jnp.where(active, stop, episodes.stop),
    )
    running = active & (episodes.stop == StopReason.RUNNING)
    return episodes, made.observation, jnp.where(running, observed, 0).astype(jnp.int32)


def replayed(
    environment: Environment,
    episodes: Episodes,
    turns: Turns,
    up_to_turn: Int[Array, "B"] | int,
    *,
    eos_ids: Sequence[int] = (),
) -> Episodes:
    """Episodes before a given turn, by replaying their recorded turns.

    An environment is a function of its state, the turn and the key of the turn, so this is exact.

    Args:
      environment: the environment.
      episodes: at their start (`started` with the same key, step, prompts and samples).
      turns: tokens of the policy (`recorded_turns`).
      up_to_turn: number of turns to replay, one number or one per row; turns that were never taken are skipped.
      eos_ids: as for `advanced`.
    """
    limit = jnp.broadcast_to(jnp.asarray(up_to_turn, jnp.int32), episodes.turns.shape)

    def one(episodes: Episodes, turn: tuple[Array, Array, Array]) -> tuple[Episodes, None]:
        number, tokens, length = turn
        length = jnp.where(number < limit, length, 0)
        return advanced(environment, episodes, tokens, length, eos_ids=eos_ids)[0], None

    count = turns.tokens.shape[1]
    columns = (jnp.arange(count), jnp.moveaxis(turns.tokens, 1, 0), jnp.moveaxis(turns.length, 1, 0))
    return jax.lax.scan(one, episodes, columns)[0]


def recorded_turns(
    tokens: Int[Array, "B T"],
    turn: Int[Array, "B T"],
    source: Int[Array, "B T"],
    *,
    max_turns: int,
    max_turn_tokens: int,
    pad_id: int = 0,
) -> Turns:
    """The policy's turns of recorded rows: the tokens of each turn without its observation.

    Args:
      tokens: completion tokens, right-padded.
      turn: index of the turn of each token; an observation belongs to the turn before it.
      source: a `Source` for each token.
      max_turns: S, number of turns to keep.
      max_turn_tokens: U, number of tokens of a turn to keep.
      pad_id: fills the rest.
    """
    chex.assert_rank([tokens, turn, source], 2)
    chex.assert_equal_shape([tokens, turn, source])
    written = (source != Source.PAD) & (source != Source.OBSERVATION)

    def row(tokens: Array, turn: Array, written: Array) -> tuple[Array, Array]:
        counted = written.astype(jnp.int32)
        length = jax.ops.segment_sum(counted, turn, num_segments=max_turns)
        place = jnp.cumsum(counted) - 1 - (jnp.cumsum(length) - length)[jnp.clip(turn, 0, max_turns - 1)]
        # Indices outside are dropped; negative ones would count from the end.
        at = (jnp.where(written, turn, max_turns), jnp.where(place >= 0, place, max_turn_tokens))
        kept = jnp.full((max_turns, max_turn_tokens), pad_id, tokens.dtype).at[at].set(tokens, mode="drop")
        return kept, jnp.minimum(length, max_turn_tokens)

    return Turns(*jax.vmap(row)(tokens, turn.astype(jnp.int32), written))


def episode_metrics(
    environment: Environment, episodes: Episodes, weight: Float[Array, "B"]
) -> dict[str, tuple[Array, Array]]:
    """Named (sum, count) pairs over rows: the environment's metrics, turns taken, and the share of each stop reason."""
    chex.assert_equal_shape([weight, episodes.stop])
    pairs = stop_metrics(episodes.turns, episodes.stop) | jax.vmap(environment.metrics)(episodes.state)
    there = weight > 0
    return {
        name: (jnp.sum(jnp.where(there, value, 0.0)), jnp.sum(jnp.where(there, count, 0.0)))
        for name, (value, count) in pairs.items()
    }


def stop_metrics(turns: Int[Array, "B"], stop: Int[Array, "B"]) -> dict[str, tuple[Array, Array]]:
    """Named (value, count) pairs of each episode: turns taken, and its stop reason."""
    once = jnp.ones(stop.shape, jnp.float32)
    ways = [reason for reason in StopReason if reason != StopReason.RUNNING]
    return {"turns_per_episode": (turns.astype(jnp.float32), once)} | {
        f"stopped_by_{reason.name.lower()}": ((stop == reason).astype(jnp.float32), once) for reason in ways
    }


def solved_episodes(environment: Environment, episodes: Episodes) -> Float[Array, "B"]:
    """1 for each episode that was solved."""
    if environment.solved is None:
        return (episodes.turn_rewards.sum(axis=1) >= 1).astype(jnp.float32)
    return jax.vmap(environment.solved)(episodes.state).astype(jnp.float32)


def cut_short(stop: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Whether a limit ended an episode, not the environment: `Experience.truncated` of a conversation."""
    return (stop == StopReason.TURN_LIMIT) | (stop == StopReason.TOKEN_LIMIT)


def _chosen(active: Bool[Array, "B"], new: Array, old: Array) -> Array:
    return jnp.where(active.reshape(active.shape + (1,) * (new.ndim - 1)), new, old)
