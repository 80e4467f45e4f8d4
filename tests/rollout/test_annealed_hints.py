"""The plan `annealed_hint`: a prompt's completions go on from the same first pieces of its demonstration (UFT)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.rollout.plans import annealed_hint, demonstration_in_group, greedy_baseline, plain
from jaxrl_llm.rollout.plans.annealed_hints import binomial
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.signatures import renamed
from jaxrl_llm.training import make_train_step

SAMPLES, WIDTH, PROMPTS = 3, 8, 6
SIZES = {"max_completion_tokens": WIDTH, "pad_id": 0, "total_steps": 4}


def prompts() -> Prompts:
    number = np.arange(PROMPTS, dtype=np.int32)
    shown = np.stack([number + 4, *[number * 0 + token for token in (5, 6, 7, 8)], number * 0 + 2], axis=1)
    fields = {"demonstration_tokens": shown, "demonstration_length": number * 0 + 6}
    return Prompts((number + 3)[:, None], number * 0 + 1, number, number[:, None], number * 0 + 1, fields)


def step_of(model, plan):
    return make_train_step(
        model,
        optax.sgd(0.1),
        source=Rollout(SAMPLES, WIDTH, eos_ids=(2,), pad_id=0, plan=plan),
        rewards=[lambda length: (length % 2).astype(jnp.float32)],
        credit=[("hint_mask", losses.demonstrated_part), ("advantages", advantages.group_normalized)],
        losses=[losses.clipped_surrogate, (renamed(losses.negative_log_likelihood, mask="hint_mask"), 0.001)],
    )


def test_the_number_of_pieces_is_binomial():
    uniform = (jnp.arange(1000) + 0.5) / 1000
    count = np.asarray(binomial(uniform, 0.3, 5))
    np.testing.assert_allclose(count.mean(), 1.5, atol=0.01)
    np.testing.assert_allclose(count.var(), 5 * 0.3 * 0.7, atol=0.02)
    assert not np.asarray(binomial(uniform, 0.0, 5)).any()
    assert (np.asarray(binomial(uniform, 1.0, 5)) == 5).all()


@pytest.mark.slow
def test_samples_of_a_prompt_share_a_hint_that_is_gone_in_the_end(make_bigram):
    model = make_bigram(16)
    plan = annealed_hint(plain(samples_per_prompt=SAMPLES), hinted_share=0.5, first_share=0.9, **SIZES)
    step = step_of(model, plan)
    state, seen = step.init(jax.random.key(0)), []
    for _ in range(3):
        state, metrics, rows = step.run(state, prompts())
        seen.append((metrics, rows))
    metrics, rows = seen[0]
    shown = np.asarray(rows.source == Source.DEMONSTRATION)
    length = shown.sum(1).reshape(PROMPTS, SAMPLES)
    assert (length == length[:, :1]).all()
    assert length.max() <= 5  # never the whole demonstration
    assert len(set(length[:, 0].tolist())) > 1
    for row in range(PROMPTS * SAMPLES):
        expected = prompts().fields["demonstration_tokens"][row // SAMPLES]
        np.testing.assert_array_equal(rows.tokens[row][shown[row]], expected[: shown[row].sum()])
    assert not (np.asarray(rows.mask)[shown]).any()
    np.testing.assert_array_equal(rows["hint_mask"], shown)
    assert metrics["prefix_tokens"] == shown.sum(1).mean()
    assert metrics["sampler_gap_max"] < 1e-5
    # Behind the hinted part of a run nothing is left of it.
    metrics, rows = seen[2]
    assert metrics["prefix_tokens"] == 0
    unhinted = step_of(model, plain(samples_per_prompt=SAMPLES))
    again = unhinted.init(jax.random.key(0)).replace(step=jnp.int32(2))
    hinted = step.init(jax.random.key(0)).replace(step=jnp.int32(2), memory={"rollout:plan": (jnp.int32(2), None)})
    np.testing.assert_array_equal(step.run(hinted, prompts())[2].tokens, unhinted.run(again, prompts())[2].tokens)


def test_what_it_cannot_be_made_around():
    inside = demonstration_in_group(plain(samples_per_prompt=2), max_completion_tokens=WIDTH, pad_id=0)
    with pytest.raises(ValueError, match="annealed_hint needs tokens that were all sampled by the policy"):
        annealed_hint(inside, **SIZES)
    with pytest.raises(ValueError, match="pieces is 0"):
        annealed_hint(plain(samples_per_prompt=2), pieces=0, **SIZES)
    assert greedy_baseline(annealed_hint(plain(samples_per_prompt=2), **SIZES), temperature=1.0).samples == 2
