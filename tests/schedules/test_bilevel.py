"""Weights of rewards that follow the implicit gradient inside of a step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import schedules
from jaxrl_llm.signatures import call

# Three arms are the samples of a prompt, each with a feature of its own; `pull` is 0.5 behind features of unit square.
BLEND = [[1, 0.2], [0.5, 1], [0, 0.6]]
ARMS = {"embedding": jnp.eye(3), "group": jnp.zeros(3, jnp.int32), "weight": jnp.ones(3), "step": jnp.int32(0)}
PULL = {"pull": 0.75, "decay": 0.0, "learning_rate": 1.0}


def weights_after(method, **data):
    return np.asarray(jax.jit(partial(call, method))(data, method.init())[1]["weights"])


def test_blends_of_both_cards_move_by_their_implicit_gradients():
    barfi = schedules.implicit_blend(primary="a", reward_names=("a", "b"), initial=(0.5, 1.0), **PULL)
    moved = weights_after(barfi, reward_components=jnp.array(BLEND), **ARMS) - [0.5, 1.0]
    np.testing.assert_allclose(moved, [0.068980, -0.031357], atol=1e-5)
    names = ("person", "a", "b")
    person = jnp.array([1.0, 0, 0.5])[:, None]
    told = jnp.concatenate([person, jnp.array(BLEND)], 1)
    parl = schedules.implicit_blend(
        primary="person", reward_names=names, initial=(9.0, 0.2, 0.4), form="preferences", **PULL
    )
    moved = weights_after(parl, reward_components=told, **ARMS) - [0, 0.2, 0.4]
    np.testing.assert_allclose(moved, [0, 0.033307, -0.082604], atol=1e-5)


def test_rows_that_are_absent_scales_and_several_prompts_change_nothing():
    method = schedules.implicit_blend(primary="a", reward_names=("a", "b"), initial=(0.5, 1.0), **PULL)
    alone = weights_after(method, reward_components=jnp.array(BLEND), **ARMS)
    twice = {
        "reward_components": jnp.array([*BLEND, [jnp.nan, 7.0], *BLEND]),
        "embedding": 5 * jnp.concatenate([jnp.eye(3), jnp.full((1, 3), 9.0), jnp.eye(3)]) + 3,
        "group": jnp.array([2, 2, 2, 2, 0, 0, 0]),
        "weight": jnp.array([1.0, 1, 1, 0, 1, 1, 1]),
        "step": jnp.int32(4),
    }
    np.testing.assert_allclose(weights_after(method, **twice), alone, atol=1e-5)
    late = schedules.implicit_blend(primary="a", reward_names=("a", "b"), every_steps=3, **PULL)
    np.testing.assert_array_equal(weights_after(late, **twice), [1, 1])
    same = twice | {"reward_components": jnp.ones((7, 2))}  # equal rewards have nothing to teach
    np.testing.assert_allclose(weights_after(method, **same), [0.5, 1.0], atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"primary": "c"}, "primary is 'c'; it must be one of the rewards a, b"),
        ({"initial": (1.0,)}, "initial has 1 weights; give one for each of the 2 rewards"),
        ({"form": "regret"}, "form is 'regret'; it must be one of return, preferences"),
        ({"pull": 0.0}, "pull is 0.0"),
    ],
)
def test_what_a_blend_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        schedules.implicit_blend(**({"primary": "a", "reward_names": ("a", "b")} | changed)).init()


@pytest.mark.slow
def test_inside_of_a_step_a_misleading_reward_loses_its_weight(bandit):
    step, prompts = bandit
    state = step.init(jax.random.key(0))
    seen = []
    for _ in range(24):
        state, metrics = step(state, prompts)
        seen.append({name: float(metrics[name]) for name in ("metric/blend_second", "reward/first")})
    assert len(step.programs) == 1
    assert seen[0]["metric/blend_second"] > 0.5
    assert seen[-1]["metric/blend_second"] < 0
    assert np.mean([one["reward/first"] for one in seen[-5:]]) > 0.1 + seen[0]["reward/first"]


@pytest.fixture
def bandit():
    """A step of a policy that writes one of three letters, and its prompts."""
    from jaxrl_llm import advantages, losses, models
    from jaxrl_llm.experience import Prompts
    from jaxrl_llm.training import Fill, Reward, Rollout, make_train_step

    earned = jnp.array(BLEND)
    blend = schedules.implicit_blend(primary="first", reward_names=("first", "second"), initial=(0.5, 1.0))
    step = make_train_step(
        models.transformer(models.TransformerConfig(3, width=8, layers=1, heads=2, kv_heads=1)),
        optax.adam(1e-2),
        source=Rollout(16, 1, eos_ids=(), pad_id=0, prompts_per_step=4),
        rewards=[
            Reward(lambda tokens: earned[tokens[:, 0], 0], name="first"),
            Reward(lambda tokens: earned[tokens[:, 0], 1], name="second"),
        ],
        credit=[
            ("embedding", lambda tokens: jax.nn.one_hot(tokens[:, 0], 3)),
            Fill(("rewards", "metric/blend_second"), blend, "blend"),
            ("advantages", partial(advantages.group_normalized, scale="none")),
        ],
        losses=[losses.policy_gradient],
    )
    number = jnp.arange(4, dtype=jnp.int32)
    nothing = jnp.zeros((4, 1), jnp.int32)
    return step, Prompts(nothing, number * 0 + 1, number, nothing, number * 0)
