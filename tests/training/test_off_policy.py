"""One step off-policy: which policy samples what, that nothing is sampled twice, and that a state goes on as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import KeyUse, Loss, Selection
from jaxrl_llm.rollout import generate
from jaxrl_llm.training import Resources, Rollout, make_train_step

SIZES = {"max_completion_tokens": 4, "eos_ids": (2,), "pad_id": 0}


def low(tokens):
    return (tokens < 8).mean(1)


def low_on_the_host(completions):
    # What follows the end of a completion is the symbol 0, which is low too.
    return [1 - sum(int(symbol, 16) >= 8 for symbol in text) / 4 for text in completions]


def composed(model, reward=low, loss=losses.clipped_surrogate, off_policy_steps=1):
    return make_train_step(
        model,
        optax.sgd(1.0),
        source=Rollout(samples_per_prompt=2, off_policy_steps=off_policy_steps, **SIZES),
        rewards=[reward],
        credit=[("advantages", advantages.group_normalized)],
        losses=[loss],
        resources=Resources(decode=lambda ids: "".join(f"{number:x}" for number in ids)),
    )


def batches(make_prompts):
    every = make_prompts(8)
    return [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], every) for i in range(4)]


def run(step, model, make_prompts, count=3):
    prompts, seen, params = batches(make_prompts), [], []
    state = step.init(jax.random.key(0), model.init(jax.random.key(1)))
    state = step.prime(state, prompts[0])
    for index in range(count):
        params.append(jax.device_get(state.params))
        given = prompts[index] if not step.priming else prompts[index + 1]
        state, metrics, rows = step.run(state, given, [{"body": "", "answer": ""}] * 2, None)
        seen.append(jax.device_get((metrics, rows)))
    return state, seen, params


@pytest.fixture(scope="module")
def behind(bigram, make_prompts):
    return run(composed(bigram), bigram, make_prompts)


def test_each_batch_is_sampled_by_the_policy_before_the_last_update(bigram, make_prompts, behind):
    _, seen, params = behind
    for index, (metrics, rows) in enumerate(seen):
        by = params[max(index - 1, 0)]
        expected = generate(
            bigram,
            jax.tree.map(jnp.asarray, by),
            batches(make_prompts)[index],
            jax.random.fold_in(jax.random.key(0), KeyUse.ROLLOUT),
            index,
            samples_per_prompt=2,
            **SIZES,
        )
        np.testing.assert_array_equal(rows.tokens, expected.tokens)
        np.testing.assert_allclose(rows.behaviour_logprobs, expected.behaviour_logprobs, atol=1e-5)
        np.testing.assert_array_equal(rows["old_logprobs"], rows.behaviour_logprobs)
        assert metrics["staleness_steps"] == min(index, 1)
    assert not np.allclose(params[0]["scores"], params[1]["scores"])


def test_the_first_update_is_that_of_a_step_on_policy(bigram, make_prompts, behind):
    _, seen, params = run(composed(bigram, off_policy_steps=0), bigram, make_prompts, count=2)
    np.testing.assert_array_equal(seen[0][1].tokens, behind[1][0][1].tokens)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params[1], behind[2][1])


def test_rewards_on_the_host_change_nothing(bigram, make_prompts, behind):
    state, seen, _ = run(composed(bigram, low_on_the_host), bigram, make_prompts)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        jax.device_get(state.params),
        jax.device_get(behind[0].params),
    )
    assert [float(metrics["reward"]) for metrics, _ in seen] == pytest.approx(
        [float(metrics["reward"]) for metrics, _ in behind[1]]
    )


def test_a_method_that_tells_behaviour_from_old_gets_both(bigram, make_prompts):
    def corrected(logprobs, old_logprobs, behaviour_logprobs, advantages, mask):
        weight = jnp.minimum(jnp.exp(old_logprobs - behaviour_logprobs), 2.0)
        return Loss(-(jnp.exp(logprobs - old_logprobs) * weight * advantages * mask).sum(), mask.sum())

    _, seen, params = run(composed(bigram, loss=corrected), bigram, make_prompts)
    expected = composed(bigram, loss=corrected)
    assert not expected.composition.keeps_record
    gaps = [np.abs(rows["old_logprobs"] - rows.behaviour_logprobs)[rows.mask > 0].max() for _, rows in seen]
    assert max(gaps[1:]) > 1e-3  # the policy has moved by one update
    np.testing.assert_allclose(seen[0][1]["old_logprobs"], seen[0][1].behaviour_logprobs, atol=1e-5)


def test_the_card_of_truncated_weights():
    new, behaviour = jnp.array([[-1, -0.5, -0.1]]), jnp.array([[-1.2, -0.5, -1.0]])
    weight = losses.importance_weight(new, behaviour, jnp.ones((1, 3)))
    np.testing.assert_allclose(weight, [[1.221403, 1, 2]], rtol=1e-6)


def test_bad_options():
    with pytest.raises(ValueError, match="off_policy_steps is 2"):
        Rollout(samples_per_prompt=2, off_policy_steps=2, **SIZES)


@pytest.mark.parametrize("reward", [low, pytest.param(low_on_the_host, marks=pytest.mark.slow)])
def test_a_selection_chooses_the_prompts_that_are_sampled_ahead(bigram, make_prompts, reward):
    """Four items in turn: step n learns from the items that were chosen for it, and samples those of the next one."""
    in_turn = Selection(
        init=lambda: jnp.int32(0),
        choose=lambda memory, key, count: (jnp.arange(count) + memory) % 4,
        update=lambda memory, item: memory + item[0] + 1,
        report=lambda memory: {"memory": memory},
    )
    step = make_train_step(
        bigram,
        optax.sgd(1.0),
        source=Rollout(2, **SIZES, off_policy_steps=1, prompts_per_step=2, selection=in_turn),
        rewards=[reward],
        credit=[("advantages", advantages.group_normalized)],
        losses=[losses.clipped_surrogate],
        resources=Resources(decode=lambda ids: "".join(f"{number:x}" for number in ids)),
    )
    every = make_prompts(4)

    def chosen(state, later):
        numbers = np.asarray(state.memory["selection"]["choices"][later])
        given = jax.tree.map(lambda x: x[numbers], every)
        fields = {"item": numbers.astype(np.int32), "repeat": np.zeros(2, np.int32)}
        items = [{"body": "", "answer": "", "item_id": number} for number in numbers.tolist()]
        return given.replace(fields=fields), items, numbers

    state = step.init(jax.random.key(0))
    prompts, items, _ = chosen(state, 0)
    state, memory = step.prime(state, prompts, items), 0
    for _ in range(4):
        (_, items, expected), (prompts, _, _) = chosen(state, 0), chosen(state, 1)
        state, metrics, rows = step.run(state, prompts, items)
        np.testing.assert_array_equal(rows["item"], np.repeat(expected, 2))
        np.testing.assert_array_equal(rows.prompt_id, np.repeat(expected, 2))
        memory += expected[0] + 1
        assert metrics["selection/memory"] == memory
