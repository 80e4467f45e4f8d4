"""Right answers against wrong ones: worked example, decoupled length preference, trust region."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import decoupled_reward, group_trust_region

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
CORRECT = jnp.array([1.0, 0, 1, 0])
LENGTH = jnp.array([3, 2, 3, 1])
ONE_GROUP = jnp.full(4, 21)
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])
LOGPROBS = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def drpo(logprobs, correct=CORRECT, length=LENGTH, group=ONE_GROUP, mask=MASK, **hyper):
    return decoupled_reward(logprobs, correct, length, group, mask, max_completion_tokens=3, **hyper)


def test_worked_example():
    value, gradient = jax.value_and_grad(lambda x: drpo(x).value + group_trust_region(x, OLD, ONE_GROUP, MASK).value)(
        LOGPROBS
    )
    np.testing.assert_allclose(value, 0.152072, **DIGITS)
    expected = [
        [-0.166667, -0.166667, -0.166667],
        [0.25225, 0.25225, 0],
        [-0.166667, -0.166667, -0.166667],
        [0.4955, 0, 0],
    ]
    np.testing.assert_allclose(gradient, expected, **DIGITS)


def test_it_equals_the_formula_on_random_groups():
    rng = np.random.default_rng(0)
    rows = 9
    logprobs = rng.uniform(-3, -0.1, (rows, 4))
    length = rng.integers(1, 5, rows)
    mask = (np.arange(4) < length[:, None]).astype(float)
    correct = np.array([1, 0, 1, 0, 0, 1, 1, 0, 1.0])
    group = np.array([3, 3, 3, 3, 88, 88, 5, 5, 5])
    score = (logprobs * mask).sum(1) / length
    total = 0.0
    for name in (3, 88, 5):
        right, wrong = (group == name) & (correct == 1), (group == name) & (correct == 0)
        omega = np.exp((1 - length[right] / 6) / 0.3)
        total += (omega * score[right]).sum() / omega.sum() - 0.7 * np.log(np.exp(score[wrong] / 0.7).mean())
    arrays = [jnp.asarray(x, jnp.float32) for x in (logprobs, correct, length, group, mask)]
    arrays[2:4] = [x.astype(jnp.int32) for x in arrays[2:4]]
    loss = decoupled_reward(*arrays, max_completion_tokens=6, temperature=0.7, length_temperature=0.3)
    np.testing.assert_allclose(loss.value, -total / 3, rtol=1e-5)
    assert loss.denominator == pytest.approx(3)


def test_a_long_right_answer_is_raised_less_but_never_pushed_down():
    group, correct = jnp.zeros(4, jnp.int32), jnp.array([1.0, 0, 1, 1])
    gradient = jax.grad(lambda x: drpo(x, correct, group=group).value)(LOGPROBS)
    per_row = gradient.sum(-1)
    assert per_row[0] < 0
    assert per_row[3] < per_row[0]
    assert per_row[1] > 0
    alike = jax.grad(lambda x: drpo(x, correct, group=group, length_temperature=None).value)(LOGPROBS).sum(-1)
    np.testing.assert_allclose(alike[jnp.array([0, 2, 3])], -1 / 3, rtol=1e-6)


def test_prompts_without_contrast_add_nothing_but_count():
    group = jnp.array([0, 0, 5, 5])
    both = drpo(LOGPROBS, group=group)
    one = drpo(LOGPROBS, jnp.array([1.0, 0, 1, 1]), group=group)
    assert both.denominator == one.denominator == 2
    gradient = jax.grad(lambda x: drpo(x, jnp.array([1.0, 0, 1, 1]), group=group).value)(LOGPROBS)
    np.testing.assert_array_equal(gradient[2:], 0)
    np.testing.assert_allclose(one.value, drpo(LOGPROBS[:2], CORRECT[:2], LENGTH[:2], group[:2], MASK[:2]).value / 2)


def test_it_stays_finite_where_a_preference_or_a_score_is_extreme():
    for scale in (1.0, 800.0):
        value, gradient = jax.value_and_grad(lambda x: drpo(x, temperature=1e-3, length_temperature=1e-3).value)(
            LOGPROBS * scale
        )
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_the_trust_region_is_free_up_to_its_threshold_and_then_pulls_back():
    inside = group_trust_region(OLD - 5e-5, OLD, ONE_GROUP, MASK)
    assert inside.value == 0
    moved = OLD - 0.1 * MASK
    value, gradient = jax.value_and_grad(lambda x: group_trust_region(x, OLD, ONE_GROUP, MASK).value)(moved)
    np.testing.assert_allclose(value, 1e3 * (0.1 - 1e-4) * 0.1, rtol=1e-5)
    np.testing.assert_allclose(gradient, -1e3 * (0.1 - 1e-4) / 9 * MASK, rtol=1e-5)


def test_the_trust_region_of_one_prompt_does_not_excuse_another():
    group = jnp.array([0, 0, 5, 5])
    moved = OLD + jnp.array([-0.2, -0.2, 0.2, 0.2])[:, None] * MASK
    gradient = jax.grad(lambda x: group_trust_region(x, OLD, group, MASK).value)(moved)
    assert np.abs(gradient[:2][MASK[:2] > 0]).min() > 0
    np.testing.assert_array_equal(gradient[2:], 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: drpo(LOGPROBS, temperature=0.0), "temperature is 0.0"),
        (lambda: drpo(LOGPROBS, length_temperature=-1.0), "length_temperature is -1.0"),
        (
            lambda: decoupled_reward(LOGPROBS, CORRECT, LENGTH, ONE_GROUP, MASK, max_completion_tokens=0),
            "max_completion_tokens is 0",
        ),
        (lambda: group_trust_region(LOGPROBS, OLD, ONE_GROUP, MASK, strength=-1.0), "strength is -1.0"),
    ],
)
def test_bad_hyper_parameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
