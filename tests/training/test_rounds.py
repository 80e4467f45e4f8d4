"""Sampling in rounds, against the same rounds done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import KeyUse
from jaxrl_llm.rollout import generate
from jaxrl_llm.rollout.round_options import Adaptive, Budget, Refill
from jaxrl_llm.training import Rollout, Update, make_train_step

SIZES = {"max_completion_tokens": 4, "eos_ids": (2,), "pad_id": 0}
ITEMS = [{"body": str(number), "answer": ""} for number in range(8)]


def even(tokens):
    """1 where the first token is even."""
    return (tokens[:, 0] % 2 == 0).astype(jnp.float32)


def even_on_the_host(completions, items):
    # The items must be those of the rows: their number is the prompt's.
    assert all(item["body"].isdigit() for item in items)
    return [float(int(text[0], 16) % 2 == 0) for text in completions]


def composed(model, rounds, samples=2, rewards=(even,), **changes):
    parts = {
        "rollout": Rollout(samples_per_prompt=samples, rounds=rounds, **SIZES),
        "rewards": list(rewards),
        "credit": [("advantages", advantages.group_normalized)],
        "losses": [losses.clipped_surrogate],
        "decode": lambda ids: "".join(f"{number:x}" for number in ids),
    }
    return make_train_step(model, optax.sgd(0.1), **(parts | changes))


def drawn(model, params, key, prompts, samples, step=0):
    """All samples of all prompts, which no rounds can change."""
    run = jax.jit(
        lambda params: generate(
            model, params, prompts, jax.random.fold_in(key, KeyUse.ROLLOUT), step, samples_per_prompt=samples, **SIZES
        )
    )
    return jax.device_get(run(params))


@pytest.fixture(scope="module")
def params(model):
    # At random parameters nearly all tokens are alike likely, so groups are mixed and alike in turn.
    return model.init(jax.random.key(1))


def one_step(step, params, prompts, items=None):
    state = step.init(jax.random.key(0), params)
    return jax.device_get(step.run(state, prompts, items, None)[1:])


@pytest.mark.parametrize("on_host", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_groups_that_are_alike_are_replaced_by_those_of_new_prompts(model, params, make_prompts, on_host):
    prompts = make_prompts(8)
    step = composed(model, Refill(max_rounds=4), rewards=[even_on_the_host if on_host else even])
    metrics, rows = one_step(step, params, prompts, ITEMS)
    every = drawn(model, params, jax.random.key(0), prompts, 2)
    right = (every.tokens[:, 0] % 2 == 0).reshape(8, 2)
    kept, rounds = [], 0
    while len(kept) < 2 and rounds < 4:
        kept += [n for n in range(2 * rounds, 2 * rounds + 2) if right[n].any() and not right[n].all()]
        rounds += 1
    assert rounds > 1, "a test in which nothing is refilled shows nothing"
    expected = [row for n in kept[:2] for row in (2 * n, 2 * n + 1)]
    np.testing.assert_array_equal(rows.tokens, every.tokens[expected])
    np.testing.assert_array_equal(rows.prompt_id, every.prompt_id[expected])
    np.testing.assert_array_equal(rows.group, [0, 0, 1, 1])
    np.testing.assert_array_equal(rows.weight, np.ones(4))
    np.testing.assert_allclose(rows.rewards, right.reshape(-1)[expected])
    assert (metrics["rounds"], metrics["groups_sampled"], metrics["groups_kept"]) == (rounds, 2 * rounds, 2)
    np.testing.assert_allclose(metrics["sampled_accuracy"], right[: 2 * rounds].mean())


def test_places_that_stay_empty_have_no_weight_and_change_nothing(model, params, make_prompts):
    step = composed(model, Refill(max_rounds=2), rewards=[lambda tokens: jnp.ones(tokens.shape[0])])
    state = step.init(jax.random.key(0), params)
    before = jax.device_get(state.params)
    state, metrics, rows = step.run(state, make_prompts(8), None, None)
    np.testing.assert_array_equal(rows.weight, 0)
    assert metrics["groups_kept"] == 0
    assert all(np.isfinite(value) for value in jax.device_get(metrics).values())
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


@pytest.mark.parametrize("on_host", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prompts_are_sampled_until_they_have_enough_of_both_kinds(model, params, make_prompts, on_host):
    prompts, kept = make_prompts(8), 2
    rounds = Adaptive(max_rounds=3, samples_per_round=2)
    step = composed(
        model,
        rounds,
        samples=kept,
        rewards=[even_on_the_host if on_host else even],
        credit=[("advantages", advantages.pool_centred)],
    )
    metrics, rows = one_step(step, params, prompts, ITEMS)
    every = drawn(model, params, jax.random.key(0), prompts, 6)
    right = (every.tokens[:, 0] % 2 == 0).reshape(8, 6)
    used = []
    for n in range(8):
        count = 2
        while count < 6 and not (right[n, :count].any() and not right[n, :count].all()):
            count += 2
        used.append(count)
        places = [*np.flatnonzero(right[n, :count]), *np.flatnonzero(~right[n, :count])]
        mixed = right[n, :count].any() and not right[n, :count].all()
        chosen = [places[0], np.flatnonzero(~right[n, :count])[0]] if mixed else places[:kept]
        ours = slice(n * kept, n * kept + kept)
        np.testing.assert_array_equal(rows.tokens[ours], every.tokens[n * 6 + np.array(chosen)])
        np.testing.assert_array_equal(rows.sample[ours], chosen)
        mean = right[n, :count].mean()
        np.testing.assert_allclose(rows.extras["pool_mean"][ours], mean, rtol=1e-6)
        np.testing.assert_allclose(rows.advantages[ours, 0], right[n, chosen] - mean, rtol=1e-5, atol=1e-6)
    assert len(set(used)) > 1
    assert metrics["samples_drawn"] == sum(used)
    assert metrics["rounds"] == max(used) // 2
    np.testing.assert_array_equal(rows.weight, np.ones(16))


@pytest.mark.slow
def test_a_budget_follows_what_was_right_at_the_last_visit(model, params, make_prompts):
    prompts = make_prompts(8)
    step = composed(model, Budget(prompt_ids=8, least=1, most=8), samples=3)
    state = step.init(jax.random.key(0), params)
    state, _, first = step.run(state, prompts, None, None)
    np.testing.assert_array_equal(first.group, np.repeat(np.arange(8), 3))
    rate = np.asarray(first.correct).reshape(8, 3).mean(1)
    success = state.memory["rollout:success"]
    np.testing.assert_allclose(success.rate, rate, rtol=1e-6)
    assert bool(success.seen.all())
    expected = advantages.knapsack_rollouts(jnp.asarray(rate), jnp.ones(8, bool), samples_per_prompt=3, least=1, most=8)
    params = jax.device_get(state.params)
    _, _, second = step.run(state, prompts, None, None)
    np.testing.assert_array_equal(np.bincount(second.group, minlength=8), expected)
    assert len(set(np.asarray(expected).tolist())) > 1
    every = drawn(model, params, jax.random.key(0), prompts, 8, step=1)
    rows = np.concatenate([8 * n + np.arange(count) for n, count in enumerate(expected)])
    np.testing.assert_array_equal(second.tokens, every.tokens[rows])


@pytest.mark.slow
def test_rounds_in_slots_are_the_same(model, params, make_prompts):
    rounds = Adaptive(max_rounds=3, samples_per_round=2)
    plain = Rollout(samples_per_prompt=2, rounds=rounds, **SIZES)
    slots = Rollout(samples_per_prompt=2, rounds=rounds, slots=3, **SIZES)
    one, other = (one_step(composed(model, rounds, rollout=r), params, make_prompts(8)) for r in (plain, slots))
    np.testing.assert_array_equal(one[1].tokens, other[1].tokens)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rounds": Adaptive(1, 2), "samples_per_prompt": 4}, "draws at most 1 x 2 samples"),
        ({"rounds": Refill(), "prefixes": ((3,),)}, "rollout.refill and rollout.prefixes are both set"),
        ({"rounds": Budget(4, least=4, most=8), "samples_per_prompt": 2}, "it is the mean and must lie between"),
    ],
)
def test_bad_rollouts(changes, message):
    with pytest.raises(ValueError, match=message):
        Rollout(**({"samples_per_prompt": 2} | SIZES | changes))


def test_bad_compositions(model, make_prompts):
    step = composed(model, Refill(max_rounds=2))
    state = step.init(jax.random.key(0))
    with pytest.raises(ValueError, match="the step was handed 7 prompts"):
        step.run(state, make_prompts(7), None, None)
    with pytest.raises(ValueError, match="max_rounds is 0"):
        Refill(max_rounds=0)
    with pytest.raises(ValueError, match="provides"):
        composed(model, Refill(), credit=[("advantages", advantages.pool_centred)])
    unknown = composed(model, Budget())
    with pytest.raises(ValueError, match="prompt_ids is not set"):
        unknown.init(jax.random.key(0))
    assert composed(model, Budget(4), update=Update(minibatches_per_epoch=2)) is not None
