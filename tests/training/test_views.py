"""Views: another sequence made of a row is scored like the row itself, by the policy and by other networks."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses, rewards
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.training import Network, Resources, Update, make_train_step

VIEW = partial(rewards.answer_after_thought, mark_id=5, opening_ids=(7,), closing_ids=(6, 2))


def verifree(model, **changed):
    given = {
        "source": Rollout(samples_per_prompt=4, max_completion_tokens=6, eos_ids=(2,), pad_id=0, temperature=0.7),
        "rewards": [rewards.answer_likelihood],
        "credit": [
            ("mask", partial(rewards.thought_mask, mark_id=5)),
            ("answer_weight", advantages.raw_rewards),
            ("advantages", advantages.leave_one_out),
        ],
        "losses": [losses.policy_gradient, losses.weighted_answer_likelihood],
        "resources": Resources(views={"answer": VIEW}),
    }
    return make_train_step(model, optax.sgd(0.5), **(given | changed))


def test_verifree_scores_the_reference_answer_and_learns_it(bigram, make_prompts):
    step = verifree(bigram)
    state = step.init(jax.random.key(0))
    table = np.asarray(state.params["scores"])
    state, metrics, rows = step.run(state, make_prompts(4))
    # Of a bigram model the log-probabilities of the answer (7) 5 (6) (2) behind the mark 5 are entries of a table.
    said = np.asarray(jax.nn.log_softmax(table / 0.7, axis=-1))
    expected = np.array([said[a, b] for a, b in ((5, 7), (7, 5), (5, 6), (6, 2))])
    tokens, length = np.asarray(rows.tokens), np.asarray(rows.length)
    thought = np.array([5 in row[:count] for row, count in zip(tokens, length, strict=True)])
    assert 0 < thought.sum() < len(thought), "the test needs thoughts that are closed and some that are not"
    np.testing.assert_allclose(np.asarray(rows["answer_logprobs"])[thought, :4], [expected] * thought.sum(), rtol=1e-5)
    np.testing.assert_allclose(rows["rewards"], thought * np.exp(expected.sum()), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(rows.mask).sum(1) > 0, thought)
    assert np.isfinite(metrics["loss/weighted_answer_likelihood"])
    after = np.asarray(jax.nn.log_softmax(np.asarray(state.params["scores"]) / 0.7, axis=-1))
    assert after[7, 5] > said[7, 5]


def test_microbatches_give_the_same_parameters(bigram, make_prompts):
    found = []
    for size in (None, 4):
        step = verifree(bigram, update=Update(sequences_per_microbatch=size))
        state, _ = step(step.init(jax.random.key(0)), make_prompts(4))
        found.append(np.asarray(state.params["scores"]))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def test_a_name_of_a_view_that_is_not_there_is_refused(bigram):
    with pytest.raises(ValueError, match="names 'answer_logprobs', which nothing in this step provides"):
        verifree(bigram, resources=Resources())
    with pytest.raises(ValueError, match="names 'proxy_answer_logprobs', which nothing in this step provides"):
        verifree(bigram, rewards=[lambda proxy_answer_logprobs: proxy_answer_logprobs.sum(1)])


def test_nover_scores_with_a_proxy_that_follows_slowly(bigram, make_prompts):
    mark = partial(rewards.reasoning_perplexity, mark_id=5)
    step = verifree(
        bigram,
        rewards=[partial(rewards.answer_present, open_id=5, close_id=6)],
        credit=[
            ("well_formed", partial(rewards.answer_present, open_id=5, close_id=6)),
            ("perplexity", mark),
            ("rewards", partial(rewards.perplexity_ranks, mark_id=5)),
            ("advantages", advantages.leave_one_out),
        ],
        losses=[losses.policy_gradient],
        resources=Resources(views={"answer": VIEW}, networks={"proxy": Network(decay=0.9)}),
    )
    state = step.init(jax.random.key(0))
    proxy = np.asarray(state.params["scores"])
    for _ in range(2):
        state, metrics, rows = step.run(state, make_prompts(8))
        said = np.asarray(jax.nn.log_softmax(proxy / 0.7, axis=-1))
        expected = np.array([said[a, b] for a, b in ((5, 7), (7, 5), (5, 6), (6, 2))])
        thought = np.isfinite(np.asarray(rows["perplexity"]))
        assert 0 < thought.sum() < len(thought)
        scored = np.asarray(rows["proxy_answer_logprobs"])[thought, :4]
        np.testing.assert_allclose(scored, [expected] * thought.sum(), rtol=2e-5)
        proxy = 0.9 * proxy + 0.1 * np.asarray(state.params["scores"])
        np.testing.assert_allclose(state.networks["proxy"].params["scores"], proxy, rtol=1e-5)
    assert metrics["gradient_norm"] > 0
