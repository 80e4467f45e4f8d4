"""A bonus from the effective rank of hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import effective_rank, rank_bonus, rank_dynamics, rank_shaped
from jaxrl_llm.advantages.shaping.effective_rank import with_bounded_bonus

HIDDEN = jnp.array([[1.0, 0], [0, 1], [1, 1], [2, 0], [0, 3]])
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def test_worked_example_of_the_rank():
    dynamics = rank_dynamics(HIDDEN[None], jnp.ones((1, 5)), stride=2)
    np.testing.assert_allclose(dynamics, [[0, -0.148212, 1.78041]], **DIGITS)


def test_worked_example_of_the_bonus():
    dynamics = jnp.array([[0.2, 0.1, 3], [0.2, -0.3, 4], [0.2, 0.1, 3]])
    bonus = rank_bonus(dynamics, jnp.array([0.1, -0.2, 2.5]))
    np.testing.assert_allclose(bonus, [0.281744, 0.417946, 0.281744], **DIGITS)
    shaped = with_bounded_bonus(jnp.array([1.0, -1, 0])[:, None], bonus[:, None])
    np.testing.assert_allclose(shaped[:, 0], [1.28174, -0.582054, 0], **DIGITS)


def test_the_effective_rank_counts_equal_directions():
    for rank in (1, 2, 5):
        states = jnp.concatenate([jnp.eye(6)[:rank], -jnp.eye(6)[:rank]])
        np.testing.assert_allclose(effective_rank(states, jnp.ones(2 * rank)), rank, rtol=1e-5)


def test_position_scale_and_padding_change_nothing():
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    expected = effective_rank(states, jnp.ones(6))
    np.testing.assert_allclose(effective_rank(7 * states + 3, jnp.ones(6)), expected, rtol=1e-5)
    spread = jnp.full((9, 4), jnp.nan).at[jnp.array([0, 2, 3, 5, 6, 8])].set(states)
    mask = jnp.array([1.0, 0, 1, 1, 0, 1, 1, 0, 1])
    np.testing.assert_allclose(effective_rank(spread, mask), expected, rtol=1e-5)
    compact = rank_dynamics(states[None], jnp.ones((1, 6)), stride=2)
    np.testing.assert_allclose(rank_dynamics(spread[None], mask[None], stride=2), compact, rtol=1e-5, atol=1e-6)


def test_dynamics_are_differences_from_the_past():
    rng = np.random.default_rng(1)
    states = jnp.asarray(rng.normal(size=(2, 9, 5)), jnp.float32)
    mask = jnp.array([[1.0] * 9, [1.0] * 6 + [0.0] * 3])
    dynamics = rank_dynamics(states, mask, stride=2)
    for row, length in enumerate((9, 6)):
        ranks = [float(effective_rank(states[row, : t + 1], jnp.ones(t + 1))) for t in range(2, length, 2)]
        velocity = [ranks[j] - np.mean(ranks[:j]) for j in range(1, len(ranks))]
        expected = [np.mean(np.diff(velocity)) if len(velocity) > 1 else 0.0, np.mean(velocity)]
        np.testing.assert_allclose(dynamics[row, :2], expected, rtol=1e-4, atol=1e-5)


def test_short_and_constant_answers_are_finite():
    states = jnp.ones((3, 4, 2))
    mask = jnp.array([[1.0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    dynamics = rank_dynamics(states, mask, stride=1)
    assert np.isfinite(dynamics).all()
    np.testing.assert_array_equal(dynamics[1:], 0)
    np.testing.assert_array_equal(rank_dynamics(states, mask, stride=40)[:, :2], 0)


def batch(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    mask = jnp.array([[1.0] * 6, [1.0] * 4 + [0.0] * 2, [1.0] * 5 + [0.0]])
    advantages = jnp.where(mask > 0, jnp.array([1.0, -1.0, 0.0])[:, None], 0.0)
    hidden = jnp.asarray(scale * rng.normal(size=(3, 6, 4)), jnp.float32)
    return advantages, hidden, jnp.array([1.0, -1.0, 0.0]), mask, jnp.ones(3)


def run(method, seeds):
    update, memory, results = jax.jit(method.update), method.init(), []
    for seed in seeds:
        shaped, memory = update(memory, *batch(seed))
        results.append(np.asarray(shaped))
    return results, memory


def test_the_first_batch_is_not_shaped_and_no_advantage_turns_around():
    results, memory = run(rank_shaped(stride=1), range(5))
    advantages = np.asarray(batch(0)[0])
    np.testing.assert_array_equal(results[0], advantages)
    assert any((r != advantages).any() for r in results[1:])
    for shaped in results:
        np.testing.assert_array_equal(np.sign(shaped), np.sign(advantages))
        assert (shaped >= advantages).all()
        assert (shaped - advantages <= np.abs(advantages) / 2 + 1e-6).all()
    assert memory["batches"] == 5


def test_the_centres_are_running_means_of_earlier_batches():
    means = [np.asarray(rank_dynamics(*(batch(s)[i] for i in (1, 3)), stride=1)).mean(0) for s in range(4)]
    _, memory = run(rank_shaped(stride=1, rate=0.3), range(4))
    expected = means[0]
    for mean in means[1:3]:
        expected = 0.7 * expected + 0.3 * mean
    np.testing.assert_allclose(memory["centre"], expected, rtol=1e-4, atol=1e-6)
    _, released = run(rank_shaped(stride=1, rate=0.3, start_at_first_batch=False), range(2))
    np.testing.assert_allclose(released["centre"], 0.3 * means[0], rtol=1e-4, atol=1e-6)


def test_the_released_form_touches_the_last_token_alone():
    everywhere, _ = run(rank_shaped(stride=1), range(3))
    last, _ = run(rank_shaped(stride=1, spread="last_token"), range(3))
    advantages = np.asarray(batch(0)[0])
    changed = last[2] != advantages
    assert changed.sum() <= 3
    for row, end in enumerate((5, 3, 4)):
        assert not np.delete(changed[row], end).any()
        assert last[2][row, end] == everywhere[2][row, end]


def test_a_policy_that_scores_well_needs_less_of_it():
    plain, memory = run(rank_shaped(stride=1, kappa=1.01), range(6))
    scaled, _ = run(rank_shaped(stride=1, kappa=1.01, scale_by_score=True), range(6))
    assert memory["score"] == 0  # rewards 1, -1, 0
    gain, half = np.stack(plain) - batch(0)[0], np.stack(scaled) - batch(0)[0]
    unbounded = (gain > 0) & (gain < 0.9)
    assert unbounded.any()
    np.testing.assert_allclose(half[unbounded], 0.5 * gain[unbounded], rtol=1e-4, atol=1e-6)


def test_an_empty_batch_leaves_no_trace():
    method = rank_shaped(stride=1)
    _, memory = method.update(method.init(), *batch(0))
    advantages, hidden, rewards, mask, weight = batch(1)
    shaped, after = method.update(memory, advantages, hidden * jnp.nan, rewards, mask, weight * 0)
    np.testing.assert_array_equal(shaped, 0)
    for name in memory:
        np.testing.assert_array_equal(after[name], memory[name])


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"kappa": 1.0}, "kappa is 1.0"),
        ({"rate": 1.5}, "rate is 1.5"),
        ({"stride": 0}, "stride is 0"),
        ({"spread": "all"}, "spread is 'all'.*last_token"),
    ],
)
def test_bad_hyper_parameters_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        rank_shaped(**hyper)
