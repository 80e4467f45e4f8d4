"""Fills: rewards and what becomes of their sum, credit in its order, one function for several names, coefficients."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import losses
from jaxrl_llm.experience import Method, Sequences
from jaxrl_llm.signatures import reading
from jaxrl_llm.training import Fill, Network, Resources, Reward, Rollout, Update, make_train_step
from jaxrl_llm.training.composition import composition_of
from jaxrl_llm.training.fill import coefficients, credit_parts, reward_parts
from jaxrl_llm.training.gradients import reward_influence
from jaxrl_llm.training.initial import initial_state
from jaxrl_llm.training.reading import Context
from jaxrl_llm.training.segments import Host

ITEMS = [{"body": "", "answer": str(number)} for number in range(4)]
ROLLOUT = Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0)


def decode(ids):
    return " ".join(map(str, ids))


def composed(model, rewards=(), credit=(), losses=(), **resources):
    """A composition that is not checked."""
    given = Resources(decode=decode, **resources)
    return composition_of(model, optax.sgd(0.1), ROLLOUT, list(rewards), list(credit), list(losses), None, given)


def run(c, parts, rows):
    """What parts make of rows, each on its own, with what they leave behind."""
    work, state = {"rows": rows}, initial_state(c, jax.random.key(0))
    for part in parts:
        context = (Context(ITEMS, decode),) if isinstance(part, Host) else ()
        work |= part.function(state, work, *context)
    return SimpleNamespace(**work, state=state)


def scored(model, rows, *terms, **resources):
    c = composed(model, terms, **resources)
    return run(c, reward_parts(c, "rows"), rows).rows


def credited(model, rows, *terms, **resources):
    c = composed(model, credit=terms, **resources)
    return run(c, credit_parts(c), rows)


# ---- rewards --------------------------------------------------------------------------------------------------------


def constant(values):
    return lambda tokens: jnp.asarray(values)


def told(values):
    return lambda completions: values


def test_rewards_are_weighted_and_the_first_one_is_the_verifier(bigram, rows):
    columns = [[1.0] * 4 + [0.9] * 4, [0.3] * 4 + [1.0] * 4, [7.0] * 8]
    terms = [Reward(constant(column), weight, str(weight)) for column, weight in zip(columns, (1.0, 0.1, 0.0), strict=True)]  # fmt: skip  # noqa: E501
    seen = scored(bigram, rows, *terms)
    np.testing.assert_allclose(seen["rewards"], [1.03] * 4 + [1.0] * 4, rtol=1e-6)
    np.testing.assert_array_equal(seen["correct"], [1] * 4 + [0] * 4)
    np.testing.assert_allclose(seen["reward_components"], np.asarray(columns).T, rtol=1e-6)
    assert seen.fields.keys() == {"rewards", "correct", "reward_components"}


def test_readings_fill_their_own_columns(bigram, rows):
    def short(length):
        return (length <= 3).astype(jnp.int32)

    terms = [Reward(short, 1.0, "short"), Reward(told(list(range(8))), 0.5, "judge"), Reward(constant([2] * 8), 1, "c")]
    seen = scored(bigram, rows, *terms)
    expected = np.asarray(rows.length) <= 3
    np.testing.assert_array_equal(seen["reward_components"], np.stack([expected, np.arange(8), [2] * 8], 1))
    np.testing.assert_allclose(seen["rewards"], expected + 0.5 * np.arange(8) + 2)
    np.testing.assert_array_equal(seen["correct"], expected)
    np.testing.assert_array_equal(seen["unrated"], 0)


def test_what_does_not_apply_is_left_out_of_the_sum_and_a_row_without_any_reward_is_absent(bigram, rows):
    nan = float("nan")
    first, second = [1, None, nan, 0, 1, None, 1, 0], [0.5, 0.5, None, 0.5, None, None, 0.5, 0.5]
    seen = scored(bigram, rows.filled(weight=rows.weight.at[7].set(0)), Reward(told(first[:7]), 1, "a"), Reward(told(second[:7]), 2, "b"))  # fmt: skip  # noqa: E501
    np.testing.assert_allclose(seen["rewards"], [2, 1, 0, 1, 1, 0, 2, 0])
    np.testing.assert_array_equal(seen.weight, [1, 1, 0, 1, 1, 0, 1, 0])
    np.testing.assert_array_equal(seen["correct"], [1, 0, 0, 0, 1, 0, 1, 0])
    # A row that was not there is not counted among those that nobody rated.
    np.testing.assert_array_equal(seen["unrated"], [0, 0, 1, 0, 0, 1, 0, 0])


def test_of_a_conversation_the_environment_knows_whether_it_was_solved(bigram, rows):
    solved = jnp.asarray([1.0, 0, 0, 1, 0, 0, 0, 1])
    seen = scored(bigram, rows.filled(solved=solved), Reward(constant([0.5] * 8)))
    np.testing.assert_array_equal(seen["correct"], solved)


def test_a_reward_may_read_what_a_network_says_of_the_rows_and_of_a_view(bigram, rows):
    def likely(reference_logprobs, mask):
        return (reference_logprobs * mask).sum(1)

    def seven(seven_logprobs, seven_mask):
        return (seven_logprobs * seven_mask).sum(1)

    def behind(prompt_tokens, prompt_length):
        count = prompt_tokens.shape[0]
        token, ones = jnp.full((count, 1), 7), jnp.ones((count, 1))
        return Sequences(prompt_tokens, prompt_length, token, jnp.ones(count, jnp.int32), ones)

    seen = scored(bigram, rows, Reward(likely), Reward(seven, 10.0), views={"seven": behind})
    table = np.asarray(jax.nn.log_softmax(initial_state(composed(bigram), jax.random.key(0)).params["scores"], -1))
    previous = np.concatenate([rows.prompt_tokens[:, -1:], rows.tokens[:, :-1]], 1)
    expected = [(table[previous, rows.tokens] * rows.mask).sum(1), table[rows.prompt_tokens[:, -1], 7]]
    np.testing.assert_allclose(seen["reward_components"], np.stack(expected, 1), rtol=1e-5)
    np.testing.assert_allclose(seen["rewards"], expected[0] + 10 * expected[1], rtol=1e-5)


# ---- credit ---------------------------------------------------------------------------------------------------------


def test_entries_see_what_those_before_them_have_filled(bigram, rows):
    seen = credited(
        bigram,
        rows.filled(rewards=jnp.arange(8.0)),
        ("rewards", lambda rewards: rewards * 2),
        ("confidence", lambda rewards, step: rewards + step),
        ("advantages", lambda confidence, weight, nothing=None: confidence * weight),
    ).rows
    np.testing.assert_array_equal(seen["advantages"], 2 * np.arange(8.0)[:, None] * rows.mask)


def pair(rewards):
    return rewards + 1, rewards[:, None] * jnp.ones((1, 6))


@pytest.mark.parametrize("by_name", [False, True])
def test_one_function_fills_several_names(bigram, rows, by_name):
    def named(rewards):
        returns, advantages = pair(rewards)
        return {"advantages": advantages, "more": 0, "returns": returns}

    names, function = (("advantages", "returns"), named) if by_name else (("returns", "advantages"), pair)
    seen = credited(bigram, rows.filled(rewards=jnp.arange(8.0)), (names, function)).rows
    # A number for a row is that of its tokens.
    np.testing.assert_array_equal(seen["returns"], (np.arange(8.0) + 1)[:, None] * rows.mask)
    np.testing.assert_array_equal(seen["advantages"], np.tile(np.arange(8.0)[:, None], 6))
    assert "more" not in seen


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"returns": 0}, r"'_' returned \['returns'\], but it must also return 'advantages'"),
        ((0, 0, 0), "'_' fills advantages, returns, so it must return 2 arrays in that order"),
        (jnp.zeros((8,)), "'_' fills advantages, returns"),
        ((jnp.zeros(8), jnp.zeros(4)), r"returns '_' returned shape \(4,\) for 8 completions"),
    ],
)
def test_values_that_do_not_go_with_the_names_are_refused(bigram, rows, returned, message):
    with pytest.raises(ValueError, match=message):
        credited(bigram, rows, Fill(("advantages", "returns"), lambda tokens: returned, "_"))


def test_a_method_gets_its_memory_and_leaves_the_next(bigram, rows):
    counting = Method(lambda: jnp.float32(3), lambda memory, rewards: (rewards + memory, memory + 1))
    seen = credited(bigram, rows.filled(rewards=jnp.zeros(8)), Fill("advantages", counting, "counted"))
    np.testing.assert_array_equal(seen.rows["advantages"], 3 * rows.mask)
    assert seen.memory == {"advantages:counted": 4}
    assert seen.state.memory == {"advantages:counted": 3}


def test_absent_rows_end_without_advantage_and_are_still_counted(bigram, rows):
    seen = credited(
        bigram, rows, ("advantages", lambda mask: mask), ("weight", lambda weight: weight.at[2].set(0.0))
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(seen.rows["advantages"]).sum(1) > 0, np.arange(8) != 2)
    np.testing.assert_array_equal(seen.sampled, 1)


def test_a_reading_between_entries_gives_a_field_that_the_next_one_takes(bigram, rows):
    def stated(completions, answers):
        return [None if answer == "3" else len(text) / 10 for text, answer in zip(completions, answers, strict=True)]

    @reading
    def looked_at(reference_logprobs):
        assert isinstance(reference_logprobs, np.ndarray)
        return reference_logprobs[:, 0]

    seen = credited(
        bigram,
        rows,
        ("said", stated),
        ("first", looked_at),
        ("rewards", lambda said, first: said + 0 * first),
    ).rows
    lengths = np.array(
        [len(decode(row[:n])) for row, n in zip(rows.tokens.tolist(), rows.length.tolist(), strict=True)]
    )
    np.testing.assert_allclose(seen["rewards"], np.where(np.arange(8) < 6, lengths / 10, 0), rtol=1e-6)
    np.testing.assert_array_equal(seen["first"], seen["reference_logprobs"][:, 0])


def shown(prompt_tokens, prompt_length, hinted):
    """A view of what an entry of credit has filled."""
    count = prompt_tokens.shape[0]
    ones = jnp.ones((count, 1))
    return Sequences(prompt_tokens, prompt_length, hinted[:, None].astype(jnp.int32), jnp.ones(count, jnp.int32), ones)


def test_a_view_waits_for_what_it_is_made_of(bigram, rows):
    seen = credited(
        bigram,
        rows,
        ("hinted", lambda sample: sample + 4.0),
        ("advantages", lambda hint_logprobs: hint_logprobs[:, 0]),
        views={"hint": shown},
    ).rows
    table = np.asarray(jax.nn.log_softmax(initial_state(composed(bigram), jax.random.key(0)).params["scores"], -1))
    expected = table[rows.prompt_tokens[:, -1], 4 + np.asarray(rows.sample)]
    np.testing.assert_allclose(seen["advantages"], expected[:, None] * rows.mask, rtol=1e-5)


def test_networks_are_asked_once_and_only_where_something_names_them(bigram, traced, make_prompts):
    def count(step):
        return sum(part.name == "networks" for part in credit_parts(step.composition))

    def step(*credit, **resources):
        return make_train_step(
            bigram,
            optax.sgd(0.1),
            source=ROLLOUT,
            rewards=[lambda tokens: tokens[:, 0]],
            credit=[*credit, ("advantages", lambda rewards: rewards)],
            losses=[losses.policy_gradient],
            resources=Resources(**resources),
        )

    assert count(step()) == 0
    both = step(("a", lambda reference_logprobs: reference_logprobs), ("b", lambda old_entropy, a: old_entropy + a), ("rewards", lambda rewards, b: rewards))  # fmt: skip  # noqa: E501
    assert count(both) == 1
    waiting = step(
        ("a", lambda proxy_logprobs: proxy_logprobs[:, 0]),
        ("hinted", lambda a: a),
        ("rewards", lambda hint_logprobs: hint_logprobs[:, 0]),
        networks={"proxy": Network(decay=0.5)},
        views={"hint": shown},
    )
    assert count(waiting) == 2
    with pytest.raises(
        ValueError, match="names 'hint_logprobs', but view 'hint' is made of 'hinted', which comes later"
    ):
        step(("a", lambda hint_logprobs: hint_logprobs), ("hinted", lambda a: a[:, 0]), views={"hint": shown})
    _, _, rows = traced(waiting, make_prompts(4))
    assert {"proxy_logprobs", "hint_logprobs", "hinted"} <= rows.fields.keys()


# ---- coefficients ---------------------------------------------------------------------------------------------------


def test_coefficients_are_numbers_functions_and_methods_of_rows_and_metrics(bigram, rows):
    growing = Method(lambda: jnp.float32(1), lambda memory, reward: (memory * reward, memory + 1))
    c = composed(
        bigram,
        losses=[
            (losses.policy_gradient, 0.5),
            (losses.entropy_bonus, lambda step, length: step + length.max()),
            (losses.kl_estimate, growing),
        ],
    )
    memory = {"coefficient:kl_estimate": jnp.float32(2), "other": 7}
    values, after = coefficients(c, rows, {"reward": 0.25}, memory, 10)
    assert [float(value) for value in values] == [0.5, 16, 0.5]
    assert after == {"coefficient:kl_estimate": 3, "other": 7}
    assert memory["coefficient:kl_estimate"] == 2


def test_a_reading_may_give_a_number_a_token_or_a_row_for_whichever_its_name_takes(bigram, make_prompts):
    def both(completions, length):
        return length.astype(float).tolist(), [np.arange(count) + 1.0 for count in length]

    def weighted(logprobs, advantages, token_weight, mask):
        return losses.policy_gradient(logprobs, advantages * token_weight, mask)

    step = make_train_step(
        bigram,
        optax.sgd(0.1),
        source=ROLLOUT,
        rewards=[constant([1.0] * 8)],
        credit=[Fill(("token_weight", "advantages"), both)],
        losses=[weighted],
        resources=Resources(decode=lambda ids: "x" * len(ids)),
    )
    _, metrics, rows = step.run(step.init(jax.random.key(0)), make_prompts(4), ITEMS)
    np.testing.assert_array_equal(rows["advantages"], np.cumsum(rows.mask, axis=1) * rows.mask)
    np.testing.assert_array_equal(rows["token_weight"], rows.length[:, None] * rows.mask)
    assert np.isfinite(metrics["loss"])


# ---- numbers to be logged -------------------------------------------------------------------------------------------


def test_an_entry_may_fill_numbers_that_are_logged(bigram, make_prompts):
    def spread(rewards):
        return jnp.std(rewards), jnp.where(rewards > 0, rewards, jnp.nan)

    def shortest(completions):
        return [None if row % 2 else float(row) for row in range(len(completions))]

    step = make_train_step(
        bigram,
        optax.sgd(0.1),
        source=ROLLOUT,
        rewards=[lambda tokens: (tokens[:, 0] % 3).astype(jnp.float32)],
        credit=[
            ("advantages", lambda rewards: rewards),
            (("metric/spread", "metric/positive"), spread),
            ("metric/even", shortest),
        ],
        losses=[losses.policy_gradient],
        resources=Resources(decode=decode),
    )
    _, metrics, rows = step.run(step.init(jax.random.key(0)), make_prompts(4), ITEMS)
    seen = np.asarray(rows["rewards"])
    np.testing.assert_allclose(metrics["metric/spread"], seen.std(), rtol=1e-5)
    np.testing.assert_allclose(metrics["metric/positive"], seen[seen > 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["metric/even"], 3.0)
    assert not any(name.startswith("metric/") for name in rows.fields)


def test_what_is_logged_is_a_number_or_one_a_row(bigram, rows):
    with pytest.raises(ValueError, match=r"metric/wide .* returned shape \(8, 6\); what is logged is one number"):
        credited(bigram, rows, Fill("metric/wide", lambda tokens: tokens, "wide"))


def test_rows_whose_filled_reward_does_not_apply_are_absent(bigram, rows):
    count = rows.tokens.shape[0]
    some = jnp.arange(count, dtype=jnp.float32).at[1].set(jnp.nan)
    after = credited(bigram, rows, ("rewards", lambda tokens: some)).rows
    np.testing.assert_array_equal(after["rewards"], jnp.nan_to_num(some))
    np.testing.assert_array_equal(after.weight, jnp.asarray(rows.weight).at[1].set(0.0))


# ---- gradients of rewards -------------------------------------------------------------------------------------------


def influences(bigram, rows, components, **update):
    c = replace(composed(bigram, [Reward(constant([0.0] * 8))], [], [losses.policy_gradient]), update=Update(**update))
    state = initial_state(c, jax.random.key(3))
    work = {"rows": rows.filled(reward_components=jnp.asarray(components))}
    return reward_influence(c, state, work)["reward_influence"], state.params


def test_influences_are_products_of_the_gradients_of_single_rewards(bigram, rows):
    right, short = [1.0, 0, 0, 1, 1, 0, 1, 1], [0.2, 0.9, 0.5, 0.4, 0.1, float("nan"), 0.3, 0.7]
    found, params = influences(bigram, rows, np.stack([right, short], 1))

    def gradient(reward):
        known = ~np.isnan(reward)
        pairs, shares = np.where(known, reward, 0.0).reshape(4, 2), known.reshape(4, 2)
        centred = (pairs - (pairs * shares).sum(1, keepdims=True) / shares.sum(1, keepdims=True)) * shares
        whole = shares.all(1, keepdims=True)  # a group of one has advantage 0
        spread = np.where(whole, pairs.std(1, ddof=1, keepdims=True), 1.0)
        advantages = (np.where(whole, centred, 0.0) / (spread + 1e-6)).reshape(8)

        def value(params):
            before = jnp.concatenate([rows.prompt_tokens[:, -1:], rows.tokens[:, :-1]], 1)
            logprobs = jax.nn.log_softmax(params["scores"])[before, rows.tokens]
            return -(rows.mask * logprobs * advantages[:, None]).sum() / rows.mask.sum()

        return jax.grad(value)(params)["scores"].ravel()

    both = [gradient(np.array(reward)) for reward in (right, short)]
    expected = [one @ (both[0] + both[1]) for one in both]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    split, _ = influences(bigram, rows, np.stack([right, short], 1), sequences_per_microbatch=2)
    np.testing.assert_allclose(split, found, rtol=1e-5)


def test_a_reward_that_is_equal_within_groups_has_no_influence(bigram, rows):
    found, _ = influences(bigram, rows, np.stack([[1.0, 0] * 4, [2.0] * 8], 1))
    assert found[0] > 0
    assert found[1] == 0


def test_influences_need_rewards_and_a_loss_on_the_policy(model):
    entry = Fill("advantages", lambda reward_influence, length: length * reward_influence[0])
    with pytest.raises(ValueError, match=r"'reward_influence', which nothing in this step.*a loss on the policy"):
        make_train_step(
            model, optax.sgd(0.1), source=ROLLOUT, rewards=[], credit=[entry], losses=[losses.policy_gradient]
        )
