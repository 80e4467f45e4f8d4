"""Every row meets the item of its own prompt, whenever and in whatever order prompts are sampled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.advantages import group_normalized
from jaxrl_llm.experience import Prompts
from jaxrl_llm.losses import clipped_surrogate
from jaxrl_llm.rewards import episode_reward
from jaxrl_llm.rollout import Endpoint, HostEnvironment, plans
from jaxrl_llm.rollout.hand_over import External
from jaxrl_llm.training import Resources, Rollout, make_train_step
from jaxrl_llm.training.reading import item_numbers

VOCABULARY, SAMPLES, PROMPTS = 12, 3, 4


def prompts_of(step: int, count: int = PROMPTS) -> Prompts:
    number = jnp.arange(count)
    return Prompts(
        tokens=jnp.stack([number % 5, number % 7], 1),
        length=number * 0 + 2,
        prompt_id=100 * step + number[::-1],
        answer_tokens=number[:, None] * 0,
        answer_length=number * 0,
    )


def items_of(step: int, count: int = PROMPTS, *, named: bool) -> list[dict]:
    ids = np.asarray(prompts_of(step, count).prompt_id).tolist()
    return [{"body": "", "answer": str(number)} | ({"item_id": number} if named else {}) for number in ids]


def answered(answers, prompt_id):
    """A reward that differs within a group where the id of the prompt is odd; the answer has to be the prompt's."""
    assert [int(answer) for answer in answers] == prompt_id.tolist()
    return [number % 2 * (row % SAMPLES) for row, number in enumerate(prompt_id.tolist())]


def step_of(model, **sampling):
    return make_train_step(
        model,
        optax.sgd(0.1),
        source=Rollout(SAMPLES, 5, eos_ids=(1,), pad_id=1, **sampling),
        rewards=[answered],
        credit=[("advantages", group_normalized)],
        losses=[clipped_surrogate],
        resources=Resources(decode=lambda ids: ""),
    )


