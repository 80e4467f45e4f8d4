"""The composed step: one program, its results, its state changes, and learning."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Loss, Method, Prompts
from jaxrl_llm.rollout import plans
from jaxrl_llm.run.compilation import CompilationWatch
from jaxrl_llm.training import Fill, LossTerm, Network, Resources, Rollout, Update, make_train_step
from jaxrl_llm.training.step import given_work

ROLLOUT = Rollout(samples_per_prompt=4, max_completion_tokens=6, eos_ids=(2,), pad_id=0)


def fives(tokens, length):
    """Number of tokens 5, as a share of the length limit."""
    inside = jnp.arange(tokens.shape[1]) < length[:, None]
    return ((tokens == 5) & inside).sum(1) / tokens.shape[1]


def fives_on_the_host(completions):
    return [text.count("5") / ROLLOUT.max_completion_tokens for text in completions]


def decode(ids):
    return "".join(f"{number:x}" for number in ids)


ITEMS = [{"body": "", "answer": ""}] * 8


def composed(model, rewards=(fives,), optimizer=optax.adam(1.0), **changes):  # noqa: B008
    parts = {
        "source": ROLLOUT,
        "rewards": rewards,
        "credit": [("advantages", advantages.group_normalized)],
        "losses": [losses.clipped_surrogate],
        "resources": Resources(decode=decode),
    }
    return make_train_step(model, optimizer, **(parts | changes))


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def numbers(state):
    """A copy of a state on the host, its key as bits. (A view of an array would keep it from being donated.)"""
    return jax.tree.map(np.array, state.replace(key=jax.random.key_data(state.key)))


def recorded(step, state, prompts, count, items=None):
    """Run a step `count` times: states before and after on the host, metrics, programs compiled by each call."""
    states, metrics, compiled, given, experience = [numbers(state)], [], [], [], None
    with CompilationWatch() as watch:
        for _ in range(count):
            before, old = watch.count + watch.read, state
            state, shown, experience = step.run(state, prompts, items)
            metrics.append(jax.device_get(shown))
            compiled.append(watch.count + watch.read - before)
            given.append(all(leaf.is_deleted() for leaf in jax.tree.leaves(old)))
            states.append(numbers(state))
    return SimpleNamespace(states=states, metrics=metrics, compiled=compiled, donated=given, experience=experience)


@pytest.fixture(scope="module")
def traceable(bigram, make_prompts):
    """Five steps whose reward is inside the program."""
    step = composed(bigram)
    run = recorded(step, step.init(jax.random.key(0)), make_prompts(8), 5)
    run.step = step
    return run


@pytest.fixture(scope="module")
def on_host(bigram, make_prompts):
    """The same steps with a reward on text."""
    step = composed(bigram, rewards=[fives_on_the_host])
    run = recorded(step, step.init(jax.random.key(0)), make_prompts(8), 2, ITEMS)
    run.step = step
    return run


def test_a_step_of_traceable_rewards_is_one_program_compiled_once(traceable):
    assert len(traceable.step.programs) == 1
    assert traceable.compiled == [1, 0, 0, 0, 0]


def test_a_step_with_a_reading_is_two_programs_compiled_once(on_host):
    assert len(on_host.step.programs) == 2
    assert on_host.compiled == [2, 0]


def test_a_reward_gives_the_same_step_inside_the_program_and_on_the_host(traceable, on_host):
    for inside, outside in zip(traceable.metrics, on_host.metrics, strict=False):
        inside, outside = ({n: x for n, x in one.items() if not n.startswith("reward/")} for one in (inside, outside))
        assert outside.keys() - inside.keys() == {"seconds/fives_on_the_host", "unrated_share"}
        assert inside.keys() <= outside.keys()
        assert outside["unrated_share"] == 0
        np.testing.assert_allclose(inside["reward"], outside["reward"], rtol=1e-6)
    same(traceable.states[2].params, on_host.states[2].params, atol=2e-6)


def test_the_given_state_is_donated(traceable, on_host):
    assert traceable.donated == [True] * 5
    assert on_host.donated == [True] * 2


def test_three_steps_improve_a_reward_that_is_easily_learnt(traceable):
    rewards = [metrics["reward"] for metrics in traceable.metrics]
    assert 0 < rewards[0] < 0.2
    assert rewards[3] > 3 * rewards[0]


def test_sampler_and_trainer_agree_at_every_step(traceable, on_host):
    for metrics in [*traceable.metrics, *on_host.metrics]:
        assert 0 <= metrics["sampler_gap_mean"] <= metrics["sampler_gap_max"] < 1e-5


def test_a_step_counts_itself_and_keeps_its_key(traceable):
    assert [int(state.step) for state in traceable.states] == [0, 1, 2, 3, 4, 5]
    assert all((state.key == traceable.states[0].key).all() for state in traceable.states)


def test_what_is_not_named_is_not_there(traceable):
    assert traceable.step.composition.wanted == {"old_logprobs"}
    assert traceable.states[-1].networks.keys() == {"policy"}
    assert traceable.states[-1].memory == {}
    assert traceable.states[-1].store == {}
    assert traceable.experience.fields.keys() == {
        "rewards", "reward_components", "correct", "advantages", "old_logprobs"
    }  # fmt: skip
    assert not {"kl_reference_per_token", "loss/entropy_bonus"} & traceable.metrics[0].keys()


def matrix_products(step, prompts) -> int:
    """Number of matrix products in a step's program, with loops counted once."""

    def count(jaxpr):
        inner = [leaf for eqn in jaxpr.eqns for leaf in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(leaf)]
        here = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
        return here + sum(count(getattr(leaf, "jaxpr", leaf)) for leaf in inner)

    def is_jaxpr(leaf):
        return hasattr(leaf, "eqns") or hasattr(getattr(leaf, "jaxpr", None), "eqns")

    state = jax.eval_shape(step.init, jax.random.key(0))
    return count(jax.make_jaxpr(step.programs[0].run)(state, given_work(prompts, None)).jaxpr)


