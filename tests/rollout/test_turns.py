"""Conversations: one program, the trainer's log-probabilities, observations that carry no loss, exact replay."""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import CharacterTokenizer, encode_prompts, tasks
from jaxrl_llm.data.tasks import grid
from jaxrl_llm.data.tasks.items import record
from jaxrl_llm.experience import KeyUse, Source
from jaxrl_llm.losses import policy_gradient
from jaxrl_llm.models import TransformerConfig, token_statistics, transformer
from jaxrl_llm.rollout import (
    Environment,
    HostEnvironment,
    Prefixes,
    Step,
    StopReason,
    cut_short,
    generate,
    generate_turns,
    host_generate_turns,
    host_turns,
    opened,
    predicting_hidden,
    recorded_turns,
    replayed,
    started,
)
from jaxrl_llm.rollout.tasks import task_environment

TOKENIZER = CharacterTokenizer()
EOS, PAD, END = TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.id("<n>")
KEY, TOKENS, SAMPLES, PROMPT = jax.random.key(7), 60, 4, 24
MODEL = transformer(
    TransformerConfig(vocabulary_size=TOKENIZER.vocabulary_size, width=16, layers=1, heads=2, kv_heads=1)
)
TASK = tasks.task("grid", size=3)
GRID = task_environment(TASK, max_turn_tokens=6)
ITEMS = [record(item, number) for number, item in enumerate(TASK.generate(level=2, count=3, seed=0))]
SIZES = {"samples_per_prompt": SAMPLES, "max_completion_tokens": TOKENS, "eos_ids": (EOS,), "pad_id": PAD}


@pytest.fixture(scope="module")
def params():
    """A policy that ends its turns often, and its sequence now and then."""
    drawn = MODEL.init(jax.random.key(1))
    hot = jnp.asarray([TOKENIZER.id(text) for text in ("<a>", "</a>", "U", "D", "L", "R", "<n>", "<n>", "<eos>")])
    table = drawn["embedding"]
    return drawn | {"embedding": table.at[hot].set(table[hot] * 3.0)}


def prompts_of(items=ITEMS):
    return encode_prompts(items, TOKENIZER, max_prompt_tokens=PROMPT, max_answer_tokens=20)


@partial(jax.jit, static_argnames=("environment", "samples", "tokens"))
def program(params, prompts, temperature, *, environment=GRID, samples=SAMPLES, tokens=TOKENS, **which):
    sizes = SIZES | {"samples_per_prompt": samples, "max_completion_tokens": tokens, "temperature": temperature}
    return generate_turns(MODEL, params, prompts, KEY, 3, environment, **sizes, **which)


@pytest.fixture(scope="module")
def rows(params):
    return program(params, prompts_of(), 1.0)


def spans(rows):
    """[B, T] places that are written."""
    return np.arange(rows.tokens.shape[1]) < np.asarray(rows.length)[:, None]


def test_the_sampler_says_what_the_trainer_says(params, rows):
    @jax.jit
    def score(params, rows):
        hidden = predicting_hidden(MODEL, params, rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length)
        return token_statistics(MODEL, params, hidden, rows.tokens, temperature=1.0, entropy=True)

    scored, inside = score(params, rows), spans(rows)
    np.testing.assert_allclose(rows.behaviour_logprobs[inside], scored.logprobs[inside], atol=1e-5)
    np.testing.assert_allclose(rows.behaviour_entropy[inside], scored.entropy[inside], atol=1e-5)
    assert not np.asarray(rows.behaviour_logprobs)[~inside].any()


def test_a_conversation_is_laid_out_as_turns_and_observations(rows):
    source, turn = np.asarray(rows.source), np.asarray(rows["turn"])
    np.testing.assert_array_equal(rows.mask, source == Source.SAMPLED)
    np.testing.assert_array_equal(source == Source.PAD, ~spans(rows))
    assert (np.diff(turn, axis=1) >= 0).all()
    assert set(np.unique(source)) == {Source.PAD, Source.SAMPLED, Source.OBSERVATION}
    for row in range(len(source)):
        turns, length = int(rows["turns"][row]), int(rows.length[row])
        assert turn[row, length - 1] == turns - 1
        assert source[row, length - 1] == Source.SAMPLED  # nobody answers the last turn
        for number in range(turns):
            own = source[row][(turn[row] == number) & spans(rows)[row]]
            ours = (own == Source.SAMPLED).sum()
            assert 1 <= ours <= 6
            assert (own[:ours] == Source.SAMPLED).all()
            assert len(own) - ours == (7 if number < turns - 1 else 0)
            said = np.asarray(rows.tokens)[row][(turn[row] == number) & spans(rows)[row]][:ours]
            assert not np.isin(said[:-1], (END, EOS)).any()
            assert np.isin(said[-1], (END, EOS)) or ours == 6 or length == TOKENS
    stop = np.asarray(rows["stop"])
    assert len(set(stop.tolist())) > 1, "the test needs episodes that end in several ways"
    np.testing.assert_array_equal(rows.truncated, cut_short(stop))
    assert not (stop == StopReason.RUNNING).any()


