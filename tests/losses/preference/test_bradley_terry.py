"""Bradley-Terry reward models: the worked example, what scores are identified up to, and gaps of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import bradley_terry, gaussian_bradley_terry
from jaxrl_llm.rewards import learned_reward

BETTER, WORSE = [1.2, -0.3, 0.8, 2], [0.7, 0.1, 0.8, -1]
SCORES = jnp.stack([jnp.array(BETTER), jnp.array(WORSE)], 1).reshape(-1)
MARGIN = jnp.stack([jnp.array([1, 0, 1 / 3, 2 / 3]), jnp.full(4, jnp.nan)], 1).reshape(-1)
GROUP = jnp.array([5, 5, 0, 0, 3, 3, 8, 8])
PREFERRED = jnp.array([1.0, 0.0] * 4)
ONES = jnp.ones(8)
DIGITS = {"rtol": 0, "atol": 6e-7}


def made(scores=SCORES, group=GROUP, preferred=PREFERRED, weight=ONES, margin=None, **hyper):
    return bradley_terry(scores, group, preferred, weight, margin, **hyper)


def test_worked_example():
    for pair, expected in enumerate([0.974077, 0.913015, 0.873639, 0.092554]):
        alone = (jnp.arange(8) // 2 == pair).astype(jnp.float32)
        np.testing.assert_allclose(made(weight=alone, margin=MARGIN).value, expected, **DIGITS)
    loss = made(margin=MARGIN, centring=0.01)
    np.testing.assert_allclose(loss.value, 0.731346, **DIGITS)
    np.testing.assert_allclose(loss.value - made(margin=MARGIN).value, 0.01802500, **DIGITS)
    np.testing.assert_allclose(loss.metrics["preferred_share"], (2.0, 4.0))


def test_the_second_worked_example():
    loss = made(jnp.array([1.0, 0, 0, 0.5]), jnp.array([0, 0, 1, 1]), PREFERRED[:4], ONES[:4])
    np.testing.assert_allclose(loss.value, 0.643669, **DIGITS)
    np.testing.assert_allclose(loss.metrics["preferred_share"], (1.0, 2.0))


def test_a_tie_costs_log_two():
    np.testing.assert_allclose(made(jnp.zeros(8)).value, np.log(2), rtol=1e-6)


def test_a_constant_of_a_prompt_cancels_unless_scores_are_centred():
    shifted = SCORES + jnp.repeat(jnp.array([3.0, -2, 0.5, 7]), 2)
    np.testing.assert_allclose(made(shifted).value, made().value, rtol=1e-5)
    for form in ("sum", "each"):
        assert made(shifted, centring=0.1, form=form).value > made(centring=0.1, form=form).value + 1


def test_swapped_sides_are_wrong_labels():
    swapped = made(preferred=1 - PREFERRED).value
    np.testing.assert_allclose(made(-SCORES).value, swapped, rtol=1e-6)
    np.testing.assert_allclose(made(label_smoothing=0.2).value, 0.8 * made().value + 0.2 * swapped, rtol=1e-6)


def test_each_is_the_mean_square_of_all_scores():
    difference = made(centring=0.5, form="each").value - made().value
    np.testing.assert_allclose(difference, 0.5 * np.mean(np.square([BETTER, WORSE])), rtol=1e-5)


def test_absent_rows_and_their_partners_change_nothing():
    weight = ONES.at[3].set(0)
    without = made(SCORES.at[3].set(jnp.inf), weight=weight, centring=0.1)
    index = jnp.array([0, 1, 4, 5, 6, 7])
    alone = made(SCORES[index], GROUP[index], PREFERRED[index], ONES[index], centring=0.1)
    np.testing.assert_allclose(without.value, alone.value, rtol=1e-6)
    assert without.denominator == 3
    nothing = made(group=jnp.arange(8))
    assert (nothing.numerator, nothing.value) == (0, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_large_gaps_have_finite_gradients(sign):
    far = SCORES + sign * 25.0 * jnp.where(PREFERRED == 1, 1, -1)
    loss, gradient = jax.value_and_grad(lambda x: made(x, margin=MARGIN).value)(far)
    assert np.isfinite(loss)
    np.testing.assert_allclose(gradient, 0 if sign > 0 else jnp.where(PREFERRED == 1, -0.25, 0.25), atol=1e-6)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"form": "mean"}, "form is 'mean'; it must be one of sum, each"),
        ({"label_smoothing": 0.6}, r"label_smoothing is 0\.6"),
        ({"centring": -1.0}, r"centring is -1\.0"),
    ],
)
def test_bad_settings_are_refused(hyper, message):
    with pytest.raises(ValueError, match=message):
        made(**hyper)


def test_scores_become_rewards_in_units_of_their_deviation():
    scores = jnp.array([1.0, 3.0, -9.0])
    np.testing.assert_array_equal(learned_reward(scores), scores)
    np.testing.assert_array_equal(learned_reward(scores, shift=1.0, scale=2.0, limit=3.0), [0, 1, -3])
    with pytest.raises(ValueError, match=r"scale is 0\.0; it must be above 0"):
        learned_reward(scores, scale=0.0)
    with pytest.raises(ValueError, match=r"limit is -1\.0; it must be above 0"):
        learned_reward(scores, limit=-1.0)


# ---- Gaussian scores ------------------------------------------------------------------------------------------------


def heads(deviation, scores=SCORES, count=1):
    """Scores of some equal heads with this deviation."""
    means = jnp.tile(scores[:, None], (1, count))
    return jnp.concatenate([means, jnp.full_like(means, np.log(deviation))], 1)


def gaussian(scores, group=GROUP, preferred=PREFERRED, weight=ONES, **hyper):
    return gaussian_bradley_terry(scores, group, preferred, weight, **hyper)


@pytest.mark.parametrize("deviation", [0.3, 1.5])
def test_gaussian_scores_equal_numerical_integrals(deviation):
    gaps, spread = np.subtract(BETTER, WORSE), deviation * np.sqrt(2)
    z = np.linspace(-12, 12, 40_001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    log_sigmoid = -np.logaddexp(0, -(gaps[:, None] + spread * z))
    marginal, expected = (np.exp(log_sigmoid) * density).sum(1), (log_sigmoid * density).sum(1)
    found = gaussian(heads(deviation, count=3))
    np.testing.assert_allclose(found.value, -np.log(marginal).mean(), rtol=1e-5)
    np.testing.assert_allclose(gaussian(heads(deviation), form="expected").value, -expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["deviation"], (4 * deviation, 4.0), rtol=1e-5)


def test_without_deviation_gaussian_scores_are_bradley_terry():
    for form in ("marginal", "expected"):
        np.testing.assert_allclose(gaussian(heads(1e-9), form=form).value, made().value, rtol=1e-6)


def test_the_marginal_deviation_grows_where_labels_contradict_each_other():
    """Two labels of one pair of answers, two to one and far apart in score."""
    scores = jnp.array([3.0, -3, 3, -3, 3, -3])
    ids, labels, ones = jnp.array([0, 0, 1, 1, 2, 2]), jnp.array([1.0, 0, 1, 0, 0, 1]), jnp.ones(6)

    def value(log_deviation, form):
        given = jnp.stack([scores, jnp.full(6, log_deviation)], 1)
        return gaussian(given, ids, labels, ones, form=form).value

    assert jax.grad(value)(0.0, "marginal") < -0.01
    assert jax.grad(value)(0.0, "expected") > 0.01


def test_absent_rows_of_gaussian_scores_have_no_gradient():
    weight = ONES.at[:2].set(0.0)
    scores = heads(1.0).at[0].set(jnp.nan)
    slope = jax.grad(lambda x: gaussian(x, weight=weight).value)(scores)
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal((slope != 0).any(1), [False] * 2 + [True] * 6)


def test_bad_gaussian_scores():
    with pytest.raises(ValueError, match=r"shape \(8, 3\); K Gaussian heads are 2K outputs"):
        gaussian(jnp.zeros((8, 3)))
    with pytest.raises(ValueError, match="form is 'sampled'; it must be one of marginal, expected"):
        gaussian(heads(1.0), form="sampled")
