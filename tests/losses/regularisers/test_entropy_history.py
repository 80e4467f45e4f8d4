"""EPO: entropy near its history."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import entropy_bonus, entropy_history, entropy_history_penalty

DIGITS = {"rtol": 5.5e-6, "atol": 1e-6}
ENTROPY = jnp.array([[0.4, 1.0, 1.6]])
HISTORY, MASK = jnp.ones((1, 3)), jnp.ones((1, 3))


def test_worked_example():
    penalties = [
        entropy_history_penalty(ENTROPY[:, i : i + 1], HISTORY[:, :1], MASK[:, :1], penalty="step").value
        for i in range(3)
    ]
    np.testing.assert_allclose(penalties, [0.1, 0, 0.1], **DIGITS)


def test_the_papers_step_has_no_gradient_so_the_update_is_that_of_a_plain_bonus():
    def objective(entropy, coefficient):
        step = entropy_history_penalty(entropy, HISTORY, MASK, penalty="step")
        return entropy_bonus(entropy, MASK).value + coefficient * step.value

    assert objective(ENTROPY, 1.0) != objective(ENTROPY, 0.0)
    with_penalty, without = (jax.grad(objective)(ENTROPY, c) for c in (1.0, 0.0))
    np.testing.assert_array_equal(with_penalty, without)


def test_the_hinge_pulls_back_from_both_sides():
    value, gradient = jax.value_and_grad(lambda x: entropy_history_penalty(x, HISTORY, MASK, alpha=1.0).value)(ENTROPY)
    np.testing.assert_allclose(value, (0.1 + 0.1) / 3, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[-1 / 3, 0, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize("penalty", ["hinge", "step"])
def test_without_history_there_is_no_penalty(penalty):
    loss = entropy_history_penalty(ENTROPY, 0 * HISTORY, MASK, penalty=penalty)
    assert loss.numerator == 0
    assert loss.metrics["outside_history_share"][0] == 0


def test_the_history_is_the_mean_over_updates_of_means_over_tokens():
    method = entropy_history(max_turns=2)
    update = jax.jit(method.update)
    turn = jnp.array([[0, 0, 1], [0, 1, 1]])
    mask = jnp.array([[1.0, 1, 1], [1, 0, 0]])
    first = jnp.array([[1.0, 3, 5], [5, 99, 99]])
    value, memory = update(method.init(), first, mask, jnp.ones(2), turn)
    np.testing.assert_array_equal(value, 0)
    value, memory = update(memory, 2 * first, mask, jnp.ones(2), turn)
    np.testing.assert_allclose(value, [[3, 3, 5], [3, 0, 0]])
    value, _ = update(memory, first, mask, jnp.ones(2), turn)
    np.testing.assert_allclose(value, [[4.5, 4.5, 7.5], [4.5, 0, 0]])


def test_absent_rows_leave_no_trace():
    method = entropy_history(max_turns=2)
    data = jnp.array([[1.0, 2.0], [jnp.nan, 7.0]]), jnp.ones((2, 2)), jnp.array([1.0, 0.0]), jnp.array([[0, 1], [0, 1]])
    _, memory = method.update(method.init(), *data)
    np.testing.assert_array_equal(memory["sum"], [1, 2])
    empty = (*data[:2], jnp.zeros(2), data[3])
    _, unchanged = method.update(memory, *empty)
    np.testing.assert_array_equal(unchanged["sum"], memory["sum"])
    np.testing.assert_array_equal(unchanged["batches"], memory["batches"])


def test_a_batch_of_early_turns_gets_no_history():
    method = entropy_history(max_turns=4)
    late, early = jnp.array([[0, 2]]), jnp.array([[0, 1]])
    data = ENTROPY[:, :2], MASK[:, :2], jnp.ones(1)
    _, memory = method.update(method.init(), *data, late)
    value, memory = method.update(memory, *data, early)
    np.testing.assert_array_equal(value, 0)
    value, _ = method.update(memory, *data, late)
    np.testing.assert_allclose(value, [[0.4, 1.0]], rtol=1e-6)


def test_turns_beyond_the_last_share_its_entry_and_single_turns_need_no_turn():
    method = entropy_history(max_turns=2)
    _, memory = method.update(method.init(), ENTROPY, MASK, jnp.ones(1), jnp.array([[0, 1, 7]]))
    np.testing.assert_allclose(memory["sum"], [0.4, 1.3], rtol=1e-6)
    single = entropy_history()
    _, memory = single.update(single.init(), ENTROPY, MASK, jnp.ones(1))
    value, _ = single.update(memory, ENTROPY, MASK, jnp.ones(1))
    np.testing.assert_allclose(value, jnp.ones((1, 3)), rtol=1e-6)


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match="max_turns is 0"):
        entropy_history(max_turns=0)
    for hyper, message in (
        ({"penalty": "square"}, r"penalty is 'square'.*hinge, step"),
        ({"low": 2.0}, r"low is 2\.0 and high is 1\.5"),
        ({"alpha": -0.1}, r"alpha is -0\.1"),
    ):
        with pytest.raises(ValueError, match=message):
            entropy_history_penalty(ENTROPY, HISTORY, MASK, **hyper)