def test_recorded_turns_replay_to_the_same_rewards(rows):
    prompts = jax.tree.map(lambda x: jnp.repeat(x, SAMPLES, axis=0), prompts_of())
    turns = recorded_turns(rows.tokens, rows["turn"], rows.source, max_turns=12, max_turn_tokens=6, pad_id=PAD)
    again = jax.jit(lambda: replayed(GRID, started(GRID, prompts, KEY, 3, rows.sample), turns, 12, eos_ids=(EOS,)))()
    np.testing.assert_array_equal(again.turn_rewards, rows["turn_rewards"])
    np.testing.assert_array_equal(again.turns, rows["turns"])
    known = np.asarray(again.stop) != StopReason.RUNNING  # a replay knows no limit of tokens
    np.testing.assert_array_equal(np.asarray(again.stop)[known], np.asarray(rows["stop"])[known])
    np.testing.assert_array_equal(again.state.reached, rows["solved"] > 0)


def test_a_row_depends_on_its_address_alone(params, rows):
    last = jax.tree.map(lambda x: x[2:], prompts_of())
    alone = program(params, last, 1.0)
    for name in ("tokens", "length", "source", "turn"):
        np.testing.assert_array_equal(alone[name], rows[name][2 * SAMPLES :])
    fewer = program(params, prompts_of(), 1.0, samples=2)
    np.testing.assert_array_equal(fewer.tokens.reshape(3, 2, -1), rows.tokens.reshape(3, SAMPLES, -1)[:, :2])


def every_sample(rows, samples=SAMPLES):
    """The rows as [prompts, samples, ...], by the names of what is compared."""
    names = ("tokens", "length", "source", "turn", "turns", "turn_rewards", "stop", "solved", "behaviour_logprobs")
    return {name: np.asarray(rows[name]).reshape(-1, samples, *rows[name].shape[1:]) for name in names}


@pytest.mark.parametrize(
    "first", [pytest.param(2, marks=pytest.mark.slow), np.array([2, 0, 1])], ids=["one for all", "one a prompt"]
)
def test_samples_are_numbered_from_the_first(params, rows, first):
    """Later samples of a prompt, drawn alone, are those that are drawn with all others."""
    later = program(params, prompts_of(), 1.0, samples=2, first_sample=jnp.asarray(first))
    number = np.broadcast_to(first, 3)[:, None] + np.arange(2)
    np.testing.assert_array_equal(later.sample.reshape(3, 2), number)
    np.testing.assert_array_equal(later.group.reshape(3, 2), np.arange(3)[:, None] + np.zeros((1, 2), int))
    whole = every_sample(rows)
    for name, value in every_sample(later, 2).items():
        of = np.take_along_axis(whole[name], number.reshape(3, 2, *[1] * (value.ndim - 2)), axis=1)
        close = name == "behaviour_logprobs"
        np.testing.assert_allclose(value, of, atol=1e-5 if close else 0, rtol=0, err_msg=name)


def test_prompts_that_are_not_active_are_not_talked_about(params, rows):
    active = np.array([True, False, True])
    some, there = program(params, prompts_of(), 1.0, active=jnp.asarray(active)), np.repeat(active, SAMPLES)
    np.testing.assert_array_equal(some.weight, there.astype(np.float32))
    assert not np.asarray(some.length)[~there].any()
    assert not np.asarray(some.mask)[~there].any()
    assert not np.asarray(some.behaviour_logprobs)[~there].any()
    assert not np.asarray(some.truncated)[~there].any()
    assert (np.asarray(some.tokens)[~there] == PAD).all()
    for name in ("turns", "turn_rewards", "solved"):
        assert not np.asarray(some[name])[~there].any(), name
    for name in ("tokens", "length", "source", "mask", "turn", "turns", "turn_rewards", "stop", "truncated"):
        np.testing.assert_array_equal(some[name][there], rows[name][there], err_msg=name)


