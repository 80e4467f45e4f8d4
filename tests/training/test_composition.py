"""What is wrong with a composition is said when the step is built, or at the latest when it is traced."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import optax
import pytest

import jaxrl_llm
from jaxrl_llm import advantages, losses, rewards
from jaxrl_llm.experience import Loss, Method
from jaxrl_llm.training import Fill, LossTerm, Resources, Reward, Rollout, Update, make_train_step

ROLLOUT = Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0)
FOUR = replace(ROLLOUT, prompts_per_step=4)


def compose(model, **changes):
    parts = {
        "source": ROLLOUT,
        "rewards": [rewards.exact_answer],
        "credit": [("advantages", advantages.group_normalized)],
        "losses": [losses.clipped_surrogate],
    }
    return make_train_step(model, optax.sgd(0.1), **(parts | changes))


def remembering():
    def update(memory, rewards):
        return rewards, memory

    return Method(lambda: jnp.float32(0), update)


def judge(completions):
    return [0.0 for _ in completions]


def judged(tokens):
    return tokens[:, 0] * 1.0


def turn_rewards(turn, rewards):
    return rewards


def misspelt(reference_logprob):
    return reference_logprob


def valued(values, mask):
    return None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": []}, "losses is empty"),
        ({"rewards": rewards.exact_answer}, "rewards is <function exact_answer.*; give a list"),
        ({"losses": losses.clipped_surrogate}, "losses is <function clipped_surrogate.*; give a list"),
        ({"credit": {"advantages": advantages.raw_rewards}}, "credit is {.*; give a list"),
        ({"rewards": ["exact_answer"]}, "rewards holds 'exact_answer'; give a function"),
        ({"rewards": [(0.3, rewards.exact_answer)]}, r"rewards holds \(0.3, .*; give a function, \(function, weight\)"),
        ({"rewards": [(rewards.exact_answer, float("nan"))]}, "rewards holds .*nan.*; give a function"),
        ({"credit": [advantages.raw_rewards]}, r"credit holds <function raw_rewards.*; give \(name, function\)"),
        ({"losses": [(losses.policy_gradient, "x")]}, r"losses holds .*'x'\); give a function, \(function, coeff"),
        ({"credit": []}, "'clipped_surrogate' names 'advantages', .* add an entry to credit .* group_normalized"),
        (
            {"credit": [("rewards", advantages.raw_rewards)]},
            "names 'advantages', which nothing in this step provides; add an entry to credit",
        ),
        ({"losses": [valued]}, "loss 'valued' names 'values', .* a critic provides it"),
        (
            {"credit": [("rewards", turn_rewards), ("advantages", advantages.raw_rewards)]},
            "rewards 'turn_rewards' names 'turn', .* an entry of credit that fills it, for example turn: separated",
        ),
        ({"rewards": [misspelt]}, "reward 'misspelt' names 'reference_logprob'"),
        (
            {"credit": [("advantages", misspelt)]},
            r"advantages 'misspelt' names 'reference_logprob', .* did you mean 'reference_logprobs'\?",
        ),
        ({"rewards": [lambda advantages: advantages]}, "names 'advantages', .* add an entry to credit"),
        (
            {"rewards": [lambda logprobs: logprobs]},
            r"names 'logprobs', .* only losses can read it: .* did you mean '\w+_logprobs'\?",
        ),
        ({"credit": [("advantages", lambda logprobs: logprobs)]}, r"did you mean '\w+_logprobs'\?"),
        ({"losses": [(losses.clipped_surrogate, lambda rewardz: 1.0)]}, "coefficient of 'clipped_surrogate' names"),
        ({"credit": [("advantage", advantages.group_normalized)]}, "fills 'advantage', .* did you mean 'advantages'"),
        ({"credit": [("tokens", advantages.group_normalized)]}, "credit fills 'tokens', which credit may not fill"),
        (
            {"source": replace(ROLLOUT, samples_per_prompt=1)},
            "samples_per_prompt is 1, but 'group_normalized' compares the samples .* at least 2",
        ),
        ({"rewards": [rewards.exact_answer, rewards.exact_answer]}, "reward 'exact_answer' is listed twice"),
        ({"losses": [losses.clipped_surrogate, losses.clipped_surrogate]}, "loss 'clipped_surrogate' is listed twice"),
        (
            {"credit": [("rewards", remembering()), ("rewards", remembering())]},
            "credit entry 'rewards:update' is listed twice and has a memory",
        ),
        ({"rewards": [judge]}, "reward 'judge' reads text, so make_train_step needs decode="),
        ({"credit": [("advantages", judge)]}, "advantages 'judge' reads text, so make_train_step needs decode="),
        ({"source": FOUR, "update": Update(minibatches_per_epoch=3)}, "does not divide .*prompts_per_step 4"),
        ({"source": FOUR, "update": Update(sequences_per_microbatch=3)}, "the 8 sequences of a minibatch"),
    ],
)
def test_what_cannot_work_is_refused_when_the_step_is_built(bigram, changes, message):
    with pytest.raises(ValueError, match=message):
        compose(bigram, **changes)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_training_samples_need_a_temperature(temperature):
    with pytest.raises(ValueError, match=f"rollout.temperature is {temperature}; .* above 0"):
        Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0, temperature=temperature)


def test_a_loss_that_compares_samples_needs_whole_groups(bigram):
    def paired(logprobs, advantages, mask, group):
        return None

    with pytest.raises(ValueError, match=r"loss 'paired' compares .* whole groups: choose a multiple of .* 2"):
        compose(bigram, losses=[paired], source=FOUR, update=Update(sequences_per_microbatch=1))


def test_sizes_are_checked_at_the_first_call_where_they_were_not_known_before(bigram, make_prompts, traced):
    step = compose(bigram, update=Update(minibatches_per_epoch=2))
    with pytest.raises(ValueError, match=r"minibatches_per_epoch is 2, .*prompts_per_step 3"):
        traced(step, make_prompts(3))


def test_a_pair_may_stand_for_a_term(bigram):
    step = compose(bigram, rewards=[(judged, 0.3)], losses=[(losses.clipped_surrogate, jnp.float32(2.0))])
    (term,) = step.composition.rewards
    assert (term.function, term.weight, term.name) == (judged, 0.3, "judged")
    assert step.composition.losses[0].coefficient == 2.0


def test_a_loss_may_return_a_plain_pair(bigram, make_prompts, traced):
    def own(logprobs, mask):
        return (logprobs * mask).sum(), mask.sum()

    assert "loss/own" in traced(compose(bigram, losses=[own]), make_prompts(4))[1]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda x: x.sum(), r"an array of shape \(\)"),
        (lambda x: (x, x.sum()), "a tuple"),
        (lambda x: None, "a NoneType"),
        (lambda x: {"loss": x.sum()}, "a dict"),
    ],
)
def test_a_loss_that_is_no_sum_and_count_is_refused_in_one_sentence(bigram, make_prompts, traced, returned, said):
    def own(logprobs):
        return returned(logprobs)

    with pytest.raises(ValueError, match=rf"^loss 'own' returned {said}; it must return a sum and a count"):
        traced(compose(bigram, losses=[own]), make_prompts(4))


def test_what_functions_of_ones_own_speak_is_where_one_looks():
    for place in (jaxrl_llm, jaxrl_llm.training):
        assert (place.Loss, place.Method, place.Reward) == (Loss, Method, Reward)
    assert losses.Loss is Loss
    assert advantages.Method is jaxrl_llm.schedules.Method is jaxrl_llm.selection.Method is Method
    assert jaxrl_llm.make_train_step is make_train_step


@pytest.mark.parametrize("shape", [(), (8, 1), (8, 6), (4,)])
def test_a_reward_of_the_wrong_shape_is_refused_when_traced(bigram, make_prompts, traced, shape):
    def odd(tokens):
        return jnp.zeros(shape)

    with pytest.raises(ValueError, match=r"reward 'odd' returned shape \(.*\) for 8 completions; .* shape \(8,\)"):
        traced(compose(bigram, rewards=[odd]), make_prompts(4))


@pytest.mark.parametrize(
    ("field", "shape", "right"),
    [
        ("rewards", (), r"\(8,\)"),
        ("weight", (8, 6), r"\(8,\)"),
        ("advantages", (4,), r"\(8,\) or \(8, 6\)"),
        ("token_weight", (8, 1), r"\(8,\) or \(8, 6\)"),
        ("mask", (8,), r"\(8, 6\)"),
    ],
)
def test_a_credit_value_of_the_wrong_shape_is_refused_when_traced(bigram, make_prompts, traced, field, shape, right):
    def odd(rewards):
        return jnp.zeros(shape)

    step = compose(bigram, credit=[("advantages", advantages.group_normalized), (field, odd)])
    with pytest.raises(ValueError, match=rf"{field} 'odd' returned shape .* it must return shape {right}(\n|$)"):
        traced(step, make_prompts(4))


def test_a_reading_of_the_data_needs_the_items_before_anything_is_computed(bigram, make_prompts):
    def compared(completions, answers):
        return judge(completions)

    step = compose(bigram, rewards=[compared], resources=Resources(decode=str))
    with pytest.raises(ValueError, match=r"call step\(state, prompts, items\)"):
        step(None, make_prompts(4))


def test_functions_are_named_after_themselves_and_terms_as_they_say(bigram):
    step = compose(
        bigram,
        rewards=[rewards.exact_answer, Reward(rewards.exact_answer, 0.5, "again")],
        credit=[
            ("rewards", advantages.running_mean_baseline()),
            Fill("advantages", advantages.raw_rewards, "raw"),
        ],
        losses=[losses.clipped_surrogate, (losses.divergence(), 0.1), LossTerm(losses.entropy_bonus, 0.1, "bonus")],
    )
    assert [term.name for term in step.composition.rewards] == ["exact_answer", "again"]
    assert [term.memory_name for term in step.composition.credit] == ["rewards:update", "advantages:raw"]
    assert [term.name for term in step.composition.losses] == ["clipped_surrogate", "sampled_divergence", "bonus"]
    assert [term.coefficient for term in step.composition.losses] == [1.0, 0.1, 0.1]
