"""The protocol: limits stop what never ends, rows do not see each other, replay and records are exact, checks speak."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.rollout import (
    Environment,
    Step,
    StopReason,
    advanced,
    cut_short,
    episode_metrics,
    recorded_turns,
    replayed,
    require_environment,
    started,
)

EOS, END = 2, 12
KEY = jax.random.key(7)


def reset(start, key):
    return {"sum": start.prompt_id, "first": jax.random.randint(key, (), 0, 1000), "noise": jnp.int32(0)}


def step(state, tokens, length, key):
    """Adds its tokens up, answers as many tokens as the turn had, and is done at a token 9."""
    inside = jnp.arange(tokens.shape[0]) < length
    total = state["sum"] + jnp.sum(jnp.where(inside, tokens, 0))
    state = {**state, "sum": total, "noise": jax.random.randint(key, (), 0, 1000)}
    done = jnp.any(inside & (tokens == 9))
    return Step(state, jnp.full(3, 40, jnp.int32), jnp.minimum(length, 3), total.astype(jnp.float32), done)


ENVIRONMENT = Environment(
    reset, step, max_turns=3, max_turn_tokens=4, max_observation_tokens=3, end_of_turn_ids=(END, EOS)
)


def prompts(ids, width=2, answer=1):
    rows = len(ids)
    return Prompts(
        tokens=jnp.ones((rows, width), jnp.int32),
        length=jnp.full(rows, width),
        prompt_id=jnp.asarray(ids, jnp.int32),
        answer_tokens=jnp.zeros((rows, answer), jnp.int32),
        answer_length=jnp.zeros(rows, jnp.int32),
    )


def begin(ids=(0, 0, 0, 0), samples=None):
    return started(ENVIRONMENT, prompts(ids), KEY, 5, jnp.arange(len(ids)) if samples is None else samples)


@jax.jit
def advance(episodes, tokens, length, room):
    return advanced(ENVIRONMENT, episodes, tokens, length, room, eos_ids=(EOS,))


def turn(episodes, rows, room=99):
    """One turn; `rows` are lists of tokens."""
    tokens = np.full((len(rows), 4), 9, np.int32)  # behind a turn stands what would end the episode
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    length = jnp.asarray([len(row) for row in rows], jnp.int32)
    return advance(episodes, jnp.asarray(tokens), length, jnp.broadcast_to(jnp.asarray(room), (len(rows),)))


def test_every_way_to_stop():
    episodes = begin((0,) * 5)
    episodes, observation, size = turn(episodes, [[9, END], [9, EOS], [1, END], [1, END], [1]], [99, 99, 2, 3, 99])
    assert episodes.stop.tolist() == [
        StopReason.ENVIRONMENT,
        StopReason.ANSWER,
        StopReason.TOKEN_LIMIT,  # the observation fills all that is left
        StopReason.RUNNING,
        StopReason.RUNNING,
    ]
    assert size.tolist() == [0, 0, 0, 2, 1]
    assert observation.shape == (5, 3)
    for _ in range(4):
        episodes, _, size = turn(episodes, [[1, END]] * 5)
    assert episodes.stop.tolist()[3:] == [StopReason.TURN_LIMIT] * 2
    assert episodes.turns.tolist() == [1, 1, 1, 3, 3]
    assert size.tolist() == [0] * 5
    assert cut_short(episodes.stop).tolist() == [False, False, True, True, True]


def test_an_environment_that_never_ends_is_stopped_by_its_turns():
    episodes = begin((0,))
    for number in range(3):
        assert episodes.stop.tolist() == [StopReason.RUNNING], number
        episodes, _, _ = turn(episodes, [[1, END]])
    assert episodes.stop.tolist() == [StopReason.TURN_LIMIT]


def test_rewards_stand_at_their_turn_and_episodes_that_stopped_stay_as_they_are():
    episodes = begin((0, 100))
    episodes, _, _ = turn(episodes, [[5, END], [9]])
    stopped = jax.tree.map(lambda x: x[1], episodes.state)
    episodes, _, _ = turn(episodes, [[6], [7]])
    assert episodes.turn_rewards.tolist() == [[17, 23, 0], [109, 0, 0]]
    assert jax.tree.map(int, stopped) == jax.tree.map(lambda x: int(x[1]), episodes.state)


def test_a_row_without_tokens_waits():
    episodes, _, size = turn(begin((3, 4)), [[], [1]])
    assert (episodes.turns.tolist(), size.tolist()) == ([0, 1], [0, 1])
    assert int(episodes.state["sum"][0]) == 3


def test_keys_are_addressed_by_prompt_sample_and_turn_not_by_rows():
    ids, samples = jnp.array([4, 4, 8]), jnp.array([0, 1, 0])
    together = turn(turn(begin(ids, samples), [[1]] * 3)[0], [[1]] * 3)[0]
    alone = turn(turn(begin(ids[1:2], samples[1:2]), [[1]])[0], [[1]])[0]
    assert jax.tree.map(lambda x: int(x[1]), together.state) == jax.tree.map(lambda x: int(x[0]), alone.state)
    once = turn(begin(ids, samples), [[1]] * 3)[0]
    drawn = [*together.state["noise"].tolist(), *once.state["noise"].tolist(), *once.state["first"].tolist()]
    assert len(set(drawn)) == 9


def test_recorded_turns_are_what_the_policy_wrote_and_replay_them():
    said = [[[5, END], [6, 7, END], [1]], [[1, 2, 3, END], [9, EOS]], [[4]]]
    width, tokens, turns, sources = 20, [], [], []
    for row in said:
        line = []
        for number, text in enumerate(row):
            line += [(token, number, Source.SAMPLED) for token in text]
            line += [(40, number, Source.OBSERVATION)] * min(len(text), 3)
        line += [(9, 0, Source.PAD)] * (width - len(line))
        for column, values in zip((tokens, turns, sources), zip(*line, strict=True), strict=True):
            column.append(values)
    arrays = [jnp.asarray(x) for x in (tokens, turns, sources)]
    recorded = recorded_turns(*arrays, max_turns=3, max_turn_tokens=4)
    assert recorded.length.tolist() == [[2, 3, 1], [4, 2, 0], [1, 0, 0]]
    assert recorded.tokens[0].tolist() == [[5, END, 0, 0], [6, 7, END, 0], [1, 0, 0, 0]]
    assert recorded.tokens[1].tolist() == [[1, 2, 3, END], [9, EOS, 0, 0], [0] * 4]

    episodes, history = begin((0, 0, 0)), []
    for number in range(3):
        history.append(episodes)
        episodes, _, _ = turn(episodes, [row[number] if number < len(row) else [] for row in said])
    start = begin((0, 0, 0))
    for number, wanted in enumerate([*history, episodes]):
        found = replayed(ENVIRONMENT, start, recorded, number, eos_ids=(EOS,))
        for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            if left.ndim and not jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(left, right)


def test_a_turn_longer_than_its_limit_is_kept_up_to_it():
    tokens = jnp.arange(10, 16)[None]
    recorded = recorded_turns(
        tokens, jnp.array([[0, 0, 0, 0, 1, 2]]), jnp.full((1, 6), Source.SAMPLED), max_turns=2, max_turn_tokens=3
    )
    assert recorded.tokens.tolist() == [[[10, 11, 12], [14, 0, 0]]]
    assert recorded.length.tolist() == [[3, 1]]


def test_metrics_leave_out_absent_rows():
    episodes = turn(begin((0, 0, 0)), [[9], [1], [9, EOS]])[0]
    found = episode_metrics(ENVIRONMENT, episodes, jnp.array([1.0, 0.5, 0.0]))
    assert {name: (float(s), float(n)) for name, (s, n) in found.items()} == {
        "turns_per_episode": (2, 2),
        "stopped_by_answer": (0, 2),
        "stopped_by_environment": (1, 2),
        "stopped_by_turn_limit": (0, 2),
        "stopped_by_token_limit": (0, 2),
    }


def returning(**changes):
    """The environment with some of what its step returns replaced."""
    return ENVIRONMENT._replace(step=lambda *a: step(*a)._replace(**{k: v(step(*a)) for k, v in changes.items()}))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (Environment(reset, step), "max_turns is 0; set it .* never ends"),
        (ENVIRONMENT._replace(max_turns=2.0), r"max_turns is 2\.0"),
        (ENVIRONMENT._replace(max_turn_tokens=-1), "max_turn_tokens is -1"),
        (ENVIRONMENT._replace(max_observation_tokens=0), "max_observation_tokens is 0"),
        (ENVIRONMENT._replace(max_observation_tokens=2), r"observation of shape \(3,\).*raise max_observation_tokens"),
        (ENVIRONMENT._replace(end_of_turn_ids=()), r"end_of_turn_ids is \(\)"),
        (ENVIRONMENT._replace(end_of_turn_ids=(200,)), "below 100, the vocabulary size"),
        (returning(done=lambda s: s.reward), "done of shape .* one boolean"),
        (returning(reward=lambda s: jnp.int32(1)), "reward of shape .* one float"),
        (returning(observation_length=lambda s: s.observation), "observation_length of shape"),
        (returning(observation=lambda s: s.observation.astype(jnp.float32)), "observation of shape .* float32"),
        (returning(state=lambda s: {**s.state, "sum": s.reward}), "a state of .* the same structure"),
        (returning(state=lambda s: s.state["sum"]), "the same structure"),
        (ENVIRONMENT._replace(step=lambda *a: step(*a)[:3]), r"must return Step\(state, observation"),
    ],
)
def test_what_is_wrong_with_an_environment_is_said_before_anything_runs(environment, message):
    with pytest.raises(ValueError, match=message):
        require_environment(environment, prompts((0,)), vocabulary_size=100)


def test_an_environment_that_is_in_order_passes():
    require_environment(ENVIRONMENT, prompts((0,)), vocabulary_size=100)