@pytest.mark.slow
def test_a_conversation_goes_on_greedily_from_any_place(params):
    """Resumed from what was said and heard, the policy says the same."""
    prompts, whole = prompts_of(), program(params, prompts_of(), 0.0, samples=1)
    source, turn, sampled = (np.asarray(x) for x in (whole.source, whole["turn"], whole.tokens))
    for row in range(3):
        turns = int(whole["turns"][row])
        begin = int(np.flatnonzero(turn[row] == turns - 1)[0])
        end = int(whole.length[row])
        assert begin > 0
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], prompts)
        given = Prefixes(
            whole.tokens[row : row + 1, : TOKENS - 1],
            jnp.array([begin]),
            jnp.asarray(source[row : row + 1, : TOKENS - 1]),
        )
        resumed = generate(
            MODEL,
            params,
            one,
            jax.random.fold_in(KEY, KeyUse.ROLLOUT),
            3,
            prefixes=given,
            temperature=0.0,
            **SIZES | {"samples_per_prompt": 1},
        )
        np.testing.assert_array_equal(np.asarray(resumed.tokens)[0, :end], sampled[row, :end])
        np.testing.assert_allclose(resumed.behaviour_logprobs[0, :end], whole.behaviour_logprobs[row, :end], atol=1e-5)


def blind(text):
    """The grid with every observation replaced, of the same length."""
    other = jnp.asarray(TOKENIZER.encode(text), jnp.int32)

    def step(*given):
        return GRID.step(*given)._replace(observation=other)

    return GRID._replace(step=step)


@pytest.mark.slow
def test_what_is_observed_does_not_change_what_is_trained_on(params):
    """The same turns with other observations: the same mask, and no gradient for the words of an observation."""
    limit = GRID._replace(max_turn_tokens=1)  # turns of one token: their lengths cannot differ
    endless = limit._replace(step=lambda *a: GRID.step(*a)._replace(done=jnp.bool_(False)))
    said = blind("<o>abcde</o>").step
    other = endless._replace(step=lambda *a: said(*a)._replace(done=jnp.bool_(False)))
    one, two = (program(params, prompts_of(), 1.0, environment=e) for e in (endless, other))
    assert (np.asarray(one.tokens) != np.asarray(two.tokens)).any()
    np.testing.assert_array_equal(one.mask, two.mask)
    np.testing.assert_array_equal(one["turn"], two["turn"])


def test_the_gradient_of_observed_targets_is_zero(params, rows):
    advantages = jnp.ones_like(rows.mask)
    gradient = jax.grad(lambda logprobs: policy_gradient(logprobs, advantages, rows.mask).value)(
        rows.behaviour_logprobs
    )
    observed = np.asarray(rows.source) == Source.OBSERVATION
    assert observed.any()
    assert not np.asarray(gradient)[observed].any()
    assert np.asarray(gradient)[np.asarray(rows.source) == Source.SAMPLED].all()


@pytest.mark.slow
def test_an_environment_that_never_ends_is_stopped(params):
    def step(state, tokens, length, key):
        return Step(state, jnp.full(3, END, jnp.int32), jnp.int32(0), jnp.float32(0.25), jnp.bool_(False))

    endless = Environment(lambda start, key: jnp.int32(0), step, 4, 5, 3, (END, EOS))
    rows = program(params, prompts_of(), 1.0, environment=endless)
    assert (np.asarray(rows["turns"]) == 4).all()
    assert (np.asarray(rows["stop"]) == StopReason.TURN_LIMIT).all()
    assert np.asarray(rows.truncated).all()
    assert (np.asarray(rows["turn_rewards"]) == 0.25).all()
    assert (np.asarray(rows["solved"]) == 1).all()  # rewards that add up to 1
    tight = program(params, prompts_of(), 1.0, environment=endless, tokens=2)
    assert (np.asarray(tight.length) == 2).all()
    assert (np.asarray(tight["stop"]) == StopReason.TOKEN_LIMIT).any()


# ---- on the host ----------------------------------------------------------------------------------------------------


