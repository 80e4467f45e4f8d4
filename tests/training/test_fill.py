"""What fills rows: several names at once, readings, rows that were written, views, and networks beside the policy."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Loss, Sequences
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.rewards.host import RewardError
from jaxrl_llm.rows import Written, written_rows
from jaxrl_llm.signatures import reading
from jaxrl_llm.training import Fill, Network, Resources, Reward, Rollout, make_train_step
from jaxrl_llm.training.scores import hidden_states

ROLLOUT = Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0)
ITEMS = [{"body": f"p{number}", "answer": f"{number}"} for number in range(4)]
PLAIN = [("advantages", advantages.group_normalized)]


def fives(tokens, length):
    """Share of the length limit that is the symbol 5."""
    return ((tokens == 5) & (jnp.arange(tokens.shape[1]) < length[:, None])).sum(1) / tokens.shape[1]


def decode(ids):
    return "".join(f"{number:x}" for number in ids)


def composed(model, rewards=(fives,), credit=PLAIN, losses=(losses.policy_gradient,), **changes):
    resources = {"decode": decode} | {
        name: changes.pop(name) for name in ("networks", "views", "critic") if name in changes
    }
    parts = {"source": ROLLOUT, "resources": Resources(**resources)} | changes
    optimizer = parts.pop("optimizer", optax.sgd(0.1))
    return make_train_step(model, optimizer, rewards=rewards, credit=credit, losses=losses, **parts)


def first(step, prompts, **given):
    """(metrics, rows) of the first step."""
    _, metrics, rows = step.run(step.init(jax.random.key(0)), prompts, ITEMS, **given)
    return jax.device_get(metrics), jax.tree.map(np.asarray, rows)


def completions_of(rows):
    return [decode(tokens[:length].tolist()) for tokens, length in zip(rows.tokens, rows.length, strict=True)]


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_one_fill_gives_two_names(bigram, make_prompts, as_dictionary):
    def both(rewards, mask):
        pair = rewards + 1, jnp.cumsum(mask, axis=1)
        return dict(zip(("token_weight", "advantages"), (pair[1], pair[0]), strict=True)) if as_dictionary else pair

    def weighted(logprobs, advantages, token_weight, mask):
        return losses.policy_gradient(logprobs, advantages * token_weight, mask)

    step = composed(bigram, credit=[Fill(("advantages", "token_weight"), both)], losses=[weighted])
    _, rows = first(step, make_prompts(4))
    assert len(step.programs) == 1
    np.testing.assert_allclose(rows["advantages"], (rows["rewards"][:, None] + 1) * rows.mask)
    np.testing.assert_array_equal(rows["token_weight"], np.cumsum(rows.mask, axis=1))


def test_a_fill_of_two_names_that_gives_one_is_refused(bigram, make_prompts):
    step = composed(bigram, credit=[(("advantages", "token_weight"), lambda rewards: rewards)])
    with pytest.raises(ValueError, match="must return 2 arrays in that order"):
        first(step, make_prompts(4))


# ---- readings -------------------------------------------------------------------------------------------------------


def test_a_reading_in_credit_cuts_the_step_in_two_and_sees_what_is_filled_before_it(bigram, make_prompts):
    def read(completions, rewards):
        return [reward + len(text) for text, reward in zip(completions, rewards, strict=True)]

    step = composed(bigram, credit=[("advantages", read)])
    assert len(step.programs) == 2
    metrics, rows = first(step, make_prompts(4))
    expected = rows["rewards"] + rows.length
    np.testing.assert_allclose(rows["advantages"][:, 0], expected, rtol=1e-6)
    assert metrics["seconds/read"] >= 0


def test_a_reading_may_give_a_number_a_token_or_a_row_for_whichever_its_name_takes(bigram, make_prompts):
    def places(completions):
        return [np.arange(len(text)) + 1.0 for text in completions]

    def both(completions):
        return [len(text) for text in completions], places(completions)

    def weighted(logprobs, advantages, token_weight, mask):
        return losses.policy_gradient(logprobs, advantages * token_weight, mask)

    credit = [Fill(("token_weight", "advantages"), both)]
    metrics, rows = first(composed(bigram, credit=credit, losses=[weighted]), make_prompts(4))
    np.testing.assert_array_equal(rows["advantages"], np.cumsum(rows.mask, axis=1) * rows.mask)
    np.testing.assert_array_equal(rows["token_weight"], rows.length[:, None] * rows.mask)
    assert np.isfinite(metrics["loss"])


def test_none_and_nan_leave_a_reward_out_and_rows_where_nothing_applies_are_absent(bigram, make_prompts):
    def sometimes(prompts):
        return [{"p0": None, "p1": float("nan")}.get(prompt, 2.0) for prompt in prompts]

    def on_its_own(prompts):
        return [None if prompt == "p1" else 0.5 for prompt in prompts]

    step = composed(bigram, rewards=[sometimes, on_its_own])
    metrics, rows = first(step, make_prompts(4))
    np.testing.assert_allclose(rows["rewards"], [0.5, 0.5, 0, 0, 2.5, 2.5, 2.5, 2.5])
    np.testing.assert_array_equal(rows.weight, [1, 1, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(np.isnan(rows["reward_components"]).sum(1), [1, 1, 2, 2, 0, 0, 0, 0])
    np.testing.assert_allclose(metrics["unrated_share"], 0.25)
    np.testing.assert_allclose(metrics["reward"], np.mean([0.5, 0.5, 2.5, 2.5, 2.5, 2.5]))
    assert np.isfinite(metrics["loss"])


def test_a_function_of_one_row_is_called_for_each(bigram, make_prompts):
    def rate(completion, answer, item):
        assert item["answer"] == answer
        return len(completion) + 10 * int(answer)

    _, rows = first(composed(bigram, rewards=[rate]), make_prompts(4))
    np.testing.assert_allclose(rows["rewards"], rows.length + 10 * np.repeat(np.arange(4), 2))


def test_a_function_may_be_async(bigram, make_prompts):
    async def ask(completion):
        await asyncio.sleep(0.001)
        return float(len(completion))

    async def ask_all(completions):
        await asyncio.sleep(0.001)
        return [float(len(text)) for text in completions]

    _, rows = first(composed(bigram, rewards=[ask, ask_all]), make_prompts(4))
    np.testing.assert_allclose(rows["reward_components"], np.stack([rows.length] * 2, axis=1))


def test_a_function_of_any_keywords_gets_all_text(bigram, make_prompts):
    seen = {}

    def judge(completions, **others):
        seen.update(others)
        return [0.0 for _ in completions]

    first(composed(bigram, rewards=[judge]), make_prompts(4))
    assert seen.keys() == {"prompts", "answers", "items"}
    assert seen["answers"] == list("00112233")


def test_a_late_call_gets_the_value_on_failure_and_is_counted(bigram, make_prompts):
    def slow(answer):
        if answer == "2":
            time.sleep(0.5)
        if answer == "3":
            raise OSError("no connection")
        return 1.0

    step = composed(bigram, rewards=[Reward(slow, deadline_s=0.1, value_on_failure=-1.0)])
    metrics, rows = first(step, make_prompts(4))
    np.testing.assert_allclose(rows["rewards"], [1, 1, 1, 1, -1, -1, -1, -1])
    assert metrics["failures/slow"] == 4
    with pytest.raises(RewardError, match=r"'slow' (took longer than|raised OSError)"):
        first(composed(bigram, rewards=[Reward(slow, deadline_s=0.1)]), make_prompts(4))


def test_a_reading_of_arrays_needs_no_items(bigram, make_prompts):
    @reading
    def total(tokens, length):
        assert isinstance(tokens, np.ndarray)
        return [row[:count].sum() for row, count in zip(tokens, length, strict=True)]

    step = composed(bigram, rewards=[total])
    _, metrics, rows = step.run(step.init(jax.random.key(0)), make_prompts(4))
    np.testing.assert_allclose(metrics["reward"], np.sum(rows.tokens * rows.mask) / 8, rtol=1e-6)


def test_equal_answers_of_a_group_get_equal_ids(bigram, make_prompts):
    rollout = Rollout(samples_per_prompt=4, max_completion_tokens=6, eos_ids=(2,), pad_id=0)

    def said(completion):
        return None if completion.startswith("5") else completion[:1]

    def shares(answer_id, group):
        same = (answer_id[:, None] == answer_id) & (group[:, None] == group)
        return same.mean(1)

    step = composed(bigram, credit=[("answer_id", said), ("advantages", shares)], source=rollout)
    _, rows = first(step, make_prompts(4))
    texts, ids, groups = [text[:1] for text in completions_of(rows)], rows["answer_id"], rows.group
    assert (ids[[text == "5" for text in texts]] == -1).all()
    for row, text in enumerate(texts):
        if text == "5":
            continue
        # The number of the first row of the group that has the answer.
        assert ids[row] == next(r for r in range(16) if groups[r] == groups[row] and texts[r] == text)
    assert len({text for text in texts if text != "5"}) > 1


# ---- rows that were written -----------------------------------------------------------------------------------------


def from_file(rows, **fields):
    return written_rows(
        rows.prompt_tokens,
        rows.prompt_length,
        rows.prompt_id,
        rows.tokens,
        rows.length,
        answer_width=2,
        rows_per_group=2,
        alone=True,
        **fields,
    )


def test_a_step_of_written_rows_alone_is_one_program_that_learns_them(bigram, rows):
    written = from_file(rows)
    step = make_train_step(
        bigram, optax.adam(0.1), source=Written(8, rows_per_group=2), losses=[losses.negative_log_likelihood]
    )
    assert len(step.programs) == 1
    state, seen = step.init(jax.random.key(0)), []
    statistics = token_statistics(bigram, state.params, hidden_states(bigram, state.params, rows), rows.tokens)
    expected = -float((statistics.logprobs * rows.mask).sum() / rows.mask.sum())
    for _ in range(8):
        state, metrics = step(state, written=written)
        seen.append(float(metrics["loss"]))
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5)
    assert seen[-1] < seen[0] - 0.5
    assert state.networks.keys() == {"policy"}
    with pytest.raises(ValueError, match="learns from written rows"):
        step(state)
    with pytest.raises(ValueError, match="composed for 8"):
        step(state, written=jax.tree.map(lambda x: x[:4], written))


def preference(logprobs, old_logprobs, preferred, group, mask):
    """How much further the better row of a pair has moved than the other; at the first update 0 by itself."""
    gain = jax.ops.segment_sum((logprobs * mask).sum(1) * (2 * preferred - 1), group, num_segments=mask.shape[0])
    start = jax.ops.segment_sum((old_logprobs * mask).sum(1) * (2 * preferred - 1), group, num_segments=mask.shape[0])
    pairs = jax.ops.segment_sum(mask.max(1) / 2, group, num_segments=mask.shape[0])
    return Loss((pairs * jax.nn.softplus(start - gain)).sum(), pairs.sum())


@pytest.mark.parametrize("loss", [preference, losses.dpo])
def test_a_loss_over_pairs_of_written_rows_prefers_the_better_ones(bigram, rows, loss):
    preferred = jnp.tile(jnp.array([1.0, 0.0]), 4)
    source = Written(8, rows_per_group=2, provides=frozenset({"preferred"}))
    step = make_train_step(bigram, optax.adam(0.1), source=source, losses=[loss])
    written = from_file(rows, preferred=preferred)

    def margin(params):
        scored = token_statistics(bigram, params, hidden_states(bigram, params, rows), rows.tokens).logprobs
        totals = (scored * rows.mask).sum(1)
        return np.asarray(totals[::2] - totals[1::2])

    state = step.init(jax.random.key(0))
    before, seen = margin(state.params), []
    for _ in range(4):
        state, metrics = step(state, written=written)
        seen.append(float(metrics["loss"]))
    np.testing.assert_allclose(seen[0], np.log(2), rtol=0.1 if loss is losses.dpo else 1e-5)
    assert margin(state.params).mean() > before.mean() + 1


def test_a_name_that_written_rows_do_not_know_is_refused(bigram):
    with pytest.raises(ValueError, match=r"'preferred', .* written rows provide it"):
        make_train_step(bigram, optax.sgd(0.1), source=Written(8, rows_per_group=2), losses=[losses.dpo])


# ---- views ----------------------------------------------------------------------------------------------------------


def reversed_answer(prompt_tokens, prompt_length, tokens, length):
    """The tokens of a completion but the last two, backwards."""
    kept = jnp.maximum(length - 2, 1)
    place = jnp.clip(kept[:, None] - 1 - jnp.arange(tokens.shape[1]), 0)
    inside = jnp.arange(tokens.shape[1]) < kept[:, None]
    turned = jnp.where(inside, jnp.take_along_axis(tokens, place, axis=1), 0)
    return Sequences(prompt_tokens, prompt_length, turned, kept, inside.astype(jnp.float32))


def test_log_probabilities_of_a_view_are_those_of_the_same_sequence(model, make_prompts):
    def kept(old_turned_logprobs, reference_turned_logprobs, turned_mask, rewards):
        return rewards

    def likelihood(turned_logprobs, turned_mask):
        return Loss(-(turned_logprobs * turned_mask).sum(), turned_mask.sum())

    step = composed(
        model,
        credit=[("advantages", kept)],
        losses=[losses.policy_gradient, likelihood],
        views={"turned": reversed_answer},
    )
    state = step.init(jax.random.key(0))
    params = jax.tree.map(np.array, state.params)
    _, metrics, rows = step.run(state, make_prompts(4))
    view = reversed_answer(rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length)
    direct = rows.replace(tokens=view.tokens, length=view.length)
    scored = token_statistics(model, params, hidden_states(model, params, direct), view.tokens).logprobs * view.mask
    np.testing.assert_array_equal(rows["turned_mask"], view.mask)
    for name in ("old_turned_logprobs", "reference_turned_logprobs"):
        np.testing.assert_allclose(rows[name] * view.mask, scored, atol=1e-5)
    np.testing.assert_allclose(metrics["loss/likelihood"], -scored.sum() / view.mask.sum(), rtol=1e-4)


# ---- networks -------------------------------------------------------------------------------------------------------


def naming(*asked):
    """A loss on which a policy learns that names more than it needs."""
    names = ", ".join(asked)
    space = {"losses": losses}
    exec(
        f"def loss(logprobs, advantages, mask, {names}):\n"
        "    return losses.policy_gradient(logprobs, advantages, mask)",
        space,
    )
    return space["loss"]


def scores_after(step, prompts, name, count):
    """Tables of scores of the policy and of one network after each of some steps, the start in front."""
    state, seen = step.init(jax.random.key(0)), []
    for number in range(count + 1):
        seen.append([np.array(state.networks[who].params["scores"]) for who in ("policy", name)])
        if number < count:
            state, _ = step(state, prompts)
    return seen


def test_a_network_with_decay_is_a_moving_average_of_the_policy(bigram, make_prompts):
    step = composed(bigram, losses=[naming("slow_logprobs")], networks={"slow": Network(decay=0.75)})
    (start, slow), *later = scores_after(step, make_prompts(4), "slow", 3)
    np.testing.assert_array_equal(start, slow)
    for policy, found in later:
        slow = 0.75 * slow + 0.25 * policy
        np.testing.assert_allclose(found, slow, atol=1e-6)
    assert np.abs(later[-1][0] - slow).max() > 1e-4


def test_a_network_with_copy_every_is_the_policy_of_some_steps_before(bigram, make_prompts):
    step = composed(bigram, losses=[naming("late_logprobs")], networks={"late": Network(copy_every=2)})
    seen = scores_after(step, make_prompts(4), "late", 5)
    for number, (_, late) in enumerate(seen):
        np.testing.assert_array_equal(late, seen[number - number % 2][0])
    assert np.abs(seen[2][0] - seen[0][0]).max() > 1e-4


def test_a_network_at_another_temperature_scores_at_that(bigram, make_prompts):
    networks = {"cold": Network(always_origin=True, temperature=0.5)}
    step = composed(bigram, losses=[naming("cold_logprobs", "old_logprobs")], networks=networks)
    state = step.init(jax.random.key(0))
    assert state.networks.keys() == {"policy"}
    params = jax.tree.map(np.array, state.params)
    _, _, rows = step.run(state, make_prompts(4))
    scored = partial(token_statistics, bigram, params, hidden_states(bigram, params, rows), rows.tokens)
    for name, temperature in (("cold_logprobs", 0.5), ("old_logprobs", 1.0)):
        expected = scored(temperature=temperature).logprobs
        np.testing.assert_allclose(rows[name] * rows.mask, expected * rows.mask, atol=1e-5)


def test_a_network_that_nothing_names_is_not_there(bigram):
    step = composed(bigram, networks={"slow": Network(decay=0.75)})
    assert jax.eval_shape(step.init, jax.random.key(0)).networks.keys() == {"policy"}