def test_only_what_is_named_costs_a_forward_pass(model, make_prompts):
    prompts = make_prompts(2)
    plain = matrix_products(composed(model), prompts)
    with_reference = composed(model, losses=[losses.clipped_surrogate, (losses.kl_estimate, 0.1)])
    assert with_reference.composition.wanted == {"old_logprobs", "reference_logprobs"}
    # The pass over the prompts has four projections and two products of attention, that over their completions four and
    # four, because it attends to both; the logits are one more. Cosines and sines of either pass are products on a CPU.
    assert matrix_products(with_reference, prompts) == plain + 6 + 8 + 1 + 2 * 2
    # The sampler's log-probabilities are those of the old policy, and entropy comes from the same pass.
    no_old = composed(model, losses=[losses.policy_gradient])
    assert no_old.composition.wanted == frozenset()
    assert matrix_products(no_old, prompts) == plain


def test_optional_data_is_not_computed_for_its_own_sake(model):
    def takes_what_there_is(logprobs, advantages, mask, reference_logprobs=None):
        return losses.policy_gradient(logprobs, advantages, mask)

    step = composed(model, losses=[takes_what_there_is])
    assert step.composition.wanted == frozenset()
    assert jax.eval_shape(step.init, jax.random.key(0)).networks.keys() == {"policy"}
    step = composed(model, losses=[takes_what_there_is, (losses.kl_estimate, 0.1)])
    assert step.composition.wanted == {"reference_logprobs"}


# ---- everything at once ---------------------------------------------------------------------------------------------


def ramp(step):
    return 0.1 * step


def shaped(rewards, step):
    return rewards + step


def doubling() -> Method:
    return Method(lambda: jnp.float32(1.0), lambda memory, reward, step: (memory, 2 * memory))


@pytest.fixture(scope="module")
def rich(bigram, make_prompts):
    """Five steps with shaped rewards, memory, a reference that is refreshed, and coefficients that change."""
    step = composed(
        bigram,
        optimizer=optax.adam(0.01),
        rewards=[fives, fives_on_the_host],
        credit=[
            Fill("rewards", shaped, "shaped"),
            Fill("advantages", advantages.running_mean_baseline(decay=0.5), "baseline"),
        ],
        losses=[
            LossTerm(losses.clipped_surrogate, 1.0, "surrogate"),
            LossTerm(losses.kl_estimate, doubling(), "kl"),
            LossTerm(losses.entropy_bonus, ramp, "entropy"),
            LossTerm(losses.divergence(samples="vocabulary"), 0.1, "exact"),
        ],
        update=Update(epochs_per_batch=2, minibatches_per_epoch=2, sequences_per_microbatch=4),
        resources=Resources(decode=decode, networks={"reference": Network(copy_every=2)}),
    )
    run = recorded(step, step.init(jax.random.key(0)), make_prompts(4), 5, ITEMS)
    run.step = step
    return run


