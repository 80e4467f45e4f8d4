"""Rows that were written or stored, beside those that a step samples."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Source
from jaxrl_llm.rows import Replay, Written, empty_store, joined, minibatch_rows, remembered, replayed, written_rows
from jaxrl_llm.training import Rollout, Update, make_train_step

ROLLOUT = Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0)


def fives(tokens, length):
    """Share of the length limit that is the symbol 5."""
    return ((tokens == 5) & (jnp.arange(tokens.shape[1]) < length[:, None])).sum(1) / tokens.shape[1]


def composed(model, **changes):
    parts = {
        "source": ROLLOUT,
        "rewards": [fives],
        "credit": [("advantages", advantages.group_normalized)],
        "losses": [losses.clipped_surrogate],
    }
    return make_train_step(model, changes.pop("optimizer", optax.adam(0.1)), **(parts | changes))


def knows(rows, **fields):
    return rows.filled(**fields)


def baseline_loss(logprobs, mask, baseline_rewards):
    return losses.negative_log_likelihood(logprobs, mask)


KEPT = {"rewards": "row", "correct": "row", "advantages": "token"}


def differ(a, b):
    return any(
        np.abs(np.asarray(x) - np.asarray(y)).max() > 1e-6 for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


class TestStored:
    REPLAY = Replay(share=0.5, batches=2, prompts_per_step=4, max_prompt_tokens=4, max_answer_tokens=2)

    def test_the_store_forgets_the_oldest_step(self, rows):
        batch = knows(rows, rewards=jnp.ones(8), correct=jnp.ones(8), advantages=rows.mask)
        store = empty_store(self.REPLAY, 2, 6, KEPT)
        for step in range(3):
            marked = replace(batch, prompt_id=jnp.full(8, step + 1))
            store = remembered(store, marked, jnp.int32(step), self.REPLAY)
        assert sorted(set(np.asarray(store.prompt_id).tolist())) == [2, 3]

    def test_replay_starts_empty_draws_whole_groups_once_and_ends(self, rows):
        replay = replace(self.REPLAY, until_step=2)
        batch = knows(rows, rewards=jnp.ones(8), correct=jnp.ones(8), advantages=rows.mask)
        store = empty_store(replay, 2, 6, KEPT)
        draw = lambda step: replayed(store, jax.random.key(0), jnp.int32(step), replay, 2)  # noqa: E731
        assert float(draw(0).weight.sum()) == 0
        store = remembered(store, batch, jnp.int32(0), replay)
        again = draw(1)
        np.testing.assert_array_equal(np.sort(np.asarray(again.prompt_id)), np.sort(np.asarray(rows.prompt_id)))
        assert float(again.weight.sum()) == 8
        assert set(np.unique(np.asarray(again.source)).tolist()) == {Source.PAD, Source.REPLAYED}
        assert float(draw(2).weight.sum()) == 0

    def test_joined_rows_are_groups_of_their_own_and_unknown_is_zero(self, rows):
        sampled = knows(rows, advantages=rows.mask, old_logprobs=rows.behaviour_logprobs)
        stored = written_rows(
            rows.prompt_tokens, rows.prompt_length, rows.prompt_id, rows.tokens, rows.length,
            answer_width=2, stored_logprobs=rows.behaviour_logprobs,
        )  # fmt: skip
        both = joined(sampled, stored, 2)
        np.testing.assert_array_equal(both.group, np.arange(16) // 2)
        assert float(both.mask[8:].sum()) == 0
        assert float(both["advantages"][8:].sum()) == 0
        np.testing.assert_array_equal(both["stored_logprobs"][:8], 0)
        np.testing.assert_array_equal(both["stored_logprobs"][8:], rows.behaviour_logprobs)

    @pytest.mark.slow
    def test_a_step_learns_from_stored_rows_beside_its_samples(self, model, make_prompts, rows):
        step = composed(
            model,
            losses=[(losses.clipped_surrogate, 0.0), losses.stored_likelihood],
            source=[ROLLOUT, Written(8, 2)],
        )
        written = written_rows(
            rows.prompt_tokens, rows.prompt_length, rows.prompt_id, rows.tokens, rows.length, answer_width=2
        )
        state, seen = step.init(jax.random.key(0)), []
        for _ in range(5):
            state, metrics = step(state, make_prompts(4), written=written)
            seen.append(float(metrics["loss/stored_likelihood"]))
        assert seen[-1] < seen[0] - 0.3
        with pytest.raises(ValueError, match="trains on written rows"):
            step(state, make_prompts(4))

    @pytest.mark.slow
    def test_stored_rows_change_no_statistic_of_the_samples(self, model, make_prompts, rows):
        written = written_rows(
            rows.prompt_tokens, rows.prompt_length, rows.prompt_id, rows.tokens, rows.length, answer_width=2
        )
        # Adam would make a whole step of what rounding leaves of a gradient.
        sgd = optax.sgd(0.1)
        plain = composed(model, optimizer=sgd)
        beside = composed(
            model,
            losses=[losses.clipped_surrogate, (losses.stored_likelihood, 0.0)],
            source=[ROLLOUT, Written(8, 2)],
            optimizer=sgd,
        )
        one, m1 = plain(plain.init(jax.random.key(0)), make_prompts(4))
        two, m2 = beside(beside.init(jax.random.key(0)), make_prompts(4), written=written)
        assert not differ(one.params, two.params)
        for name in ("reward", "advantage_abs_per_token", "loss/clipped_surrogate"):
            np.testing.assert_allclose(m1[name], m2[name], rtol=1e-6, atol=1e-7)

    @pytest.mark.slow
    def test_replay_runs_in_one_program_and_resumes_from_its_state(self, model, make_prompts):
        step = composed(
            model,
            losses=[losses.mixed_policy_surrogate],
            source=[ROLLOUT, Replay(0.5, 2, prompts_per_step=4, max_prompt_tokens=4, max_answer_tokens=2)],
        )
        assert len(step.programs) == 1
        state = step.init(jax.random.key(0))
        for _ in range(3):
            state, metrics = step(state, make_prompts(4))
        assert np.isfinite(float(metrics["loss"]))
        assert float(state.store["replay"].weight.sum()) == 16

    def test_every_minibatch_has_its_share_of_each_part(self):
        order = np.asarray(minibatch_rows(jax.random.key(0), 2, 2, [4, 2], 3))
        assert order.shape == (4, 9)
        assert ((order < 12).sum(1) == 6).all()
        for epoch in order.reshape(2, -1):
            assert sorted(epoch.tolist()) == list(range(18))

    def test_what_does_not_fit_is_refused(self, model):
        with pytest.raises(ValueError, match="groups of written rows 3"):
            composed(
                model,
                losses=[losses.clipped_surrogate, losses.stored_likelihood],
                source=[replace(ROLLOUT, prompts_per_step=4), Written(6, 2)],
                update=Update(minibatches_per_epoch=2),
            )
        with pytest.raises(ValueError, match=r"replay\.share is 1\.5"):
            replace(self.REPLAY, share=1.5)
        with pytest.raises(ValueError, match="keep more batches"):
            replace(self.REPLAY, share=0.9)
        with pytest.raises(ValueError, match="'baseline_rewards', which replayed rows do not have"):
            composed(model, losses=[losses.clipped_surrogate, baseline_loss], source=[ROLLOUT, self.REPLAY])
        with pytest.raises(ValueError, match="alignment needs losses on written completions"):
            composed(model, update=Update(alignment_every_steps=2))
