"""Conversations: the policy writes turns, and an environment inside the program answers each.

    begin -> (decode -> environment -> feed) x turns

All rows take their turns together, in one program. Observations are tokens of the row, with `Source.OBSERVATION` and
mask 0. `host_turns` does the same for environments written in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.experience import Experience, KeyUse, Prompts, Source
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.decoding import Decoding, Drawing, begin, decode, feed
from jaxrl_llm.rollout.environment_checks import require_limits
from jaxrl_llm.rollout.environments import (
    Environment,
    StopReason,
    advanced,
    cut_short,
    solved_episodes,
    started,
    stop_metrics,
)
from jaxrl_llm.rollout.generation import experience_of
from jaxrl_llm.rollout.sampling import row_keys

# In `Experience.fields`: value and count of each metric of an episode, by its name behind these.
METRIC, METRIC_COUNT = "episode/", "episode_count/"
# Fields of a conversation beyond those of a completion.
TURN_FIELDS = frozenset({"turn", "turn_rewards", "durations", "turns", "stop", "solved"})


class Speech(NamedTuple):
    """How the policy's part of conversations is written; everything here is known before the program is compiled.

    Attributes:
      model: the policy.
      environment: its limits and ends of turns are read.
      samples_per_prompt: conversations about each prompt.
      max_completion_tokens: T, all turns and observations included.
      eos_ids: ends of sequence.
      pad_id: fills the rest.
      constrain: places arrays with one entry a row on a mesh.
    """

    model: Model
    environment: Any
    samples_per_prompt: int
    max_completion_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    constrain: Callable[[PyTree], PyTree]

    def check(self) -> None:
        """Raises ValueError for invalid sizes."""
        require_limits(self.environment, self.model.vocabulary_size)
        if self.samples_per_prompt < 1 or self.max_completion_tokens < 1:
            raise ValueError(
                f"rollout.samples_per_prompt is {self.samples_per_prompt} and rollout.max_completion_tokens is "
                f"{self.max_completion_tokens}; both must be at least 1"
            )


@struct.dataclass
class Talk:
    """B running conversations, without their environment.

    Attributes:
      per_row: the prompt of each row.
      group: its number.
      sample: number of the row within its group.
      keys: one a row.
      temperature: of each row.
      decoding: what was written.
      turn: index of the turn that each token belongs to; places behind the last token have that of the last turn.
    """

    per_row: Prompts
    group: Int[Array, "B"]
    sample: Int[Array, "B"]
    keys: Array
    temperature: Float[Array, "B"]
    decoding: Decoding
    turn: Int[Array, "B T"]


def generate_turns(
    model: Model,
    params: PyTree,
    prompts: Prompts,
    key: Array,
    step: Array | int,
    environment: Environment,
    *,
    samples_per_prompt: int,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float | Float[Array, "G"] = 1.0,
    first_sample: int | Int[Array, "..."] = 0,
    active: Bool[Array, "N"] | None = None,
    constrain: Callable[[PyTree], PyTree] = lambda rows: rows,
) -> Experience:
    """Sample conversations and record everything about them that training needs.

    The tokens of a row depend on its prompt and its own number alone, as in `generate`. The loop ends as soon as every
    episode has. An episode is as it was `started` with the same key, step and sample, so it can be replayed.

    Args:
      model: the policy.
      params: its parameters.
      prompts: N left-padded prompts.
      key: the run's key; tokens and environments use addresses of their own under it.
      step: training step.
      environment: what answers.
      samples_per_prompt: G; rows are prompt-major, B = N * G.
      max_completion_tokens: T, all turns and observations included.
      eos_ids: ends of sequence.
      pad_id: fills the rest.
      temperature: of the softmax; 0 is greedy. One number, or one for each sample number.
      first_sample: number of the first sample of a prompt; it addresses the random keys. One number, or one a prompt.
      active: prompts that are talked about; the rows of the others are empty and have weight 0. None takes all.
      constrain: applied to arrays with one row a sample, to place them on a mesh.

    Returns:
      `Experience` that knows `turn`, `turn_rewards` and `durations` [B, S], `turns`, `stop` (a `StopReason`), `solved`,
      and value and count of the environment's metrics (`METRIC`, `METRIC_COUNT`).

    Raises:
      ValueError: for limits that cannot be.
    """
    speech = Speech(model, environment, samples_per_prompt, max_completion_tokens, tuple(eos_ids), pad_id, constrain)
    speech.check()
    talk = begun(speech, params, prompts, key, step, temperature, first_sample)
    episodes = started(environment, talk.per_row, key, step, talk.sample)
    there = None if active is None else active[talk.group]

    def running(episodes):
        under_way = episodes.stop == StopReason.RUNNING
        return under_way if there is None else under_way & there

    def one(carry):
        talk, episodes = carry
        talk, tokens, length = spoken(speech, params, talk, episodes.turns, running(episodes))
        room = max_completion_tokens - talk.decoding.written.length
        episodes, *answer = advanced(environment, episodes, tokens, length, room, eos_ids=speech.eos_ids)
        return heard(speech, params, talk, *answer), episodes

    talk, episodes = jax.lax.while_loop(lambda carry: jnp.any(running(carry[1])), one, (talk, episodes))
    rows = recorded(
        talk,
        turn_rewards=episodes.turn_rewards,
        durations=episodes.durations,
        turns=episodes.turns,
        stop=episodes.stop,
        solved=solved_episodes(environment, episodes),
    )
    rows = with_metrics(rows, jax.vmap(environment.metrics)(episodes.state))
    return rows if there is None else replace(rows, weight=there.astype(jnp.float32))


def begun(
    speech: Speech,
    params: PyTree,
    prompts: Prompts,
    key: Array,
    step: Array | int,
    temperature: float | Float[Array, "G"],
    first_sample: int | Int[Array, "..."] = 0,
) -> Talk:
    """Conversations before their first turn; each prompt is prefilled once for all of its samples."""
    count, samples = prompts.tokens.shape[0], speech.samples_per_prompt
    group = jnp.repeat(jnp.arange(count, dtype=jnp.int32), samples)
    place = jnp.tile(jnp.arange(samples, dtype=jnp.int32), count)
    sample = place + jnp.broadcast_to(jnp.asarray(first_sample, jnp.int32), (count,))[group]
    per_row = jax.tree.map(lambda x: speech.constrain(jnp.repeat(x, samples, axis=0)), prompts)
    keys = row_keys(jax.random.fold_in(key, KeyUse.ROLLOUT), step, per_row.prompt_id, sample)
    temperatures = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (samples,))[place]
    environment = speech.environment
    # Decoding writes all tokens of a turn except the last; the last is written afterwards, with the observation.
    slots = environment.max_turns * (environment.max_turn_tokens + environment.max_observation_tokens)
    decoding = begin(
        _drawing(speech, params, keys, temperatures, per_row),
        prompts,
        per_row,
        None,
        max_completion_tokens=speech.max_completion_tokens,
        slots=slots,
        pad_id=speech.pad_id,
        constrain=speech.constrain,
    )
    turn = speech.constrain(jnp.zeros((count * samples, speech.max_completion_tokens), jnp.int32))
    return Talk(per_row, group, sample, keys, temperatures, decoding, turn)


def spoken(
    speech: Speech, params: PyTree, talk: Talk, number: Int[Array, "B"], running: Bool[Array, "B"]
) -> tuple[Talk, Int[Array, "B U"], Int[Array, "B"]]:
    """Conversations with one more turn of the policy: (talk, tokens of the turn, their number).

    Args:
      speech: how it is written.
      params: of the policy.
      talk: so far.
      number: index of the turn.
      running: rows that take it.
    """
    most, width = speech.environment.max_turn_tokens, speech.max_completion_tokens
    start = talk.decoding.written.length
    decoding, _ = decode(
        _drawing(speech, params, talk.keys, talk.temperature, talk.per_row),
        talk.decoding,
        active=running,
        limit=jnp.minimum(start + most, width),
        end_ids=speech.environment.end_of_turn_ids,
    )
    length = decoding.written.length - start
    place = jnp.arange(most)
    at = jnp.minimum(start[:, None] + place, width - 1)
    tokens = jnp.take_along_axis(decoding.written.tokens, at, axis=1)
    tokens = jnp.where(place < length[:, None], tokens, speech.pad_id)
    new = running[:, None] & (jnp.arange(width) >= start[:, None])
    return replace(talk, decoding=decoding, turn=jnp.where(new, number[:, None], talk.turn)), tokens, length


def heard(speech: Speech, params: PyTree, talk: Talk, observation: Int[Array, "B O"], length: Int[Array, "B"]) -> Talk:
    """Conversations with the observations appended; a length of 0 adds nothing."""
    drawing = _drawing(speech, params, talk.keys, talk.temperature, talk.per_row)
    source = jnp.full(observation.shape, Source.OBSERVATION, jnp.int8)
    return replace(talk, decoding=feed(drawing, talk.decoding, observation, length, source))


def recorded(talk: Talk, *, stop: Int[Array, "B"], **facts: Array) -> Experience:
    """The final rows of finished conversations; facts have one entry per row."""
    rows = experience_of(
        talk.decoding.written, talk.per_row, sample=talk.sample, group=talk.group, ended=~cut_short(stop)
    )
    rows = rows.filled(turn=talk.turn, stop=stop, **facts)
    return with_metrics(rows, stop_metrics(facts["turns"], stop))


def with_metrics(rows: Experience, pairs: dict[str, tuple[Array, Array]]) -> Experience:
    """Rows with the value and count of some metrics of their episode as fields."""
    values = {METRIC + name: value.astype(jnp.float32) for name, (value, _) in pairs.items()}
    counts = {METRIC_COUNT + name: count.astype(jnp.float32) for name, (_, count) in pairs.items()}
    return rows.filled(**values, **counts)


def metrics_of(rows: Experience, weight: Float[Array, "B"]) -> dict[str, tuple[Array, Array]]:
    """Named (sum, count) pairs of the episodes' metrics over existing rows; none for rows of one completion."""
    there = (weight > 0).astype(jnp.float32)
    names = [name.removeprefix(METRIC) for name in rows.fields if name.startswith(METRIC)]
    return {name: ((rows[METRIC + name] * there).sum(), (rows[METRIC_COUNT + name] * there).sum()) for name in names}


def _drawing(speech: Speech, params: PyTree, keys: Array, temperature: Array, per_row: Prompts) -> Drawing:
    model = speech.model
    return Drawing(
        model=model,
        params=params if model.for_decoding is None else model.for_decoding(params),
        keys=keys,
        temperature=temperature,
        prompt_length=per_row.length,
        controls=None,
        eos_ids=speech.eos_ids,
    )
