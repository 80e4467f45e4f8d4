"""Scoring passes take no more rows at a time than the update does, and give the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.training import Resources, Rollout, make_train_step
from jaxrl_llm.training.scores import by_microbatch, viewed


def composed(model):
    """A step with a reference and a critic."""
    return make_train_step(
        model,
        optax.sgd(0.1),
        source=Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0),
        rewards=[lambda length: length.astype(jnp.float32)],
        credit=[("returns", advantages.gae_returns), ("advantages", advantages.gae)],
        losses=[losses.clipped_surrogate, losses.clipped_value, losses.kl_estimate],
        resources=Resources(critic=optax.sgd(0.1)),
    )


@pytest.mark.parametrize("size, calls", [(None, (8,)), (2, (2,)), (8, (8,)), (3, (8,))])
def test_rows_come_back_in_their_order_whatever_the_size_of_a_piece(model, rows, size, calls):
    step, seen = composed(model), []
    state = step.init(jax.random.key(0))

    def scored(part):
        seen.append(part.tokens.shape[0])
        return viewed(step.composition, state, part, {"reference_logprobs"}, own_samples=False)

    whole = jax.jit(scored)(rows)
    seen.clear()
    pieces = jax.jit(lambda rows: by_microbatch(scored, rows, size))(rows)
    assert tuple(dict.fromkeys(seen)) == calls
    np.testing.assert_allclose(pieces["reference_logprobs"], whole["reference_logprobs"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pieces.tokens, rows.tokens)
    np.testing.assert_array_equal(pieces.group, rows.group)
    assert float(jnp.abs(whole["reference_logprobs"]).min(axis=1).max()) > 0


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
def test_what_the_sampler_recorded_needs_no_pass(model, rows, wanted, own_samples, needed):
    passes = []

    def counted(*arguments):
        passes.append(1)
        return model.apply(*arguments)

    step = composed(model._replace(apply=counted))
    state = jax.eval_shape(step.init, jax.random.key(0))
    passes.clear()
    found = jax.eval_shape(
        lambda state, rows: viewed(step.composition, state, rows, wanted, own_samples=own_samples), state, rows
    )
    assert bool(passes) == needed
    assert found.fields.keys() == wanted - {"baseline_rewards", "demonstration_tokens"}