def test_updates_of_a_step_are_epochs_times_minibatches(rich):
    assert [int(state.networks["policy"].optimizer_state[0].count) for state in rich.states] == [0, 4, 8, 12, 16, 20]


def test_memory_of_a_method_lives_in_the_state_and_changes(rich):
    first, second, third = (state.memory["advantages:baseline"] for state in rich.states[:3])
    assert first == {"sum": 0.0, "mass": 0.0}
    # s <- 0.5 s + 0.5 mean(r): twice the plain reward, as two functions score it, and the step number on top.
    plain = [metrics["reward"] for metrics in rich.metrics]
    np.testing.assert_allclose(second["sum"], 0.5 * plain[0], rtol=1e-5)
    np.testing.assert_allclose(third["sum"], 0.25 * plain[0] + 0.5 * plain[1], rtol=1e-5)
    assert [float(state.memory["coefficient:kl"]) for state in rich.states] == [1, 2, 4, 8, 16, 32]


def test_coefficients_may_change_with_the_step_and_with_memory(rich):
    np.testing.assert_allclose([m["coefficient/entropy"] for m in rich.metrics], [0.0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose([m["coefficient/kl"] for m in rich.metrics], [1, 2, 4, 8, 16])
    assert "coefficient/surrogate" not in rich.metrics[0]
    first = rich.metrics[1]
    parts = [first[f"loss/{name}"] * c for name, c in (("surrogate", 1), ("kl", 2), ("entropy", 0.1), ("exact", 0.1))]
    np.testing.assert_allclose(first["loss"], sum(parts), rtol=1e-4)


def test_credit_functions_see_the_step(rich):
    # Both rewards are equal, and `shaped` adds the step number.
    components = np.asarray(rich.experience["reward_components"])
    np.testing.assert_allclose(components[:, 0], components[:, 1])
    np.testing.assert_allclose(rich.experience["rewards"], components.sum(1) + 4, rtol=1e-6)


def test_the_reference_is_the_policy_of_the_last_refresh(rich):
    states = rich.states
    for index, refreshed in enumerate([0, 0, 2, 2, 4, 4]):
        reference = states[index].networks["reference"].params
        same(reference, states[refreshed].params)
        moved = jnp.abs(states[index].params["scores"] - reference["scores"]).max()
        assert (moved == 0) == (index == refreshed)


def test_the_divergence_from_the_reference_is_reported_and_starts_at_zero(rich):
    drift = [metrics["kl_reference_per_token"] for metrics in rich.metrics]
    assert abs(drift[0]) < 1e-6
    assert abs(drift[2]) < 1e-6  # step 3 is the first after a refresh
    assert abs(drift[1]) > 1e-6
    assert rich.metrics[0]["loss/exact"] > 0  # the mean over updates, and only the first starts at the reference


def test_a_rich_step_compiles_once_as_well(rich):
    assert rich.compiled == [2, 0, 0, 0, 0]
    assert all(metrics["sampler_gap_max"] < 1e-5 for metrics in rich.metrics)
    assert all(np.isfinite(value).all() for metrics in rich.metrics for value in metrics.values())


# ---- rows that are absent -------------------------------------------------------------------------------------------


def the_first_two_prompts(prompt_id, weight):
    return jnp.where(prompt_id < 2, weight, 0.0)


@pytest.fixture(scope="module")
def filtered(bigram, make_prompts):
    """(a step on two prompts, a step on four prompts of which a credit entry keeps two)."""
    step = composed(
        bigram,
        optimizer=optax.sgd(0.1),
        credit=[("weight", the_first_two_prompts), ("advantages", advantages.group_normalized)],
        losses=[partial(losses.clipped_surrogate, aggregation="seq_mean_token_mean"), losses.entropy_bonus],
    )
    params = bigram.init(jax.random.key(3))
    runs = [recorded(step, step.init(jax.random.key(0), params), make_prompts(count), 1) for count in (2, 4)]
    return runs


def test_rows_of_weight_zero_change_nothing(filtered):
    alone, beside_absent_rows = filtered
    same(alone.states[1].params, beside_absent_rows.states[1].params, atol=1e-6)
    for name in ("loss", "gradient_norm", "clip_share/clipped_surrogate", "kl_update", "sampler_gap_max"):
        np.testing.assert_allclose(alone.metrics[0][name], beside_absent_rows.metrics[0][name], atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(np.asarray(beside_absent_rows.experience["advantages"])[8:], 0.0)


def test_metrics_of_a_batch_do_not_hide_the_rows_that_were_left_out(filtered):
    everything = filtered[1]
    experience = everything.experience
    np.testing.assert_allclose(everything.metrics[0]["reward"], np.mean(experience["rewards"]), rtol=1e-6)
    np.testing.assert_allclose(everything.metrics[0]["completion_tokens"], np.mean(experience.length), rtol=1e-6)
    np.testing.assert_allclose(everything.metrics[0]["kept_share"], 0.5)
    np.testing.assert_allclose(filtered[0].metrics[0]["kept_share"], 1.0)


def test_params_that_are_given_survive_the_donation(bigram, make_prompts, traceable):
    params = bigram.init(jax.random.key(3))
    traceable.step(traceable.step.init(jax.random.key(0), params), make_prompts(8))
    assert not params["scores"].is_deleted()


def test_a_step_without_rewards_distils_a_teacher(make_bigram):
    """Distillation needs only rows of the policy and a teacher's log-probabilities, without a reward."""
    bigram = make_bigram(16)

    def distilled(logprobs, teacher_logprobs, behaviour_logprobs, mask):
        gap = jax.lax.stop_gradient(teacher_logprobs - behaviour_logprobs)
        return Loss(-(mask * gap * logprobs).sum(), mask.sum())

    step = make_train_step(
        bigram,
        optax.sgd(10.0),
        source=Rollout(samples_per_prompt=8, max_completion_tokens=4, eos_ids=(2,), pad_id=0),
        losses=[distilled],
        resources=Resources(networks={"teacher": Network(origin="given", model=bigram)}),
    )
    assert len(step.programs) == 1
    teacher = bigram.init(jax.random.key(5))
    state = step.init(jax.random.key(0), None, {"teacher": teacher})
    number = np.arange(4, dtype=np.int32)
    prompts = Prompts(number[:, None] + 3, number * 0 + 1, number, number[:, None], number * 0 + 1)
    distance = []
    for _ in range(10):
        state, metrics, rows = step.run(state, prompts)
        distance.append(
            float((rows.mask * (rows.behaviour_logprobs - rows["teacher_logprobs"])).sum() / rows.mask.sum())
        )
    assert np.mean(distance[-3:]) < 0.7 * np.mean(distance[:3])
    assert "reward" not in metrics
    rollout = replace(ROLLOUT, plan=plans.refill(plans.plain(samples_per_prompt=4), samples_per_prompt=4))
    with pytest.raises(ValueError, match="rewards is empty, but the plan reads rewards"):
        make_train_step(bigram, optax.sgd(2.0), source=rollout, losses=[distilled])


def test_pairs_may_be_made_of_the_samples_of_a_step(bigram, make_prompts):
    """DPO on the best and the worst sample of each group; the others are in no pair."""

    def best_and_worst(rewards, group):
        ours = group[:, None] == group[None, :]
        most = jnp.where(ours, rewards, -jnp.inf).max(1)
        least = jnp.where(ours, rewards, jnp.inf).min(1)
        return jnp.where(rewards == most, 1.0, jnp.where(rewards == least, 0.0, -1.0))

    step = composed(bigram, credit=[("preferred", best_and_worst)], losses=[losses.dpo], optimizer=optax.adam(0.5))
    state, seen = step.init(jax.random.key(0)), []
    for _ in range(15):
        state, metrics, _ = step.run(state, make_prompts(8))
        seen.append(float(metrics["reward"]))
    assert np.mean(seen[-3:]) > np.mean(seen[:3]) + 0.1
