"""Value-augmented sampling: what is drawn is the base policy times exp(strength * V), exactly."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Prompts
from jaxrl_llm.models.decoder import transformer
from jaxrl_llm.models.heads import HeadConfig, init_head, token_outputs
from jaxrl_llm.models.mixture import value_augmented_logits, value_guided
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.rollout.generation import generate

TOKENS, WIDTH, DRAWS, STRENGTH = 3, 3, 512, 2.0
BASE = transformer(TransformerConfig(TOKENS, width=8, layers=1, heads=2, kv_heads=1))
VALUE = transformer(TransformerConfig(TOKENS, width=12, layers=1, heads=2, kv_heads=2))
# Left-padded prompts of two and three tokens, and every text behind them.
PROMPT, LENGTH = np.array([[0, 1, 2], [2, 1, 1]]), np.array([2, 3])
TEXTS = np.array(list(itertools.product(range(TOKENS), repeat=WIDTH)))


def test_the_candidates_of_the_card_gain_what_their_values_say():
    logits, values, ids = jnp.array([[2, 1.5, 0, -1, 1]]), jnp.array([[0.1, 0.6, -0.1]]), jnp.array([[0, 1, 4]])
    found = value_augmented_logits(logits, ids, values, strength=3.0)
    np.testing.assert_allclose(found, [[1.7, 2.7, 0, -1, 0.1]], atol=1e-6)
    expected = [[0.239804, 0.651856, 0.043808, 0.016116, 0.048416]]
    np.testing.assert_allclose(jax.nn.softmax(found), expected, atol=1e-6)
    for changed in ({"strength": 0.0, "values": values}, {"strength": 3.0, "values": jnp.full((1, 3), 7.0)}):
        np.testing.assert_allclose(value_augmented_logits(logits, ids, **changed), logits, atol=1e-5)


def said(params):
    """(log-probabilities [2 texts T V], values behind each token [2 texts T]) of all texts behind both prompts."""
    own, judge = params
    found = []
    for prompt, length in zip(PROMPT, LENGTH, strict=True):
        asked = np.broadcast_to(prompt[3 - length :], (len(TEXTS), length))
        whole = jnp.asarray(np.concatenate([asked, TEXTS], 1))
        place = jnp.broadcast_to(jnp.arange(whole.shape[1]), whole.shape)
        log_p = jax.nn.log_softmax(BASE.logits(own, BASE.apply(own, whole, place, None)[0]))
        worth = token_outputs(VALUE, judge["backbone"], judge["head"], whole, place)[..., 0]
        found.append((log_p[:, length - 1 : -1], worth[:, length:]))
    return tuple(map(jnp.stack, zip(*found, strict=True)))


def exact(log_p, worth, strength: float) -> np.ndarray:
    """Probability of each text: at each place, pi * exp(strength * V) / Z."""
    found = np.ones(len(TEXTS))
    for at in range(WIDTH):
        # V behind each token that could stand here, from the texts that differ in that token alone.
        step = TOKENS ** (WIDTH - at - 1)
        first = np.arange(len(TEXTS)) - TEXTS[:, at] * step
        values = np.stack([worth[first + token * step, at] for token in range(TOKENS)], 1)
        weights = np.exp(log_p[:, at] + strength * values)
        found *= weights[np.arange(len(TEXTS)), TEXTS[:, at]] / weights.sum(1)
    return found


@pytest.mark.slow
def test_what_is_drawn_is_the_policy_times_the_exponential_of_the_value():
    model = value_guided(BASE, VALUE, strength=STRENGTH, candidates=20)

    @jax.jit
    def drawn(key):
        own, head, backbone = jax.random.split(key, 3)
        value = {"head": init_head(VALUE, head, HeadConfig(initial_scale=6.0)), "backbone": VALUE.init(backbone)}
        params = BASE.init(own), value
        nothing = jnp.zeros((2, 0), jnp.int32)
        prompts = Prompts(jnp.asarray(PROMPT), jnp.asarray(LENGTH), jnp.arange(2), nothing, jnp.zeros(2, jnp.int32))
        how = {"samples_per_prompt": DRAWS, "max_completion_tokens": WIDTH, "eos_ids": (), "pad_id": 0}
        return generate(model, params, prompts, jax.random.key(0), 0, **how), said(params)

    rows, tables = drawn(jax.random.key(3))
    code = np.asarray(rows.tokens) @ TOKENS ** np.arange(WIDTH)[::-1]
    recorded = np.exp(np.asarray(rows.behaviour_logprobs, np.float64).sum(1))
    for number, (log_p, worth) in enumerate(zip(*(np.asarray(table, np.float64) for table in tables), strict=True)):
        expected, base = exact(log_p, worth, STRENGTH), exact(log_p, worth, 0.0)
        np.testing.assert_allclose(expected.sum(), 1, atol=1e-9)
        own = slice(number * DRAWS, (number + 1) * DRAWS)
        np.testing.assert_allclose(recorded[own], expected[code[own]], rtol=2e-4)
        counted = np.bincount(code[own], minlength=len(TEXTS)) / DRAWS
        apart = np.abs(counted - expected).sum() / 2
        assert apart < 0.12
        assert np.abs(expected - base).sum() / 2 > 2 * apart, "the value must matter for the test to say something"


def test_a_value_network_of_other_tokens_is_refused():
    other = transformer(TransformerConfig(TOKENS + 1, width=8, layers=1, heads=2, kv_heads=1))
    with pytest.raises(ValueError, match="the policy has 3 tokens and the value network 4"):
        value_guided(BASE, other)
