"""A profile counts what ran: operations of each phase, loops that end by data included."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.planning.profiled import ceilings, phase_table, traced_events
from jaxrl_llm.run.step_trace import StepTrace

SIZE, TURNS = 64, 7


@jax.jit
def program(x, turns):
    with jax.named_scope("prefill"):
        y = x @ x

    @jax.named_scope("decode")
    def turn(carry):
        number, value = carry
        return number + 1, jnp.tanh(value @ x)

    return jax.lax.while_loop(lambda carry: carry[0] < turns, turn, (0, y))[1]


def test_every_execution_is_counted_and_none_twice(tmp_path):
    x = jnp.ones((SIZE, SIZE)) / SIZE
    program(x, TURNS).block_until_ready()
    trace = StepTrace("3:4", tmp_path)
    parts = SimpleNamespace(
        step=SimpleNamespace(run=lambda state, turns: (program(x, turns).block_until_ready(), {}, None))
    )
    take = trace.traced(parts, 1)
    for step in range(5):
        take(SimpleNamespace(step=step), TURNS)
    assert (trace.done, trace.parts) == (True, parts)
    text = program.lower(x, TURNS).compile().as_text()
    rows = {row["phase"]: row for row in phase_table([text], traced_events(tmp_path), 2)}
    assert rows["prefill"]["flops"] == 2 * SIZE**3
    assert rows["decode"]["flops"] == 2 * SIZE**3 * TURNS
    assert rows["decode"]["seconds"] > 0
    assert rows["decode"]["bytes"] >= TURNS * 3 * 4 * SIZE**2


def test_ceilings_are_rates():
    found = ceilings(size=128, repeats=2)
    assert found["flops"] > 1e8
    assert found["bytes"] > 1e7


@pytest.mark.parametrize("steps", ["0:3", "5:3", "x", "1:2:3", ""])
def test_a_range_that_is_none_is_refused(tmp_path, steps):
    with pytest.raises(ValueError, match="give the first and the last step, such as 10:13"):
        StepTrace(steps, tmp_path)


def test_a_directory_without_a_trace_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no trace"):
        traced_events(tmp_path)
