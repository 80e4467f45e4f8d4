"""SEC: a bandit over kinds of prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import group_normalized
from jaxrl_llm.selection.bandits import Arms, bandit, moved_values

# Three levels of 2, 3 and 5 items, mixed.
LEVELS = [3, 1, 2, 3, 2, 3, 1, 2, 3, 3]
RECORDS = [{"level": level, "domain": f"d{number % 2}"} for number, level in enumerate(LEVELS)]
VALUE = jnp.array([0.0, 0.5, 0.9])


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, [0.195759, 0.322752, 0.481489]), (0.2, [0.00969, 0.118048, 0.872262])]
)
def test_worked_example_of_the_softmax(temperature, expected):
    np.testing.assert_allclose(jax.nn.softmax(VALUE / temperature), expected, rtol=1e-4)
    made = bandit(records=RECORDS, temperature=temperature)
    chosen = made.choose(Arms(VALUE, jnp.zeros(10, jnp.int32)), jax.random.key(0), 4000)
    share = np.bincount(np.array(LEVELS)[chosen], minlength=4)[1:] / 4000
    np.testing.assert_allclose(share, expected, atol=3 * 0.5 / 4000**0.5)


def test_worked_example_of_the_values():
    value, arm = jnp.array([0.2, 0.4, 0.6]), jnp.array([0, 0, 2, 2])
    signal, there = jnp.array([0.9, 0.7, 0.0, 0.4]), jnp.ones(4, bool)
    np.testing.assert_allclose(moved_values(value, arm, signal, there, rate=0.5), [0.5, 0.4, 0.4], rtol=1e-6)
    decayed = moved_values(value, arm, signal, there, rate=0.5, decay_unsampled=True)
    np.testing.assert_allclose(decayed, [0.5, 0.2, 0.4], rtol=1e-6)


def test_what_is_half_solved_is_worth_most():
    def worth(right):
        rewards = (jnp.arange(8) < right).astype(jnp.float32)
        return float(jnp.abs(group_normalized(rewards, jnp.zeros(8, jnp.int32), jnp.ones(8), ddof=0)).mean())

    np.testing.assert_allclose(worth(1), 0.661438, rtol=1e-4)
    assert worth(0) == worth(8) == 0
    assert worth(4) > worth(2) > worth(1)


def test_the_signal_of_a_row_is_a_mean_over_its_tokens():
    made = bandit(records=RECORDS, rate=1.0)
    item, weight = jnp.array([1, 6, 2, 4]), jnp.array([1.0, 1, 1, 0])
    advantages = jnp.array([[1.0, -3, 9], [0.5, 9, 9], [0.25, 0.25, 0.25], [7, 7, 7]])
    mask = jnp.array([[1.0, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]])
    after = made.update(made.init(), item, advantages, mask, weight)
    np.testing.assert_allclose(after.value, [(2.0 + 0.5) / 2, 0.25, 0], rtol=1e-6)
    np.testing.assert_array_equal(after.visits, [0, 1, 1, 0, 0, 0, 1, 0, 0, 0])
    # A group without tokens to learn from is no evidence of anything.
    nothing = made.update(after, item, advantages, mask * 0, weight)
    np.testing.assert_array_equal(nothing.value, after.value)


def test_equal_values_are_drawn_evenly_and_items_by_turns():
    made = bandit(records=RECORDS)
    memory, seen = made.init(), np.zeros(10, int)
    for step in range(30):
        chosen = made.choose(memory, jax.random.key(step), 4)
        zero = jnp.zeros((4, 1))
        memory = made.update(memory, chosen, zero, zero + 1, jnp.ones(4))
        np.add.at(seen, np.unique(chosen), 1)
    np.testing.assert_array_equal(memory.visits, seen)
    for level in (1, 2, 3):
        of_level = seen[np.array(LEVELS) == level]
        assert of_level.max() - of_level.min() <= 1


def test_more_slots_than_items_of_an_arm_repeat_them_evenly():
    made = bandit(records=RECORDS, temperature=0.01)
    chosen = made.choose(Arms(jnp.array([1.0, 0, 0]), jnp.zeros(10, jnp.int32)), jax.random.key(0), 6)
    assert sorted(chosen.tolist()) == [1, 1, 1, 6, 6, 6]


def test_arms_may_be_combinations_of_columns():
    made = bandit(records=RECORDS, arms=("level", "domain"))
    kinds = {(record["level"], record["domain"]) for record in RECORDS}
    assert made.init().value.shape == (len(kinds),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": "topic"}, "a record has no 'topic'; its columns are domain, level"),
        ({"records": RECORDS[:1]}, "all 1 records are of one kind"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"rate": 1.5}, r"rate is 1.5; .*\(0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bandit(**({"records": RECORDS} | options))
