"""Heads: the last token is found under any padding, what they read learns or does not, and fresh ones are small."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import (
    HeadConfig,
    TransformerConfig,
    at_last,
    from_policy,
    head_outputs,
    head_specs,
    init_head,
    initialise,
    parameter_count,
    positions_of,
    sequence_reward,
    token_outputs,
    transformer,
)

LENGTHS, WIDTH = (7, 4, 1), 7
LEFT = np.arange(WIDTH) >= WIDTH - np.array(LENGTHS)[:, None]
RIGHT = np.arange(WIDTH) < np.array(LENGTHS)[:, None]
TWO_LAYERS = HeadConfig(layers=2, width=5)
HEADS = {"one layer": HeadConfig(), "two layers": TWO_LAYERS}


@pytest.fixture(scope="module")
def model():
    return transformer(TransformerConfig(vocabulary_size=13, width=16, layers=1, heads=2, kv_heads=1))


@pytest.fixture(scope="module")
def policy(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 13, length) for length in LENGTHS]


def padded(sequences, mask, pad=0):
    tokens = np.full(mask.shape, pad, np.int32)
    tokens[mask] = np.concatenate(sequences)
    return jnp.asarray(tokens), positions_of(jnp.asarray(mask))


@pytest.fixture(scope="module")
def reward(model):
    return jax.jit(partial(sequence_reward, model))


@pytest.fixture(scope="module")
def gradients(model):
    """Of the summed rewards, by the parameters of the backbone and of the head."""
    return jax.jit(jax.grad(lambda *arguments: sequence_reward(model, *arguments).sum(), argnums=(0, 1)))


def largest(tree) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_the_reward_is_that_of_the_last_token_under_either_padding(model, reward, policy, sequences, config):
    head = init_head(model, jax.random.key(1), config)
    apply, alone = jax.jit(model.apply), []
    for sequence in sequences:
        tokens = jnp.asarray(sequence, jnp.int32)[None]
        hidden, _ = apply(policy, tokens, jnp.arange(len(sequence))[None], None)
        alone.append(float(head_outputs(head, hidden)[0, -1, 0]))
    assert len(np.unique(alone)) == 3
    for mask in (LEFT, RIGHT):
        for pad in (0, 5):
            rewards = reward(policy, head, *padded(sequences, mask, pad))
            assert rewards.shape == (3,)
            np.testing.assert_allclose(rewards, alone, rtol=1e-5, atol=1e-6)


def test_an_empty_completion_is_judged_at_its_prompt_and_an_empty_row_is_0(model, reward, gradients, policy):
    head = init_head(model, jax.random.key(1), TWO_LAYERS) | {"hidden_bias": jnp.ones(5)}
    prompt = jnp.array([[0, 3, 4], [0, 3, 4], [0, 0, 0]])
    tokens = jnp.concatenate([prompt, jnp.array([[0, 0], [7, 0], [0, 0]])], axis=1)
    real = jnp.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    rewards = reward(policy, head, tokens, positions_of(real))
    alone = reward(policy, head, prompt[:, 1:], jnp.array([[0, 1]] * 3))
    np.testing.assert_allclose(rewards[0], alone[0], rtol=1e-5)
    assert abs(float(rewards[1] - rewards[0])) > 1e-3
    assert float(rewards[2]) == 0.0
    assert largest(gradients(policy, head, tokens, positions_of(0 * real))) == 0.0


def test_a_token_level_head_gives_every_token_its_numbers_and_padding_none(model, reward, policy, sequences):
    head = init_head(model, jax.random.key(1), HeadConfig(outputs=3))
    tokens, positions = padded(sequences, RIGHT)
    token_level = jax.jit(partial(token_outputs, model))
    outputs = token_level(policy, head, tokens, positions)
    assert outputs.shape == (3, WIDTH, 3)
    np.testing.assert_array_equal(outputs != 0, np.broadcast_to(RIGHT[..., None], outputs.shape))
    moved = token_level(policy, head, *padded(sequences, LEFT, 5))
    np.testing.assert_allclose(moved[LEFT], outputs[RIGHT], rtol=1e-5, atol=1e-6)
    # A token is judged by what came up to it.
    shorter = token_level(policy, head, tokens[:, :4], positions[:, :4])
    np.testing.assert_allclose(shorter, outputs[:, :4], rtol=1e-5, atol=1e-6)
    # The last of a scalar head is the reward of the sequence.
    one = {"weight": head["weight"][:, :1]}
    last = at_last(token_level(policy, one, tokens, positions), positions)
    np.testing.assert_allclose(last[:, 0], reward(policy, one, tokens, positions), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_gradients_reach_every_layer_and_the_backbone_that_is_read(model, gradients, policy, sequences, config):
    head = init_head(model, jax.random.key(1), config)
    through = gradients(policy, head, *padded(sequences, LEFT))
    assert all(largest(leaf) > 0 for leaf in jax.tree.leaves(through))


def test_a_shared_backbone_learns_and_a_separate_one_leaves_the_policy_alone(model, reward, policy, sequences):
    arguments = padded(sequences, LEFT)
    shared = from_policy(model, policy, jax.random.key(1), TWO_LAYERS, backbone="shared")
    own = from_policy(model, policy, jax.random.key(1), TWO_LAYERS)
    assert (set(shared), set(own)) == ({"head"}, {"head", "backbone"})
    np.testing.assert_array_equal(shared["head"]["weight"], own["head"]["weight"])

    def value(policy, params):
        return reward(params.get("backbone", policy), params["head"], *arguments).sum()

    of_policy, of_shared = jax.grad(value, argnums=(0, 1))(policy, shared)
    assert largest(of_policy) > 0
    assert largest(of_shared["head"]) > 0
    of_policy, of_own = jax.grad(value, argnums=(0, 1))(policy, own)
    assert largest(of_policy) == 0
    assert largest(of_own["backbone"]) > 0
    # It starts as the policy, so that both say the same; as a copy, so that donating one leaves the other.
    np.testing.assert_array_equal(value(policy, own), value(policy, shared))
    pairs = zip(jax.tree.leaves(own["backbone"]), jax.tree.leaves(policy), strict=True)
    assert all(copied.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer() for copied, leaf in pairs)


def test_two_layers_have_silu_between_them():
    head = {"hidden": jnp.eye(2), "hidden_bias": jnp.array([0.0, 1.0]), "weight": jnp.array([[1.0], [10.0]])}
    silu = lambda x: x / (1 + math.exp(-x))  # noqa: E731
    np.testing.assert_allclose(head_outputs(head, jnp.array([1.0, 2.0])), [silu(1.0) + 10 * silu(3.0)], rtol=1e-6)


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_outputs_are_float32_for_hidden_states_in_bfloat16(config):
    model = transformer(
        TransformerConfig(
            vocabulary_size=13,
            width=16,
            layers=1,
            heads=2,
            kv_heads=1,
            compute_dtype="bfloat16",
            parameter_dtype="bfloat16",
        )
    )
    head = init_head(model, jax.random.key(1), config)
    tokens, positions = jnp.array([[1, 2, 3]]), jnp.array([[0, 1, 2]])

    @jax.jit
    def hidden_and_rewards(key, head):
        policy = model.init(key)
        hidden, _ = model.apply(policy, tokens, positions, None)
        return hidden, sequence_reward(model, policy, head, tokens, positions)

    hidden, rewards = hidden_and_rewards(jax.random.key(0), head)
    assert hidden.dtype == jnp.bfloat16
    assert rewards.dtype == jnp.float32
    # The product is in float32 too: nothing is rounded but the hidden states.
    expected = head_outputs(head, hidden.astype(jnp.float32))[:, -1, 0]
    np.testing.assert_allclose(rewards, expected, rtol=1e-5)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), head)
    assert head_outputs(halved, hidden).dtype == jnp.float32


def test_fresh_heads_are_as_small_as_they_say():
    hidden = jax.random.normal(jax.random.key(0), (4000, 64))
    for config, expected in (
        (HeadConfig(outputs=40), 64**-0.5),
        (HeadConfig(outputs=40, initial_scale=0.1), 0.1 * 64**-0.5),
        (HeadConfig(outputs=40, layers=2, width=100), 0.6 * 100**-0.5),
    ):
        head = initialise(head_specs(64, config), jax.random.key(1))
        np.testing.assert_allclose(head_outputs(head, hidden).std(), expected, rtol=0.1)
    for config in (HeadConfig(initial_scale=0), HeadConfig(layers=2, initial_scale=0)):
        head = initialise(head_specs(64, config), jax.random.key(1))
        np.testing.assert_array_equal(head_outputs(head, hidden), 0.0)
        # It can still learn.
        assert largest(jax.grad(lambda head: head_outputs(head, hidden).sum())(head)) > 0


def test_sizes():
    assert parameter_count(head_specs(16, HeadConfig(outputs=2))) == 32
    assert parameter_count(head_specs(16, TWO_LAYERS)) == 16 * 5 + 5 + 5
    assert parameter_count(head_specs(16, HeadConfig(layers=2))) == 16 * 16 + 16 + 16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"outputs": 0}, "head.outputs is 0"),
        ({"layers": 3}, "head.layers is 3; a head has 1 layer or 2"),
        ({"width": 8}, "head.width is 8, but a head of one layer .* set head.layers to 2"),
        ({"width": 0, "layers": 2}, "head.width is 0"),
        ({"initial_scale": -1.0}, "head.initial_scale is -1.0"),
        ({"initial_scale": float("nan")}, "head.initial_scale is nan"),
    ],
)
def test_a_head_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**change)


def test_what_does_not_fit_is_refused_by_name(model, policy):
    head, tokens = init_head(model, jax.random.key(1)), np.zeros((2, 3), np.int32)
    reward, outputs = (partial(jax.eval_shape, partial(of, model), policy) for of in (sequence_reward, token_outputs))
    with pytest.raises(ValueError, match=r"tokens have shape \(2, 3\) and positions \(3,\)"):
        reward(head, tokens, np.arange(3))
    with pytest.raises(ValueError, match="reads hidden states of width 5, but these have width 16"):
        outputs({"weight": np.zeros((5, 1))}, tokens, tokens)
    with pytest.raises(ValueError, match="the head has 3 outputs, but a sequence reward is one number"):
        reward({"weight": np.zeros((16, 3))}, tokens, tokens)
    with pytest.raises(ValueError, match="backbone is 'copied'; it must be 'own' or 'shared'"):
        from_policy(model, policy, jax.random.key(1), backbone="copied")
