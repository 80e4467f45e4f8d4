"""Plans, compared with the same completions sampled directly."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import KeyUse, Prompts, Selection, Source
from jaxrl_llm.rollout import Environment, Prefixes, Step, generate, generate_turns
from jaxrl_llm.rollout.plans import (
    adaptive,
    budget,
    demonstration_in_group,
    from_the_start,
    greedy_baseline,
    last_share,
    mixed_temperature,
    plain,
    prefixes,
    prioritized,
    refill,
    resume,
)
from jaxrl_llm.run.nonfinite import not_finite
from jaxrl_llm.selection import knapsack_rollouts, next_rollouts
from jaxrl_llm.training import Resources, Rollout, Update, make_train_step

SIZES = {"max_completion_tokens": 4, "eos_ids": (2,), "pad_id": 0}
WIDTHS = {"max_completion_tokens": 4, "pad_id": 0}
# A key that gives groups with different rewards and groups with equal rewards alternately.
KEY = jax.random.key(1)
ITEMS = [{"body": str(number), "answer": ""} for number in range(8)]


@pytest.fixture(scope="module")
def model(make_bigram):
    """With empty caches, so that any selection of rows is empty, too."""
    bigram = make_bigram(16)
    return bigram._replace(
        take_rows=lambda cache, rows, extra_slots: cache, replace_row=lambda cache, slot, source, row: cache
    )


@pytest.fixture(scope="module")
def params(model):
    # Nearly all tokens have the same probability.
    return jax.tree.map(lambda x: 0.1 * x, model.init(jax.random.key(1)))


def make_prompts(count, **fields):
    rng = np.random.default_rng(0)
    tokens, length = rng.integers(3, 16, (8, 4)).astype(np.int32), rng.integers(2, 5, 8).astype(np.int32)
    number = np.arange(count, dtype=np.int32)
    return Prompts(tokens[:count], length[:count], number, number[:, None], np.ones(count, np.int32), fields)


def even(tokens):
    """1 if the first token is even."""
    return (tokens[:, 0] % 2 == 0).astype(jnp.float32)


def even_on_the_host(completions, items):
    # The items must belong to the rows: they have the number of the prompt.
    assert all(item["body"].isdigit() for item in items)
    # A completion of nothing but the end of sequence, which is 2, has no text.
    return [float(int(text[:1] or "2", 16) % 2 == 0) for text in completions]


def composed(model, plan, samples=2, rewards=(even,), rollout=None, **changes):
    parts = {
        "source": Rollout(samples_per_prompt=samples, plan=plan, **SIZES, **(rollout or {})),
        "rewards": list(rewards),
        "credit": [("advantages", advantages.group_normalized)],
        "losses": [losses.clipped_surrogate],
        "resources": Resources(decode=lambda ids: "".join(f"{number:x}" for number in ids)),
    }
    return make_train_step(model, optax.sgd(0.1), **(parts | changes))


def drawn(model, params, key, prompts, samples, step=0, temperature=1.0, **options):
    """Samples of all prompts, on which plans have no influence."""
    address = jax.random.fold_in(key, KeyUse.ROLLOUT)
    run = jax.jit(
        lambda params: generate(
            model,
            params,
            prompts,
            address,
            step,
            samples_per_prompt=samples,
            temperature=temperature,
            **SIZES,
            **options,
        )
    )
    return jax.device_get(run(params))


def one_step(step, params, prompts, items=None):
    state = step.init(KEY, params)
    return jax.device_get(step.run(state, prompts, items, None)[1:])


def refilled(inner=None, samples=2, **options):
    return refill(inner or plain(samples_per_prompt=samples), samples_per_prompt=samples, **options)


def in_rounds(samples=2, **options):
    options = {"max_rounds": 3, "samples_per_round": 2} | options
    return adaptive(plain(samples_per_prompt=samples), samples_per_prompt=samples, **options)


# ---- refill ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_host", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_groups_that_are_alike_are_replaced_by_those_of_new_prompts(model, params, on_host):
    prompts = make_prompts(8)
    step = composed(model, refilled(max_rounds=4), rewards=[even_on_the_host if on_host else even])
    metrics, rows = one_step(step, params, prompts, ITEMS)
    every = drawn(model, params, KEY, prompts, 2)
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
    np.testing.assert_allclose(rows["rewards"], right.reshape(-1)[expected])
    assert (metrics["rounds"], metrics["groups_sampled"], metrics["groups_kept"]) == (rounds, 2 * rounds, 2)
    np.testing.assert_allclose(metrics["sampled_accuracy"], right[: 2 * rounds].mean())


def test_places_that_stay_empty_have_no_weight_and_change_nothing(model, params):
    step = composed(model, refilled(max_rounds=2), rewards=[lambda tokens: jnp.ones(tokens.shape[0])])
    state = step.init(KEY, params)
    before = jax.device_get(state.params)
    state, metrics, rows = step.run(state, make_prompts(8), None, None)
    np.testing.assert_array_equal(rows.weight, 0)
    assert metrics["groups_kept"] == 0
    assert not not_finite(jax.device_get(metrics))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


# ---- adaptive -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_host", [pytest.param(False, marks=pytest.mark.slow), True])
def test_prompts_are_sampled_until_they_have_enough_of_both_kinds(model, params, on_host):
    prompts, kept = make_prompts(8), 2
    step = composed(
        model,
        in_rounds(),
        rewards=[even_on_the_host if on_host else even],
        credit=[("advantages", advantages.pool_centred)],
    )
    metrics, rows = one_step(step, params, prompts, ITEMS)
    every = drawn(model, params, KEY, prompts, 6)
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
        np.testing.assert_allclose(rows["pool_mean"][ours], mean, rtol=1e-6)
        np.testing.assert_allclose(rows["advantages"][ours, 0], right[n, chosen] - mean, rtol=1e-5, atol=1e-6)
    assert len(set(used)) > 1
    assert metrics["samples_drawn"] == sum(used)
    assert metrics["rounds"] == max(used) // 2
    np.testing.assert_array_equal(rows.weight, np.ones(16))


@pytest.mark.slow
def test_rounds_in_slots_are_the_same(model, params):
    steps = (composed(model, in_rounds(), rollout=rollout) for rollout in ({}, {"slots": 3}))
    one, other = (one_step(step, params, make_prompts(8)) for step in steps)
    np.testing.assert_array_equal(one[1].tokens, other[1].tokens)


# ---- budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_budget_follows_what_was_right_at_the_last_visit(model, params):
    prompts = make_prompts(8)
    plan = budget(plain(samples_per_prompt=3), samples_per_prompt=3, prompt_ids=8, least=1, most=8)
    step = composed(model, plan, samples=3)
    state = step.init(KEY, params)
    state, _, first = step.run(state, prompts, None, None)
    np.testing.assert_array_equal(first.group, np.repeat(np.arange(8), 3))
    rate = np.asarray(first["correct"]).reshape(8, 3).mean(1)
    success = state.memory["rollout:plan"]
    np.testing.assert_allclose(success.rate, rate, rtol=1e-6)
    assert bool(success.seen.all())
    expected = knapsack_rollouts(jnp.asarray(rate), jnp.ones(8, bool), samples_per_prompt=3, least=1, most=8)
    params = jax.device_get(state.params)
    _, _, second = step.run(state, prompts, None, None)
    np.testing.assert_array_equal(np.bincount(second.group, minlength=8), expected)
    assert len(set(np.asarray(expected).tolist())) > 1
    every = drawn(model, params, KEY, prompts, 8, step=1)
    rows = np.concatenate([8 * n + np.arange(count) for n, count in enumerate(expected)])
    np.testing.assert_array_equal(second.tokens, every.tokens[rows])


# ---- prioritized ----------------------------------------------------------------------------------------------------


def by_priority(samples=4, **options):
    return prioritized(plain(samples_per_prompt=samples), samples_per_prompt=samples, first_samples=2, **options)


def even_at_first(tokens, step):
    """`even` in the first step, then 1 for all."""
    return jnp.where(step == 0, even(tokens), 1.0)


@pytest.mark.parametrize(
    "rounds, reward", [(1, even_at_first), pytest.param(2, even_on_the_host, marks=pytest.mark.slow)]
)
def test_samples_go_to_the_prompts_of_largest_priority(model, params, rounds, reward):
    prompts = make_prompts(8)
    step = composed(model, by_priority(rounds=rounds), 4, rewards=[reward])
    state, metrics, rows = step.run(step.init(KEY, params), prompts, ITEMS, None)
    every = drawn(model, params, KEY, prompts, 18)
    right = (every.tokens[:, 0] % 2 == 0).astype(np.float32)
    sizes = np.full(8, 2)
    for _ in range(rounds):
        group = np.repeat(np.arange(8), sizes)
        first = np.searchsorted(group, np.arange(8))
        rewards = jnp.asarray(right[18 * group + np.arange(len(group)) - first[group]])
        options = {"rollouts": 16 // rounds, "exploration": 1.0}
        given = next_rollouts(rewards, jnp.asarray(group), jnp.ones(len(group)), jnp.int32(0), **options)
        sizes += np.asarray(given)[first]
    assert sizes.max() > sizes.min() == 2
    places = np.concatenate([18 * n + np.arange(size) for n, size in enumerate(sizes)])
    np.testing.assert_array_equal(rows.tokens, every.tokens[places])
    np.testing.assert_array_equal(rows.sample, every.sample[places])
    np.testing.assert_array_equal(rows.group, np.repeat(np.arange(8), sizes))
    np.testing.assert_array_equal(rows["rewards"], right[places])
    np.testing.assert_array_equal(rows.weight, np.ones(32))
    assert (metrics["largest_group"], metrics["smallest_group"]) == (sizes.max(), sizes.min())
    if reward is even_at_first:
        state, metrics, rows = step.run(state, prompts, ITEMS, None)
        np.testing.assert_array_equal(rows.group, np.repeat(np.arange(8), 4), err_msg="equal rewards: even shares")
        assert state.memory["rollout:plan"] == 2


# ---- given prefixes ------------------------------------------------------------------------------------------

TEXTS = ("ab", "c")


def encode(text):
    return tuple(10 + "abc".index(letter) for letter in text)


def started(samples=4):
    return prefixes(plain(samples_per_prompt=samples), texts=TEXTS, encode=encode, **WIDTHS)


def starts(prompts, samples=4, last=0):
    """The prefix of each row by `started`; a further row repeats the last prefix."""
    of_row = [TEXTS[number // (samples // 2)] for number in range(samples)] + [TEXTS[-1]] * last
    ids = [encode(text) for text in of_row] * prompts
    tokens = jnp.asarray([(*one, 0)[:2] for one in ids], jnp.int32)
    return Prefixes(tokens, jnp.asarray([len(one) for one in ids], jnp.int32), jnp.full(tokens.shape, Source.HINT))


def total(tokens):
    return tokens.sum(1).astype(jnp.float32)


def above_baseline(rewards, baseline_rewards):
    return rewards - baseline_rewards


def test_a_greedy_completion_starts_as_the_last_sample_does(model, params):
    prompts = make_prompts(4)
    step = composed(model, started(), 4, [total], credit=[("advantages", above_baseline)])
    _, rows = one_step(step, params, prompts)
    every = drawn(model, params, KEY, prompts, 4, prefixes=starts(4))
    greedy = drawn(model, params, KEY, prompts, 5, prefixes=starts(4, last=1), temperature=0.0)
    np.testing.assert_array_equal(rows.tokens, every.tokens)
    np.testing.assert_array_equal(rows.source, every.source)
    baseline = np.asarray(total(greedy.tokens)).reshape(4, 5)[:, 4]
    np.testing.assert_array_equal(rows["baseline_rewards"], np.repeat(baseline, 4))
    assert set(greedy.tokens.reshape(4, 5, 4)[:, 4, 0].tolist()) == set(encode("c"))
    np.testing.assert_array_equal(rows["advantages"], (rows["rewards"] - rows["baseline_rewards"])[:, None] * rows.mask)


@pytest.mark.slow
def test_prefixes_may_be_made_around_a_greedy_completion_too(model, params):
    inner = greedy_baseline(plain(samples_per_prompt=4), temperature=1.0)
    plan = prefixes(inner, texts=TEXTS, encode=encode, **WIDTHS)
    credit = [("advantages", above_baseline)]
    one, other = (composed(model, made, 4, [total], credit=credit) for made in (started(), plan))
    one, other = (one_step(step, params, make_prompts(4))[1] for step in (one, other))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one["baseline_rewards"], other["baseline_rewards"])


def with_demonstrations(count):
    tokens = np.array([[5 + number, 7, 2, 0] for number in range(count)], np.int32)
    return make_prompts(count, demonstration_tokens=tokens, demonstration_length=np.full(count, 3, np.int32))


@pytest.mark.slow
def test_a_greedy_completion_beside_demonstrations(model, params):
    prompts = with_demonstrations(4)
    plan = demonstration_in_group(plain(samples_per_prompt=3), **WIDTHS)
    step = composed(model, plan, 3, credit=[("advantages", above_baseline)])
    _, rows = one_step(step, params, prompts)
    every = drawn(model, params, KEY, prompts, 2)
    greedy = drawn(model, params, KEY, prompts, 1, temperature=0.0)
    by_prompt = rows.tokens.reshape(4, 3, 4)
    np.testing.assert_array_equal(by_prompt[:, :2], every.tokens.reshape(4, 2, 4))
    np.testing.assert_array_equal(by_prompt[:, 2], prompts.fields["demonstration_tokens"])
    np.testing.assert_array_equal(rows.source.reshape(4, 3, 4)[:, 2, :3], Source.DEMONSTRATION)
    np.testing.assert_array_equal(rows["baseline_rewards"], np.repeat(even(greedy.tokens), 3))


@pytest.mark.slow
def test_groups_of_given_starts_are_refilled(model, params):
    prompts = make_prompts(8)
    plan = refilled(started(), samples=4, max_rounds=4)
    odd = lambda tokens: (tokens[:, 2] % 4 == 0).astype(jnp.float32)  # noqa: E731
    metrics, rows = one_step(composed(model, plan, 4, [odd]), params, prompts)
    every = drawn(model, params, KEY, prompts, 4, prefixes=starts(8))
    right = np.asarray(odd(every.tokens)).reshape(8, 4)
    informative = np.flatnonzero(right.any(1) & ~right.all(1))
    assert informative[1] > 1, "a test in which nothing is refilled shows nothing"
    assert metrics["rounds"] == informative[1] // 2 + 1
    np.testing.assert_array_equal(rows.tokens.reshape(2, 4, 4), every.tokens.reshape(8, 4, 4)[informative[:2]])
    np.testing.assert_array_equal(rows.prompt_id, np.repeat(informative[:2], 4))


@pytest.mark.slow
def test_groups_with_a_greedy_completion_are_refilled(model, params):
    inner = greedy_baseline(plain(samples_per_prompt=2), temperature=1.0)
    credit = [("advantages", above_baseline)]
    metrics, rows = one_step(composed(model, refilled(inner, max_rounds=4), credit=credit), params, make_prompts(8))
    expected = one_step(composed(model, refilled(max_rounds=4)), params, make_prompts(8))
    np.testing.assert_array_equal(rows.tokens, expected[1].tokens)
    assert metrics["rounds"] == expected[0]["rounds"] > 1
    greedy = drawn(model, params, KEY, make_prompts(8), 1, temperature=0.0)
    np.testing.assert_array_equal(rows["baseline_rewards"], np.asarray(even(greedy.tokens))[rows.prompt_id])


# ---- resume ---------------------------------------------------------------------------------------------------------


def resumed(choose, inner=None, samples=4, branches=2, **options):
    options = {"encode": None, **WIDTHS} | options
    inner = inner or plain(samples_per_prompt=samples - branches)
    return resume(inner, choose=choose, samples_per_prompt=samples, branches=branches, **options)


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hint", [pytest.param("", marks=pytest.mark.slow), "b"])
def test_a_branch_is_the_completion_that_goes_on_from_what_is_kept(model, params, trained, hint):
    prompts = make_prompts(4)
    plan = resumed(partial(last_share, kept=0.5), trained_prefix=trained, hint=hint, encode=encode)
    _, rows = one_step(composed(model, plan, 4), params, prompts)
    first = drawn(model, params, KEY, prompts, 2)
    count = np.minimum(first.length // 2, 2 - len(hint))
    place = np.arange(3)
    kept = np.where(place < count[:, None], first.tokens[:, :3], 0)
    kept = np.where((place == count[:, None]) & (hint == "b"), 11, kept)
    source = np.where((place < count[:, None]) & trained, Source.SAMPLED, Source.HINT)
    start = Prefixes(jnp.asarray(kept), jnp.asarray(count + len(hint)), jnp.asarray(source))
    branch = drawn(model, params, KEY, prompts, 2, prefixes=start, first_sample=2)
    whole = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), rows)
    for name in ("tokens", "length", "behaviour_logprobs", "source", "mask"):
        ours = getattr(whole, name)
        np.testing.assert_array_equal(ours[:, :2].reshape(8, *ours.shape[2:]), getattr(first, name), err_msg=name)
        np.testing.assert_array_equal(ours[:, 2:].reshape(8, *ours.shape[2:]), getattr(branch, name), err_msg=name)
    inside = np.arange(4) < branch.length[:, None]
    given = np.arange(4) < (count + len(hint))[:, None]
    untrained = (np.arange(4) == count[:, None]) & (hint == "b") if trained else given
    np.testing.assert_array_equal(whole.mask[:, 2:].reshape(8, 4), inside & ~untrained)
    np.testing.assert_array_equal(rows.group, np.repeat(np.arange(4), 4))
    np.testing.assert_array_equal(rows["branch"], np.tile([0, 0, 1, 1], 4))
    assert (count > 0).any()


@pytest.mark.slow
def test_branches_go_on_from_demonstrations_too(model, params):
    prompts = with_demonstrations(4)
    plan = resumed(partial(last_share, kept=0.5), demonstration_in_group(plain(samples_per_prompt=2), **WIDTHS))
    _, rows = one_step(composed(model, plan, 4), params, prompts)
    last = rows.tokens.reshape(4, 4, 4)[:, 3]
    np.testing.assert_array_equal(last[:, 0], prompts.fields["demonstration_tokens"][:, 0])
    np.testing.assert_array_equal(rows.source.reshape(4, 4, 4)[:, 3, 0], Source.DEMONSTRATION)
    np.testing.assert_array_equal(rows.mask.reshape(4, 4, 4)[:, 3, 0], 0)


# ---- conversations --------------------------------------------------------------------------------------------------


def turn(state, tokens, length, key):
    """Two turns of one token; even ones are rewarded."""
    reward = (tokens[0] % 2 == 0).astype(jnp.float32)
    return Step(state + 1, jnp.asarray([9], jnp.int32), jnp.int32(1), reward, state >= 1)


TALK = Environment(lambda start, key: jnp.int32(0), turn, 2, 1, 1, (3,))


def talks(model, params, prompts, samples):
    """Conversations of all prompts, on which plans have no influence."""
    run = partial(generate_turns, model, samples_per_prompt=samples, **SIZES)
    return jax.device_get(jax.jit(lambda params: run(params, prompts, KEY, 0, TALK))(params))


def some_even(turn_rewards):
    return (turn_rewards.sum(1) >= 1).astype(jnp.float32)


@pytest.mark.slow
def test_groups_of_conversations_are_refilled(model, params):
    step = composed(model, refilled(max_rounds=4, metric="rewards"), 2, [some_even], {"environment": TALK})
    metrics, rows = one_step(step, params, make_prompts(8))
    every = talks(model, params, make_prompts(8), 2)
    right = np.asarray(some_even(every["turn_rewards"])).reshape(8, 2)
    informative = np.flatnonzero(right[:, 0] != right[:, 1])[:2]
    assert informative[1] > 1, "a test in which nothing is refilled shows nothing"
    assert metrics["rounds"] == informative[1] // 2 + 1
    expected = [row for n in informative for row in (2 * n, 2 * n + 1)]
    for name in ("tokens", "turn", "turns", "turn_rewards", "mask", "behaviour_logprobs"):
        np.testing.assert_array_equal(rows[name], every[name][np.array(expected)], err_msg=name)
    assert (rows.source == Source.OBSERVATION).any()


@pytest.mark.slow
def test_prompts_are_talked_about_until_they_have_enough_of_both_kinds(model, params):
    step = composed(model, in_rounds(), 2, [some_even], {"environment": TALK})
    metrics, rows = one_step(step, params, make_prompts(8))
    every = talks(model, params, make_prompts(8), 6)
    right = np.asarray(some_even(every["turn_rewards"])).reshape(8, 6)
    mixed = [next((c for c in (2, 4) if len(set(right[n, :c])) == 2), 6) for n in range(8)]
    assert metrics["samples_drawn"] == sum(mixed) > 16
    place = np.arange(8).repeat(2) * 6 + rows.sample
    for name in ("tokens", "turn", "turns", "turn_rewards", "behaviour_logprobs"):
        np.testing.assert_array_equal(rows[name], every[name][place], err_msg=name)
    np.testing.assert_allclose(rows["pool_mean"][::2], [right[n, :c].mean() for n, c in enumerate(mixed)], rtol=1e-6)


# ---- repeated prompts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(plain(samples_per_prompt=4), marks=pytest.mark.slow),
        pytest.param(demonstration_in_group(plain(samples_per_prompt=4), **WIDTHS), marks=pytest.mark.slow),
        pytest.param(in_rounds(4, max_rounds=2, samples_per_round=4), marks=pytest.mark.slow),
        pytest.param(resumed(from_the_start), marks=pytest.mark.slow),
        pytest.param(
            mixed_temperature(plain(samples_per_prompt=4), samples_per_prompt=4, prompt_share=1.0, temperature=1.5),
            marks=pytest.mark.slow,
        ),
        budget(plain(samples_per_prompt=4), samples_per_prompt=4, prompt_ids=1, least=1, most=8),
        pytest.param(by_priority(clock="rollouts"), marks=pytest.mark.slow),
        pytest.param(refilled(samples=4, max_rounds=2), marks=pytest.mark.slow),
    ],
    ids=["plain", "demonstration", "adaptive", "resume", "mixed_temperature", "budget", "prioritized", "refill"],
)
def test_copies_of_a_prompt_get_samples_of_their_own(model, params, plan):
    one = jax.tree.map(lambda x: np.repeat(x, 6, axis=0), with_demonstrations(1))
    prompts = one.replace(fields={**one.fields, "repeat": np.arange(6, dtype=np.int32)})
    rewards = [lambda sample: (sample % 2).astype(jnp.float32)]
    _, rows = one_step(composed(model, plan, 4, rewards), params, prompts)
    there = (rows.weight > 0) & (rows.source[:, 0] != Source.DEMONSTRATION)
    assert there.sum() >= 12
    assert len(set(rows.sample[there].tolist())) == there.sum()
    assert len({tuple(row) for row in rows.behaviour_logprobs[there].tolist()}) > 0.9 * there.sum()


# ---- selection ------------------------------------------------------------------------------------------------------


def test_a_selection_learns_of_a_step_two_steps_later(model, params):
    """A selection by the number of rows so far, with a queue of two steps."""
    selection = Selection(
        init=lambda: {"rows": jnp.int32(0), "last": jnp.int32(-1)},
        choose=lambda memory, key, count: (memory["rows"] // 4 + jnp.arange(count)) % 8,
        update=lambda memory, item, step: {"rows": memory["rows"] + item.shape[0], "last": jnp.int32(step)},
    )
    step = composed(model, None, rollout={"prompts_per_step": 2, "selection": selection})
    state = step.init(KEY, params)
    np.testing.assert_array_equal(state.memory["selection"]["choices"], [[0, 1], [0, 1]])
    seen, every = [], make_prompts(8)
    for number in range(4):
        chosen = np.asarray(state.memory["selection"]["choices"][0])
        seen.append(chosen.tolist())
        prompts = jax.tree.map(lambda x, chosen=chosen: x[chosen], every).replace(fields={"item": chosen})
        state, _, rows = step.run(state, prompts)
        np.testing.assert_array_equal(rows["item"], np.repeat(chosen, 2))
        memory = jax.device_get(state.memory["selection"]["memory"])
        assert memory == {"rows": 4 * (number + 1), "last": number}
    assert seen == [[0, 1], [0, 1], [1, 2], [2, 3]]


def test_a_selection_hands_a_plan_of_rounds_all_that_it_may_come_to(model, params):
    selection = Selection(
        init=lambda: jnp.int32(0), choose=lambda memory, key, count: jnp.arange(count), update=lambda memory: memory
    )
    rollout = {"prompts_per_step": 2, "selection": selection}
    step = composed(model, refilled(max_rounds=3), rollout=rollout)
    np.testing.assert_array_equal(step.init(KEY, params).memory["selection"]["choices"], [range(6)] * 2)


# ---- refusals -------------------------------------------------------------------------------------------------------

TWO = plain(samples_per_prompt=2)
ROUNDS = refilled(max_rounds=2)
GREEDY = greedy_baseline(TWO, temperature=1.0)
WRITTEN = demonstration_in_group(TWO, **WIDTHS)
UNEVEN = budget(TWO, samples_per_prompt=2, prompt_ids=8, most=8)
MIXED = mixed_temperature(TWO, samples_per_prompt=2, prompt_share=0.5, temperature=1.5)
STARTED = started(2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: in_rounds(4, max_rounds=1), "draws at most 1 x 2 samples"),
        (lambda: in_rounds(max_rounds=0), "max_rounds is 0; it must be at least 1"),
        (lambda: refilled(max_rounds=0), "max_rounds is 0"),
        (
            lambda: budget(TWO, samples_per_prompt=2, prompt_ids=4, least=4, most=8),
            "it is the mean and must lie between",
        ),
        (lambda: budget(TWO, samples_per_prompt=2, prompt_ids=0), "prompt_ids is 0; it must be at least 1"),
        (lambda: by_priority(3, rounds=2), "samples_per_prompt is 3, but .* it must be at least 4"),
        (lambda: prioritized(TWO, samples_per_prompt=2, first_samples=1), "first_samples is 1; it must be at least 2"),
        (lambda: demonstration_in_group(plain(samples_per_prompt=1), **WIDTHS), "samples_per_prompt is 1"),
        (lambda: prefixes(TWO, texts=("a", "b", "c"), encode=encode, **WIDTHS), "3 texts, which do not divide"),
        (lambda: prefixes(TWO, texts=("abca",), encode=encode, **WIDTHS), "leaves nothing of rollout.max_completion"),
        (lambda: mixed_temperature(TWO, samples_per_prompt=2, prompt_share=0.0, temperature=1.0), "prompt_share is 0"),
        (lambda: mixed_temperature(TWO, samples_per_prompt=2, prompt_share=0.5, temperature=0), "must be above 0"),
        (lambda: resumed(from_the_start, plain(samples_per_prompt=3)), "the plan inside of it draws 3 completions"),
    ],
)
def test_bad_plans(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "name, make, capability",
    [
        ("refill", lambda: refilled(ROUNDS), "one_round"),
        ("refill", lambda: refilled(UNEVEN), "equal_groups"),
        ("refill", lambda: refilled(MIXED), "one_group_a_prompt"),
        ("greedy_baseline", lambda: greedy_baseline(in_rounds(), temperature=1.0), "one_round"),
        ("greedy_baseline", lambda: greedy_baseline(MIXED, temperature=1.0), "one_group_a_prompt"),
        ("prefixes", lambda: prefixes(UNEVEN, texts=("a",), encode=encode, **WIDTHS), "equal_groups"),
        ("prefixes", lambda: prefixes(WRITTEN, texts=("a",), encode=encode, **WIDTHS), "drawn_by_policy"),
        ("resume", lambda: resumed(from_the_start, ROUNDS), "one_round"),
        (
            "mixed_temperature",
            lambda: mixed_temperature(UNEVEN, samples_per_prompt=2, prompt_share=1, temperature=1.0),
            "equal_groups",
        ),
        ("adaptive", lambda: adaptive(WRITTEN, samples_per_prompt=2), "any_number"),
        ("adaptive", lambda: adaptive(GREEDY, samples_per_prompt=2), "any_number"),
        ("adaptive", lambda: adaptive(STARTED, samples_per_prompt=2), "any_number"),
        ("budget", lambda: budget(WRITTEN, samples_per_prompt=2, prompt_ids=8, most=8), "any_number"),
        ("budget", lambda: budget(STARTED, samples_per_prompt=2, prompt_ids=8, most=8), "any_number"),
        ("prioritized", lambda: prioritized(UNEVEN, samples_per_prompt=8), "equal_groups"),
        ("demonstration_in_group", lambda: demonstration_in_group(STARTED, **WIDTHS), "any_number"),
        ("demonstration_in_group", lambda: demonstration_in_group(WRITTEN, **WIDTHS), "any_number"),
    ],
)
def test_a_plan_that_cannot_be_made_around_another_says_why(name, make, capability):
    message = rf"rollout.plan.{name} needs .* \({capability}\), which the plan inside of it does not offer"
    with pytest.raises(ValueError, match=message):
        make()


def test_branches_do_not_know_what_the_first_completions_are_compared_with():
    with pytest.raises(ValueError, match=r"resume .*'baseline_rewards'"):
        resumed(from_the_start, GREEDY)


def test_bad_compositions(model):
    step = composed(model, refilled(max_rounds=2))
    state = step.init(KEY)
    with pytest.raises(ValueError, match="the step was handed 7 prompts"):
        step.run(state, make_prompts(7), None, None)
    with pytest.raises(ValueError, match="provides"):
        composed(model, refilled(), credit=[("advantages", advantages.pool_centred)])
    with pytest.raises(ValueError, match="greedy_baseline needs rows sampled in one round"):
        composed(model, in_rounds(), credit=[("advantages", above_baseline)])
    plan = budget(TWO, samples_per_prompt=2, prompt_ids=4)
    assert composed(model, plan, update=Update(minibatches_per_epoch=2)) is not None
