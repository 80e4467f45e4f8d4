"""Truncated sampling in training: sampler and trainer compute over the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.config import ConfigError, parse_config
from jaxrl_llm.models import token_statistics
from jaxrl_llm.rollout import Controls, predicting_hidden
from jaxrl_llm.training import Rollout, make_train_step

SIZES = {"samples_per_prompt": 4, "max_completion_tokens": 6, "eos_ids": (2,), "pad_id": 0}
TRUNCATION = Controls(top_k=5, top_p=0.9)


def low(tokens):
    return (tokens < 8).mean(1)


@pytest.fixture(scope="module")
def trained(bigram, make_prompts):
    step = make_train_step(
        bigram,
        optax.sgd(0.5),
        source=Rollout(truncation=TRUNCATION, temperature=0.8, **SIZES),
        rewards=[low],
        credit=[("advantages", advantages.group_normalized)],
        losses=[losses.clipped_surrogate, (losses.entropy_bonus, -0.05), (losses.kl_estimate, 0.1)],
    )
    state = step.init(jax.random.key(0), bigram.init(jax.random.key(1)))
    seen = []
    for _ in range(2):
        before = jax.tree.map(jnp.copy, state.params)
        state, metrics, rows = step.run(state, make_prompts(4), None, None)
        seen.append((before, jax.device_get(metrics), rows))
    return seen


def test_log_probabilities_are_those_of_the_tokens_that_could_be_drawn(bigram, trained):
    for params, metrics, rows in trained:
        hidden = predicting_hidden(bigram, params, rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length)
        log_p = np.asarray(jax.nn.log_softmax(bigram.logits(params, hidden) / 0.8))
        for b, t in np.argwhere(np.asarray(rows.mask) > 0):
            order = np.argsort(-log_p[b, t])[:5]
            p = np.exp(log_p[b, t, order]) / np.exp(log_p[b, t, order]).sum()
            kept = order[: 1 + int(np.searchsorted(np.cumsum(p), 0.9))]
            support = np.asarray(rows.support[b, t])
            assert set(support[support >= 0].tolist()) == set(kept.tolist())
            assert int(rows.tokens[b, t]) in kept
            renormalised = log_p[b, t] - np.log(np.exp(log_p[b, t, kept]).sum())
            np.testing.assert_allclose(rows.behaviour_logprobs[b, t], renormalised[rows.tokens[b, t]], atol=3e-5)
        assert metrics["sampler_gap_max"] < 3e-5
        assert np.isfinite(list(metrics.values())).all()


def test_gradients_are_those_of_the_renormalised_distribution(bigram, trained):
    params, _, rows = trained[0]
    hidden = predicting_hidden(bigram, params, rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length)

    def ours(hidden):
        found = token_statistics(
            bigram, params, hidden, rows.tokens, temperature=0.8, entropy=True, support=rows.support, chunk=4
        )
        return jnp.sum((found.logprobs + 0.3 * found.entropy) * rows.mask)

    def by_hand(hidden):
        scores = bigram.logits(params, hidden) / 0.8
        there = (rows.support[..., None] == jnp.arange(16)).any(-2)
        log_p = jax.nn.log_softmax(jnp.where(there, scores, -1e9))
        entropy = -jnp.sum(jnp.where(there, jnp.exp(log_p) * log_p, 0.0), -1)
        picked = jnp.take_along_axis(log_p, rows.tokens[..., None], -1)[..., 0]
        return jnp.sum((picked + 0.3 * entropy) * rows.mask)

    one, other = (jax.jit(jax.value_and_grad(function))(hidden) for function in (ours, by_hand))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rollout, message",
    [
        ({"top_k": 4}, "set rollout.renormalised to true"),
        ({"top_p": 0.9}, "set rollout.renormalised to true"),
        ({"renormalised": True}, "sampling is not truncated"),
    ],
)
def test_truncation_must_be_asked_for(rollout, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"name": "x", "rollout": rollout}, vocabulary_size=100)


def test_bad_truncation(bigram):
    with pytest.raises(ValueError, match=r"without rollout\.top_k"):
        Rollout(truncation=Controls(top_p=0.9), **SIZES)
    with pytest.raises(
        ValueError,
        match=r"needs tokens sampled from the whole vocabulary \(whole_vocabulary\), which rollout.truncation does not",
    ):
        make_train_step(
            bigram,
            optax.sgd(0.5),
            source=Rollout(truncation=TRUNCATION, **SIZES),
            rewards=[low],
            credit=[("advantages", advantages.group_normalized)],
            losses=[losses.clipped_surrogate, losses.divergence(samples="vocabulary", gradient="exact")],
        )
