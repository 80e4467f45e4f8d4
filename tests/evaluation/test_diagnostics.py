"""Diagnostics of rewards, data and problems: the worked example of each card, and what each leaves unchanged."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrl_llm.evaluation import problem_diagnostics as problems
from jaxrl_llm.evaluation import reward_diagnostics as rewards

RANDOM = np.random.default_rng(0)


def test_informativeness_is_a_covariance_within_prompts():
    a, r = RANDOM.normal(size=(3, 5)), RANDOM.normal(size=(3, 5))
    slow = np.mean([np.cov(x, y, bias=True)[0, 1] for x, y in zip(a, r, strict=True)])
    assert rewards.informativeness(a, r) == pytest.approx(slow)
    assert rewards.informativeness(a, r + 7) == pytest.approx(slow)
    assert rewards.informativeness(a, np.ones((3, 5))) == 0
    assert rewards.informativeness([[2.0]], [[1.0]]) == 0


def test_informativeness_over_horizons_has_the_worked_example():
    # A chain s0 -> s1 -> end; action 0 goes on or ends well, action 1 gives nothing or half.
    transitions = np.zeros((3, 2, 3))
    transitions[0, 0, 1] = transitions[0, 1, 2] = transitions[1, :, 2] = transitions[2, :, 2] = 1
    reward = np.array([[0.0, 0.0], [1.0, 0.5], [0.0, 0.0]])
    found = rewards.horizon_informativeness(
        reward, transitions, [0, 0, 0], [0.9, 0.5, 0.0], discount=0.9, horizons=(0, 1)
    )
    assert found == pytest.approx(-0.9)
    shaped = reward.copy()
    shaped[0] += [0.9, 0.0]
    shaped[1] -= 0.0
    better = rewards.horizon_informativeness(
        shaped, transitions, [0, 0, 0], [0.9, 0.5, 0.0], discount=0.9, horizons=(0,)
    )
    assert better == 0


def test_starc_ignores_offsets_and_scale():
    assert rewards.starc_distance([[1, 2, 3]], [[2, 1, 3]]) == pytest.approx(0.5)
    r, other = RANDOM.normal(size=(4, 6)), RANDOM.normal(size=(4, 6))
    assert rewards.starc_distance(r, 3 * r + np.arange(4)[:, None]) == pytest.approx(0, abs=1e-9)
    assert rewards.starc_distance(r, -r) == pytest.approx(1)
    centred = [x - x.mean(1, keepdims=True) for x in (r, other)]
    rho = (centred[0] * centred[1]).sum() / np.prod([np.linalg.norm(x) for x in centred])
    assert rewards.starc_distance(r, other) == pytest.approx(np.sqrt((1 - rho) / 2))


def test_tabular_starc_has_the_worked_example_and_ignores_potentials():
    first, second = np.array([[[0, 1.0]], [[0.5, 0]]]), np.array([[[0, 2.0]], [[0, 1.0]]])
    transitions = np.array([[[0.5, 0.5]], [[0.25, 0.75]]])
    measure = {"transitions": transitions, "discount": 0.9}
    # With one action the canonical reward is 0; the card's 0.894427 is rounding noise divided by its own norm.
    assert rewards.tabular_starc_distance(first, second, **measure) == 0
    assert rewards.tabular_starc_distance(first, second, **measure, potential=True) == pytest.approx(1.370849, abs=1e-6)
    reward, potential = RANDOM.normal(size=(2, 3, 2)), np.array([0.3, -1.2])
    measure["transitions"] = RANDOM.dirichlet([1, 1], size=(2, 3))
    shaped = 2 * (reward + 0.9 * potential[None, None, :] - potential[:, None, None])
    for kind in (False, True):
        assert rewards.tabular_starc_distance(reward, shaped, **measure, potential=kind) == pytest.approx(0, abs=1e-9)
        assert rewards.tabular_starc_distance(reward, -reward, **measure, potential=kind) == pytest.approx(2)


def test_one_right_against_many_wrong_solutions():
    found = rewards.one_against_many([2, 0.5, 1], [[1, 0, -1], [0.7, 0.5, 0.1], [1, 0.2, 0.3]])
    expected = {"accuracy": 1 / 3, "accuracy_with_ties": 2 / 3, "mrr": 0.611111, "pairwise": 2 / 3}
    assert found == pytest.approx(expected, abs=1e-6)


def test_step_scores_in_every_usual_way():
    found = rewards.step_score_summaries([0.9, 0.5, 0.8])
    expected = {"min": 0.5, "max": 0.9, "last": 0.8, "product": 0.36, "mean": 0.733333, "geometric_mean": 0.711379}
    assert found == pytest.approx(expected | {"mean_logit": 0.767546, "mean_odds": 4.666667}, abs=1e-6)
    assert rewards.step_score_summaries([])["mean"] == 0.5
    assert np.isfinite(rewards.step_score_summaries([1.0, 0.0])["mean_odds"])


def test_a_tied_group_flips_and_one_with_a_margin_does_not():
    assert rewards.policy_cliff([1, 1, 1, 0, 0, 0], alpha=1.0) == {"ties": 3, "margin": 1}
    assert rewards.policy_cliff([2, 2], alpha=1.0) == {"ties": 2, "margin": 0}
    u = [1.0, -1.0, 0.0]
    soft = rewards.policy_cliff([1, 1, 0], alpha=0.1, direction=u)
    assert soft["flip"] == pytest.approx(0.049833, abs=1e-5)
    assert soft["flip"] <= soft["bound"] == pytest.approx(0.05)
    assert rewards.policy_cliff([1, 1, 0], alpha=0.001, direction=u)["flip"] == pytest.approx(0.5, abs=1e-6)
    assert rewards.policy_cliff([1, 0.5, 0], alpha=0.001, direction=u)["flip"] == pytest.approx(0, abs=1e-6)


def test_coverage_of_a_data_set():
    found = problems.dataset_coverage([(0, 1), (0, 1), (1, 0)], [(0, 0), (0, 1), (1, 0), (1, 1)], [0.2, 0.4], best=1.0)
    assert found == pytest.approx((0.5, 0.5, 0.3))
    assert problems.dataset_coverage([(0, 1)], [(0, 1)], [1.0], best=1.0).log_sa_co is None


def tree(leaves):
    return lambda sequence: leaves.get(sequence, 0.0)


def test_the_effective_horizon_has_both_worked_examples():
    first = tree({(0, 0): 0.1, (0, 1): 0.1, (1, 1): 1.0})
    found = problems.effective_horizons(first, actions=2, length=2)
    assert found[0] == pytest.approx((1, 0.4, 3.643856), abs=1e-6)
    assert found[1] == pytest.approx((2, 0.9, 2 + np.log2(1 / 0.81)))
    second = tree({(0, 0): 0.5, (0, 1): 0.5, (1, 0): -1.0, (1, 1): 1.0})
    assert problems.effective_horizons(second, actions=2, length=2)[0] == pytest.approx((2, 0.5, 4.0))
    assert problems.effective_horizons(second, actions=2, length=2, most_k=1) == []


def test_rewards_that_know_less_than_the_truth():
    found = problems.spurious_rewards([1, 0, 1, 0], [1, 1, 0, 1], [0.2, 0.5, 0.9, 0.4])
    assert found["random"].tolist() == [0, 1, 0, 0]
    assert problems.spurious_rewards([1, 0, 1, 0], [1, 1, 0, 0], [0] * 4)["incorrect"].tolist() == [0, 1, 0, 0]
    assert found["truth"].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rewards.informativeness([[1, 2]], [[1]]), r"must both be \[P, G\]"),
        (lambda: rewards.one_against_many([1], [1]), "one right and W wrong"),
        (lambda: rewards.policy_cliff([1, 0], alpha=0), "an alpha above 0"),
        (lambda: rewards.policy_cliff([1, 0], alpha=1, direction=[1]), "one number a sample"),
        (lambda: problems.dataset_coverage([], [1], [1.0], best=1.0), "data that is not empty"),
        (lambda: problems.coach_transfer([1], [1, 2], [1]), "of the same problems"),
        (lambda: problems.spurious_rewards([1], [1, 1], [0]), "must be the same"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