@pytest.mark.parametrize(
    "named", [pytest.param(True, marks=pytest.mark.slow), False], ids=["items that say their id", "items that do not"]
)
def test_one_step_off_policy_the_items_are_those_of_the_rows(make_bigram, named):
    step = step_of(make_bigram(VOCABULARY), off_policy_steps=1)
    state = step.prime(step.init(jax.random.key(0)), prompts_of(0), items_of(0, named=named))
    for index in range(2):
        state, _, rows = step.run(state, prompts_of(index + 1), items_of(index, named=named))
        assert set(np.asarray(rows.prompt_id) // 100) == {index}
        np.testing.assert_array_equal(rows["correct"] > 0, rows["rewards"] >= 1)


@pytest.mark.parametrize(
    "named", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["items that say their id", "items that do not"]
)
def test_further_prompts_of_a_round_have_items_of_their_own(make_bigram, named):
    plan = plans.refill(plans.plain(samples_per_prompt=SAMPLES), samples_per_prompt=SAMPLES, max_rounds=3)
    step = step_of(make_bigram(VOCABULARY), plan=plan)
    count = 3 * PROMPTS
    _, metrics, rows = step.run(step.init(jax.random.key(0)), prompts_of(0, count), items_of(0, count, named=named))
    assert metrics["rounds"] == 2
    assert (np.asarray(rows.prompt_id) % 2 == 1).all()
    assert len(np.unique(rows.prompt_id)) == PROMPTS


def test_items_are_found_by_id_wherever_ids_tell_prompts_apart():
    ids, groups = np.array([7, 7, 5, 5]), np.array([0, 0, 1, 1])
    plain = [{"answer": "a"}, {"answer": "b"}]
    assert item_numbers(ids, groups, np.array([5, 7]), plain).tolist() == [1, 1, 0, 0]
    assert item_numbers(ids, groups, None, plain).tolist() == [0, 0, 1, 1]
    assert item_numbers(ids * 0, groups, np.array([0, 0]), plain).tolist() == [0, 0, 1, 1]
    named = [{"item_id": 5}, {"item_id": 9}, {"item_id": 7}]
    assert item_numbers(ids, groups, np.array([1, 2]), named).tolist() == [2, 2, 0, 0]
    # Ids of other prompts say nothing.
    assert item_numbers(ids, groups, np.array([5, 9]), plain).tolist() == [0, 0, 1, 1]


# ---- environments in Python -----------------------------------------------------------------------------------------


def talking(item_seen: list[int]) -> HostEnvironment:
    """One turn, whose rewards differ within a group where the answer of the item is odd."""
    turns: list[int] = []

    def begin(item):
        item_seen.append(int(item["answer"]))
        return int(item["answer"])

    def turn(number, text):
        turns.append(number)
        return number, "", float(number % 2 * (len(turns) % SAMPLES)), True

    return HostEnvironment(
        begin, turn, max_turns=1, max_turn_tokens=3, max_observation_tokens=1, end_of_turn_ids=(1,), workers=1
    )


def test_a_round_of_conversations_is_about_its_own_items(make_bigram):
    seen: list[int] = []
    plan = plans.refill(
        plans.plain(samples_per_prompt=SAMPLES), samples_per_prompt=SAMPLES, max_rounds=2, metric="rewards"
    )
    step = make_train_step(
        make_bigram(VOCABULARY),
        optax.sgd(0.1),
        source=Rollout(SAMPLES, 5, eos_ids=(1,), pad_id=1, plan=plan, environment=talking(seen)),
        rewards=[episode_reward],
        credit=[("advantages", group_normalized)],
        losses=[clipped_surrogate],
        resources=Resources(decode=lambda ids: "", encode=lambda text: []),
    )
    given, items = prompts_of(0, 2 * PROMPTS), items_of(0, 2 * PROMPTS, named=False)
    _, metrics, rows = step.run(step.init(jax.random.key(0)), given, items)
    ids = np.asarray(given.prompt_id)
    assert seen == np.repeat(ids, SAMPLES).tolist()[: len(seen)]
    assert len(seen) == int(metrics["rounds"]) * PROMPTS * SAMPLES
    there = np.asarray(rows.weight) > 0
    assert there.any()
    assert (np.asarray(rows.prompt_id)[there] % 2 == 1).all()


@pytest.mark.parametrize(
    "sampling, message",
    [
        ({"off_policy_steps": 1}, r"off_policy_steps needs .*\(ahead\), which the environment in Python"),
        ({"engine": External(Endpoint("http://localhost:1", "policy"))}, r"\(conversations\), which rollout.engine"),
    ],
)
def test_what_an_environment_in_python_cannot_go_with(make_bigram, sampling, message):
    with pytest.raises(ValueError, match=message):
        make_train_step(
            make_bigram(VOCABULARY),
            optax.sgd(0.1),
            source=Rollout(SAMPLES, 5, eos_ids=(1,), pad_id=1, environment=talking([]), **sampling),
            rewards=[episode_reward],
            losses=[clipped_surrogate],
            resources=Resources(decode=lambda ids: "", encode=lambda text: []),
            credit=[("advantages", group_normalized)],
        )


@pytest.mark.parametrize("place", ["an engine", "an environment in Python"])
def test_a_temperature_of_its_own_is_not_left_out_in_silence(make_bigram, place):
    inner = plans.plain(samples_per_prompt=SAMPLES)
    plan = plans.mixed_temperature(inner, samples_per_prompt=SAMPLES, prompt_share=0.5, temperature=1.5)
    where = (
        {"engine": External(Endpoint("http://localhost:1", "policy"))}
        if place == "an engine"
        else {"environment": talking([])}
    )
    with pytest.raises(ValueError, match=r"rollout.plan needs .*\(temperatures\)"):
        make_train_step(
            make_bigram(VOCABULARY),
            optax.sgd(0.1),
            source=Rollout(SAMPLES, 5, eos_ids=(1,), pad_id=1, plan=plan, **where),
            rewards=[episode_reward if "environment" in where else answered],
            losses=[clipped_surrogate],
            resources=Resources(decode=lambda ids: "", encode=lambda text: []),
            credit=[("advantages", group_normalized)],
        )
