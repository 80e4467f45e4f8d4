"""SPINE: which tokens fork, and the band that their entropy is kept in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import clipped_surrogate, entropy_band, forking_kl, forking_mask, forking_tokens, kl_estimate
from jaxrl_llm.losses.token_weights.forking_tokens import row_quantile

ENTROPY = jnp.array([[0.1, 0.2, 0.3, 0.4, 2, 0.1, 1, 3, 0.2, 0.5]])
MASK = jnp.ones((1, 10))
FORKS = np.array([0, 0, 0, 0, 1, 0, 0, 1, 0, 0])
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def test_worked_example():
    np.testing.assert_array_equal(forking_tokens(ENTROPY, MASK)[0], FORKS)
    chosen = forking_mask(ENTROPY, MASK)
    band = [row_quantile(ENTROPY, chosen, level)[0, 0] for level in (0.1, 0.5)]
    np.testing.assert_allclose(band, [2.1, 2.5], **DIGITS)
    np.testing.assert_allclose(entropy_band(ENTROPY, ENTROPY, MASK).numerator, (0.1 + 0.5) / 10, **DIGITS)
    gradient = jax.grad(lambda x: entropy_band(x, ENTROPY, MASK, aggregation="seq_mean_token_sum").value)(ENTROPY)
    np.testing.assert_array_equal(gradient[0], [0, 0, 0, 0, -1, 0, 0, 1, 0, 0])


def test_a_policy_loss_trains_on_forks_and_divides_by_all_tokens():
    logprobs = -jnp.ones((1, 10))
    weight = forking_tokens(ENTROPY, MASK)
    loss = lambda x: clipped_surrogate(x, logprobs, MASK, MASK, weight).value  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(logprobs)[0], -FORKS / 10, rtol=1e-6)


def test_a_weight_found_before_is_kept_on_forks():
    np.testing.assert_array_equal(forking_tokens(ENTROPY, MASK, 3.0 * MASK)[0], 3.0 * FORKS)


def test_ties_of_the_last_fork_are_all_forks_and_rows_are_apart():
    entropy = jnp.array([[1.0, 1, 1, 0, 0], [5, 4, 9, 9, 9]])
    mask = jnp.array([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(forking_tokens(entropy, mask), [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    # 0.1 * 30 is 3 tokens, although float32 has it above 3.
    assert forking_tokens(jnp.arange(30.0)[None], jnp.ones((1, 30)), share=0.1).sum() == 3


def test_otsu_splits_two_heaps_wherever_they_lie():
    rng = np.random.default_rng(0)
    low, high = rng.normal(0.3, 0.05, 40), rng.normal(2.5, 0.2, 10)
    entropy = jnp.asarray(rng.permutation(np.concatenate([low, high]))[None], jnp.float32)
    chosen = forking_tokens(entropy, jnp.ones((1, 50)), selection="otsu")
    np.testing.assert_array_equal(chosen[0] > 0, np.asarray(entropy[0]) > 1.2)
    scaled = forking_tokens(7 * entropy + 3, jnp.ones((1, 50)), selection="otsu")
    np.testing.assert_array_equal(scaled, chosen)


def test_otsu_maximises_the_variance_between_classes():
    rng = np.random.default_rng(1)
    entropy = rng.gamma(1.0, 0.7, 60).astype(np.float32)
    chosen = np.asarray(forking_tokens(jnp.asarray(entropy)[None], jnp.ones((1, 60)), selection="otsu"))[0] > 0

    def between(above):
        return above.mean() * (1 - above.mean()) * (entropy[above].mean() - entropy[~above].mean()) ** 2

    best = max(between(entropy > t) for t in np.sort(entropy)[:-1])
    # The histogram's bins cost a little.
    assert between(chosen) > 0.98 * best


@pytest.mark.parametrize("selection", ["top_share", "otsu"])
def test_equal_entropies_all_fork_and_an_empty_row_has_none(selection):
    chosen = forking_tokens(jnp.ones((2, 4)), jnp.array([[1.0, 1, 1, 0], [0, 0, 0, 0]]), selection=selection)
    np.testing.assert_array_equal(chosen, [[1, 1, 1, 0], [0, 0, 0, 0]])


def test_the_band_of_deviations():
    # Forks 2 and 3: median 2.5, median absolute deviation 0.5.
    value = entropy_band(ENTROPY - 1.0, ENTROPY, MASK, band="deviation", aggregation="seq_mean_token_sum").value
    np.testing.assert_allclose(value, max(2.5 - 1.4826 * 0.5 - 1.0, 0), rtol=1e-5)
    single = entropy_band(jnp.array([[0.1]]), jnp.array([[0.7]]), jnp.ones((1, 1)), band="deviation")
    np.testing.assert_allclose(single.value, 0.6, rtol=1e-6)


def test_inside_the_band_nothing_pulls():
    inside = jnp.full_like(ENTROPY, 2.3)
    loss = entropy_band(inside, ENTROPY, MASK)
    assert loss.numerator == 0
    assert loss.metrics["outside_band_share"][0] == 0


def test_the_divergence_is_averaged_over_forks():
    logprobs, reference = -jnp.ones((1, 10)), -jnp.linspace(0.5, 2.0, 10)[None]
    loss = forking_kl(logprobs, reference, ENTROPY, MASK)
    forks = np.flatnonzero(FORKS)
    expected = kl_estimate(logprobs[:, forks], reference[:, forks], jnp.ones((1, 2)))
    np.testing.assert_allclose(loss.value, expected.value, rtol=1e-6)
    assert loss.denominator == 2


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"selection": "entropy"}, r"selection is 'entropy'.*top_share, otsu"),
        ({"share": 0.0}, r"share is 0\.0"),
        ({"band": "iqr"}, r"band is 'iqr'.*quantile, deviation"),
        ({"low": 0.9}, r"low is 0\.9 and high is 0\.5"),
    ],
)
def test_bad_hyper_parameters_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        entropy_band(ENTROPY, ENTROPY, MASK, **hyper)
