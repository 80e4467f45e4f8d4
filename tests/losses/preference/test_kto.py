"""KTO: the worked example, its anchor, and labels that are far from the truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import kto, mismatched_completions, mismatched_kl

# Four good answers, then four bad ones: summed log-probabilities under policy and reference.
LOGP = jnp.array([-12, -8.5, -20.25, -5, -14.5, -7, -26, -5.5])
REFERENCE = jnp.array([-13, -9, -18.75, -6, -13.5, -8, -24, -4])
LABELS = jnp.array([1.0] * 4 + [0.0] * 4)
RHO = np.array([1, 0.5, -1.5, 1, -1, 1, -2, -1.5])


def tokens(sums):
    """Rows of two tokens with these sums."""
    return jnp.stack([0.25 * sums, 0.75 * sums], axis=1)


def made(logp=LOGP, reference=REFERENCE, labels=LABELS, anchor=0.5, mask=None, **hyper):
    mask = jnp.ones((len(logp), 2)) if mask is None else mask
    return kto(tokens(logp), tokens(reference), labels, jnp.full(len(logp), anchor), mask, **hyper)


def anchor(logp, reference, weight=None, mask=None):
    mask = jnp.ones((len(logp), 2)) if mask is None else mask
    weight = jnp.ones(len(logp)) if weight is None else weight
    return mismatched_kl(tokens(logp), tokens(reference), mask, weight)


def test_worked_example():
    z = anchor(jnp.array([-10.0, -9, -8]), jnp.array([-10.5, -9.25, -8.75]))
    np.testing.assert_allclose(z, [0.5] * 3, atol=1e-6)
    loss = made()
    np.testing.assert_allclose(loss.value, 0.485987, rtol=0, atol=6e-7)
    assert loss.denominator == 8
    np.testing.assert_allclose(loss.metrics["desirable_log_ratio"], (1.0, 4.0), atol=1e-5)
    np.testing.assert_allclose(loss.metrics["undesirable_log_ratio"], (-3.5, 4.0), atol=1e-5)
    np.testing.assert_allclose(loss.metrics["kl_anchor"], (4.0, 8.0))


def test_gradient_is_the_slope_of_the_sigmoid_at_the_distance_from_the_anchor():
    gradient = jax.grad(lambda x: made(x).value)(LOGP)
    sigmoid = 1 / (1 + np.exp(-0.1 * (RHO - 0.5)))
    expected = np.where(LABELS == 1, -1, 1) * 0.1 * sigmoid * (1 - sigmoid) / 8
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_at_the_anchor_every_answer_costs_a_half():
    np.testing.assert_allclose(made(REFERENCE + 0.5).value, 0.5, rtol=1e-6)


def test_what_all_answers_and_the_anchor_gain_cancels():
    np.testing.assert_allclose(made(LOGP + 3.0, anchor=3.5).value, made().value, rtol=1e-5)


def test_swapped_labels_turn_the_loss_over():
    np.testing.assert_allclose(made(labels=1 - LABELS).value, 1 - made().value, rtol=1e-6)


def test_weights_are_factors_of_either_kind():
    good, bad = (made(labels=jnp.where(kind == LABELS, LABELS, -1)) for kind in (1, 0))
    weighted = made(desirable_weight=2.0, undesirable_weight=0.5)
    np.testing.assert_allclose(weighted.numerator, 2 * good.numerator + 0.5 * bad.numerator, rtol=1e-6)
    assert (good.denominator, weighted.denominator) == (4, 8)


def test_padding_absent_rows_and_unlabelled_rows_change_nothing():
    wide = [jnp.pad(tokens(x), ((0, 2), (0, 1)), constant_values=9) for x in (LOGP, REFERENCE)]
    mask = jnp.pad(jnp.ones((8, 2)), ((0, 2), (0, 1)))
    padded = kto(*wide, jnp.pad(LABELS, (0, 2)), jnp.full(10, 0.5), mask)
    np.testing.assert_allclose(padded.value, made().value, rtol=1e-6)
    unlabelled = made(labels=LABELS.at[3].set(-1))
    np.testing.assert_allclose(unlabelled.value, made(mask=jnp.ones((8, 2)).at[3].set(0)).value, rtol=1e-6)
    assert unlabelled.denominator == 7


@pytest.mark.parametrize("sign", [1, -1])
def test_far_answers_have_finite_and_vanishing_gradients(sign):
    far = LOGP + sign * 500.0
    loss, gradient = jax.value_and_grad(lambda x: made(x).value)(far)
    assert np.isfinite(loss)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_the_anchor_is_never_negative_and_leaves_absent_rows_out():
    np.testing.assert_array_equal(anchor(REFERENCE - 1, REFERENCE), 0)
    weight = jnp.array([1.0, 0, 1, 0, 0, 0, 0, 0])
    logp = jnp.where(weight > 0, REFERENCE + 2, jnp.inf)
    np.testing.assert_allclose(anchor(logp, REFERENCE, weight), 2, rtol=1e-6)
    np.testing.assert_array_equal(anchor(LOGP, REFERENCE, jnp.zeros(8)), 0)


def test_completions_move_on_by_one_row():
    prompts, completions = jnp.arange(6).reshape(3, 2), 10 + jnp.arange(9).reshape(3, 3)
    view = mismatched_completions(prompts, jnp.array([2, 1, 2]), completions, jnp.array([3, 1, 2]))
    np.testing.assert_array_equal(view.prompt_tokens, prompts)
    np.testing.assert_array_equal(view.prompt_length, [2, 1, 2])
    np.testing.assert_array_equal(view.tokens, completions[jnp.array([2, 0, 1])])
    np.testing.assert_array_equal(view.length, [2, 3, 1])
    np.testing.assert_array_equal(view.mask, [[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    with pytest.raises(ValueError, match=r"a single row.*at least 2 rows"):
        mismatched_completions(prompts[:1], jnp.array([2]), completions[:1], jnp.array([3]))


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"beta": -0.1}, "beta is -0.1.*above 0"),
        ({"desirable_weight": -1.0}, "desirable_weight is -1.0.*at least 0"),
        ({"undesirable_weight": -2.0}, "undesirable_weight is -2.0"),
    ],
)
def test_bad_settings_are_refused(hyper, message):
    with pytest.raises(ValueError, match=message):
        made(**hyper)
