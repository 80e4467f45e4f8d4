"""Slots, prefixes, shared prompts and ragged groups: how a completion is produced changes nothing about it."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.buckets import buckets
from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.models import TransformerConfig, abstract, transformer
from jaxrl_llm.models.functions import from_functions
from jaxrl_llm.rollout import Controls, Prefixes, decoding, generate, predicting_hidden
from jaxrl_llm.rollout.decoding import Drawing, begin, cache_stages, decode, feed
from jaxrl_llm.rollout.generation import experience_of
from jaxrl_llm.rollout.sampling import row_keys

VOCABULARY, EOS, PAD, STEPS, SAMPLES = 7, 1, 0, 14, 4
KEY = jax.random.key(42)
PROMPTS = Prompts(
    tokens=jnp.array([[0, 0, 3, 2, 4], [5, 2, 3, 4, 2], [0, 2, 2, 6, 5]]),
    length=jnp.array([3, 5, 4]),
    prompt_id=jnp.array([11, 4, 200]),
    answer_tokens=jnp.zeros((3, 1), jnp.int32),
    answer_length=jnp.ones(3, jnp.int32),
)


@functools.cache
def model_of(layer_loop="unrolled", cache_dtype="compute", window=None):
    # One block where there is no loop over blocks: it compiles in half the time.
    sizes = {"width": 16, "layers": 2 if layer_loop == "scanned" else 1, "heads": 2, "kv_heads": 1}
    return transformer(
        TransformerConfig(VOCABULARY, layer_loop=layer_loop, cache_dtype=cache_dtype, window=window, **sizes)
    )


@functools.cache
def params_of(layer_loop="unrolled"):
    rng = np.random.default_rng(3)
    shapes = abstract(model_of(layer_loop).specs)
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), shapes)
    return params | {"final_norm": jnp.ones(16)}


def sampled(prompts=PROMPTS, *, model=None, samples=SAMPLES, steps=STEPS, **options):
    model = model or model_of()
    sizes = {"max_completion_tokens": steps, "eos_ids": (EOS,), "pad_id": PAD, "samples_per_prompt": samples}
    run = jax.jit(lambda p, prompts: generate(model, p, prompts, KEY, 3, **(sizes | options)))
    return jax.device_get(run(params_of(model.config.layer_loop), prompts))


@functools.cache
def whole(layer_loop="unrolled"):
    return sampled(model=model_of(layer_loop))


def assert_same(ours, theirs, rows=slice(None), but=()):
    for name in ("tokens", "length", "truncated", "prompt_id", "sample", "source", "mask"):
        if name not in but:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name)[rows], err_msg=name)
    for name in ("behaviour_logprobs", "behaviour_entropy"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name)[rows], rtol=1e-5, atol=1e-5)


def test_the_batch_is_worth_the_tests():
    assert len(set(whole().length.tolist())) > 4
    assert {True, False} == set(whole().truncated.tolist())


@pytest.mark.parametrize(
    "slots, layer_loop",
    [
        pytest.param(1, "unrolled", marks=pytest.mark.slow),
        pytest.param(5, "unrolled", marks=pytest.mark.slow),
        (4, "scanned"),
        pytest.param(64, "scanned", marks=pytest.mark.slow),
    ],
)
def test_slots_change_nothing(slots, layer_loop):
    assert_same(sampled(slots=slots, model=model_of(layer_loop)), whole(layer_loop))


@pytest.mark.slow
def test_slots_with_a_window_and_controls_change_nothing():
    controls = Controls(repetition_penalty=1.5, top_p=0.9, min_completion_tokens=3)
    options = {"model": model_of(window=3), "controls": controls}
    assert_same(sampled(slots=3, **options), sampled(**options))


def test_slots_are_refilled_as_soon_as_a_row_has_ended():
    drawing, per_row, state = begun(slots=0)
    rows, slots = 12, 3
    limit = jnp.full(rows, STEPS)
    run = jax.jit(lambda: decode(drawing, state, active=jnp.ones(rows, bool), limit=limit, end_ids=(EOS,), slots=slots))
    after, stopped = run()
    ours = experience_of(after.written, per_row, sample=jnp.tile(jnp.arange(4), 3), group=jnp.arange(12), ended=stopped)
    assert_same(jax.device_get(ours), whole())
    # The first token of a row comes from its prompt; every other one takes a slot for one step.
    busy, free_from = [int(length) - 1 for length in whole().length if length > 1], [0] * slots
    for steps in busy:
        free_from[free_from.index(min(free_from))] += steps
    assert int(after.calls) == max(free_from)


def begun(slots=STEPS, samples=SAMPLES):
    per_row = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), PROMPTS)
    rows = per_row.length.shape[0]
    sample = jnp.tile(jnp.arange(samples), 3)
    drawing = Drawing(
        model=model_of(),
        params=params_of(),
        keys=row_keys(KEY, 3, per_row.prompt_id, sample),
        temperature=jnp.ones(rows),
        prompt_length=per_row.length,
        controls=None,
        eos_ids=(EOS,),
    )
    state = begin(drawing, PROMPTS, per_row, None, max_completion_tokens=STEPS, slots=slots, pad_id=PAD)
    return drawing, per_row, state


@pytest.mark.parametrize("slots", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_going_on_from_any_prefix_of_itself_gives_the_same_completion(slots):
    rows = whole().tokens.shape[0]
    # Nothing, one token, some, all but one, and all of a completion.
    cut = np.minimum(np.array([0, 1, 3, 99, 2, 98, 5, 4, 99, 0, 1, 6])[:rows], whole().length)
    cut = np.minimum(cut, STEPS - 1)
    width = int(cut.max())
    prefixes = Prefixes(whole().tokens[:, :width], cut, np.where(np.arange(width) < cut[:, None], Source.SAMPLED, 0))
    again = sampled(prefixes=prefixes, slots=slots)
    assert_same(again, whole())


@pytest.mark.slow
def test_a_prefix_keeps_its_source_and_is_trained_on_only_where_it_was_sampled():
    rows, width = 12, 3
    tokens = np.full((rows, width), 4)
    source = np.tile([Source.HINT, Source.DEMONSTRATION, Source.SAMPLED], (rows, 1))
    length = np.array([3, 2, 1, 0] * 3)
    ours = sampled(prefixes=Prefixes(tokens, length, source))
    for row in range(rows):
        n, total = length[row], ours.length[row]
        assert ours.tokens[row, :n].tolist() == [4] * n
        assert ours.source[row, :n].tolist() == source[row, :n].tolist()
        assert ours.mask[row, :n].tolist() == [0, 0, 1][:n]
        assert (ours.source[row, n:total] == Source.SAMPLED).all()
        assert (ours.source[row, total:] == Source.PAD).all()
    # A row without prefix is what it is alone, whatever its neighbours start with.
    assert_same(jax.tree.map(lambda x: x[3::4], ours), whole(), slice(3, None, 4))
    # Given tokens have the policy's log-probabilities too.
    model, inside = model_of(), np.arange(STEPS) < ours.length[:, None]
    hidden = predicting_hidden(model, params_of(), ours.prompt_tokens, ours.prompt_length, ours.tokens, ours.length)
    log_p = jax.nn.log_softmax(model.logits(params_of(), hidden))
    expected = jnp.take_along_axis(log_p, ours.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(ours.behaviour_logprobs[inside], expected[inside], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_decoding_in_pieces_is_one_rollout(width):
    drawing, per_row, state = begun(slots=STEPS + 12)

    @jax.jit
    def run(state):
        active, stopped, nothing = jnp.ones(12, bool), jnp.zeros(12, bool), jnp.zeros((12, width), jnp.int32)
        for most in (2, 5, STEPS):
            state = feed(drawing, state, nothing, jnp.zeros(12, jnp.int32), nothing)
            state, now = decode(drawing, state, active=active, limit=jnp.full(12, most), end_ids=(EOS,))
            stopped, active = stopped | now, active & ~now
        return state, stopped

    state, stopped = run(state)
    ours = experience_of(state.written, per_row, sample=jnp.tile(jnp.arange(4), 3), group=jnp.arange(12), ended=stopped)
    assert_same(jax.device_get(ours), whole())


@pytest.mark.slow
@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_prompts_of_a_bucket_are_those_of_their_exact_width(layer_loop):
    padded = replace(PROMPTS, tokens=jnp.pad(PROMPTS.tokens, ((0, 0), (59, 0)), constant_values=3))
    assert padded.tokens.shape[1] == buckets(100)[0]
    assert_same(sampled(padded, model=model_of(layer_loop)), whole(layer_loop))
    assert_same(sampled(padded, model=model_of(layer_loop), slots=5), whole(layer_loop))


def test_groups_of_different_sizes_are_the_rows_of_equal_ones():
    prompt_of = jnp.array([0, 1, 1, 1, 1, 2, 2])
    ours = sampled(prompt_of=prompt_of)
    chosen = np.array([0, 4, 5, 6, 7, 8, 9])
    np.testing.assert_array_equal(ours.group, prompt_of)
    assert_same(ours, whole(), chosen)
    assert_same(sampled(prompt_of=prompt_of, slots=2), whole(), chosen)


def test_later_samples_may_be_drawn_on_their_own():
    later = sampled(samples=2, first_sample=jnp.array([2, 0, 1]))
    assert later.sample.tolist() == [2, 3, 0, 1, 1, 2]
    assert_same(later, whole(), np.array([2, 3, 4, 5, 9, 10]))


def test_a_prompt_is_prefilled_once_and_its_cache_is_not_copied():
    # The bar: prompt 1024, 16 samples. Of keys and values of prompts there are as many as prompts.
    model, count, width, samples = model_of(), 2, 1024, 16
    shapes = jax.eval_shape(lambda: model.expand_cache(model.init_cache(count, width), samples, 8))
    context, own = jax.tree.leaves(shapes.context), jax.tree.leaves(shapes.layers)
    assert {leaf.shape[0] for leaf in context} == {count}
    assert {leaf.shape for leaf in own} == {(count * samples, 1, 8, 8)}

    def flops(samples):
        tokens = jnp.zeros((count, width), jnp.int32)
        prompts = Prompts(tokens, jnp.full(count, width), jnp.arange(count), tokens[:, :1], jnp.ones(count, jnp.int32))
        run = lambda p: generate(  # noqa: E731
            model, p, prompts, KEY, 0, samples_per_prompt=samples, max_completion_tokens=2, eos_ids=(EOS,), pad_id=PAD
        )
        return jax.jit(run).lower(params_of()).compile().cost_analysis()["flops"]

    once = flops(1)
    assert flops(16) < 1.6 * once, "prefill is most of the work, and must not be done again for each sample"


@pytest.mark.slow
@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_keys_and_values_in_int8_are_close(layer_loop):
    exact = sampled(temperature=0.0, steps=4, model=model_of(layer_loop))
    close = sampled(temperature=0.0, steps=4, model=model_of(layer_loop, "int8"))
    same = (exact.tokens == close.tokens).all(1)
    assert same.mean() > 0.8
    error = np.abs(exact.behaviour_logprobs - close.behaviour_logprobs)[same].max()
    assert 0 < error < 0.05


def test_int8_in_slots_is_int8_side_by_side():
    model = model_of("unrolled", "int8")
    ours, theirs = sampled(model=model, slots=4), sampled(model=model)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def plain_model():
    def apply(params, tokens, positions):
        return params["table"][tokens]

    return from_functions(
        init=lambda key: {"table": jax.random.normal(key, (VOCABULARY, 4))},
        apply=apply,
        logits=lambda params, hidden: hidden @ params["table"].T,
        vocabulary_size=VOCABULARY,
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"slots": 0}, "rollout.slots is 0"),
        (
            {"prefixes": Prefixes(np.ones((12, STEPS + 1)), np.ones(12), np.ones((12, STEPS + 1)))},
            "15 tokens wide, more",
        ),
        (
            {"prefixes": Prefixes(np.ones((3, 2)), np.ones(3), np.ones((3, 2)))},
            "3 rows and prefixes.length 3, but there are 12",
        ),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        sampled(**options)


def test_slots_need_a_model_that_offers_them():
    with pytest.raises(ValueError, match=r"rollout.slots is 2, but this model does not support"):
        generate(
            plain_model(),
            {},
            PROMPTS,
            KEY,
            0,
            samples_per_prompt=1,
            max_completion_tokens=2,
            eos_ids=(EOS,),
            pad_id=PAD,
            slots=2,
        )


@pytest.mark.parametrize("tokens", [1, 2, 95, 96, 127, 128, 1023, 1024, 2049, 8192])
def test_stages_of_a_cache_have_room_for_all_tokens(tokens):
    sizes = cache_stages(tokens)
    assert sum(sizes) == tokens
    assert all(size > 0 for size in sizes)
    assert len(sizes) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_a_cache_that_grows_in_stages_changes_nothing(monkeypatch, layout):
    config = TransformerConfig(9, width=16, layers=1, heads=2, kv_heads=1, cache_layout=layout)
    model = transformer(config)
    params = jax.tree.map(lambda x: 2 * x, model.init(jax.random.key(0)))
    prompts = Prompts(
        tokens=jnp.array([[0, 3, 4], [5, 6, 7]]),
        length=jnp.array([2, 3]),
        prompt_id=jnp.arange(2),
        answer_tokens=jnp.zeros((2, 1), jnp.int32),
        answer_length=jnp.ones(2, jnp.int32),
    )
    prefixes = Prefixes(jnp.full((6, 2), 4), jnp.array([0, 1, 2, 2, 0, 1]), jnp.full((6, 2), Source.HINT))
    settings = dict(samples_per_prompt=3, max_completion_tokens=24, eos_ids=(1,), pad_id=0)

    def sampled(halved_from, prefixes):
        monkeypatch.setattr(decoding, "HALVED_FROM", halved_from)
        run = jax.jit(
            lambda params: generate(model, params, prompts, jax.random.key(1), 0, prefixes=prefixes, **settings)
        )
        return run(params)

    for given in (None, prefixes):
        whole, staged = sampled((), given), sampled((1, 1), given)
        np.testing.assert_array_equal(staged.tokens, whole.tokens)
        np.testing.assert_allclose(staged.behaviour_logprobs, whole.behaviour_logprobs, atol=1e-5)
    assert int(whole.length.max()) > 12, "no row is long enough for a second stage"
