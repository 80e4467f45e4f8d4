"""Controllers: coefficients that follow the metrics of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.fields import provided_by
from jaxrl_llm.run.recipes import loss_terms
from jaxrl_llm.schedules import adaptive_kl, adaptive_kl_of_rows, entropy_gated_kl
from jaxrl_llm.signatures import call, names

DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}


def run(method, *columns):
    memory, values = method.init(), []
    for row in zip(*columns, strict=True):
        value, memory = method.update(memory, *(jnp.float32(x) for x in row))
        values.append(float(value))
    return np.array(values), memory


def test_worked_example_of_adaptive_kl():
    method = adaptive_kl(sequences_per_step=256)
    # 0.09 nats a token on completions of 100 tokens are 9 nats a sequence.
    values, memory = run(method, [0.09], [100.0])
    np.testing.assert_allclose(values, [0.1], rtol=1e-6)
    np.testing.assert_allclose(memory["coefficient"], 0.100512, **DIGITS)
    _, per_token = run(adaptive_kl(sequences_per_step=256, unit="token"), [9.0])
    np.testing.assert_allclose(per_token["coefficient"], 0.100512, **DIGITS)


def test_the_coefficient_of_a_divergence_in_the_rewards_is_that_of_its_rows():
    method = adaptive_kl_of_rows()
    update, old, mask = jax.jit(method.update), jnp.zeros((512, 4)), jnp.ones((512, 4)).at[:, 3].set(0.0)
    reference = old - 3.0  # of three tokens that count: 9 nats a row
    half = (jnp.arange(512) % 2).astype(jnp.float32)
    value, memory = update(method.init(), old, reference.at[0].set(jnp.nan), mask, half)
    np.testing.assert_allclose(value, jnp.full(512, 0.1), rtol=1e-6)
    np.testing.assert_allclose(memory["coefficient"], 0.100512, **DIGITS)  # 256 rows, as above
    np.testing.assert_allclose(update(memory, old, old, mask, half)[1]["coefficient"], 0.100512 * 0.99488, **DIGITS)
    assert update(memory, old, reference, mask, half * 0)[1]["coefficient"] == memory["coefficient"]


def test_the_coefficient_rises_above_the_target_and_falls_below_it():
    method = adaptive_kl(sequences_per_step=512, unit="token", target=0.05)
    up, _ = run(method, [0.2] * 20)
    down, _ = run(method, [0.0] * 20)
    level, _ = run(method, [0.05] * 20)
    assert (np.diff(up) > 0).all()
    assert (np.diff(down) < 0).all()
    assert (down > 0).all()
    np.testing.assert_allclose(level, 0.1, rtol=1e-6)


def test_worked_example_of_safe():
    kl, entropy, reward = [2, 4, 6], [1, 1, 3], [0, 0.5, 1]
    penalties, _ = run(entropy_gated_kl(output="penalty"), kl, entropy, reward)
    np.testing.assert_allclose(penalties, [0, 0.00249061, 0.0270617], **DIGITS)
    # The thresholds of the card, read off the coefficient: 2 * 0.1 * (k - threshold) * gate * 0.1.
    coefficients, _ = run(entropy_gated_kl(), kl, entropy, reward)
    averages, gates = np.array([0.2, 0.58, 1.122]), np.array([2 / 1.1, 2 / 1.1, 2 / 3.1])
    np.testing.assert_allclose((averages - coefficients / (0.02 * gates))[1:], [0.46296, 0.474345], rtol=1e-5)
    assert coefficients[0] == 0


def test_the_coefficient_is_the_derivative_of_the_penalty_by_the_kl_of_the_batch():
    penalty, coefficient = entropy_gated_kl(output="penalty"), entropy_gated_kl()
    _, memory = run(penalty, [2, 4, 6], [1, 1, 3], [0, 0.5, 1])
    data = jnp.float32(5.0), jnp.float32(0.7), jnp.float32(0.8)
    slope = jax.grad(lambda kl: penalty.update(memory, kl, *data[1:])[0])(data[0])
    np.testing.assert_allclose(coefficient.update(memory, *data)[0], slope, rtol=1e-5)
    assert slope > 0


def test_a_falling_reward_lowers_the_threshold():
    rising, _ = run(entropy_gated_kl(), [5] * 6, [1] * 6, [0, 0.2, 0.4, 0.6, 0.8, 1.0])
    falling, _ = run(entropy_gated_kl(), [5] * 6, [1] * 6, [1, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert (falling[1:] > rising[1:]).all()


def test_a_sure_policy_pays_more():
    sure, _ = run(entropy_gated_kl(), [5], [0.05], [0.5])
    random, _ = run(entropy_gated_kl(), [5], [10.0], [0.5])
    np.testing.assert_allclose(sure / random, (2 / 0.15) / 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rewards", "phase"),
    [
        ([0.5] * 3, 1.5),  # too few
        ([0.5] * 5, 0.8),  # neither settled nor high
        ([0.9] * 5, 1.0),  # settled and high
        ([0.1] * 4 + [0.3] * 4, 1.2),  # rising, judged from two windows on
        ([0.1] * 4 + [0.3] * 3, 0.8),
    ],
)
def test_phases(rewards, phase):
    count = len(rewards)
    method = entropy_gated_kl(
        window=4, proportional=0.0, integral=0.0, derivative=0.0, highest_threshold=9.0, kl_decay=0.0
    )
    values, _ = run(method, [2.0] * count, [1.9] * count, rewards)
    # 2 * 0.1 * (2 - 0.3 * phase) * 2 / (1.9 + 0.1)
    np.testing.assert_allclose(values[-1], 0.2 * (2 - 0.3 * phase), rtol=1e-5)


def test_updates_compile_with_a_donated_memory_and_are_finite_far_out():
    method = entropy_gated_kl()
    update = jax.jit(method.update, donate_argnums=0)
    memory = method.init()
    for kl in (0.0, 1e6, -5.0):
        value, memory = update(memory, jnp.float32(kl), jnp.float32(0.0), jnp.float32(-100.0))
        assert np.isfinite(value)
        assert value >= 0
    assert jax.tree.structure(memory) == jax.tree.structure(method.init())


@pytest.mark.parametrize(
    "controller",
    [
        {"adaptive_kl": {"sequences_per_step": 64, "target": 0.1, "unit": "token"}},
        {"adaptive_kl": {"sequences_per_step": 64}},
        {"entropy_gated_kl": {}},
    ],
)
def test_a_recipe_may_put_a_controller_where_a_coefficient_stands(controller):
    (term,) = loss_terms([{"divergence": {"coefficient": controller}}])
    assert names(term.coefficient) <= provided_by("metrics")
    metrics = dict.fromkeys(provided_by("metrics"), jnp.float32(1.0))
    value, memory = call(term.coefficient, metrics, term.coefficient.init())
    assert value.shape == ()
    assert jax.tree.structure(memory) == jax.tree.structure(term.coefficient.init())


@pytest.mark.parametrize(
    ("factory", "hyper", "message"),
    [
        (adaptive_kl, {"sequences_per_step": 0}, "sequences_per_step is 0"),
        (adaptive_kl, {"sequences_per_step": 8, "target": -1.0}, r"target is -1\.0"),
        (adaptive_kl, {"sequences_per_step": 8, "unit": "row"}, r"unit is 'row'.*sequence, token"),
        (entropy_gated_kl, {"output": "loss"}, r"output is 'loss'.*coefficient, penalty"),
        (entropy_gated_kl, {"kl_decay": 1.0}, r"kl_decay is 1\.0"),
        (entropy_gated_kl, {"lowest_threshold": 0.7}, r"lowest_threshold is 0\.7 and highest_threshold is 0\.6"),
        (entropy_gated_kl, {"window": 0}, "window is 0"),
    ],
)
def test_bad_hyper_parameters_are_named(factory, hyper, message):
    with pytest.raises(ValueError, match=message):
        factory(**hyper)
