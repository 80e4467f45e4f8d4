"""Importance correction of tokens that another distribution drew."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import importance_weight, negative_sequence_mask

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
SAMPLER = jnp.array([[-1.1, -0.6, -0.4], [-0.6, -1.2, 0], [-1.7, -0.3, -1.0], [-0.9, 0, 0]])
ADVANTAGES = jnp.broadcast_to(jnp.array([1.0, -1.0, 0.5, -0.5])[:, None], MASK.shape)


def test_worked_example_truncated_tokens():
    expected = [[0.904837, 0.904837, 1.10517], [1.10517, 0.67032, 0], [0.740818, 0.904837, 1.10517], [1.10517, 0, 0]]
    np.testing.assert_allclose(importance_weight(OLD, SAMPLER, MASK, high=1.2), expected, rtol=5.5e-6)


def test_worked_example_masked_sequences():
    weights = importance_weight(OLD, SAMPLER, MASK, level="sequence", mode="mask", low=0.8, high=1.2)
    expected = [[0.904837] * 3, [0, 0, 0], [0, 0, 0], [1.10517, 0, 0]]
    np.testing.assert_allclose(weights, expected, rtol=5.5e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("normalize", [False, True])
def test_where_sampler_and_trainer_agree_every_weight_is_one(level, mode, normalize):
    weights = importance_weight(OLD, OLD, MASK, level=level, mode=mode, low=0.9, high=1.1, normalize=normalize)
    np.testing.assert_array_equal(weights, MASK)


def test_an_unknown_sampler_logprob_counts_as_agreement():
    unknown = SAMPLER.at[0, 1].set(jnp.nan).at[1, 0].set(-jnp.inf)
    weights = importance_weight(OLD, unknown, MASK)
    assert weights[0, 1] == weights[1, 0] == 1.0
    np.testing.assert_array_equal(weights[2:], importance_weight(OLD, SAMPLER, MASK)[2:])


def test_normalised_weights_have_mean_one_over_the_rows_that_count():
    weight = jnp.array([1.0, 0.0, 1.0, 2.0])
    weights = importance_weight(OLD, SAMPLER, MASK, weight, normalize=True)
    counts = np.asarray(MASK) * np.asarray(weight)[:, None]
    np.testing.assert_allclose((weights * counts).sum() / counts.sum(), 1.0, rtol=1e-6)
    other = importance_weight(OLD.at[1].set(-9.0), SAMPLER, MASK, weight, normalize=True)
    np.testing.assert_array_equal(weights[2], other[2])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_differences_stay_finite(level):
    for shift in (-500.0, 500.0):
        weights = importance_weight(OLD + shift, SAMPLER, MASK, level=level, high=None, normalize=True)
        assert np.isfinite(weights).all()


def test_existing_factors_are_multiplied():
    already = 0.5 * jnp.ones_like(MASK)
    np.testing.assert_allclose(
        importance_weight(OLD, SAMPLER, MASK, None, already), 0.5 * importance_weight(OLD, SAMPLER, MASK), rtol=1e-6
    )
    kept = negative_sequence_mask(OLD, OLD, ADVANTAGES, MASK, already, threshold=0.1)
    np.testing.assert_array_equal(kept, 0.5 * MASK)


def test_the_sequence_mask_drops_only_bad_sequences_that_were_left_behind():
    # The trained policy gives rows 0 and 1 half a nat a token less than the sampler did, row 3 a little less.
    old = SAMPLER - jnp.array([0.5, 0.5, 0.0, 0.1])[:, None]
    kept = negative_sequence_mask(old, SAMPLER, ADVANTAGES, MASK, threshold=0.2)
    np.testing.assert_array_equal(kept, MASK * jnp.array([1.0, 0, 1, 1])[:, None])
    np.testing.assert_array_equal(negative_sequence_mask(old, SAMPLER, ADVANTAGES, MASK, threshold=0.6), MASK)
    # The rule looks at the sign of the advantage, and the mean leaves masked tokens out.
    np.testing.assert_array_equal(
        negative_sequence_mask(old, SAMPLER, -ADVANTAGES, MASK, threshold=0.2),
        MASK * jnp.array([0.0, 1, 1, 1])[:, None],
    )


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"level": "batch"}, "level is 'batch'"),
        ({"mode": "drop"}, "mode is 'drop'"),
        ({"low": 3.0}, "low is 3.0 and high is 2.0"),
    ],
)
def test_bad_hyper_parameters_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        importance_weight(OLD, SAMPLER, MASK, **hyper)
