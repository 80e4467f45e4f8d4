"""What a rollout records, on a model that follows a script: every number here can be worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.models import Model
from jaxrl_llm.rollout import completion_positions, generate, prompt_positions

EOS, PAD, VOCABULARY = 1, 0, 8
SCRIPT = jnp.array(
    [
        [2, 3, 4, 5],  # never ends
        [2, 3, 4, EOS],  # ends with its last allowed token
        [EOS, 7, 7, 7],  # ends at once
        [3, EOS, 6, EOS],  # ends early
    ]
)


CALLS = []


def _apply(params, tokens, positions, cache):
    row, written = cache
    jax.debug.callback(lambda *call: CALLS.append(tuple(np.asarray(x).tolist() for x in call)), tokens, positions)
    row = jnp.where(row < 0, tokens[:, -1], row)
    following = jnp.take(SCRIPT, written, axis=1, mode="clip")[row]
    return jnp.broadcast_to(following[:, None, None].astype(jnp.float32), (*tokens.shape, 1)), (row, written + 1)


# Writes the row of `SCRIPT` that the last prompt token names, and appends (tokens, positions) of each call to `CALLS`.
SCRIPTED = Model(
    init=lambda key: {},
    apply=_apply,
    logits=lambda params, hidden: 40.0 * jax.nn.one_hot(hidden[..., 0].astype(jnp.int32), VOCABULARY),
    init_cache=lambda rows, slots: (jnp.full(rows, -1), jnp.int32(0)),
    expand_cache=lambda cache, samples, extra: (jnp.repeat(cache[0], samples), cache[1]),
    specs={},
    vocabulary_size=VOCABULARY,
    config=None,
)


@functools.partial(jax.jit, static_argnames=("max_completion_tokens", "samples_per_prompt"))
def _program(prompts, pad_id, temperature, **sizes):
    return generate(
        SCRIPTED, {}, prompts, jax.random.key(0), 0, eos_ids=(EOS,), pad_id=pad_id, temperature=temperature, **sizes
    )


def written(rows, *, max_completion_tokens=4, samples_per_prompt=1, pad_id=PAD):
    """The greedy experience, and the (tokens, positions) of each call of the model."""
    prompts = Prompts(
        tokens=jnp.array([[9, 9, row] for row in rows], jnp.int32),
        length=jnp.array([1 + row % 3 for row in rows], jnp.int32),
        prompt_id=100 + jnp.array(rows, jnp.int32),
        answer_tokens=jnp.array([[row, row] for row in rows], jnp.int32),
        answer_length=jnp.full(len(rows), 2, jnp.int32),
    )
    CALLS.clear()
    sizes = {"max_completion_tokens": max_completion_tokens, "samples_per_prompt": samples_per_prompt}
    experience = jax.block_until_ready(_program(prompts, pad_id, 0.0, **sizes))
    jax.effects_barrier()
    return experience, list(CALLS)


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_tokens_length_mask_source_and_truncation(pad_id):
    experience, _ = written([0, 1, 2, 3], pad_id=pad_id)
    p = pad_id
    np.testing.assert_array_equal(experience.tokens, [[2, 3, 4, 5], [2, 3, 4, EOS], [EOS, p, p, p], [3, EOS, p, p]])
    np.testing.assert_array_equal(experience.length, [4, 4, 1, 2])
    np.testing.assert_array_equal(experience.truncated, [True, False, False, False])
    mask = [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    np.testing.assert_array_equal(experience.mask, mask)
    np.testing.assert_array_equal(experience.source, np.where(np.array(mask) == 1, Source.SAMPLED, Source.PAD))
    np.testing.assert_allclose(experience.behaviour_logprobs, 0.0, atol=1e-6)
    np.testing.assert_allclose(experience.behaviour_entropy, 0.0, atol=1e-6)
    np.testing.assert_array_equal(experience.weight, np.ones(4))
    assert "rewards" not in experience
    assert experience.get("rewards") is None


def test_a_completion_of_one_token():
    experience, calls = written([0, 2], max_completion_tokens=1)
    np.testing.assert_array_equal(experience.tokens, [[2], [EOS]])
    np.testing.assert_array_equal(experience.length, [1, 1])
    np.testing.assert_array_equal(experience.truncated, [True, False])
    assert len(calls) == 1


def test_rows_are_prompt_major_and_carry_their_prompt():
    experience, _ = written([3, 0], samples_per_prompt=3)
    np.testing.assert_array_equal(experience.group, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(experience.sample, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(experience.prompt_id, [103] * 3 + [100] * 3)
    np.testing.assert_array_equal(experience.prompt_tokens, [[9, 9, 3]] * 3 + [[9, 9, 0]] * 3)
    np.testing.assert_array_equal(experience.prompt_length, [1] * 6)
    np.testing.assert_array_equal(experience.answer_tokens, [[3, 3]] * 3 + [[0, 0]] * 3)
    np.testing.assert_array_equal(experience.answer_length, [2] * 6)
    np.testing.assert_array_equal(experience.length, [2] * 3 + [4] * 3)


def test_decoding_stops_when_every_row_has_ended():
    # The model is called once for the prompts and once for each token after the first.
    for rows, longest in (([2, 2], 1), ([2, 3], 2), ([3, 1], 4)):
        experience, calls = written(rows, max_completion_tokens=50)
        assert len(calls) == longest
        assert int(experience.length.max()) == longest
        np.testing.assert_array_equal(experience.tokens[:, longest:], PAD)
        assert not bool(experience.truncated.any())


def test_the_model_is_given_each_token_at_its_own_position_and_ended_rows_as_padding():
    _, calls = written([1, 3])
    prefill, *decode = calls
    assert prefill == ([[9, 9, 1], [9, 9, 3]], [[-1, 0, 1], [-1, -1, 0]])
    # Prompts of 2 and 1 tokens; the second completion ends with its second token.
    assert decode == [
        ([[2], [3]], [[2], [1]]),
        ([[3], [EOS]], [[3], [-1]]),
        ([[4], [EOS]], [[4], [-1]]),
    ]


def test_positions_come_from_lengths():
    np.testing.assert_array_equal(
        prompt_positions(jnp.array([4, 2, 0]), 4), [[0, 1, 2, 3], [-1, -1, 0, 1], [-1, -1, -1, -1]]
    )
    np.testing.assert_array_equal(
        completion_positions(jnp.array([4, 2, 3]), jnp.array([3, 1, 0]), 3), [[4, 5, 6], [2, -1, -1], [-1, -1, -1]]
    )


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(samples_per_prompt=0), "samples_per_prompt is 0"),
        (dict(max_completion_tokens=0), "max_completion_tokens is 0"),
        (dict(temperature=-0.5), "temperature is -0.5"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(samples_per_prompt=2, temperature=[0.0, -1.0]), "temperature is"),
        (dict(samples_per_prompt=2, temperature=jnp.array([0.0, -1.0])), "temperature is"),
    ],
)
def test_bad_input_is_refused(bad, message):
    row = jnp.zeros(1, jnp.int32)
    prompts = Prompts(tokens=row[None], length=row + 1, prompt_id=row, answer_tokens=row[None], answer_length=row)
    good = {"samples_per_prompt": 1, "max_completion_tokens": 4, "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        generate(SCRIPTED, {}, prompts, jax.random.key(0), 0, eos_ids=(EOS,), pad_id=PAD, **(good | bad))
