"""Work read from the text of compiled programs: loops count as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.planning.hlo import Program, costs

ROWS, WIDTH = 8, 16
PRODUCT = 2 * ROWS * WIDTH * WIDTH


def program_of(function):
    text = jax.jit(function).lower(jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH))).compile().as_text()
    return Program(text)


def test_a_loop_of_known_length_counts_as_often_as_it_runs():
    def five(x, weights):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ weights), None), x, length=5)[0]

    found, _ = costs(program_of(five))
    assert sum(cost.flops for cost in found.values()) == 5 * PRODUCT


@pytest.mark.parametrize("steps, expected", [((3, 7), 10), ((3,), 6), (None, 2)])
def test_loops_that_depend_on_data_count_as_they_are_said_to(steps, expected):
    def until_large(x, weights):
        for _ in range(2):
            with jax.named_scope("decode"):
                x = jax.lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: jnp.tanh(x @ weights), x)
        return x

    found, _ = costs(program_of(until_large), ("decode",), steps=None if steps is None else {"decode": steps})
    assert found["decode"].flops == expected * PRODUCT


def test_a_product_belongs_to_its_phase():
    def two(x, weights):
        with jax.named_scope("prefill"):
            x = jnp.tanh(x @ weights)
        return jnp.tanh(x @ weights) @ weights

    found, _ = costs(program_of(two), ("prefill",))
    assert found["prefill"].flops == PRODUCT
    assert found["other"].flops == 2 * PRODUCT
