"""Weights of rewards that follow the influence of each reward on the policy gradient of all."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import schedules
from jaxrl_llm.signatures import call

NAMES = ("right", "short", "format")
GRADIENTS = jnp.array([[1, 0, 0.5], [0, 1, -0.5], [-0.5, 0.5, 0]])
INFLUENCE = GRADIENTS @ GRADIENTS.sum(0)
NAN = float("nan")
COLUMNS = jnp.array([[1.0, 0, 2], [0, 1, NAN], [NAN, NAN, NAN]])


def steps(count, influence=INFLUENCE, **hyper):
    """(value, memory) of each step."""
    method = schedules.influence_weighted(reward_names=NAMES, **hyper)
    memory, found = method.init(), []
    for step in range(count):
        given = {"reward_components": COLUMNS, "reward_influence": influence, "step": jnp.int32(step)}
        value, memory = call(method, given, memory)
        found.append((value, memory))
    return found


def test_the_worked_example_in_the_step_that_measures_it():
    ((value, memory),) = steps(1, initial=(0.5, 0.25, 0.25), learning_rate=0.1, mu=1.0)
    np.testing.assert_allclose(memory["weights"], [0.487190, 0.269214, 0.243595], atol=1e-6)
    np.testing.assert_allclose(value["rewards"], [0.487190 + 2 * 0.243595, 0.269214, NAN], atol=1e-6)
    assert [float(value[f"metric/weight_{name}"]) for name in NAMES] == memory["weights"].tolist()


def test_influence_is_averaged_over_the_steps_between_two_updates():
    every, single = steps(3, every_steps=3, learning_rate=0.1, mu=1.0), steps(1, learning_rate=0.1, mu=1.0)
    for _, memory in every[:2]:
        np.testing.assert_allclose(memory["weights"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(every[2][1]["weights"], single[0][1]["weights"], rtol=1e-6)
    np.testing.assert_array_equal(every[2][1]["influence"], 0.0)


def test_equal_influences_keep_the_weights_and_a_constant_reward_loses_weight():
    np.testing.assert_allclose(steps(1, jnp.full(3, 5.0), mu=1e-6)[0][1]["weights"], 1 / 3, rtol=1e-6)
    right, short, constant = steps(4, jnp.array([2.0, 1.0, 0.0]), learning_rate=0.1, mu=1.0)[-1][1]["weights"]
    assert right > short > constant > 0


@pytest.mark.parametrize(
    ("initial", "message"), [((1.0, 1.0), "initial has 2 weights.*3 rewards"), ((1.0, 0.0, 1.0), "must be above 0")]
)
def test_bad_initial_weights(initial, message):
    with pytest.raises(ValueError, match=message):
        schedules.influence_weighted(reward_names=NAMES, initial=initial).init()
