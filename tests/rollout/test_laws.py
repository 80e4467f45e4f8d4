"""The laws of a rollout, on random transformers.

Law 1: the sampler's log-probabilities and entropies are the trainer's.
Law 2: a row's tokens depend on its address (run key, step, prompt id, sample, position) and on nothing around it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.models import TransformerConfig, abstract, token_statistics, transformer
from jaxrl_llm.rollout import generate, predicting_hidden

# Six symbols: end of sequence is drawn often, and early.
VOCABULARY, EOS, PAD, STEPS, SAMPLES = 6, 1, 0, 12, 8
KEY = jax.random.key(42)


def model_of(layer_loop="unrolled"):
    # One block where the loop over blocks is not what is tested: it compiles in half the time.
    layers = 2 if layer_loop == "scanned" else 1
    return transformer(
        TransformerConfig(
            vocabulary_size=VOCABULARY, width=16, layers=layers, heads=2, kv_heads=1, layer_loop=layer_loop
        )
    )


@functools.cache
def params_of(layer_loop):
    rng = np.random.default_rng(0)
    draw = lambda leaf: np.float32(0.4 * rng.standard_normal(leaf.shape))  # noqa: E731
    return jax.tree.map(draw, abstract(model_of(layer_loop).specs)) | {"final_norm": np.ones(16, np.float32)}


def prompts_of(lengths=(5, 2, 3, 1), ids=(7, 0, 123_456, 2**31 - 1), width=5, seed=1) -> Prompts:
    """Left-padded prompts whose tokens follow from their ids, with random tokens for padding."""
    noise = np.random.default_rng(seed)
    tokens = noise.integers(0, VOCABULARY, (len(ids), width))
    for row, (length, prompt_id) in enumerate(zip(lengths, ids, strict=True)):
        tokens[row, width - length :] = np.random.default_rng(prompt_id).integers(2, VOCABULARY, length)
    empty = jnp.zeros((len(ids), 1), jnp.int32)
    return Prompts(
        tokens=jnp.asarray(tokens, jnp.int32),
        length=jnp.asarray(lengths, jnp.int32),
        prompt_id=jnp.asarray(ids, jnp.int32),
        answer_tokens=empty,
        answer_length=empty[:, 0],
    )


@functools.cache
def program(layer_loop="unrolled", samples=SAMPLES, steps=STEPS):
    def run(params, prompts, step, temperature, eos_id, pad_id):
        return generate(
            model_of(layer_loop),
            params,
            prompts,
            KEY,
            step,
            samples_per_prompt=samples,
            max_completion_tokens=steps,
            eos_ids=(eos_id,),
            pad_id=pad_id,
            temperature=temperature,
        )

    return jax.jit(run)


def rollout(prompts=None, step=3, temperature=1.0, pad_id=PAD, layer_loop="unrolled", **sizes) -> Experience:
    params = params_of(layer_loop)
    return program(layer_loop, **sizes)(params, prompts or prompts_of(), step, temperature, EOS, pad_id)


@functools.cache
def trainer(layer_loop="unrolled"):
    model = model_of(layer_loop)

    def statistics(params, e: Experience, temperature):
        hidden = predicting_hidden(model, params, e.prompt_tokens, e.prompt_length, e.tokens, e.length)
        scored = token_statistics(model, params, hidden, e.tokens, temperature=temperature, entropy=True, chunk=5)
        return scored.logprobs, scored.entropy, jnp.argmax(model.logits(params, hidden), axis=-1)

    return functools.partial(jax.jit(statistics), params_of(layer_loop))


def assert_same_rows(ours: Experience, theirs: Experience, rows=slice(None)):
    """Equal tokens, and equal numbers to float tolerance."""
    for name in ("tokens", "length", "truncated", "mask", "source", "prompt_id", "sample"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name)[rows], err_msg=name)
    for name in ("behaviour_logprobs", "behaviour_entropy"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name)[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
@pytest.mark.parametrize("temperature, pad_id", [(1.0, PAD), (0.7, PAD), (1.0, EOS), (0.7, EOS)])
def test_the_sampler_and_the_trainer_agree(layer_loop, temperature, pad_id):
    experience = rollout(temperature=temperature, pad_id=pad_id, layer_loop=layer_loop)
    logprobs, entropy, _ = trainer(layer_loop)(experience, temperature)
    inside = np.asarray(experience.mask) == 1
    np.testing.assert_allclose(experience.behaviour_logprobs[inside], logprobs[inside], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(experience.behaviour_entropy[inside], entropy[inside], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(experience.behaviour_logprobs[~inside], 0.0)
    np.testing.assert_array_equal(experience.behaviour_entropy[~inside], 0.0)
    # The batch is worth the test: some rows end at once, some early, some never, and no two numbers are alike.
    assert len(set(np.asarray(experience.length).tolist())) > 4
    assert {True, False} == set(np.asarray(experience.truncated).tolist())
    assert np.asarray(experience.behaviour_logprobs)[inside].std() > 0.3
    assert np.asarray(experience.behaviour_entropy)[inside].std() > 0.05


def test_temperature_changes_what_is_reported():
    warm = rollout(temperature=1.0)
    logprobs, _, _ = trainer()(warm, 0.7)
    inside = np.asarray(warm.mask) == 1
    assert np.abs(warm.behaviour_logprobs - logprobs)[inside].max() > 0.1


@pytest.mark.parametrize("temperature, pad_id", [(1.0, PAD), (0.7, EOS)])
def test_lengths_masks_and_truncation_follow_from_the_tokens(temperature, pad_id):
    experience = jax.device_get(rollout(temperature=temperature, pad_id=pad_id))
    for tokens, length, mask, truncated in zip(
        experience.tokens, experience.length, experience.mask, experience.truncated, strict=True
    ):
        ends = np.flatnonzero(tokens[:length] == EOS)
        assert mask.tolist() == [1] * length + [0] * (STEPS - length)
        if truncated:
            assert length == STEPS
            assert len(ends) == 0
        else:
            assert ends.tolist() == [length - 1]
            assert (tokens[length:] == pad_id).all()


def test_what_stands_in_the_padding_changes_nothing():
    experience = rollout()
    other = experience.replace(
        tokens=jnp.where(experience.mask == 1, experience.tokens, VOCABULARY - 1),
        prompt_tokens=rollout(prompts_of(seed=9)).prompt_tokens,
    )
    assert not np.array_equal(other.prompt_tokens, experience.prompt_tokens)
    inside = np.asarray(experience.mask) == 1
    for ours, theirs in zip(trainer()(other, 1.0), trainer()(experience, 1.0), strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[inside], np.asarray(theirs)[inside])
    assert_same_rows(rollout(prompts_of(seed=9)), experience)


def test_prompts_may_be_split_over_batches():
    whole = rollout()
    for part in (slice(0, 2), slice(2, 4)):
        some = jax.tree.map(lambda x: x[part], prompts_of())  # noqa: B023
        assert_same_rows(rollout(some), whole, slice(part.start * SAMPLES, part.stop * SAMPLES))


def test_the_first_samples_do_not_depend_on_how_many_follow():
    rows = np.concatenate([prompt * SAMPLES + np.arange(4) for prompt in range(4)])
    assert_same_rows(rollout(samples=4), rollout(), rows)


def test_the_order_of_prompts_does_not_matter():
    order = np.array([2, 0, 3, 1])
    permuted = rollout(jax.tree.map(lambda x: x[order], prompts_of()))
    assert_same_rows(permuted, rollout(), (order[:, None] * SAMPLES + np.arange(SAMPLES)).reshape(-1))


def test_the_width_of_the_prompt_bucket_does_not_matter():
    assert_same_rows(rollout(prompts_of(width=9, seed=4)), rollout())


def test_the_completion_limit_only_cuts():
    limit = 3
    long, short = jax.device_get(rollout()), jax.device_get(rollout(steps=limit))
    np.testing.assert_array_equal(short.tokens, long.tokens[:, :limit])
    np.testing.assert_array_equal(short.mask, long.mask[:, :limit])
    np.testing.assert_array_equal(short.length, np.minimum(long.length, limit))
    np.testing.assert_array_equal(short.truncated, long.length > limit)
    np.testing.assert_allclose(short.behaviour_logprobs, long.behaviour_logprobs[:, :limit], rtol=1e-5, atol=1e-5)
    ended_on_the_limit = (short.length == limit) & ~short.truncated
    assert ended_on_the_limit.any()
    assert (short.tokens[ended_on_the_limit, -1] == EOS).all()


def test_another_address_draws_other_tokens():
    base = rollout()
    tokens = np.asarray(base.tokens).reshape(4, SAMPLES, STEPS)
    assert not np.array_equal(rollout(step=4).tokens, base.tokens)
    # The same prompts under other ids: only the row whose id changed draws anew.
    prompts = prompts_of()
    renamed = rollout(prompts.replace(prompt_id=prompts.prompt_id.at[1].set(5)))
    others = np.asarray(renamed.tokens).reshape(4, SAMPLES, STEPS)
    np.testing.assert_array_equal(others[[0, 2, 3]], tokens[[0, 2, 3]])
    assert not np.array_equal(others[1], tokens[1])
    # Samples of one prompt differ from each other, up to the few symbols that there are.
    assert all(len({tuple(row) for row in group.tolist()}) > 2 for group in tokens)


def test_each_sample_number_has_its_own_temperature():
    greedy, mixed, sampled = (
        rollout(samples=3, temperature=jnp.array(t, jnp.float32)) for t in ([0, 0, 0], [0, 1, 1], [1, 1, 1])
    )
    first, rest = np.arange(12) % 3 == 0, np.arange(12) % 3 > 0
    for name in ("tokens", "length", "behaviour_logprobs", "behaviour_entropy"):
        np.testing.assert_array_equal(getattr(mixed, name)[first], getattr(greedy, name)[first], err_msg=name)
        np.testing.assert_array_equal(getattr(mixed, name)[rest], getattr(sampled, name)[rest], err_msg=name)
    np.testing.assert_array_equal(greedy.tokens[::3], greedy.tokens[1::3])
    # A vector of ones is temperature 1, and three samples are the first three of eight.
    rows = np.concatenate([prompt * SAMPLES + np.arange(3) for prompt in range(4)])
    assert_same_rows(sampled, rollout(), rows)


def test_greedy_takes_the_trainers_likeliest_token_and_reports_temperature_one():
    # Teacher-forced on the completion itself, the likeliest token at every place must be the next one.
    greedy = rollout(samples=3, temperature=jnp.zeros(3))
    logprobs, entropy, likeliest = trainer()(greedy, 1.0)
    inside = np.asarray(greedy.mask) == 1
    np.testing.assert_array_equal(np.asarray(likeliest)[inside], np.asarray(greedy.tokens)[inside])
    np.testing.assert_allclose(greedy.behaviour_logprobs[inside], logprobs[inside], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(greedy.behaviour_entropy[inside], entropy[inside], rtol=1e-5, atol=1e-5)
    assert len({tuple(row) for row in np.asarray(greedy.tokens).tolist()}) > 1
