"""A selection of prompts by a bandit, within the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Prompts
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.selection import bandit
from jaxrl_llm.training import make_train_step

# Items 0 to 3 are never solved, 4 to 7 as often as the first token is even.
RECORDS = [{"level": 1 + (number >= 4)} for number in range(8)]


def solved(tokens, prompt_id):
    return jnp.where(prompt_id >= 4, tokens[:, 0] % 2, 0).astype(jnp.float32)


@pytest.mark.slow
def test_the_bandit_finds_the_arm_that_teaches(make_bigram):
    step = make_train_step(
        make_bigram(16),
        optax.sgd(0.0),
        source=Rollout(
            samples_per_prompt=8,
            max_completion_tokens=3,
            eos_ids=(2,),
            pad_id=0,
            prompts_per_step=4,
            selection=bandit(records=RECORDS, temperature=0.05, rate=0.5),
        ),
        rewards=[solved],
        credit=[("advantages", advantages.group_normalized)],
        losses=[losses.policy_gradient],
    )
    state = step.init(jax.random.key(0))
    value, chosen_arms = np.zeros(2), []
    for _ in range(12):
        chosen = np.asarray(state.memory["selection"]["choices"][0])
        following = np.asarray(state.memory["selection"]["choices"][1])
        number = chosen.astype(np.int32)
        repeat = np.array([(number[:place] == one).sum() for place, one in enumerate(number)], np.int32)
        given = Prompts(
            number[:, None] + 3,
            number * 0 + 1,
            number,
            number[:, None],
            number * 0 + 1,
            {"item": number, "repeat": repeat},
        )
        state, _, rows = step.run(state, given)
        # The choice that waited is next, whatever this step has shown.
        np.testing.assert_array_equal(state.memory["selection"]["choices"][0], following)
        signal = (np.abs(rows["advantages"]) * rows.mask).sum(1) / np.asarray(rows.mask).sum(1)
        arm = np.repeat(number >= 4, 8)
        for k in (0, 1):
            if (arm == k).any():
                value[k] = 0.5 * value[k] + 0.5 * signal[arm == k].mean()
        np.testing.assert_allclose(state.memory["selection"]["memory"].value, value, rtol=1e-5, atol=1e-7)
        chosen_arms.append((number >= 4).mean())
    assert value[0] == 0 < value[1]
    assert np.mean(chosen_arms[4:]) > 0.9
