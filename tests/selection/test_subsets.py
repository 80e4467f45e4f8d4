"""Which samples of a prompt are trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.selection import (
    balanced_groups,
    best_and_random,
    complete_samples,
    extreme_rewards,
    extreme_samples,
    finished_in_window,
    one_success_one_failure,
    resampled,
    row_uniforms,
    squared_correlation,
)

REWARDS = jnp.array([0.9, 0.2, 0.5, 0.1])
GROUP = jnp.zeros(4, jnp.int32)
ONES = jnp.ones(4)


def batch(prompts=40, samples=6, seed=0):
    rng = np.random.default_rng(seed)
    rows = prompts * samples
    group = np.repeat(np.arange(prompts), samples)
    return {
        "correct": jnp.asarray(rng.integers(0, 2, rows), jnp.float32),
        "group": jnp.asarray(group),
        "prompt_id": jnp.asarray(1000 + group),
        "sample": jnp.asarray(np.tile(np.arange(samples), prompts)),
        "weight": jnp.ones(rows),
        "step": jnp.int32(5),
    }


def named(data, value):
    return (data[value], data["group"], data["prompt_id"], data["sample"], data["weight"], data["step"])


def test_worked_example():
    np.testing.assert_array_equal(extreme_samples(REWARDS, GROUP, ONES), [1, 0, 0, 1])
    np.testing.assert_allclose(
        extreme_samples(REWARDS, GROUP, ONES, rule="best_random"), [1, 0.333333, 0.333333, 0.333333], rtol=2e-6
    )
    np.testing.assert_array_equal(extreme_samples(REWARDS, GROUP, ONES, rule="best"), [1, 0, 0, 0])
    batch_wide = extreme_rewards(jnp.array([1.0, 0, 0, 0]), ONES, rule="max_random")
    np.testing.assert_allclose(batch_wide, [0.4, 0.1, 0.1, 0.1], rtol=1e-6)


def test_ties_go_to_the_first_best_and_the_last_worst():
    equal = jnp.full(4, 0.5)
    np.testing.assert_array_equal(extreme_samples(equal, GROUP, ONES), [1, 0, 0, 1])
    np.testing.assert_array_equal(extreme_samples(equal, GROUP, ONES, rule="best"), [1, 0, 0, 0])
    np.testing.assert_array_equal(extreme_samples(equal, jnp.arange(4), ONES), [1, 1, 1, 1])
    np.testing.assert_array_equal(extreme_samples(equal, GROUP, jnp.array([0.0, 2, 1, 0])), [0, 2, 1, 0])


def test_the_batch_wide_rules():
    rewards = jnp.array([-2.0, 0.5, 3, 3])
    np.testing.assert_allclose(extreme_rewards(rewards, ONES), [1, 0, 1, 1], atol=1e-7)
    np.testing.assert_allclose(extreme_rewards(rewards, ONES, rule="power"), [4, 0.25, 9, 9], rtol=1e-6)


def test_best_and_random_is_the_best_rule_drawn():
    rng = np.random.default_rng(1)
    data = batch(prompts=300, samples=4) | {"rewards": jnp.asarray(rng.normal(size=1200), jnp.float32)}
    weight = best_and_random(*named(data, "rewards")).reshape(300, 4)
    np.testing.assert_array_equal(weight.sum(1), 2)
    best = extreme_samples(data["rewards"], data["group"], data["weight"], rule="best").reshape(300, 4)
    assert (weight[best > 0] == 1).all()
    rank = np.argsort(np.argsort(-np.asarray(data["rewards"]).reshape(300, 4), axis=1), axis=1)
    chosen = [float(weight[rank == k].sum()) for k in (1, 2, 3)]
    assert min(chosen) > 70  # 100 each in expectation, standard deviation 8


def test_one_right_and_one_wrong_answer_of_each_prompt():
    data = batch()
    kept = np.asarray(one_success_one_failure(*named(data, "correct"))).reshape(40, 6)
    correct = np.asarray(data["correct"]).reshape(40, 6)
    mixed = (correct.sum(1) > 0) & (correct.sum(1) < 6)
    np.testing.assert_array_equal((kept * correct).sum(1), mixed)
    np.testing.assert_array_equal((kept * (1 - correct)).sum(1), mixed)
    other_step = one_success_one_failure(*named(data | {"step": jnp.int32(6)}, "correct"))
    assert (np.asarray(other_step).reshape(40, 6) != kept).any()


def test_balanced_groups_drop_the_surplus():
    data = batch()
    right = np.asarray(data["correct"]).reshape(40, 6)
    counts = right.sum(1)
    mixed = (counts > 0) & (counts < 6)
    negatives = np.asarray(balanced_groups(*named(data, "correct"))).reshape(40, 6)
    np.testing.assert_array_equal((negatives * right).sum(1), counts)
    np.testing.assert_array_equal((negatives * (1 - right)).sum(1)[mixed], np.minimum(counts, 6 - counts)[mixed])
    np.testing.assert_array_equal(negatives[~mixed], 1)
    both = np.asarray(balanced_groups(*named(data, "correct"), drop="both")).reshape(40, 6)
    np.testing.assert_array_equal((both * right).sum(1)[mixed], np.minimum(counts, 6 - counts)[mixed])
    np.testing.assert_array_equal(both.sum(1)[mixed], 2 * np.minimum(counts, 6 - counts)[mixed])


def test_random_numbers_belong_to_the_row_and_not_to_its_place():
    prompts, samples = jnp.array([3, 3, 900]), jnp.array([0, 1, 0])
    there = row_uniforms(7, prompts, samples)
    folded = jax.random.key(0)
    for number in (7, int(prompts[1]), int(samples[1])):
        folded = jax.random.fold_in(folded, number)
    assert there[1] == jax.random.uniform(folded)
    np.testing.assert_array_equal(row_uniforms(7, prompts[::-1], samples[::-1]), there[::-1])
    assert len({*map(float, there), *map(float, row_uniforms(8, prompts, samples))}) == 6


def test_resampling_draws_by_weight_as_many_rows_as_are_present():
    weight = jnp.concatenate([jnp.full(300, 1.0), jnp.full(300, 3.0), jnp.zeros(200)])
    counts = resampled(weight, jnp.int32(0))
    assert counts.sum() == 600
    assert counts[600:].sum() == 0
    assert 400 < counts[300:600].sum() < 500  # 450 in expectation, standard deviation 11
    assert (resampled(weight, jnp.int32(1)) != counts).any()
    np.testing.assert_array_equal(resampled(jnp.zeros(5), jnp.int32(0)), 0)


def test_the_ends_of_a_noisy_reward_are_the_most_reliable():
    rng = np.random.default_rng(3)
    true = rng.uniform(0, 1, 2000)
    middle = np.abs(true - 0.5) < 0.3
    rewards = np.where(middle, rng.uniform(0.2, 0.8, 2000), true)
    rewards, true = jnp.asarray(rewards, jnp.float32), jnp.asarray(true, jnp.float32)
    group = jnp.repeat(jnp.arange(2000 // 5), 5)
    weight = jnp.ones(2000)
    everything = squared_correlation(rewards, true, weight)
    ends = squared_correlation(rewards, true, extreme_samples(rewards, group, weight))
    assert ends > everything + 0.05
    np.testing.assert_allclose(everything, np.corrcoef(rewards, true)[0, 1] ** 2, rtol=1e-4)
    assert squared_correlation(jnp.ones(4), REWARDS, ONES) == 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"rule is 'worst'.*best_worst"):
        extreme_samples(REWARDS, GROUP, ONES, rule="worst")
    with pytest.raises(ValueError, match=r"rule is 'mean'.*max_min"):
        extreme_rewards(REWARDS, ONES, rule="mean")
    with pytest.raises(ValueError, match=r"exponent is -1.0"):
        extreme_rewards(REWARDS, ONES, rule="power", exponent=-1.0)
    with pytest.raises(ValueError, match=r"drop is 'all'"):
        balanced_groups(*named(batch(), "correct"), drop="all")


def test_samples_that_outlast_a_window_are_left_out():
    durations = jnp.array([[6.0, 2.0], [1.0, 0.0], [5.0, 0.0], [4.0, 4.0], [3.0, 0.0], [1.0, 0.0]])
    group, sample = jnp.array([0, 0, 0, 1, 1, 1]), jnp.array([0, 1, 2, 1, 0, 2])
    window = jax.jit(lambda *data: finished_in_window(*data, window=9.0))
    found = window(durations, group, sample, jnp.ones(6))  # 8, 9, 14; the others are 3, 11, 12 in their order
    np.testing.assert_array_equal(found, [1, 1, 0, 0, 1, 0])
    order = jnp.array([3, 0, 5, 2, 4, 1])
    np.testing.assert_array_equal(window(durations[order], group[order], sample[order], jnp.ones(6)), found[order])
    absent = window(durations, group, sample, jnp.array([0.0, 1, 0.5, 0, 1, 1]))  # takes no time
    np.testing.assert_array_equal(absent, [0, 1, 0.5, 0, 1, 1])
    np.testing.assert_array_equal(window(durations + 20, group, sample, jnp.ones(6)), 0)


def test_samples_that_were_cut_are_left_out():
    got = complete_samples(jnp.array([1.0, 0.5, 1.0, 0.0]), jnp.array([0, 1, 0, 1], bool))
    np.testing.assert_array_equal(got, [1, 0, 1, 0])
