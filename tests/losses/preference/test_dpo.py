"""DPO: worked examples, what cancels, and margins of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import dpo

# Better and worse answers to four prompts: summed log-probabilities under policy and reference, and lengths.
LOGP_W, LOGP_L = [-12, -8.5, -20.25, -5], [-14.5, -7, -26, -5.5]
REF_W, REF_L = [-13, -9, -18.75, -6], [-13.5, -8, -24, -4]
LENGTH_W, LENGTH_L = [6, 4, 10, 3], [7, 4, 12, 2]
DIGITS = {"rtol": 0, "atol": 6e-7}


def spread(first, second, length_first=LENGTH_W, length_second=LENGTH_L, width=12):
    """Rows of pairs that follow one another, a sum spread evenly over the tokens of its row."""
    sums, lengths = np.stack([first, second], 1).reshape(-1), np.stack([length_first, length_second], 1).reshape(-1)
    inside = np.arange(width) < lengths[:, None]
    return jnp.asarray(np.where(inside, sums[:, None] / lengths[:, None], 0), jnp.float32)


MASK = (spread(np.ones(4), np.ones(4)) > 0).astype(jnp.float32)
LOGPROBS, REFERENCE = spread(LOGP_W, LOGP_L), spread(REF_W, REF_L)
GROUP = jnp.array([9, 9, 0, 0, 4, 4, 1, 1])
PREFERRED = jnp.array([1.0, 0.0] * 4)


def value(logprobs=LOGPROBS, reference=REFERENCE, group=GROUP, preferred=PREFERRED, mask=MASK, **hyper):
    return dpo(logprobs, reference, group, preferred, mask, **hyper).value


def test_worked_example():
    each = [0.598139, 0.718460, 0.668460, 0.575939]
    for number, expected in enumerate(each):
        alone = MASK * (jnp.arange(8) // 2 == number)[:, None]
        np.testing.assert_allclose(value(mask=alone), expected, **DIGITS)
    mean, gradient = jax.value_and_grad(value)(LOGPROBS)
    np.testing.assert_allclose(mean, 0.640249, **DIGITS)
    np.testing.assert_allclose(gradient[::2, 0], [-0.011254, -0.012812, -0.012188, -0.010946], **DIGITS)
    np.testing.assert_allclose(gradient[1::2, 0], -gradient[::2, 0], rtol=1e-6)
    np.testing.assert_array_equal(gradient[MASK == 0], 0)


@pytest.mark.parametrize(
    ("hyper", "expected"),
    [
        ({"link": "hinge", "beta": 0.5}, 0.5),
        ({"link": "robust", "label_smoothing": 0.1}, 0.626187),
        ({"link": "square", "beta": 0.5}, 1.4375),
        ({"link": "square", "beta": 0.5, "length_normalised": True}, 0.679068),
        ({"beta": 2.0, "length_normalised": True}, 0.510449),
    ],
)
def test_worked_examples_of_the_other_links(hyper, expected):
    np.testing.assert_allclose(value(**hyper), expected, **DIGITS)


def test_metrics_say_how_many_pairs_are_ordered_and_how_far():
    made = dpo(LOGPROBS, REFERENCE, GROUP, PREFERRED, MASK)
    assert made.denominator == 4
    np.testing.assert_allclose(made.metrics["preferred_share"], (3.0, 4.0))
    np.testing.assert_allclose(made.metrics["margin"], (0.1 * 4.5, 4.0), rtol=1e-5)


def test_swapped_sides_are_wrong_labels():
    swapped = value(preferred=1 - PREFERRED)
    np.testing.assert_allclose(value(label_smoothing=0.3), 0.7 * value() + 0.3 * swapped, rtol=1e-6)
    np.testing.assert_allclose(value(-LOGPROBS, -REFERENCE), swapped, rtol=1e-6)


def test_robust_is_right_on_average_over_flipped_labels():
    robust = lambda preferred: value(preferred=preferred, link="robust", label_smoothing=0.2)  # noqa: E731
    np.testing.assert_allclose(0.8 * robust(PREFERRED) + 0.2 * robust(1 - PREFERRED), value(), rtol=1e-6)


def test_doubled_tokens_change_nothing_where_lengths_are_divided_out():
    twice = [jnp.concatenate([x, x], axis=1) for x in (LOGPROBS, REFERENCE, MASK)]
    made = value(twice[0], twice[1], mask=twice[2], length_normalised=True, beta=2.0)
    np.testing.assert_allclose(made, 0.510449, **DIGITS)


def test_padding_absent_partners_and_unknown_rows_change_nothing():
    wide = [jnp.pad(x, ((0, 2), (0, 3)), constant_values=fill) for x, fill in ((LOGPROBS, 8), (REFERENCE, -3))]
    mask = jnp.pad(MASK, ((0, 2), (0, 3)))
    made = dpo(*wide, jnp.pad(GROUP, (0, 2), constant_values=4), jnp.pad(PREFERRED, (0, 2)), mask)
    np.testing.assert_allclose(made.value, value(), rtol=1e-6)
    assert made.denominator == 4
    first = MASK * (jnp.arange(8) < 2)[:, None]
    np.testing.assert_allclose(value(mask=first.at[3].set(MASK[3])), value(mask=first), rtol=1e-6)
    np.testing.assert_allclose(value(preferred=PREFERRED.at[2].set(-1)), value(mask=MASK.at[2].set(0)), rtol=1e-6)


def test_no_pair_is_zero():
    nothing = dpo(LOGPROBS, REFERENCE, jnp.arange(8), PREFERRED, MASK)
    assert (nothing.numerator, nothing.denominator, nothing.value) == (0, 0, 0)


def test_a_prompt_with_many_answers_is_the_mean_over_its_pairs():
    rows = (0, 1, 2, 3)  # two better and two worse answers of one prompt
    lp, ref, mask = (x[jnp.array(rows)] for x in (LOGPROBS, REFERENCE, MASK))
    made = dpo(lp, ref, jnp.zeros(4, int), PREFERRED[:4], mask)
    rho = np.array([1, -1, 0.5, 1])
    expected = np.mean([np.log1p(np.exp(-0.1 * (rho[i] - rho[j]))) for i in (0, 2) for j in (1, 3)])
    np.testing.assert_allclose(made.value, expected, rtol=1e-5)
    np.testing.assert_allclose(made.denominator, 1.0)


@pytest.mark.parametrize("link", ["logistic", "robust", "hinge", "square"])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_margins_have_finite_gradients(link, sign):
    far = LOGPROBS.at[::2, 0].add(sign * 500.0)  # z of some 50
    loss, gradient = jax.value_and_grad(lambda x: value(x, link=link))(far)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    if link == "logistic" and sign < 0:
        np.testing.assert_allclose(gradient[::2, 0], -0.1 / 4, rtol=1e-4)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"link": "square_root"}, "link is 'square_root'.*logistic, robust, hinge, square"),
        ({"beta": 0.0}, "beta is 0.0.*above 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0.5; it must lie in \[0, 0\.5\)"),
        ({"label_smoothing": 0.1, "link": "hinge"}, "label_smoothing is 0.1.*'hinge'"),
    ],
)
def test_bad_settings_are_refused(hyper, message):
    with pytest.raises(ValueError, match=message):
        value(**hyper)


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        value(reference=REFERENCE[:, :3])
