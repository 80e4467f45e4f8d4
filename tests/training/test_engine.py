"""What the engine offers to methods beyond plain samples: critics, stored and replayed rows, views of the policy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Source, TrainState
from jaxrl_llm.models.heads import HeadConfig
from jaxrl_llm.models.logprobs import scaled_log_softmax, token_statistics
from jaxrl_llm.rollout import plans
from jaxrl_llm.rollout.generate import generate
from jaxrl_llm.rows import Replay, Written, empty_store, joined, minibatch_rows, remembered, replayed, written_rows
from jaxrl_llm.schedules import temperature_controller
from jaxrl_llm.training import Fill, Network, Resources, Rollout, Update, make_train_step, scores
from jaxrl_llm.training.metrics import explained_variance
from jaxrl_llm.training.networks import initial_networks, moved, networks_named

ROLLOUT = Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0)
GAE = [
    ("returns", advantages.gae_returns),
    ("advantages", advantages.gae),
]
VALUE = [losses.clipped_surrogate, (losses.clipped_value, 0.5)]


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


CRITIC = optax.adam(0.05)


def value_model(backbone="own"):
    return Resources(networks={"value": Network(head=HeadConfig(), backbone=backbone, optimizer=CRITIC)})


def planned(plan, **changes):
    return replace(ROLLOUT, plan=plan, **changes)


def knows(rows, **fields):
    return rows.filled(**fields)


def prefixed(*texts, around=None):
    return plans.prefixes(
        around or plans.plain(samples_per_prompt=4),
        texts=texts,
        encode=lambda text: [int(letter) for letter in text],
        max_completion_tokens=6,
        pad_id=0,
    )


def demonstrated(inner):
    return plans.demonstration_in_group(inner, max_completion_tokens=6, pad_id=0)


def baseline_loss(logprobs, mask, baseline_rewards):
    return losses.negative_log_likelihood(logprobs, mask)


KEPT = {"rewards": "row", "correct": "row", "advantages": "token"}


def differ(a, b):
    return any(
        np.abs(np.asarray(x) - np.asarray(y)).max() > 1e-6 for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


class TestCritics:
    @pytest.mark.parametrize("backbone", [pytest.param("own", marks=pytest.mark.slow), "shared"])
    def test_a_value_model_is_trained_beside_the_policy(self, model, make_prompts, backbone):
        # The policy stands still, so that the returns that the value model is fitted to do too.
        waits = Update(freeze_policy_steps=100)
        step = composed(model, credit=GAE, losses=VALUE, resources=value_model(backbone), update=waits)
        state = step.init(jax.random.key(0))
        before = jax.tree.map(np.array, state.networks["value"].params)
        assert ("backbone" in before) == (backbone == "own")
        values = []
        for _ in range(12):
            state, metrics = step(state, make_prompts(4))
            values.append(float(metrics["loss/clipped_value"]))
        assert differ(before, state.networks["value"].params)
        assert np.mean(values[-4:]) < np.mean(values[:4])
        assert np.isfinite(float(metrics["value_explained_variance"]))
        assert float(metrics["gradient_norm/value"]) > 0

    @pytest.mark.slow
    def test_a_shared_backbone_learns_from_the_value_loss_and_an_own_one_leaves_the_policy_alone(
        self, model, make_prompts
    ):
        for backbone, moves in (("own", False), ("shared", True)):
            step = composed(model, credit=GAE, losses=[losses.clipped_value], resources=value_model(backbone))
            state = step.init(jax.random.key(0))
            before = jax.tree.map(np.array, state.params)
            state, _ = step(state, make_prompts(4))
            assert differ(before, state.params) == moves

    @pytest.mark.slow
    def test_the_policy_waits_while_it_is_frozen_and_the_critic_does_not(self, model, make_prompts):
        step = composed(model, credit=GAE, losses=VALUE, resources=value_model(), update=Update(freeze_policy_steps=2))
        state = step.init(jax.random.key(0))
        at_start = jax.tree.map(np.array, (state.params, state.networks["value"].params))
        seen = []
        for _ in range(3):
            state, _ = step(state, make_prompts(4))
            seen.append((differ(at_start[0], state.params), differ(at_start[1], state.networks["value"].params)))
        assert seen == [(False, True), (False, True), (True, True)]

    @pytest.mark.slow
    def test_own_and_shared_backbones_give_the_same_values_at_the_start(self, model, rows):
        seen = []
        for backbone in ("own", "shared"):
            step = composed(model, credit=GAE, losses=VALUE, resources=value_model(backbone))
            state = step.init(jax.random.key(3), model.init(jax.random.key(0)))
            viewed = scores.viewed(step.composition, state, rows, {"old_values"}, own_samples=False)
            seen.append(viewed["old_values"])
        np.testing.assert_allclose(*seen, atol=1e-6)

    def test_the_slow_copy_moves_by_its_rate(self, model):
        described = {"twin_target": Network(origin="twin", decay=0.75)}
        networks = networks_named({"twin_values", "twin_target_values"}, described, [], CRITIC)
        states = initial_networks(model, CRITIC, networks, jax.random.key(0), None, {})
        before = states["twin_target"].params
        jax.tree.map(np.testing.assert_array_equal, before, states["twin"].params)
        states["twin"] = replace(states["twin"], params=jax.tree.map(lambda x: x + 4.0, before))
        after = moved(model, networks, TrainState(states, {}, jax.random.key(0), jnp.int32(1)))
        jax.tree.map(
            lambda new, old: np.testing.assert_allclose(new, old + 1.0, rtol=1e-5),
            after.networks["twin_target"].params,
            before,
        )

    @pytest.mark.slow
    def test_twin_critics_are_judged_by_their_slow_copies(self, model, make_prompts):
        step = composed(
            model,
            credit=[("advantages", advantages.twin_baseline_normalized)],
            losses=[losses.clipped_surrogate, losses.twin_huber_value],
            resources=Resources(critic=CRITIC, networks={"twin_target": Network(origin="twin", decay=0.5)}),
        )
        state, _, experience = step.run(step.init(jax.random.key(0)), make_prompts(4))
        assert experience["twin_target_values"].shape == (8, 2)
        assert differ(state.networks["twin"].params, state.networks["twin_target"].params)

    def test_names_bring_their_critics(self):
        assert networks_named({"rewards"}, {}, [], CRITIC) == {}
        assert [*networks_named({"old_values", "twin_values"}, {}, [], CRITIC)] == ["value", "twin"]
        assert [*networks_named({"token_reward_logits"}, {}, [], CRITIC)] == ["token_reward"]
        assert [*networks_named({"twin_target_values"}, {}, [], CRITIC)] == ["twin", "twin_target"]
        assert networks_named({"old_values"}, {}, [], None) == {}

    @pytest.mark.slow
    def test_values_split_into_microbatches_give_the_same_update(self, model, make_prompts):
        after = []
        for size in (None, 2):
            step = composed(
                model, credit=GAE, losses=VALUE, resources=value_model(), update=Update(sequences_per_microbatch=size)
            )
            state, _ = step(step.init(jax.random.key(0)), make_prompts(4))
            after.append(jax.tree.map(np.array, state.networks["value"].params["head"]))
        np.testing.assert_allclose(after[0]["weight"], after[1]["weight"], atol=2e-5)

    def test_explained_variance(self):
        returns, mask = jnp.array([[1.0, 2.0, 9.0]]), jnp.array([[1.0, 1.0, 0.0]])
        assert float(explained_variance(returns, returns, mask)) == 1.0
        assert float(explained_variance(jnp.zeros((1, 3)), returns, mask)) == pytest.approx(0.0, abs=1e-6)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"backbone": "half"}, "networks: backbone is 'half'"),
            ({"decay": 2.0}, r"networks: decay is 2.0; .* \[0, 1\]"),
            ({"copy_every": -1}, "networks: copy_every is -1"),
            ({"decay": 0.5, "optimizer": CRITIC}, "a network that learns cannot follow another one too"),
            ({"origin": "given"}, "whose parameters are given needs its model"),
        ],
    )
    def test_bad_options_are_named(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Network(**changes)

    def test_a_name_without_its_critic_is_refused(self, model):
        with pytest.raises(
            ValueError, match="names 'old_values', which nothing in this step provides; a critic provides it"
        ):
            composed(model, credit=GAE, losses=VALUE)


class TestViews:
    @pytest.mark.slow
    def test_teacher_forcing_repeats_the_sampler(self, model, make_prompts):
        params = model.init(jax.random.key(0))
        sampled = generate(
            model, params, make_prompts(4), jax.random.key(1), 0,
            samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0,
        )  # fmt: skip
        wanted = {"old_logprobs", "old_entropy", "hidden", "prompt_logprobs", "prompt_mask"}
        step = composed(model)
        state = step.init(jax.random.key(0), params)
        seen = scores.viewed(step.composition, state, sampled, wanted, own_samples=False)
        np.testing.assert_allclose(seen["old_logprobs"], sampled.behaviour_logprobs, atol=1e-5)
        np.testing.assert_allclose(seen["old_entropy"], sampled.behaviour_entropy, atol=1e-5)
        scored = token_statistics(model, params, seen["hidden"], sampled.tokens).logprobs
        np.testing.assert_allclose(scored * sampled.mask, sampled.behaviour_logprobs, atol=1e-5)
        # A prompt is predicted from its second token on.
        np.testing.assert_array_equal(seen["prompt_mask"].sum(1), sampled.prompt_length - 1)
        assert (np.asarray(seen["prompt_logprobs"])[np.asarray(seen["prompt_mask"]) > 0] < 0).all()

    def test_a_credit_function_over_the_vocabulary_sees_whole_distributions(self, model, rows):
        params = model.init(jax.random.key(0))
        term = Fill("proxy_logprobs", partial(losses.min_p_logprobs, min_p=0.05), "min_p")
        got = scores.over_vocabulary(model, params, rows, [term], temperature=1.0)[0]
        log_p = scaled_log_softmax(model.logits(params, scores.hidden_states(model, params, rows)), 1.0)
        np.testing.assert_allclose(got, losses.min_p_logprobs(log_p, rows.tokens, min_p=0.05), atol=1e-5)

    def test_a_new_name_must_be_read_by_somebody(self, model):
        with pytest.raises(
            ValueError, match="credit fills 'advantage', which nothing after it reads; did you mean 'advantages'"
        ):
            composed(model, credit=[("advantage", advantages.group_normalized)])


class TestRows:
    @pytest.mark.slow
    def test_a_demonstration_is_the_last_of_its_group(self, model, make_prompts):
        written = np.array([[5, 5, 2, 0]] * 4, np.int32)
        fields = {"demonstration_tokens": written, "demonstration_length": np.full(4, 3, np.int32)}
        plan = demonstrated(plans.plain(samples_per_prompt=3))
        prompts = make_prompts(4).replace(fields=fields)
        step = composed(
            model,
            source=planned(plan, samples_per_prompt=3),
            losses=[losses.external_surrogate],
        )
        state, metrics, e = step.run(step.init(jax.random.key(0)), prompts)
        source = np.asarray(e.source).reshape(4, 3, 6)
        assert (source[:, 2, :3] == Source.DEMONSTRATION).all()
        assert (source[:, 2, 3:] == Source.PAD).all()
        assert not (source[:, :2] == Source.DEMONSTRATION).any()
        np.testing.assert_array_equal(np.asarray(e.tokens).reshape(4, 3, 6)[:, 2, :3], written[:, :3])
        # Its log-probabilities are the policy's own, and it says nothing about the sampler.
        assert (np.asarray(e["old_logprobs"]).reshape(4, 3, 6)[:, 2, :3] < 0).all()
        assert float(metrics["sampler_gap_max"]) < 1e-5

    def test_prefixes_start_completions_and_are_not_trained_on(self, model, make_prompts):
        source = planned(prefixed("7", "89"), samples_per_prompt=4)
        _, _, e = (step := composed(model, source=source)).run(step.init(jax.random.key(0)), make_prompts(2))
        tokens, mask, source = (np.asarray(x).reshape(2, 4, 6) for x in (e.tokens, e.mask, e.source))
        assert (tokens[:, :2, 0] == 7).all()
        assert (tokens[:, 2:, :2] == [8, 9]).all()
        assert (source[:, :2, 0] == Source.HINT).all()
        assert (mask[:, :2, 0] == 0).all()
        assert (mask[:, 2:, :2] == 0).all()
        assert (mask.sum(-1) == np.asarray(e.length).reshape(2, 4) - [1, 1, 2, 2]).all()

    @pytest.mark.slow
    def test_a_greedy_baseline_is_the_reward_of_the_likeliest_completion(self, model, make_prompts):
        step = composed(model, credit=[("advantages", advantages.reward_minus_baseline)])
        state = step.init(jax.random.key(0))
        greedy = generate(
            model, state.params, make_prompts(4), jax.random.key(9), 0,
            samples_per_prompt=1, max_completion_tokens=6, eos_ids=(2,), pad_id=0, temperature=0.0,
        )  # fmt: skip
        expected = np.repeat(np.asarray(fives(greedy.tokens, greedy.length)), 2)
        _, _, e = step.run(state, make_prompts(4))
        assert e.tokens.shape[0] == 8
        np.testing.assert_allclose(e["baseline_rewards"], expected)
        np.testing.assert_allclose(np.asarray(e["advantages"])[:, 0], np.asarray(e["rewards"]) - expected, atol=1e-6)

    def test_greedy_rows_leave_as_they_came(self, rows):
        plan = plans.greedy_baseline(plans.plain(samples_per_prompt=1), temperature=1.0)
        kept, _ = plan.result(plan.merge(None, knows(rows, rewards=jnp.arange(8.0))))
        np.testing.assert_array_equal(kept.sample, [0, 0, 0, 0])
        np.testing.assert_array_equal(kept["baseline_rewards"], [1, 3, 5, 7])
        np.testing.assert_array_equal(kept.group, [0, 1, 2, 3])

    @pytest.mark.slow
    def test_extra_groups_follow_a_temperature_with_memory(self, model, make_prompts):
        method = temperature_controller(target=100.0, cold=0.5, hot=2.0)
        inner = plans.plain(samples_per_prompt=2)
        plan = plans.mixed_temperature(inner, samples_per_prompt=2, prompt_share=0.5, temperature=method)
        step = composed(model, source=planned(plan))
        state, metrics, e = step.run(step.init(jax.random.key(0)), make_prompts(4))
        assert e.tokens.shape[0] == 12
        np.testing.assert_array_equal(np.asarray(e["extra"]), [False] * 8 + [True] * 4)
        np.testing.assert_array_equal(np.asarray(e.group)[8:], [4, 4, 5, 5])
        assert float(metrics["extra_temperature"]) == 2.0
        # They are trained on at the policy's own temperature, and do not count as a gap of the sampler.
        assert differ(e["old_logprobs"][8:], e.behaviour_logprobs[8:])
        np.testing.assert_allclose(e["old_logprobs"][:8], e.behaviour_logprobs[:8], atol=1e-5)
        assert float(metrics["sampler_gap_max"]) < 1e-5

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (lambda: prefixed("1", "1", "1"), "prefixes has 3 texts, which do not divide"),
            (lambda: prefixed("111111"), "a text of 6 tokens, which leaves nothing"),
            (lambda: demonstrated(plans.plain(samples_per_prompt=1)), "use at least 2"),
            (lambda: prefixed("1", around=demonstrated(plans.plain(samples_per_prompt=4))), "drawn_by_policy"),
        ],
    )
    def test_bad_plans_are_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            changes()


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
        with pytest.raises(ValueError, match="learns from written rows"):
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
        with pytest.raises(ValueError, match="alignment compares a loss on written completions"):
            composed(model, update=Update(alignment_every_steps=2))


class TestReference:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("reference", "moved"),
        [
            (Network(), [0, 0, 0]),
            (Network(copy_at=(2,)), [0, 1, 1]),
            (Network(copy_every=2), [0, 1, 1]),
            (Network(decay=0.5), [1, 1, 1]),
        ],
    )
    def test_it_moves_as_it_is_described(self, model, make_prompts, reference, moved):
        described = Resources(networks={"reference": reference})
        step = composed(model, losses=[losses.clipped_surrogate, (losses.kl_estimate, 0.1)], resources=described)
        state = step.init(jax.random.key(0))
        before, seen = jax.tree.map(np.array, state.networks["reference"].params), []
        for _ in range(3):
            state, _ = step(state, make_prompts(4))
            seen.append(int(differ(before, state.networks["reference"].params)))
        assert seen == moved

    def test_a_constant_temperature_needs_no_memory(self):
        inner = plans.plain(samples_per_prompt=2)
        mixed = partial(plans.mixed_temperature, inner, samples_per_prompt=2)
        assert mixed(prompt_share=0.5, temperature=1.5).memory() is None
        with pytest.raises(ValueError, match="prompt_share is 0"):
            mixed(prompt_share=0.0, temperature=1.0)
        with pytest.raises(ValueError, match=r"temperature is 0\.0"):
            mixed(prompt_share=0.5, temperature=0.0)
