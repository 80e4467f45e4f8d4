"""What must hold for advantages and selections: rows have no order, group ids no meaning, absent rows no effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import advantages, losses, selection
from jaxrl_llm.signatures import signature

ROWS, TOKENS = 9, 4
LENGTHS = np.array([4, 2, 3, 1, 4, 4, 2, 3, 4])


def running_mean(rewards, weight):
    method = advantages.running_mean_baseline()
    _, memory = method.update(method.init(), jnp.array([0.2, 0.4]), jnp.ones(2))
    return method.update(memory, rewards, weight)[0]


def tracked_risk(rewards, sample, group, weight):
    method = advantages.tracked_mixed_value_at_risk(use="mix", prompts_per_bundle=9)
    past = (jnp.array([0.0, 1.0, 1.0, 0.0]), jnp.array([0, 1, 0, 1]), jnp.array([0, 0, 1, 1]), jnp.ones(4))
    _, memory = method.update(method.init(), *past)
    return method.update(memory, rewards, sample, group, weight)[0]


def rank_shaped(rewards, returns, old_logprobs, old_values, mask, weight):
    method = advantages.rank_shaped(stride=1, kappa=1.5)
    hidden = jnp.stack([returns, old_logprobs, old_values, jnp.cos(7 * old_values.astype(jnp.float32))], axis=-1)
    memory = method.init() | {"batches": jnp.int32(1), "before": jnp.array([0.05, 0.2, 1.5])}
    return method.update(memory, returns, hidden, rewards, mask, weight)[0]


def at_step(function, **hyper):
    """A random choice of rows; its numbers are those of step 3."""

    def chosen(rewards, group, prompt_id, sample, weight):
        return function(rewards, group, prompt_id, sample, weight, jnp.int32(3), **hyper)

    return chosen


CASES = {
    "signed_correctness": advantages.signed_correctness,
    "nonzero_advantages": selection.nonzero_advantages,
    "beta_normalized": functools.partial(advantages.beta_normalized, least_reward=-0.5, largest_reward=1.5),
    "beta_normalized_components": functools.partial(advantages.beta_normalized_components, largest_reward=2.0),
    "shifted_mean_baseline": advantages.shifted_mean_baseline,
    "log_mean_exp_baseline": functools.partial(advantages.log_mean_exp_baseline, temperature=0.5),
    "extreme_samples": selection.extreme_samples,
    "extreme_samples/best_random": functools.partial(selection.extreme_samples, rule="best_random"),
    "extreme_samples/best": functools.partial(selection.extreme_samples, rule="best"),
    "best_and_random": at_step(selection.best_and_random),
    "extreme_rewards": selection.extreme_rewards,
    "extreme_rewards/max_random": functools.partial(selection.extreme_rewards, rule="max_random"),
    "extreme_rewards/power": functools.partial(selection.extreme_rewards, rule="power"),
    "one_success_one_failure": at_step(selection.one_success_one_failure),
    "balanced_groups": at_step(selection.balanced_groups),
    "balanced_groups/both": at_step(selection.balanced_groups, drop="both"),
    "steered_advantages": advantages.steered_advantages,
    "entropy_mixed_advantages": advantages.entropy_mixed_advantages,
    "novelty_sharpened": advantages.novelty_sharpened,
    "reward_half_width": selection.reward_half_width,
    "rollout_priority": functools.partial(selection.rollout_priority, exploration=0.1),
    "win_rate": advantages.win_rate,
    "score_win_rate": advantages.score_win_rate,
    "score_win_rate/temperature": functools.partial(advantages.score_win_rate, temperature=0.3),
    "budget_advantages": functools.partial(advantages.budget_advantages, max_completion_tokens=16),
    "answer_entropy": advantages.answer_entropy,
    "batch_normalized_accuracy": advantages.batch_normalized_accuracy,
    "local_share": advantages.local_share,
    "local_share/forced": functools.partial(advantages.local_share, mode="forced"),
    "consistency_blended": functools.partial(advantages.consistency_blended, discount_disagreement=True),
    "rank_shaped": rank_shaped,
    "decoupled_normalized": advantages.decoupled_normalized,
    "decoupled_normalized/none": functools.partial(advantages.decoupled_normalized, scale="none"),
    "sigma_filtered": functools.partial(advantages.sigma_filtered, limit=1.0),
    "sigma_filtered/released": functools.partial(advantages.sigma_filtered, rule="released", limit=1.0),
    # One bundle holds all groups: which groups share a bundle depends on the order of their ids.
    "mixed_value_at_risk": functools.partial(advantages.mixed_value_at_risk, prompts_per_bundle=9),
    "mixed_value_at_risk/uniform": functools.partial(
        advantages.mixed_value_at_risk, prompts_per_bundle=9, credit="uniform", natural_baseline=False
    ),
    "mixed_value_at_risk/sum_mean": functools.partial(
        advantages.mixed_value_at_risk, prompts_per_bundle=9, credit="sum_mean"
    ),
    "mixed_value_at_risk/score": functools.partial(
        advantages.mixed_value_at_risk, prompts_per_bundle=9, credit="score", normalize=False
    ),
    "tracked_mixed_value_at_risk": tracked_risk,
    "turn_leave_one_out": advantages.turn_leave_one_out,
    "turn_mixed_normalized": functools.partial(advantages.turn_mixed_normalized, gamma=0.9),
    "turn_mixed_normalized/batch": functools.partial(advantages.turn_mixed_normalized, scope="batch"),
    "confidence_shaped": functools.partial(advantages.confidence_shaped, share=0.4),
    "solved_group_length_penalty": advantages.solved_group_length_penalty,
    "solved_group_length_penalty/threshold": functools.partial(advantages.solved_group_length_penalty, threshold=0.6),
    "near_perfect_groups": functools.partial(selection.near_perfect_groups, attempts=3, min_correct=2),
    "twin_baseline_normalized": advantages.twin_baseline_normalized,
    "entropy_change_weights": losses.entropy_change_weights,
    "entropy_change_weights/exponential": functools.partial(losses.entropy_change_weights, form="exponential"),
    "raw_rewards": advantages.raw_rewards,
    "reward_minus_baseline": advantages.reward_minus_baseline,
    "running_mean_baseline": running_mean,
    "group_normalized": advantages.group_normalized,
    "group_normalized/batch": functools.partial(advantages.group_normalized, scale="batch"),
    "group_normalized/none": functools.partial(advantages.group_normalized, scale="none"),
    "leave_one_out": advantages.leave_one_out,
    "length_weighted_baseline": advantages.length_weighted_baseline,
    "pass_at_k_normalized": functools.partial(advantages.pass_at_k_normalized, k=2),
    "max_at_k_weights": functools.partial(advantages.max_at_k_weights, k=2),
    "max_at_k_weights/no_baseline": functools.partial(advantages.max_at_k_weights, k=2, baseline=False),
    "top_margin": advantages.top_margin,
    "nonconstant_groups": selection.nonconstant_groups,
    "whitened": advantages.whitened,
    "reinforce_plus_plus": functools.partial(advantages.reinforce_plus_plus, gamma=0.9),
    "reinforce_plus_plus_baseline": advantages.reinforce_plus_plus_baseline,
    "discounted_returns": functools.partial(advantages.discounted_returns, gamma=0.9),
    "gae": functools.partial(advantages.gae, gamma=0.9),
    "gae_returns": functools.partial(advantages.gae_returns, gamma=0.9),
}
# Columns that are no positions, and so have no padding.
NOT_TOKENS = {"reward_components", "twin_target_values", "preferences"}
# Centred on something that moves with the rewards.
SHIFT_INVARIANT = {
    "mixed_value_at_risk",
    "mixed_value_at_risk/uniform",
    "mixed_value_at_risk/sum_mean",
    "twin_baseline_normalized",
    "group_normalized",
    "group_normalized/batch",
    "group_normalized/none",
    "leave_one_out",
    "length_weighted_baseline",
    "max_at_k_weights",
    "top_margin",
    "nonconstant_groups",
    "reinforce_plus_plus_baseline",
    "log_mean_exp_baseline",
}
SCALE_INVARIANT = {"group_normalized", "group_normalized/batch", "top_margin", "reinforce_plus_plus_baseline"}
# Equal rewards in every group.
ZERO_ON_EQUAL = (SHIFT_INVARIANT | {"pass_at_k_normalized", "mixed_value_at_risk/score", "beta_normalized"}) - {
    "twin_baseline_normalized"
}
ZERO_ALONE = {
    "beta_normalized",
    "log_mean_exp_baseline",
    "reward_half_width",
    "mixed_value_at_risk",
    "mixed_value_at_risk/uniform",
    "mixed_value_at_risk/sum_mean",
    "mixed_value_at_risk/score",
    "group_normalized",
    "group_normalized/batch",
    "group_normalized/none",
    "leave_one_out",
    "length_weighted_baseline",
    "pass_at_k_normalized",
    "top_margin",
}


def batch():
    draws = np.random.default_rng(5)

    def rng(seed):
        return np.random.default_rng(seed)

    data = {
        "rewards": draws.permutation(ROWS) / 4 - 0.5,
        "correct": [1, 0, 1, 0, 0, 1, 1, 0, 0],
        "baseline_rewards": draws.normal(size=ROWS),
        "weight": np.ones(ROWS),
        "reward_components": rng(6).integers(0, 3, (ROWS, 2)),
        "twin_target_values": rng(7).normal(size=(ROWS, 2)),
        "turn_rewards": rng(8).normal(size=(ROWS, 3)),
        "prompt_logprobs": -rng(9).uniform(0, 2, (ROWS, 5)),
        "prompt_mask": np.arange(5) < 1 + LENGTHS[:, None],
        "old_logprobs": -rng(10).uniform(0, 2, (ROWS, TOKENS)),
        "old_entropy": rng(11).uniform(0, 2, (ROWS, TOKENS)),
        "returns": rng(15).normal(size=(ROWS, TOKENS)),
        "preferences": rng(12).uniform(0, 1, (ROWS, 3)),
        "tempered_logprobs": -rng(13).uniform(0, 2, (ROWS, TOKENS)),
        "token_reward_logits": rng(14).normal(size=(ROWS, TOKENS)),
        "mask": np.arange(TOKENS) < LENGTHS[:, None],
        "advantages": draws.normal(size=(ROWS, TOKENS)),
        "old_values": draws.normal(size=(ROWS, TOKENS)),
    }
    whole_numbers = {
        "group": [3, 0, 3, 3, 0, 6, 6, 6, 8],
        "length": LENGTHS,
        "sample": [1, 0, 0, 2, 1, 2, 0, 1, 0],
        "turn": np.minimum(np.arange(TOKENS), 2) + np.zeros((ROWS, 1)),
        "prompt_id": [30, 2, 30, 30, 2, 61, 61, 61, 7],
        "answer_id": [5, 1, 5, 0, 3, 1, 1, 1, 8],
        "budget": [8, 4, 8, 4, 8, 4, 4, 8, 4],
    }
    # Numbers that bfloat16 has, too: one law compares the two.
    data = {name: np.asarray(value, jnp.bfloat16).astype(np.float32) for name, value in data.items()}
    data |= {name: np.asarray(value, np.int32) for name, value in whole_numbers.items()}
    return data | {"extra": np.arange(ROWS) % 3 == 0}


DATA = batch()
# Without the group of one, which keeps its raw reward under REINFORCE++-baseline and max@k.
WHOLE_GROUPS = np.float32(np.arange(ROWS) != 8)


@pytest.fixture(params=sorted(CASES))
def name(request):
    return request.param


@jax.jit
def every_case(data):
    def result(function):
        read = signature(function.func if isinstance(function, functools.partial) else function)
        # By position, as jit has no data to read names from.
        return jax.jit(function)(*(data[field] for field in read.required))

    return {name: result(function) for name, function in CASES.items()}


def rows(data, index):
    return {name: value[index] for name, value in data.items()}


def extended(data, rewards, padding):
    """The data with three absent rows and two columns of padding."""
    absent = rows(data, np.array([0, 4, 7]))
    absent |= {"weight": np.zeros(3, np.float32), "rewards": np.float32(rewards)}
    larger = {}
    for field, value in data.items():
        value = np.concatenate([value, absent[field]])
        if value.ndim == 2 and field not in NOT_TOKENS:
            value = np.pad(value, ((0, 0), (0, 2)), constant_values=0 if field.endswith("mask") else padding)
        larger[field] = value
    return larger


def present(result):
    return result[:ROWS, :TOKENS] if result.ndim == 2 else result[:ROWS]


@functools.cache
def outcomes(data_of):
    """name -> result of every case on the data that a function returns: one program for all of them."""
    found = jax.device_get(every_case(extended(data_of(), rewards=np.zeros(3), padding=0)))
    return {name: present(result) for name, result in found.items()}


def whole():
    return DATA


ORDER = np.random.default_rng(2).permutation(ROWS)


def another_order():
    return rows(DATA, ORDER)


def test_a_permutation_of_rows_permutes_the_result(name):
    np.testing.assert_allclose(outcomes(another_order)[name], outcomes(whole)[name][ORDER], rtol=1e-5, atol=1e-6)


def other_names_of_groups():
    return DATA | {"group": np.int32([5, 1, 2, 0, 4, 3, 7, 8, 6])[DATA["group"]]}


def test_the_names_of_groups_mean_nothing(name):
    np.testing.assert_allclose(outcomes(other_names_of_groups)[name], outcomes(whole)[name], rtol=1e-5, atol=1e-6)


@functools.cache
def outcomes_with_other_padding():
    return jax.device_get(every_case(extended(DATA, rewards=[50.0, -3.0, np.nan], padding=9)))


def test_absent_rows_and_columns_of_padding_change_nothing_and_get_nothing(name):
    result = outcomes_with_other_padding()[name]
    np.testing.assert_allclose(present(result), outcomes(whole)[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(result[ROWS:], 0)
    if result.ndim == 2:
        np.testing.assert_array_equal(result[:, TOKENS:], 0)


def no_rows():
    return DATA | {"weight": np.zeros(ROWS, np.float32)}


def test_an_empty_batch_is_zero_and_finite(name):
    np.testing.assert_array_equal(outcomes(no_rows)[name], 0)


@functools.cache
def outcomes_in_low_precision():
    low = {f: v.astype(jnp.bfloat16) if np.issubdtype(v.dtype, np.floating) else v for f, v in DATA.items()}
    return jax.device_get(every_case(low))


def test_low_precision_gives_float32_statistics_and_padding_may_be_missing(name):
    result = outcomes_in_low_precision()[name]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, outcomes(whole)[name], rtol=1e-5, atol=1e-6)


def whole_groups():
    return DATA | {"weight": WHOLE_GROUPS}


def shifted():
    return whole_groups() | {"rewards": DATA["rewards"] + 2}


@pytest.mark.parametrize("name", sorted(SHIFT_INVARIANT))
def test_a_shift_of_all_rewards_changes_nothing(name):
    np.testing.assert_allclose(outcomes(shifted)[name], outcomes(whole_groups)[name], rtol=1e-5, atol=1e-5)


def scaled():
    return DATA | {"rewards": DATA["rewards"] * 10}


@pytest.mark.parametrize("name", sorted(SCALE_INVARIANT))
def test_a_positive_scale_of_all_rewards_changes_nothing(name):
    np.testing.assert_allclose(outcomes(scaled)[name], outcomes(whole)[name], rtol=1e-4, atol=1e-5)


def equal(value):
    ones = np.ones(ROWS, np.float32)
    return whole_groups() | {"rewards": np.float32(value) * ones, "correct": ones}


EQUAL = [functools.partial(equal, value) for value in (0.1, 1000.1)]


@pytest.mark.parametrize("name", sorted(ZERO_ON_EQUAL))
def test_equal_rewards_of_a_group_give_zero(name):
    for data_of in EQUAL:
        np.testing.assert_array_equal(outcomes(data_of)[name], 0)


def alone():
    return DATA | {"group": np.arange(ROWS, dtype=np.int32)}


@pytest.mark.parametrize("name", sorted(ZERO_ALONE))
def test_a_group_of_one_gives_zero(name):
    np.testing.assert_array_equal(outcomes(alone)[name], 0)
