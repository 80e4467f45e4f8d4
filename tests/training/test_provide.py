"""Scoring passes take no more rows at a time than the update does, and give the same numbers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.training import provide


@pytest.mark.parametrize("size, calls", [(None, (8,)), (2, (2,)), (8, (8,)), (3, (8,))])
def test_rows_come_back_in_their_order_whatever_the_size_of_a_piece(model, rows, size, calls):
    params, seen = jax.jit(model.init)(jax.random.key(0)), []

    def scored(part):
        seen.append(part.tokens.shape[0])
        return replace(
            part, reference_logprobs=provide.reference_logprobs(model, params, part, temperature=1.0), old_values=None
        )

    whole = jax.jit(scored)(rows)
    seen.clear()
    pieces = jax.jit(lambda rows: provide.by_microbatch(scored, rows, size))(rows)
    assert tuple(dict.fromkeys(seen)) == calls
    np.testing.assert_allclose(pieces.reference_logprobs, whole.reference_logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pieces.tokens, rows.tokens)
    np.testing.assert_array_equal(pieces.group, rows.group)
    assert float(jnp.abs(whole.reference_logprobs).min(axis=1).max()) > 0


@pytest.mark.parametrize(
    "wanted, own_samples, needed",
    [
        (set(), True, False),
        ({"old_logprobs", "old_entropy"}, True, False),
        ({"old_logprobs"}, False, True),
        ({"reference_logprobs"}, True, True),
        ({"old_values"}, True, True),
        ({"hidden", "old_logprobs"}, True, True),
        ({"baseline_rewards", "demonstration_tokens"}, False, False),
    ],
)
def test_what_the_sampler_recorded_needs_no_pass(wanted, own_samples, needed):
    assert provide.needs_a_pass(wanted, own_samples=own_samples) == needed
