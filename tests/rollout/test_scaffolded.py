"""The plan `scaffolded`: samples see a part of the rubric, and learn without it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses, rewards
from jaxrl_llm.experience import Prompts
from jaxrl_llm.rollout.plans import greedy_baseline, plain, scaffolded
from jaxrl_llm.rollout.plans.scaffolds import kept_tokens, shown_share
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.training import make_train_step

SIZES = {"samples_per_prompt": 4, "total_steps": 101, "pad_id": 0, "encode": lambda text: [9] * len(text)}


def test_the_share_falls_along_the_group_and_over_time():
    shares = shown_share(jnp.arange(4), group_size=4, step=21, total_steps=101)
    np.testing.assert_allclose(shares, [0.5, 0.333333, 0.166667, 0], atol=1e-6)
    assert shown_share(jnp.array([0]), group_size=1, step=1, total_steps=101).tolist() == [1.0]
    assert float(shown_share(jnp.array([0]), group_size=4, step=101, total_steps=101)[0]) < 1e-6


def test_criteria_are_shown_as_a_whole():
    own = jnp.array([[0, 0, 0, 0, 0, 0, 1, 5]] * 4)
    scaffold = jnp.array([[0, 1, 6, 9, 7, 7, 9, 5]] * 3 + [[0, 0, 0, 0, 0, 0, 1, 5]])  # 6 9 and 7 7 9 stand before 5
    length, share = jnp.array([7, 7, 7, 2]), jnp.array([1.0, 0.5, 0.0, 1.0])
    chances = jnp.tile(jnp.linspace(0.9, 0.1, 8), (4, 1))  # the later criterion first
    kept = kept_tokens(scaffold, length, own, jnp.full(4, 2), share, chances, separator=9)
    shown = [row[mask].tolist() for row, mask in zip(np.asarray(scaffold), np.asarray(kept), strict=True)]
    assert shown == [[1, 6, 9, 7, 7, 9, 5], [1, 7, 7, 9, 5], [1, 5], [1, 5]]


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_learn_without_what_they_have_seen(make_bigram, trained):
    number = np.arange(3, dtype=np.int32)
    own = np.stack([number * 0, number * 0, number * 0 + 1, number + 3], axis=1)
    shown = np.stack([number * 0 + 7, number * 0 + 9, number * 0 + 1, number + 3], axis=1)
    fields = {"scaffold_tokens": shown, "scaffold_length": number * 0 + 4}
    prompts = Prompts(own, number * 0 + 2, number, number[:, None], number * 0 + 1, fields)
    plan = scaffolded(plain(samples_per_prompt=4), trained=trained, **SIZES)
    source = Rollout(samples_per_prompt=4, max_completion_tokens=6, eos_ids=(2,), pad_id=0, plan=plan)
    step = make_train_step(
        make_bigram(16),
        optax.sgd(0.1),
        source=source,
        rewards=[rewards.answer_present],
        credit=[("advantages", advantages.leave_one_out)],
        losses=[losses.clipped_surrogate],
    )
    state, metrics, rows = step.run(step.init(jax.random.key(0)), prompts)
    np.testing.assert_array_equal(rows.group, np.repeat(number, 4))
    np.testing.assert_array_equal(rows.sample, np.tile(np.arange(4), 3))
    assert len({tuple(row) for row in rows.tokens.tolist()}) > 3
    # One criterion: samples whose share is above a half see it.
    if trained:
        np.testing.assert_array_equal(rows.prompt_length, np.tile([4, 4, 2, 2], 3))
    else:
        np.testing.assert_array_equal(rows.prompt_tokens, np.repeat(own, 4, axis=0))
        assert "old_logprobs" in rows  # of the prompt without the criterion
    assert metrics["shown_tokens"] == 1
    assert int(state.memory["rollout:plan"]) == 2


def test_what_it_cannot_be_made_around():
    with pytest.raises(ValueError, match="separator ';;' is 2 tokens"):
        scaffolded(plain(samples_per_prompt=4), separator=";;", **SIZES)
    with pytest.raises(ValueError, match=r"leave out the plan inside of it|leave rollout.plan.scaffolded out"):
        scaffolded(greedy_baseline(plain(samples_per_prompt=4), temperature=1.0), **SIZES)
