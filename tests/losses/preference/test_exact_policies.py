"""Policies that a table of logits learns from all pairs of a few answers: what theory says, to 1e-2."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import losses

REWARDS = np.array([1.0, 0.2, -0.5, 0.4])
REFERENCE = np.array([0.1, 0.4, 0.3, 0.2])
# Answer i beats answer i + 1, and the last one the first: no reward orders them.
ROCK_PAPER_SCISSORS = np.array([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]])


def bradley_terry(rewards):
    return 1 / (1 + np.exp(rewards[None] - rewards[:, None]))


def pairs(arms):
    """All ordered pairs of different arms as rows: (arm, group, preferred), the better one first."""
    ordered = [(a, b) for a in range(arms) for b in range(arms) if a != b]
    arm = jnp.array([arm for pair in ordered for arm in pair])
    return arm, jnp.repeat(jnp.arange(len(ordered)), 2), jnp.tile(jnp.array([1.0, 0.0]), len(ordered))


def of_pairs(matrix):
    """An entry of a matrix a pair, for both of its rows; in the order of `pairs`."""
    arms = len(matrix)
    return jnp.repeat(matrix[~np.eye(arms, dtype=bool)] if isinstance(matrix, np.ndarray) else _off(matrix), 2)


def _off(matrix):
    arms = matrix.shape[0]
    rows, columns = np.nonzero(~np.eye(arms, dtype=bool))
    return matrix[rows, columns]


def minimised(value, logits, steps, rate):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def one(carry, _):
        logits, state = carry
        change, state = optimizer.update(jax.grad(value)(logits), state)
        return (optax.apply_updates(logits, change), state), None

    return jax.lax.scan(one, (logits, optimizer.init(logits)), None, length=steps)[0][0]


def trained(loss, reference, matrix, *, steps=1500, rate=0.05, **fixed):
    """The policy that a pair loss ends at, with a weight of a pair for how often the first of it is preferred."""
    arm, group, preferred = pairs(len(matrix))
    log_reference = jnp.log(jnp.asarray(reference))
    mask = of_pairs(matrix)[:, None]

    def value(logits):
        said = jax.nn.log_softmax(logits)[arm][:, None]
        known = {
            "reference_logprobs": log_reference[arm][:, None],
            "group": group,
            "preferred": preferred,
            "mask": mask,
        }
        return loss(logprobs=said, **known, **{name: jnp.log(x)[arm][:, None] for name, x in fixed.items()}).value

    return jax.nn.softmax(minimised(value, log_reference, steps, rate))


def tilted(reference, exponent):
    weights = reference * np.exp(exponent - np.max(exponent))
    return weights / weights.sum()


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_ends_at_the_reference_tilted_by_the_rewards(beta):
    policy = jax.jit(lambda: trained(partial(losses.dpo, beta=beta), REFERENCE, bradley_terry(REWARDS)))()
    np.testing.assert_allclose(policy, tilted(REFERENCE, REWARDS / beta), atol=1e-2)


def test_ipo_ends_at_the_reference_tilted_by_the_share_of_wins():
    """Also where a preference is sure, at which DPO would leave the reference without end."""
    for matrix, beta in ((bradley_terry(REWARDS), 0.25), (bradley_terry(100 * REWARDS), 1.0)):
        policy = trained(partial(losses.dpo, link="square", beta=beta), REFERENCE, matrix)
        wins = matrix.mean(1)  # against the uniform policy that wrote the pairs, itself included
        np.testing.assert_allclose(policy, tilted(REFERENCE, wins / beta), atol=1e-2)


def test_kto_ends_at_the_best_value_of_prospects_which_is_no_tilted_reference():
    good, reference, beta = np.array([0.9, 0.6, 0.2]), np.array([0.3, 0.4, 0.3]), 0.5
    arm, preferred = jnp.array([0, 1, 2, 0, 1, 2]), jnp.array([1.0, 1, 1, 0, 0, 0])
    log_reference = jnp.log(jnp.asarray(reference))
    mask = jnp.asarray(np.concatenate([good, 1 - good]))[:, None]

    def value(logits):
        said = jax.nn.log_softmax(logits)[arm][:, None]
        anchor = jnp.zeros(6)
        return losses.kto(said, log_reference[arm][:, None], preferred, anchor, mask, beta=beta).value

    policy = np.asarray(jax.nn.softmax(minimised(value, log_reference, 1500, 0.05)))
    # The same by search: the value is the sum of (2 p - 1) * sigmoid(beta * log(pi / reference)).
    first, second = np.meshgrid(*[np.linspace(1e-4, 1, 500)] * 2, indexing="ij")
    third = 1 - first - second
    inside = np.where(third > 0, third, np.nan)
    ratio = np.stack([first, second, inside]) / reference[:, None, None]
    value_of = np.tensordot(2 * good - 1, ratio**beta / (1 + ratio**beta), 1)
    best = np.unravel_index(np.nanargmax(value_of), value_of.shape)
    np.testing.assert_allclose(policy, [first[best], second[best], third[best]], atol=1e-2)
    # An answer that is bad more often than good loses everything, however often it is good.
    assert policy[2] < 1e-2 < tilted(reference, np.log(good / (1 - good)) / 2)[2]


def in_rounds(loss, rounds, **names):
    """Pairs of the policy's own answers, judged by a preference with a cycle, in rounds from a lopsided reference."""
    reference = np.array([0.6, 0.3, 0.1])
    matrix = jnp.asarray(ROCK_PAPER_SCISSORS)

    def one(policy, _):
        share = jnp.maximum(policy[:, None] * policy[None], 1e-6) * matrix
        after = trained(loss, reference, share, steps=150, rate=0.2, **dict.fromkeys(names, policy))
        return after, after

    return np.asarray(jax.jit(lambda: jax.lax.scan(one, jnp.asarray(reference), None, length=rounds))()[1]), reference


def test_inpo_mixes_where_preferences_have_a_cycle_and_dpo_does_not():
    eta, tau = 1.0, 0.2
    seen, reference = in_rounds(partial(losses.inpo, eta=eta, tau=tau), 30, previous_logprobs=True)
    policy = seen[-1]
    # No policy beats it: it is the reference tilted by its own wins against itself.
    np.testing.assert_allclose(policy, tilted(reference, ROCK_PAPER_SCISSORS @ policy / tau), atol=1e-2)
    assert policy.min() > 0.15

    def dpo(previous_logprobs, reference_logprobs, **known):  # against the policy of the last round
        return losses.dpo(reference_logprobs=previous_logprobs, beta=0.2, **known)

    seen, _ = in_rounds(dpo, 30, previous_logprobs=True)
    assert (seen[-10:].min(1) < 0.02).all()  # some answer is always all but gone
    assert seen[-10:].max(1).mean() > 0.8
