"""Plans of sampling, alone and around each other, against the same samples asked for by hand."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses, schedules
from jaxrl_llm.experience import KeyUse, Source
from jaxrl_llm.rollout import generate, plans
from jaxrl_llm.rollout.plans import from_the_start, highest_entropy, last_share
from jaxrl_llm.selection import knapsack_rollouts
from jaxrl_llm.training import Resources, Rollout, Update, make_train_step

SIZES = {"max_completion_tokens": 4, "eos_ids": (2,), "pad_id": 0}
ITEMS = [{"body": str(number), "answer": ""} for number in range(8)]
KEY = jax.random.key(0)


def even(tokens):
    """1 where the first token is even."""
    return (tokens[:, 0] % 2 == 0).astype(jnp.float32)


def even_on_the_host(completions, items):
    # The items must be those of the rows: their number is the prompt's.
    assert all(item["body"].isdigit() for item in items)
    return [float(int(text[0], 16) % 2 == 0) for text in completions]


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


# ---- rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_host", [False, True])
def test_groups_that_are_alike_are_replaced_by_those_of_new_prompts(bigram, params, make_prompts, every, on_host):
    step = composed(bigram, refill(max_rounds=4), rewards=[even_on_the_host if on_host else even])
    assert len(step.programs) == (4 if on_host else 1)
    metrics, rows = one_step(step, params, make_prompts(8), ITEMS)
    right = every.tokens[:, :2, 0] % 2 == 0
    kept, rounds = [], 0
    while len(kept) < 2 and rounds < 4:
        kept += [n for n in range(2 * rounds, 2 * rounds + 2) if right[n].any() and not right[n].all()]
        rounds += 1
    assert rounds > 1, "a test in which nothing is refilled shows nothing"
    np.testing.assert_array_equal(rows.tokens, every.tokens[kept[:2], :2].reshape(4, -1))
    np.testing.assert_array_equal(rows.prompt_id, np.repeat(kept[:2], 2))
    np.testing.assert_array_equal(rows.group, [0, 0, 1, 1])
    np.testing.assert_array_equal(rows.weight, np.ones(4))
    np.testing.assert_allclose(rows["rewards"], right[kept[:2]].reshape(-1))
    assert (metrics["rounds"], metrics["groups_sampled"], metrics["groups_kept"]) == (rounds, 2 * rounds, 2)
    np.testing.assert_allclose(metrics["sampled_accuracy"], right[: 2 * rounds].mean())


def test_places_that_stay_empty_have_no_weight_and_change_nothing(bigram, params, make_prompts):
    step = composed(bigram, refill(max_rounds=2), rewards=[lambda tokens: jnp.ones(tokens.shape[0])])
    state = step.init(KEY, params)
    before = jax.device_get(state.params)
    state, metrics, rows = step.run(state, make_prompts(8))
    np.testing.assert_array_equal(rows.weight, 0)
    assert metrics["groups_kept"] == 0
    assert all(np.isfinite(value) for value in jax.device_get(metrics).values())
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


@pytest.mark.parametrize("on_host", [False, True])
def test_prompts_are_sampled_until_they_have_enough_of_both_kinds(bigram, params, make_prompts, every, on_host):
    kept = 2
    step = composed(
        bigram,
        adaptive(max_rounds=3, samples_per_round=2),
        samples=kept,
        rewards=[even_on_the_host if on_host else even],
        credit=[("advantages", advantages.pool_centred)],
    )
    metrics, rows = one_step(step, params, make_prompts(8), ITEMS)
    right = every.tokens[:, :, 0] % 2 == 0
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
        np.testing.assert_array_equal(rows.tokens[ours], every.tokens[n, chosen])
        np.testing.assert_array_equal(rows.sample[ours], chosen)
        mean = right[n, :count].mean()
        np.testing.assert_allclose(rows["pool_mean"][ours], mean, rtol=1e-6)
        np.testing.assert_allclose(rows["pool_count"][ours], count)
        np.testing.assert_allclose(rows["advantages"][ours, 0], right[n, chosen] - mean, rtol=1e-5, atol=1e-6)
    assert len(set(used)) > 1
    assert metrics["samples_drawn"] == sum(used)
    assert metrics["rounds"] == max(used) // 2
    np.testing.assert_array_equal(rows.weight, np.ones(16))


def test_a_budget_follows_what_was_right_at_the_last_visit(bigram, params, make_prompts):
    prompts = make_prompts(8)
    plan = plans.budget(plain(3), samples_per_prompt=3, prompt_ids=8, least=1, most=8)
    step = composed(bigram, plan, samples=3)
    state = step.init(KEY, params)
    state, _, first = step.run(state, prompts)
    np.testing.assert_array_equal(first.group, np.repeat(np.arange(8), 3))
    rate = np.asarray(first["correct"]).reshape(8, 3).mean(1)
    success = state.memory["rollout:plan"]
    np.testing.assert_allclose(success.rate, rate, rtol=1e-6)
    assert bool(success.seen.all())
    expected = knapsack_rollouts(jnp.asarray(rate), jnp.ones(8, bool), samples_per_prompt=3, least=1, most=8)
    params = jax.device_get(state.params)
    _, _, second = step.run(state, prompts)
    np.testing.assert_array_equal(np.bincount(second.group, minlength=8), expected)
    assert len(set(np.asarray(expected).tolist())) > 1
    every = drawn(bigram, params, prompts, 8, step=1)
    rows = np.concatenate([8 * n + np.arange(count) for n, count in enumerate(expected)])
    np.testing.assert_array_equal(second.tokens, every.tokens[rows])


def test_rounds_in_slots_are_the_same(bigram, params, make_prompts):
    plan = adaptive(max_rounds=3, samples_per_round=2)
    one, other = (
        one_step(composed(bigram, plan, sizes={"slots": slots}), params, make_prompts(8)) for slots in (None, 3)
    )
    np.testing.assert_array_equal(one[1].tokens, other[1].tokens)


def test_prompts_that_are_there_twice_get_samples_of_their_own_in_every_round(bigram, params, make_prompts):
    prompts = jax.tree.map(lambda x: x[np.array([3, 3])], make_prompts(8))
    prompts = prompts.replace(fields={"repeat": np.array([0, 1], np.int32)})
    plan = adaptive(4, max_rounds=2, samples_per_round=2, threshold=9.0)  # nothing is ever right
    _, rows = one_step(composed(bigram, plan, samples=4), params, prompts)
    np.testing.assert_array_equal(rows.sample, np.arange(8))
    np.testing.assert_array_equal(rows.tokens, drawn(bigram, params, make_prompts(8), 8).tokens[24:32])


def test_copies_of_a_prompt_have_sample_numbers_of_their_own(make_prompts):
    prompts = make_prompts(2).replace(fields={"repeat": np.array([0, 1], np.int32)})
    for plan in (plain(3), mixed(plain(2)), refill(3, max_rounds=1), branching(), mixed(prefixed(2, "1"))):
        seen = set()
        for request in plan.requests(None, None, prompts):
            first = np.broadcast_to(request.first_sample, (request.prompts.prompt_id.shape[0],))
            repeats = np.asarray(request.prompts.fields["repeat"])
            for repeat, number in zip(repeats.tolist(), first.tolist(), strict=True):
                mine = {(number + sample) for sample in range(request.samples_per_prompt)}
                assert not mine & {number for other, number in seen if other != repeat}
                seen |= {(repeat, number) for number in mine}


def branching():
    return plans.resume(
        plain(1), choose=last_share, samples_per_prompt=2, branches=1, max_completion_tokens=4, pad_id=0
    )  # fmt: skip


# ---- one round ------------------------------------------------------------------------------------------------------


def test_prompts_that_are_there_twice_get_samples_of_their_own(bigram, params, make_prompts, every):
    prompts = jax.tree.map(lambda x: x[np.array([3, 5, 3, 3])], make_prompts(8))
    prompts = prompts.replace(fields={"repeat": np.array([0, 0, 1, 2], np.int32)})
    _, rows = one_step(composed(bigram, None), params, prompts)
    np.testing.assert_array_equal(rows.group, [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(rows.sample, [0, 1, 0, 1, 2, 3, 4, 5])
    expected = [*every.tokens[3, :2], *every.tokens[5, :2], *every.tokens[3, 2:6]]
    np.testing.assert_array_equal(rows.tokens, expected)
    assert len({tuple(row) for row in every.tokens[3].tolist()}) > 3


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


# ---- around each other ----------------------------------------------------------------------------------------------


def test_a_greedy_baseline_around_prefixes_starts_as_the_last_sample_does(bigram, params, make_prompts):
    step = composed(bigram, prefixed(2, "7", "89"), rewards=[sevens], credit=BASELINE)
    _, rows = one_step(step, params, make_prompts(4))
    assert (rows.tokens[::2, 0] == 7).all()
    assert (rows.tokens[1::2, :2] == [8, 9]).all()
    # Greedily from 8 9: the likeliest way on in the table.
    table, expected = np.asarray(params["scores"]), [8, 9]
    while len(expected) < 4 and expected[-1] != 2:
        expected.append(int(table[expected[-1]].argmax()))
    reward = float(sevens(jnp.asarray([expected]), jnp.asarray([len(expected)]))[0])
    np.testing.assert_allclose(rows["baseline_rewards"], reward, rtol=1e-6)


def test_prefixes_inside_of_demonstrations_are_those_of_the_samples_that_are_drawn(make_prompts):
    given = {"demonstration_tokens": np.ones((4, 3), np.int32), "demonstration_length": np.full(4, 3, np.int32)}
    prompts = make_prompts(4).replace(fields=given)
    sampled, written = demonstrated(prefixed(4, "7", "89")).requests(None, None, prompts)
    assert (sampled.samples_per_prompt, written.samples_per_prompt) == (3, 1)
    np.testing.assert_array_equal(sampled.prefixes.length, [1, 1, 2] * 4)
    np.testing.assert_array_equal(written.prefixes.tokens, [[1, 1, 1, 0]] * 4)


def second_even(tokens):
    return (tokens[:, 1] % 2 == 0).astype(jnp.float32)


def test_refill_around_prefixes_asks_for_them_in_every_round(bigram, params, make_prompts):
    alone = one_step(composed(bigram, prefixed(2, "7"), rewards=[second_even]), params, make_prompts(8))[1]
    plan = refill(2, prefixed(2, "7"), max_rounds=4)
    metrics, rows = one_step(composed(bigram, plan, rewards=[second_even]), params, make_prompts(8))
    assert (rows.tokens[:, 0] == 7).all()
    assert (rows.source[:, 0] == Source.HINT).all()
    assert (rows.mask[:, 0] == 0).all()
    right = np.asarray(alone["rewards"]).reshape(8, 2)
    kept = np.flatnonzero(right.max(1) > right.min(1))[:2]
    np.testing.assert_array_equal(rows.prompt_id, np.repeat(kept, 2))
    np.testing.assert_array_equal(rows.tokens, np.asarray(alone.tokens).reshape(8, 2, 4)[kept].reshape(4, 4))
    assert metrics["groups_kept"] == 2


# ---- going on from a position ---------------------------------------------------------------------------------------


def resumed(branches=2, samples=4, choose=last_share, **options):
    return plans.resume(
        plain(samples - branches), choose=choose, samples_per_prompt=samples, branches=branches,
        max_completion_tokens=8, pad_id=0, encode=lambda text: [int(symbol, 16) for symbol in text], **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def branched(bigram, params, make_prompts):
    """Hint, whether the prefix is trained on -> (metrics, rows of four prompts)."""
    found = {}

    def at(**options):
        key = tuple(options.items())
        if key not in found:
            step = composed(bigram, resumed(**options), samples=4, sizes={"max_completion_tokens": 8})
            found[key] = one_step(step, params, make_prompts(4))
        return found[key]

    return at


def split(rows):
    """Two completions of each prompt, and the two that go on from them."""
    rows = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), rows)
    return jax.tree.map(lambda x: x[:, :2], rows), jax.tree.map(lambda x: x[:, 2:], rows)


def test_a_branch_keeps_the_tokens_before_its_position_and_goes_on_by_itself(branched):
    metrics, rows = branched()
    np.testing.assert_array_equal(rows.group, np.repeat(np.arange(4), 4))
    np.testing.assert_array_equal(rows.sample, np.tile(np.arange(4), 4))
    np.testing.assert_array_equal(rows["branch"], np.tile([0, 0, 1, 1], 4))
    first, branch = split(rows)
    kept = first.length // 2
    before = np.arange(8) < kept[..., None]
    np.testing.assert_array_equal(np.where(before, branch.tokens, 0), np.where(before, first.tokens, 0))
    assert (branch.tokens != first.tokens).any(), "a branch has samples of its own"
    # What was kept is no token of the branch's own: it is not trained on.
    inside = np.arange(8) < branch.length[..., None]
    np.testing.assert_array_equal(branch.mask, (inside & ~before).astype(np.float32))
    np.testing.assert_array_equal(branch.source == Source.HINT, before)
    assert metrics["resumed_tokens"] == pytest.approx(kept.mean())
    assert kept.max() > kept.min() >= 1


def test_the_first_completions_are_those_of_a_plain_plan(bigram, params, make_prompts, branched):
    plain_rows = drawn(bigram, params, make_prompts(4), 2)
    first, _ = split(branched()[1])
    np.testing.assert_array_equal(first.tokens[:, :, :4].reshape(8, 4), plain_rows.tokens)
    # Log-probabilities of what a branch was given are the policy's own.
    _, branch = split(branched()[1])
    assert (branch.behaviour_logprobs[np.arange(8) < branch.length[..., None]] < 0).all()


def test_the_policys_own_tokens_may_be_trained_on_in_the_branch_too(branched):
    first, branch = split(branched(trained_prefix=True)[1])
    np.testing.assert_array_equal(branch.tokens, split(branched()[1])[1].tokens)
    inside = np.arange(8) < branch.length[..., None]
    np.testing.assert_array_equal(branch.mask, inside.astype(np.float32))
    np.testing.assert_array_equal(branch.source == Source.SAMPLED, inside)
    assert first.mask.sum() > 0


def test_a_retry_starts_afresh_behind_its_hint(branched):
    first, branch = split(branched(hint="ef", choose=from_the_start)[1])
    assert (branch.tokens[..., :2] == [14, 15]).all()
    assert (branch.source[..., :2] == Source.HINT).all()
    assert (branch.mask[..., :2] == 0).all()
    assert (branch.mask.sum(-1) == branch.length - 2).all()
    assert (first.source != Source.HINT).all()


def test_a_hint_stands_behind_what_is_kept(branched):
    first, branch = split(branched(hint="ef")[1])
    kept = np.minimum(first.length // 2, 8 - 2 - 2)
    for row in np.ndindex(4, 2):
        count = kept[row]
        np.testing.assert_array_equal(branch.tokens[row][:count], first.tokens[row][:count])
        np.testing.assert_array_equal(branch.tokens[row][count : count + 2], [14, 15])
        assert branch.mask[row].sum() == branch.length[row] - count - 2


def test_where_a_branch_begins_may_depend_on_rewards(bigram, params, make_prompts):
    """Right completions are gone on from in the middle, wrong ones are tried again."""

    def of_the_right(rewards, length):
        return jnp.where(rewards > 0, length // 2, 0)

    step = composed(bigram, resumed(choose=of_the_right), samples=4, sizes={"max_completion_tokens": 8})
    assert step.composition.plan.reads_rewards
    first, branch = split(one_step(step, params, make_prompts(4))[1])
    np.testing.assert_array_equal(
        (branch.source == Source.HINT).sum(-1), np.where(first["rewards"] > 0, first.length // 2, 0)
    )
    assert 0 < first["rewards"].sum() < 8


def test_the_position_of_highest_entropy_is_one_of_the_candidates():
    entropy = jnp.asarray([[0.1, 3.0, 0.2, 2.0, 9.0], [5.0, 1.0, 4.0, 3.0, 2.0]])
    mask = jnp.asarray([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    drawn = jax.jit(partial(highest_entropy, tokens=2))
    seen = np.array([drawn(entropy, mask, jax.random.key(number)) for number in range(20)])
    assert set(seen[:, 0].tolist()) == {1, 3}
    assert set(seen[:, 1].tolist()) == {0, 2}
    first = highest_entropy(entropy, mask * jnp.asarray([[0.0], [1.0]]), jax.random.key(0), tokens=20)
    assert first[0] == 0, "a row without candidates starts afresh"
    np.testing.assert_array_equal(last_share(jnp.asarray([5, 8]), kept=0.25), [1, 2])


# ---- what cannot be -------------------------------------------------------------------------------------------------


def demonstrated(inner):
    return plans.demonstration_in_group(inner, max_completion_tokens=4, pad_id=0)


def mixed(inner):
    return plans.mixed_temperature(inner, samples_per_prompt=2, prompt_share=0.5, temperature=1.5)


def budgeted(inner, samples=2, **options):
    return plans.budget(inner, samples_per_prompt=samples, **{"prompt_ids": 4, "most": 8, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adaptive(4, max_rounds=1, samples_per_round=2), "draws at most 1 x 2 samples"),
        (lambda: adaptive(2, max_rounds=0), "max_rounds is 0"),
        (lambda: refill(2, max_rounds=0), "max_rounds is 0"),
        (lambda: budgeted(plain(2), least=4), "it is the mean and must lie between"),
        (lambda: budgeted(plain(2), prompt_ids=0), "prompt_ids is 0"),
        (lambda: prefixed(2, "1", "1", "1"), "prefixes has 3 texts, which do not divide"),
        (lambda: prefixed(2, "1" * 4), "a text of 4 tokens, which leaves nothing"),
        (lambda: demonstrated(plain(1)), "use at least 2"),
        (lambda: resumed(branches=3), "at most half of the samples may be branches"),
        (lambda: resumed(branches=0), "branches is 0"),
        (
            lambda: plans.resume(plain(3), choose=last_share, samples_per_prompt=4, max_completion_tokens=4, pad_id=0, branches=2),  # noqa: E501
            "draws 3 completions of a prompt, not 2",
        ),
        (lambda: last_share(jnp.ones(2), kept=1.0), "kept is 1.0"),
        (lambda: highest_entropy(jnp.ones((1, 2)), jnp.ones((1, 2)), KEY, tokens=0), "tokens is 0"),
        # around each other
        (lambda: prefixed(2, "1", inner=demonstrated(plain(2))), r"prefixes needs .*\(drawn_by_policy\)"),
        (lambda: mixed(demonstrated(plain(2))), r"mixed_temperature needs .*\(drawn_by_policy\)"),
        (lambda: refill(2, refill(2)), r"rollout.plan.refill needs rows that come in one round \(one_round\)"),
        (lambda: refill(2, mixed(plain(2))), r"rollout.plan.refill needs one group of each prompt"),
        (lambda: mixed(budgeted(plain(2))), r"mixed_temperature needs groups of one size \(equal_groups\)"),
        (lambda: demonstrated(adaptive(2)), r"demonstration_in_group needs .*\(one_round\), which the plan inside"),
        (lambda: budgeted(mixed(plain(2))), r"rollout.plan.budget needs one group of each prompt"),
        (lambda: plans.greedy_baseline(mixed(plain(2)), temperature=1.0), r"greedy_baseline needs"),
        (lambda: plans.greedy_baseline(refill(2), temperature=1.0), r"greedy_baseline needs .*\(one_round\)"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_a_step_with_a_plan_cannot_be(bigram, make_prompts, traced):
    with pytest.raises(ValueError, match="the step was handed 7 prompts"):
        traced(composed(bigram, refill(max_rounds=2)), make_prompts(7))
    with pytest.raises(ValueError, match="the plan adaptive provides it"):
        composed(bigram, refill(), credit=[("advantages", advantages.pool_centred)])
    with pytest.raises(ValueError, match="groups at another temperature provide it"):
        composed(bigram, None, credit=[("advantages", lambda extra, rewards: rewards * extra)])
    assert composed(bigram, budgeted(plain(2)), update=Update(minibatches_per_epoch=2)) is not None


def test_every_plan_can_be_traced(bigram, make_prompts, traced):
    """Rows and reports of each, as shapes."""
    given = {"demonstration_tokens": np.zeros((8, 4), np.int32), "demonstration_length": np.ones(8, np.int32)}
    prompts = make_prompts(8).replace(fields=given)
    for plan, count in (
        (None, 16),
        (refill(max_rounds=4), 4),
        (adaptive(max_rounds=2), 16),
        (budgeted(plain(2), prompt_ids=8), 16),
        (demonstrated(prefixed(2, "1")), 16),
        (mixed(prefixed(2, "1")), 24),
        (refill(inner=demonstrated(plain(2)), max_rounds=2), 8),
        (branching(), 16),
    ):
        step = composed(bigram, plan)
        _, metrics, rows = traced(step, prompts)
        assert rows.tokens.shape == (count, 4)
        assert step.composition.plan.reports <= metrics.keys()
        assert step.composition.plan.provides <= rows.fields.keys()