def host_grid(**options):
    limits = dict(max_turns=12, max_turn_tokens=6, max_observation_tokens=7, end_of_turn_ids=(END, EOS))
    return HostEnvironment(grid.episode, grid.turn, **limits, **options)


def talked(params, environment, call, items=ITEMS, samples=SAMPLES, **which):
    sizes = SIZES | {"samples_per_prompt": samples}
    turns = host_turns(MODEL, environment, encode=TOKENIZER.encode, decode=TOKENIZER.decode, **sizes)
    return host_generate_turns(turns, params, prompts_of(items), items, KEY, 3, call, **which)


def test_on_the_host_the_same_is_said(params, rows):
    """Token for token what the program says, to an environment that does in Python what that does."""
    environment = host_grid()
    with opened(environment) as call:
        found = talked(params, environment, call)
    for name in ("tokens", "length", "source", "mask", "turn", "truncated"):
        np.testing.assert_array_equal(found[name], rows[name], err_msg=name)
    for name in ("turn_rewards", "turns", "stop", "solved", "episode/turns_per_episode"):
        np.testing.assert_array_equal(found[name], rows[name], err_msg=name)
    np.testing.assert_allclose(found.behaviour_logprobs, rows.behaviour_logprobs, atol=1e-5)
    assert not np.asarray(found["episode/failures_per_episode"]).any()


def test_on_the_host_samples_are_numbered_from_the_first_too(params, rows):
    with opened(environment := host_grid()) as call:
        later = talked(params, environment, call, samples=2, first_sample=2)
        mixed = talked(params, environment, call, samples=2, first_sample=np.array([2, 0, 1]))
    whole, found = every_sample(rows), every_sample(later, 2)
    for name in ("tokens", "length", "turn", "turn_rewards"):
        np.testing.assert_array_equal(found[name], whole[name][:, 2:], err_msg=name)
    tokens = every_sample(mixed, 2)["tokens"]
    for prompt, first in enumerate((2, 0, 1)):
        np.testing.assert_array_equal(tokens[prompt], whole["tokens"][prompt, first : first + 2])


def test_an_environment_on_the_host_never_hears_of_prompts_that_fill_a_batch_up(params, rows):
    heard: list[str] = []

    def episode(item):
        heard.append(item["body"])
        return grid.episode(item)

    with opened(environment := host_grid()._replace(reset=episode)) as call:
        found = talked(params, environment, call, present=np.array([True, False, True]))
    assert heard == [item["body"] for item in (ITEMS[0], ITEMS[2]) for _ in range(SAMPLES)]
    whole, found = every_sample(rows), every_sample(found)
    for name in ("tokens", "length", "turn", "turn_rewards"):
        np.testing.assert_array_equal(found[name][[0, 2]], whole[name][[0, 2]], err_msg=name)
    assert not found["turn_rewards"][1].any()


def hanging(state, text):
    time.sleep(60)


def test_a_tool_that_hangs_is_answered_for(params):
    environment = host_grid(
        deadline_seconds=0.2, on_failure="observation", failure_observation="ERR", failure_reward=-1.0
    )
    environment = environment._replace(step=hanging, workers=12)
    began = time.monotonic()
    with opened(environment) as call:
        found = talked(params, environment, call)
    assert time.monotonic() - began < 30
    assert (np.asarray(found["stop"]) != StopReason.RUNNING).all()
    assert (np.asarray(found["turn_rewards"])[:, 0] == -1).all()
    assert (np.asarray(found["episode/failures_per_episode"]) == 1).all()


def test_programs_on_the_host_are_compiled_once(params):
    environment = host_grid()
    turns = host_turns(MODEL, environment, encode=TOKENIZER.encode, decode=TOKENIZER.decode, **SIZES)
    with opened(environment) as call:
        for step in range(3):
            host_generate_turns(turns, params, prompts_of(), ITEMS, KEY, step, call)
    assert [piece._cache_size() for piece in (turns.start, turns.say, turns.hear, turns.finish)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(params, sizes, message):
    with pytest.raises(ValueError, match=message):
        generate_turns(MODEL, params, prompts_of(), KEY, 0, GRID, **SIZES | sizes)
    with pytest.raises(ValueError, match=r"max_turns is 0; .* never ends"):
        generate_turns(MODEL, params, prompts_of(), KEY, 0, GRID._replace(max_turns=0), **SIZES)
