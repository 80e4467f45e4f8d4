"""What may be sampled, on a model whose next token is drawn from one table."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.experience import Prompts
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout import Controls, generate, stop_automaton
from jaxrl_llm.rollout.controls import adjusted_scores, truncated

VOCABULARY, EOS, PAD = 8, 1, 0
PROBABILITIES = np.array([0.02, 0.05, 0.40, 0.25, 0.15, 0.08, 0.03, 0.02])


def model(probabilities=PROBABILITIES) -> Model:
    scores = jnp.log(jnp.asarray(probabilities, jnp.float32))
    return Model(
        init=lambda key: {},
        apply=lambda params, tokens, positions, cache: (jnp.zeros((*tokens.shape, 1)), cache),
        logits=lambda params, hidden: jnp.broadcast_to(scores, (*hidden.shape[:-1], len(scores))),
        init_cache=lambda rows, slots: (),
        expand_cache=lambda cache, samples, extra: cache,
        specs=None,
        vocabulary_size=len(probabilities),
        config=None,
    )


def drawn(controls=None, *, samples=400, steps=6, temperature=1.0, eos_ids=(EOS,), prompt=(2, 3), policy=None):
    prompts = Prompts(
        tokens=jnp.array([prompt], jnp.int32),
        length=jnp.array([len(prompt)]),
        prompt_id=jnp.array([0]),
        answer_tokens=jnp.zeros((1, 1), jnp.int32),
        answer_length=jnp.zeros(1, jnp.int32),
    )
    run = jax.jit(
        lambda: generate(
            policy or model(),
            {},
            prompts,
            jax.random.key(0),
            0,
            samples_per_prompt=samples,
            max_completion_tokens=steps,
            eos_ids=eos_ids,
            pad_id=PAD,
            temperature=temperature,
            controls=controls,
        )
    )
    return jax.device_get(run())


def first_tokens(controls, **options):
    made = drawn(controls, steps=1, samples=4000, **options)
    return np.bincount(made.tokens[:, 0], minlength=VOCABULARY) / 4000, made


@pytest.mark.parametrize(
    ("controls", "kept"),
    [
        (Controls(top_k=2), [2, 3]),
        (Controls(top_p=0.65), [2, 3]),
        (Controls(top_p=0.66), [2, 3, 4]),
        pytest.param(Controls(top_p=0.01), [2], marks=pytest.mark.slow),
        (Controls(min_p=0.3), [2, 3, 4]),
        (Controls(top_k=3, min_p=0.5), [2, 3]),
        (Controls(allowed_ids=(4, 5)), [1, 4, 5]),
    ],
)
def test_only_what_is_kept_is_drawn_and_recorded_renormalised(controls, kept):
    share, made = first_tokens(controls)
    expected = np.zeros(VOCABULARY)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    np.testing.assert_allclose(share, expected, atol=0.03)
    assert set(np.flatnonzero(share)) == set(kept)
    np.testing.assert_allclose(made.behaviour_logprobs[:, 0], np.log(expected[made.tokens[:, 0]]), atol=1e-5)
    entropy = -np.sum(expected[kept] * np.log(expected[kept]))
    np.testing.assert_allclose(made.behaviour_entropy[:, 0], entropy, atol=1e-5)


def test_controls_that_change_nothing_change_nothing():
    plain, controlled = drawn(), drawn(Controls())
    np.testing.assert_array_equal(plain.tokens, controlled.tokens)
    np.testing.assert_allclose(plain.behaviour_logprobs, controlled.behaviour_logprobs, atol=1e-6)


def test_ties_are_kept_whatever_their_order():
    log_p = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25]]))
    assert np.isfinite(truncated(log_p, Controls(top_k=1))).all()


def test_the_bias_is_added_to_the_scores():
    share, _ = first_tokens(Controls(logit_bias={7: 20.0}))
    assert share[7] > 0.999


def test_the_penalty_divides_positive_and_multiplies_negative_scores_of_tokens_that_were_seen():
    scores = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    out = adjusted_scores(scores, Controls(repetition_penalty=4.0), seen, 0, (3,))
    np.testing.assert_allclose(out, [[0.5, -8.0, 2.0, -2.0]])


def test_a_large_penalty_lets_no_token_come_twice_nor_repeat_the_prompt():
    peaked = np.exp(-np.arange(30) / 10)
    made = drawn(
        Controls(repetition_penalty=1e9), samples=50, steps=10, policy=model(peaked / peaked.sum()), eos_ids=(29,)
    )
    for row, length in zip(made.tokens, made.length, strict=True):
        said = row[:length].tolist()
        assert len(set(said)) == len(said)
        assert not {2, 3} & set(said)


def test_no_end_before_the_minimum():
    likely = np.array([0.0, 0.9, 0.02, 0.02, 0.02, 0.02, 0.01, 0.01]) + 1e-9
    assert drawn(policy=model(likely)).length.min() == 1
    made = drawn(Controls(min_completion_tokens=4), policy=model(likely))
    assert made.length.min() == 4


def test_several_ends_of_sequence():
    made = drawn(eos_ids=(EOS, 4))
    last = made.tokens[np.arange(len(made.tokens)), made.length - 1]
    assert set(last[~made.truncated]) == {EOS, 4}


PIECES = [None, None, b"a", b"b", b"ab", b"c", b"ba", b"\xc3\xa9"]


def run_automaton(texts, tokens):
    automaton, state, states = stop_automaton(texts, PIECES), 0, []
    for token in tokens:
        state = int(automaton.following[state, token])
        states.append(state == automaton.stopped)
    return states


@pytest.mark.parametrize(
    ("texts", "tokens", "expected"),
    [
        (["ab"], [2, 3], [False, True]),
        (["ab"], [4], [True]),
        (["ab"], [2, 2, 3], [False, False, True]),
        (["ab"], [6, 3], [False, True]),  # ba + b: the text begins within a token
        (["bc", "aab"], [2, 4, 5], [False, True, True]),
        (["ab"], [2, 0, 3], [False, False, False]),  # a token without text breaks it off
        (["é"], [7], [True]),
        (["abab", "ba"], [2, 6], [False, True]),
    ],
)
def test_a_stop_text_is_found_however_it_is_spread_over_tokens(texts, tokens, expected):
    assert run_automaton(texts, tokens) == expected


def test_the_automaton_agrees_with_searching_the_text():
    rng = np.random.default_rng(0)
    for texts in (["aba"], ["bb", "cab"], ["abcab", "ca"]):
        automaton = stop_automaton(texts, PIECES)
        for _ in range(200):
            tokens = rng.integers(2, 7, 8)
            state, text = 0, ""
            for token in tokens:
                state = int(np.asarray(automaton.following)[state, token])
                text += PIECES[token].decode()
                assert (state == automaton.stopped) == any(each in text for each in texts)


@pytest.mark.parametrize("text", ["d", "ad", "e"])
def test_a_stop_text_that_cannot_occur_is_refused(text):
    with pytest.raises(ValueError, match=f"the stop text {text!r} cannot occur"):
        stop_automaton([text], PIECES)


def test_a_completion_ends_with_the_token_that_completes_a_stop_text():
    automaton = stop_automaton(["ab"], [*PIECES[:2], b"a", b"b", b"ab", b"c", b"ba", b"x"])
    made = drawn(Controls(stop=automaton))
    pieces = ["|", "|", "a", "b", "ab", "c", "ba", "x"]  # tokens without text break a text off
    for row, length, cut in zip(made.tokens, made.length, made.truncated, strict=True):
        text = "".join(pieces[token] for token in row[:length])
        before = "".join(pieces[token] for token in row[: length - 1])
        assert "ab" not in before
        assert cut == ("ab" not in text and row[length - 1] != EOS)
    assert (~made.truncated & (made.tokens[np.arange(400), made.length - 1] != EOS)).sum() > 50


def test_a_stop_text_before_the_minimum_counts_for_nothing():
    automaton = stop_automaton(["a"], PIECES)
    made = drawn(Controls(stop=automaton, min_completion_tokens=3))
    assert made.length.min() == 3


def test_the_built_in_tokenizer_stops_at_its_texts():
    tokenizer = CharacterTokenizer()
    automaton = stop_automaton(["</a>", "; "], tokenizer.token_bytes())
    state = 0
    for token in tokenizer.encode("1+2; "):
        state = int(automaton.following[state, token])
    assert state == automaton.stopped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must lie in (0, 1]"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"min_completion_tokens": -1}, "min_completion_tokens is -1"),
        ({"allowed_ids": ()}, "allowed_ids is empty"),
    ],
)
def test_controls_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Controls(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allowed_ids": (99,)}, "allowed_ids names the token id 99"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names the token id -1"),
        ({"min_completion_tokens": 7}, "min_completion_tokens is 7, more than max_completion_tokens 6"),
    ],
)
def test_controls_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        drawn(Controls(**options))


def test_empty_stop_texts_are_refused():
    with pytest.raises(ValueError, match="give texts that are not empty"):
        stop_automaton([""], PIECES)
