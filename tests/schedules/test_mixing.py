"""The share of imitation follows a validation loss and the entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.schedules import adaptive_mixing, gradient_alignment, mixing_weight

SUPERVISED, REINFORCEMENT = jnp.array([1.0, 0, 2]), jnp.array([0.0, 1, 1])
VALIDATION = jnp.array([0.5, -1, 2])


def test_worked_example():
    alignment = gradient_alignment(VALIDATION, SUPERVISED, REINFORCEMENT, learning_rate=1e-3)
    options = {"target_entropy": 0.6, "meta_rate": 1.0}
    np.testing.assert_allclose(mixing_weight(0.5, alignment, 0.4, **options), 0.5036, rtol=1e-6)
    np.testing.assert_allclose(mixing_weight(0.5, alignment, 0.4, sign="released", **options), 0.4966, rtol=1e-6)


def test_the_alignment_is_the_slope_of_the_validation_loss_after_a_step():
    target = jnp.array([0.3, -0.2, 0.9])
    params = {"a": jnp.array([0.1, 0.2]), "b": jnp.array([[0.4]])}
    flat = lambda p: jnp.concatenate([p["a"], p["b"].ravel()])  # noqa: E731
    losses = [
        lambda p: jnp.sum((flat(p) - target) ** 2),
        lambda p: jnp.sum(jnp.sin(flat(p) * 2)),
        lambda p: jnp.sum(flat(p) ** 3),
    ]
    validation, supervised, reinforcement = (jax.grad(f)(params) for f in losses)
    rate = 1e-4

    def after(mu):
        step = jax.tree.map(lambda p, r, s: p - rate * ((1 - mu) * r + mu * s), params, reinforcement, supervised)
        return -losses[0](step)

    slope = jax.grad(after)(0.5)
    alignment = gradient_alignment(validation, supervised, reinforcement, learning_rate=rate)
    np.testing.assert_allclose(alignment, slope, rtol=0.02)


def test_the_weight_stays_within_its_bounds():
    assert mixing_weight(0.5, 1e9, 0.4, target_entropy=0.4) == pytest.approx(0.95)
    assert mixing_weight(0.5, -1e9, 0.4, target_entropy=0.4) == pytest.approx(0.05)


def run(method, entropies, alignments=None):
    memory, values = method.init(), []
    update = jax.jit(method.update)
    for i, entropy in enumerate(entropies):
        extra = () if alignments is None else (jnp.float32(alignments[i]),)
        value, memory = update(memory, jnp.float32(entropy), *extra)
        values.append(float(value))
    return values


def test_aligned_demonstrations_raise_their_share():
    rising = run(adaptive_mixing(target_entropy=0.5, meta_rate=1.0), [0.5] * 5, [0.01] * 5)
    np.testing.assert_allclose(rising, 0.5 + 0.01 * np.arange(1, 6), rtol=1e-5)
    falling = run(adaptive_mixing(target_entropy=0.5, meta_rate=1.0, sign="released"), [0.5] * 5, [0.01] * 5)
    assert falling[-1] < 0.5


def test_the_target_is_measured_before_the_weight_moves():
    values = run(adaptive_mixing(target_steps=2, entropy_rate=0.1), [1.0, 0.5, 0.25, 0.25])
    np.testing.assert_allclose(values, [0.5, 0.5, 0.55, 0.6], rtol=1e-6)


def test_the_two_coefficients_add_up_to_one():
    history = ([0.4, 0.9, 0.1, 0.3], [0.5, -2.0, 0.1, 9.0])
    options = {"target_entropy": 0.5, "meta_rate": 0.1}
    supervised = run(adaptive_mixing(**options), *history)
    reinforcement = run(adaptive_mixing(part="reinforcement", **options), *history)
    np.testing.assert_allclose(np.add(supervised, reinforcement), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"part": "sft"}, "part is 'sft'"),
        ({"sign": "plus"}, "sign is 'plus'"),
        ({"start": 0.01}, "start is 0.01"),
        ({"low": 0.9, "high": 0.1}, "low is 0.9"),
        ({"target_steps": 0}, "target_steps is 0"),
    ],
)
def test_bad_hyper_parameters_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        adaptive_mixing(**hyper)
