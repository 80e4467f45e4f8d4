"""The plan `paraphrased`: a group of each prompt and one of its paraphrase."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses, rewards
from jaxrl_llm.experience import Prompts
from jaxrl_llm.rollout.plans import greedy_baseline, paraphrased, plain, refill
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.training import make_train_step


@pytest.fixture
def model(make_bigram):
    return make_bigram(16)


def prompts(count=3, **fields):
    number = np.arange(count, dtype=np.int32)
    own = np.stack([number * 0 + 1, number + 3], axis=1)
    other = np.stack([number * 0, number + 8], axis=1)
    said = {"paraphrase_tokens": other, "paraphrase_length": number * 0 + 1}
    return Prompts(own, number * 0 + 2, number, number[:, None], number * 0 + 1, said | fields)


def composed(model, plan, **changed):
    given = {
        "rewards": [rewards.answer_present],
        "credit": [
            ("answer_id", rewards.paired_answer_ids),
            ("rewards", rewards.paired_majority_match),
            ("advantages", advantages.leave_one_out),
        ],
        "losses": [losses.policy_gradient],
    }
    source = Rollout(samples_per_prompt=4, max_completion_tokens=6, eos_ids=(2,), pad_id=0, plan=plan)
    return make_train_step(model, optax.sgd(0.1), source=source, **(given | changed))


def test_two_groups_a_prompt_that_know_each_other(model):
    step = composed(model, paraphrased(plain(samples_per_prompt=4)))
    _, metrics, rows = step.run(step.init(jax.random.key(0)), prompts())
    given = prompts()
    first = np.repeat(given.tokens, 4, axis=0)
    np.testing.assert_array_equal(
        rows.prompt_tokens, np.r_[first, np.repeat(given.fields["paraphrase_tokens"], 4, axis=0)]
    )
    np.testing.assert_array_equal(rows.prompt_length, [2] * 12 + [1] * 12)
    np.testing.assert_array_equal(rows.group, np.repeat(np.arange(6), 4))
    np.testing.assert_array_equal(rows["paired_group"], np.repeat([3, 4, 5, 0, 1, 2], 4))
    np.testing.assert_array_equal(rows.prompt_id, np.tile(np.repeat(np.arange(3), 4), 2))
    assert len({(int(i), int(s)) for i, s in zip(rows.prompt_id, rows.sample, strict=True)}) == 24
    assert metrics["sampler_gap_max"] < 1e-5
    # By hand: what is between 5 and 6, and which of these most rows of the other wording have.
    answers = np.asarray(rows["answer_id"]).reshape(6, 4)
    for group in range(6):
        other = [a for a in answers[(group + 3) % 6].tolist() if a >= 0]
        label = max(sorted(set(other)), key=other.count) if other else None
        np.testing.assert_array_equal(rows["rewards"].reshape(6, 4)[group], answers[group] == label)


def test_copies_of_a_prompt_have_samples_of_their_own(model):
    step = composed(model, paraphrased(plain(samples_per_prompt=4)))
    doubled = jax.tree.map(lambda x: np.concatenate([x, x]), prompts(2, repeat=np.zeros(2, np.int32)))
    doubled.fields["repeat"][2:] = 1
    rows = step.run(step.init(jax.random.key(0)), doubled)[2]
    assert len({(int(i), int(s)) for i, s in zip(rows.prompt_id, rows.sample, strict=True)}) == 32


def test_each_wording_has_a_greedy_baseline_of_its_own(model):
    made = paraphrased(greedy_baseline(plain(samples_per_prompt=4), temperature=1.0))
    credit = [("advantages", advantages.reward_minus_baseline)]
    step = composed(model, made, rewards=[lambda tokens: tokens[:, 0].astype(jnp.float32)], credit=credit)
    state = step.init(jax.random.key(0))
    likeliest = np.argmax(np.asarray(state.params["scores"]), axis=1)
    rows = step.run(state, prompts())[2]
    last = np.asarray(rows.prompt_tokens)[:, -1]
    np.testing.assert_array_equal(rows["baseline_rewards"], likeliest[last])


def test_a_step_that_lacks_the_plan_or_cannot_have_it_says_so(model):
    with pytest.raises(
        ValueError, match="names 'paired_group', which nothing in this step provides; the plan paraphrased"
    ):
        composed(model, plain(samples_per_prompt=4))
    assert paraphrased(plain(samples_per_prompt=4)).reads == {"paraphrase_tokens", "paraphrase_length"}
    inner = refill(plain(samples_per_prompt=4), samples_per_prompt=4)
    with pytest.raises(ValueError, match=r"rollout.plan.paraphrased needs .* \(one_round\), which the plan inside"):
        paraphrased(inner)
