"""Rows that plans bring into a step: demonstrations, given starts, greedy completions, another temperature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses, schedules
from jaxrl_llm.experience import KeyUse, Source
from jaxrl_llm.rollout import generate, plans
from jaxrl_llm.rollout.plans import last_share
from jaxrl_llm.training import Resources, Rollout, make_train_step

SIZES = {"max_completion_tokens": 4, "eos_ids": (2,), "pad_id": 0}
ITEMS = [{"body": str(number), "answer": ""} for number in range(8)]
KEY = jax.random.key(0)


def even(tokens):
    """1 where the first token is even."""
    return (tokens[:, 0] % 2 == 0).astype(jnp.float32)


def plain(samples):
    return plans.plain(samples_per_prompt=samples)


def refill(samples=2, inner=None, **options):
    return plans.refill(inner or plain(samples), samples_per_prompt=samples, **options)


def adaptive(samples=2, **options):
    return plans.adaptive(plain(samples), samples_per_prompt=samples, **options)


def prefixed(samples, *texts, inner=None):
    """Blocks of samples that start with texts of hexadecimal digits."""
    encode = lambda text: [int(symbol, 16) for symbol in text]  # noqa: E731
    return plans.prefixes(inner or plain(samples), texts=texts, encode=encode, max_completion_tokens=4, pad_id=0)


def composed(model, plan, samples=2, rewards=(even,), sizes=None, **changes):
    parts = {
        "source": Rollout(samples_per_prompt=samples, plan=plan, **(SIZES | (sizes or {}))),
        "rewards": list(rewards),
        "credit": [("advantages", advantages.group_normalized)],
        "losses": [losses.clipped_surrogate],
        "resources": Resources(decode=lambda ids: "".join(f"{number:x}" for number in ids)),
    }
    return make_train_step(model, optax.sgd(0.1), **(parts | changes))


def drawn(model, params, prompts, samples, step=0, **options):
    """All samples of all prompts, which no plan can change."""
    key = jax.random.fold_in(KEY, KeyUse.ROLLOUT)
    run = jax.jit(lambda p: generate(model, p, prompts, key, step, samples_per_prompt=samples, **SIZES, **options))
    return jax.device_get(run(params))


@pytest.fixture(scope="module")
def bigram(bigram):
    """The bigram model, whose cache of nothing can be cut into rows."""
    return bigram._replace(take_rows=lambda cache, rows, steps: cache, replace_row=lambda cache, *where: cache)


@pytest.fixture(scope="module")
def params(bigram):
    return bigram.init(jax.random.key(1))


@pytest.fixture(scope="module")
def every(bigram, params, make_prompts):
    """Six samples of eight prompts, [8, 6] of them."""
    rows = drawn(bigram, params, make_prompts(8), 6)
    return jax.tree.map(lambda x: x.reshape(8, 6, *x.shape[1:]), rows)


def one_step(step, params, prompts, items=None):
    state = step.init(KEY, params)
    return jax.device_get(step.run(state, prompts, items)[1:])


def test_a_demonstration_is_the_last_of_its_group(bigram, make_prompts):
    written = np.array([[5, 5, 2, 0]] * 4, np.int32)
    given = {"demonstration_tokens": written, "demonstration_length": np.full(4, 3, np.int32)}
    plan = plans.demonstration_in_group(plain(3), max_completion_tokens=6, pad_id=0)
    step = composed(
        bigram, plan, samples=3, sizes={"max_completion_tokens": 6}, losses=[losses.external_surrogate]
    )  # fmt: skip
    _, metrics, e = step.run(step.init(KEY), make_prompts(4).replace(fields=given))
    source = np.asarray(e.source).reshape(4, 3, 6)
    assert (source[:, 2, :3] == Source.DEMONSTRATION).all()
    assert (source[:, 2, 3:] == Source.PAD).all()
    assert not (source[:, :2] == Source.DEMONSTRATION).any()
    np.testing.assert_array_equal(np.asarray(e.tokens).reshape(4, 3, 6)[:, 2, :3], written[:, :3])
    np.testing.assert_array_equal(np.asarray(e.mask).reshape(4, 3, 6)[:, 2], [[1, 1, 1, 0, 0, 0]] * 4)
    # Its log-probabilities are the policy's own, and it says nothing about the sampler.
    assert (np.asarray(e["old_logprobs"]).reshape(4, 3, 6)[:, 2, :3] < 0).all()
    assert float(metrics["sampler_gap_max"]) < 1e-5


def test_prefixes_start_completions_and_are_not_trained_on(bigram, params, make_prompts):
    _, e = one_step(composed(bigram, prefixed(4, "7", "89"), samples=4), params, make_prompts(2))
    tokens, mask, source = (np.asarray(x).reshape(2, 4, 4) for x in (e.tokens, e.mask, e.source))
    assert (tokens[:, :2, 0] == 7).all()
    assert (tokens[:, 2:, :2] == [8, 9]).all()
    assert (source[:, :2, 0] == Source.HINT).all()
    assert (mask[:, :2, 0] == 0).all()
    assert (mask[:, 2:, :2] == 0).all()
    assert (mask.sum(-1) == np.asarray(e.length).reshape(2, 4) - [1, 1, 2, 2]).all()


def sevens(tokens, length):
    return ((tokens == 7) & (jnp.arange(tokens.shape[1]) < length[:, None])).sum(1) + 0.1 * length


BASELINE = [("advantages", advantages.reward_minus_baseline)]


def test_a_greedy_baseline_is_the_reward_of_the_likeliest_completion(bigram, params, make_prompts, every):
    step = composed(bigram, None, rewards=[sevens], credit=BASELINE)
    greedy = drawn(bigram, params, make_prompts(4), 1, temperature=0.0)
    expected = np.repeat(np.asarray(sevens(greedy.tokens, greedy.length)), 2)
    _, e = one_step(step, params, make_prompts(4))
    np.testing.assert_array_equal(e.tokens, every.tokens[:4, :2].reshape(8, -1))
    np.testing.assert_allclose(e["baseline_rewards"], expected)
    np.testing.assert_allclose(e["advantages"][:, 0], e["rewards"] - expected, atol=1e-6)


def test_a_greedy_baseline_reads_the_text_of_its_own_completions(bigram, params, make_prompts):
    """Readings see the greedy rows too, each with the item of its prompt."""

    def judged(completions, items):
        return [text.count("7") + 0.1 * len(text) + 100 * int(item["body"]) for text, item in zip(completions, items, strict=True)]  # fmt: skip  # noqa: E501

    _, e = one_step(composed(bigram, None, rewards=[judged], credit=BASELINE), params, make_prompts(4), ITEMS[:4])
    greedy = drawn(bigram, params, make_prompts(4), 1, temperature=0.0)
    expected = np.asarray(sevens(greedy.tokens, greedy.length)) + 100 * np.arange(4)
    np.testing.assert_allclose(e["baseline_rewards"], np.repeat(expected, 2), rtol=1e-6)


def test_greedy_rows_leave_as_they_came(rows, make_prompts):
    plan = plans.greedy_baseline(plain(1), temperature=1.0)
    (request,) = plan.requests(None, None, make_prompts(4))
    np.testing.assert_array_equal(request.temperature, [1.0, 0.0])
    assert request.samples_per_prompt == 2
    merged = plan.merge(None, rows.filled(rewards=jnp.arange(8.0)))
    kept, report = plan.result(merged)
    np.testing.assert_array_equal(kept["baseline_rewards"], [1, 3, 5, 7])
    np.testing.assert_array_equal(kept["rewards"], [0, 2, 4, 6])
    np.testing.assert_array_equal(kept.group, [0, 1, 2, 3])
    assert report == {}


def test_extra_groups_follow_a_temperature_with_memory(bigram, make_prompts):
    method = schedules.temperature_controller(target=100.0, cold=0.5, hot=2.0)
    plan = plans.mixed_temperature(plain(2), samples_per_prompt=2, prompt_share=0.5, temperature=method)
    step = composed(bigram, plan)
    state, metrics, e = step.run(step.init(KEY), make_prompts(4))
    assert e.tokens.shape[0] == 12
    np.testing.assert_array_equal(np.asarray(e["extra"]), [False] * 8 + [True] * 4)
    np.testing.assert_array_equal(np.asarray(e.group)[8:], [4, 4, 5, 5])
    np.testing.assert_array_equal(np.asarray(e.sample)[8:], [2, 3, 2, 3])
    assert float(metrics["extra_temperature"]) == 2.0
    assert float(state.memory["rollout:plan"]["temperature"]) == 2.0
    # They are trained on at the policy's own temperature, and do not count as a gap of the sampler.
    assert np.abs(np.asarray(e["old_logprobs"] - e.behaviour_logprobs))[8:].max() > 1e-3
    np.testing.assert_allclose(e["old_logprobs"][:8], e.behaviour_logprobs[:8], atol=1e-5)
    assert float(metrics["sampler_gap_max"]) < 1e-5


def test_a_constant_temperature_is_remembered_by_nobody():
    inside = dict(samples_per_prompt=2, temperature=1.5)
    assert plans.mixed_temperature(plain(2), prompt_share=0.5, **inside).memory() is None
    with pytest.raises(ValueError, match="prompt_share is 0"):
        plans.mixed_temperature(plain(2), prompt_share=0.0, **inside)


def demonstrated(inner):
    return plans.demonstration_in_group(inner, max_completion_tokens=4, pad_id=0)


def mixed(inner):
    return plans.mixed_temperature(inner, samples_per_prompt=2, prompt_share=0.5, temperature=1.5)


def test_a_demonstration_has_no_place_in_a_group_at_another_temperature():
    with pytest.raises(ValueError, match=r"mixed_temperature needs .*\(drawn_by_policy\), which the plan inside of it"):
        mixed(demonstrated(plain(2)))


def test_every_plan_can_be_traced(bigram, make_prompts, traced):
    """Rows and reports of each, as shapes."""
    given = {"demonstration_tokens": np.zeros((8, 4), np.int32), "demonstration_length": np.ones(8, np.int32)}
    prompts = make_prompts(8).replace(fields=given)
    branching = plans.resume(
        plain(1), choose=last_share, samples_per_prompt=2, branches=1, max_completion_tokens=4, pad_id=0, encode=None
    )
    for plan, count in (
        (None, 16),
        (refill(max_rounds=4), 4),
        (adaptive(max_rounds=2), 16),
        (plans.budget(plain(2), samples_per_prompt=2, prompt_ids=8, most=8), 16),
        (demonstrated(plain(2)), 16),
        (mixed(prefixed(2, "1")), 24),
        (refill(inner=demonstrated(plain(2)), max_rounds=2), 8),
        (branching, 16),
    ):
        step = composed(bigram, plan)
        _, metrics, rows = traced(step, prompts)
        assert rows.tokens.shape == (count, 4)
        assert step.composition.plan.reports <= metrics.keys()
        assert step.composition.plan.provides <= rows.fields.keys()
