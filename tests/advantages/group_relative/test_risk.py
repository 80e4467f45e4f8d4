"""RiskPO: papers of bundled prompts, risk measures of their scores, and quantiles that are tracked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import advantages
from jaxrl_llm.advantages import group_quantile, tracked_mixed_value_at_risk
from jaxrl_llm.advantages.group_relative import risk
from jaxrl_llm.advantages.group_relative.risk import tracked_quantile

# One program each: their operations one by one take seconds to compile.
bundled_papers = jax.jit(risk.bundled_papers, static_argnames=("prompts_per_bundle",))
mixed_value_at_risk = jax.jit(
    advantages.mixed_value_at_risk,
    static_argnames=("prompts_per_bundle", "credit", "natural_baseline", "tail_weight", "lower", "upper"),
)

DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}
REWARDS = jnp.array([1.0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1])
GROUP, SAMPLE, WEIGHT = jnp.repeat(jnp.arange(3), 4), jnp.tile(jnp.arange(4), 3), jnp.ones(12)
DATA = (REWARDS, SAMPLE, GROUP, WEIGHT)


def test_worked_example():
    papers = bundled_papers(*DATA, prompts_per_bundle=5)
    np.testing.assert_array_equal(papers.score[:4], [2, 1, 1, 2])
    for level, quantile in ((0.2, 1.0), (0.8, 2.0)):
        np.testing.assert_allclose(group_quantile(papers.score, papers.bundle, papers.leader, level=level), quantile)
    uniform = mixed_value_at_risk(*DATA, credit="uniform")
    np.testing.assert_allclose(uniform[:4], [0, -1.1547, -1.1547, 0], **DIGITS)
    expected = [0, -1.99999, -1.99999, 0] + 2 * [0, -2.30939, -2.30939, 0]
    np.testing.assert_allclose(mixed_value_at_risk(*DATA), expected, **DIGITS)
    shared = mixed_value_at_risk(*DATA, credit="sum_mean", natural_baseline=False)
    expected = [1.1547, 0, 0, 1.1547, -0.577348, 0, 0, -0.577348, 0.577348, 0, 0, 0.577348]
    np.testing.assert_allclose(shared, expected, **DIGITS)


def test_worked_example_of_tracking():
    quantile = tracked_quantile(jnp.float32(2.5), jnp.arange(5.0), jnp.ones(5), level=0.2)
    np.testing.assert_allclose(quantile, 2.46, rtol=1e-6)


def test_quantiles_are_those_of_numpy():
    values = jnp.asarray(np.random.default_rng(0).normal(size=11), jnp.float32)
    group = jnp.array([4, 4, 0, 4, 4, 0, 4, 0, 2, 4, 4])
    for level in (0.0, 0.2, 0.35, 0.9, 1.0):
        result = group_quantile(values, group, jnp.ones(11), level=level)
        for one in (0, 2, 4):
            inside = np.asarray(group) == one
            expected = np.quantile(np.asarray(values)[inside].astype(np.float64), level)
            np.testing.assert_allclose(np.asarray(result)[inside], expected, rtol=1e-5, atol=1e-6)


def test_bundles_are_independent():
    rng = np.random.default_rng(1)
    rewards = jnp.asarray(rng.integers(0, 3, 24), jnp.float32)
    group, sample = jnp.repeat(jnp.arange(6), 4), jnp.tile(jnp.arange(4), 6)
    whole = mixed_value_at_risk(rewards, sample, group, jnp.ones(24), prompts_per_bundle=3)
    for part in (slice(0, 12), slice(12, 24)):
        alone = mixed_value_at_risk(rewards[part], sample[part], group[part] % 3, WEIGHT, prompts_per_bundle=3)
        np.testing.assert_allclose(whole[part], alone, rtol=1e-5, atol=1e-6)


def test_rows_may_stand_in_any_order_and_absent_groups_break_no_bundle():
    rng = np.random.default_rng(2)
    rewards = jnp.asarray(rng.integers(0, 3, 24), jnp.float32)
    group, sample = jnp.repeat(jnp.arange(6), 4), jnp.tile(jnp.arange(4), 6)
    straight = mixed_value_at_risk(rewards, sample, group, jnp.ones(24), prompts_per_bundle=2)
    order = rng.permutation(24)
    shuffled = mixed_value_at_risk(rewards[order], sample[order], group[order], jnp.ones(24), prompts_per_bundle=2)
    np.testing.assert_allclose(shuffled, straight[order], rtol=1e-6, atol=1e-7)
    # Without groups 0 and 3 the bundles are (1, 2) and (4, 5).
    weight = jnp.asarray((np.asarray(group) % 3 > 0).astype(np.float32))
    left = mixed_value_at_risk(jnp.where(weight > 0, rewards, jnp.nan), sample, group, weight, prompts_per_bundle=2)
    kept = np.flatnonzero(np.asarray(weight))
    dense = jnp.repeat(jnp.arange(4), 4)
    expected = mixed_value_at_risk(rewards[kept], sample[kept], dense, jnp.ones(16), prompts_per_bundle=2)
    np.testing.assert_allclose(left[kept], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.delete(np.asarray(left), kept), 0)


def test_a_missing_sample_counts_as_its_prompts_mean():
    ragged = (jnp.array([1.0, 0, 1, 1, 0]), jnp.array([0, 1, 2, 0, 1]), jnp.array([0, 0, 0, 1, 1]), jnp.ones(5))
    score = bundled_papers(*ragged, prompts_per_bundle=2).score
    np.testing.assert_allclose(score, [2, 0, 1.5, 2, 0], rtol=1e-6)


@pytest.mark.parametrize("credit", ["uniform", "std", "score"])
def test_with_the_natural_baseline_no_advantage_is_positive(credit):
    rng = np.random.default_rng(3)
    rewards = jnp.asarray(rng.normal(size=40), jnp.float32)
    group, sample = jnp.repeat(jnp.arange(5), 8), jnp.tile(jnp.arange(8), 5)
    advantages = np.asarray(mixed_value_at_risk(rewards, sample, group, jnp.ones(40), credit=credit))
    assert advantages.max() <= 1e-6
    papers = np.asarray(bundled_papers(rewards, sample, group, jnp.ones(40), prompts_per_bundle=5).score)[:8]
    np.testing.assert_allclose(advantages.reshape(5, 8)[:, papers.argmax()], 0, atol=1e-6)
    assert (advantages.reshape(5, 8)[:, papers.argmin()] < 0).all()


def test_equal_scores_and_single_papers_give_zero():
    swapped = jnp.array([1.0, 0, 0, 1])
    data = (swapped, jnp.array([0, 1, 0, 1]), jnp.array([0, 0, 1, 1]), jnp.ones(4))
    alone = (swapped, jnp.zeros(4, jnp.int32), jnp.arange(4), jnp.ones(4))
    forms = (("uniform", True), ("std", True), ("std", False), ("sum_mean", False), ("score", True))

    @jax.jit
    def every_form(*rows):
        return [
            advantages.mixed_value_at_risk(*rows, natural_baseline=natural, credit=credit) for credit, natural in forms
        ]

    for rows in (data, alone):
        for form, found in zip(forms, every_form(*rows), strict=True):
            np.testing.assert_array_equal(found, 0, err_msg=str(form))


def test_sum_mean_shares_equally_where_no_sample_stands_out():
    # Paper 0 has deviations that cancel; papers 1 and 2 do not.
    rewards = jnp.array([1.0, 0, 0.5, 0, 1, 0.2])
    data = (rewards, jnp.tile(jnp.arange(3), 2), jnp.repeat(jnp.arange(2), 3), jnp.ones(6))
    shared = mixed_value_at_risk(*data, credit="sum_mean", natural_baseline=False)
    uniform = mixed_value_at_risk(*data, credit="uniform", natural_baseline=False)
    assert np.isfinite(shared).all()
    # The shares of a paper add up to its advantage.
    np.testing.assert_allclose(shared.reshape(2, 3).sum(0), uniform[:3], rtol=1e-4, atol=1e-5)


def test_tracked_quantiles_reach_the_advantage_from_the_second_batch_on():
    method = tracked_mixed_value_at_risk()
    update = jax.jit(method.update)
    first, memory = update(method.init(), *DATA)
    np.testing.assert_allclose(first, mixed_value_at_risk(*DATA), rtol=1e-6)
    # Scores 2, 1, 1, 2: quantiles 1 and 2, below which lie none and half of the papers.
    np.testing.assert_allclose([memory["lower"], memory["upper"]], [1 + 0.1 * 0.2, 2 + 0.1 * 0.3], rtol=1e-6)
    second, memory = update(memory, *DATA)
    assert np.abs(np.asarray(second - first)).max() > 1e-3
    mixed, _ = tracked_mixed_value_at_risk(use="mix").update(memory, *DATA)
    assert np.abs(np.asarray(mixed - second)).max() > 1e-3


def test_equal_scores_far_from_the_tracked_quantiles_are_bounded():
    method = tracked_mixed_value_at_risk()
    _, memory = method.update(method.init(), *DATA)
    for reward in (0.0, 1.0):
        value, _ = method.update(memory, jnp.full(12, reward), *DATA[1:])
        # At most (1.5 / 0.2 + 1 / 0.6) / 2.5 for each unit of score below the quantiles.
        assert np.abs(np.asarray(value)).max() < 10.0


def test_tracking_converges_to_the_quantiles_of_the_scores():
    rng = np.random.default_rng(4)
    method = tracked_mixed_value_at_risk(learning_rate=0.05, prompts_per_bundle=1)
    update = jax.jit(method.update)
    memory = method.init()
    sample, group, weight = jnp.tile(jnp.arange(10), 5), jnp.repeat(jnp.arange(5), 10), jnp.ones(50)
    for _ in range(200):
        _, memory = update(memory, jnp.asarray(rng.uniform(size=50), jnp.float32), sample, group, weight)
    np.testing.assert_allclose([memory["lower"], memory["upper"]], [0.2, 0.8], atol=0.05)


def test_an_empty_batch_is_forgotten():
    method = tracked_mixed_value_at_risk()
    value, memory = method.update(method.init(), REWARDS, SAMPLE, GROUP, jnp.zeros(12))
    np.testing.assert_array_equal(value, 0)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), memory, method.init()))


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"lower": 0.8, "upper": 0.2}, r"lower is 0\.8 and upper is 0\.2"),
        ({"credit": "mean"}, "credit is 'mean'.*uniform, std, sum_mean, score"),
        ({"prompts_per_bundle": 0}, "prompts_per_bundle is 0"),
        ({"tail_weight": -1.0}, r"tail_weight is -1\.0"),
    ],
)
def test_bad_hyper_parameters_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        mixed_value_at_risk(*DATA, **hyper)
    with pytest.raises(ValueError, match=message):
        tracked_mixed_value_at_risk(**hyper)


def test_bad_tracking_is_named():
    with pytest.raises(ValueError, match=r"use is 'both'.*tracked, mix"):
        tracked_mixed_value_at_risk(use="both")
    with pytest.raises(ValueError, match=r"learning_rate is 0\.0"):
        tracked_mixed_value_at_risk(learning_rate=0.0)
