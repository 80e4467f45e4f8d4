"""A bonus from the geometry of hidden states: the effective rank of an answer and its growth."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import AboveOne, Count, NonNegative, Share, ranged
from jaxrl_llm.statistics import group_mean

Spread = Literal["all_tokens", "last_token"]
EPS = 1e-8


def effective_rank(hidden: Float[Array, "T D"], mask: Float[Array, "T"]) -> Float[Array, ""]:
    """Exponential of the entropy of the normalised singular values of the centred hidden states.

        exp(-sum_i p_i log p_i),   p_i = s_i / sum_j s_j

    Args:
      hidden: hidden state at each token.
      mask: non-zero on tokens that count.

    Returns:
      A number between 1 and the rank; 0 for fewer than two tokens.

    Reference: VERL, velocity-exploiting rank learning (2509.23808).
    Certainty: verified
    """
    chex.assert_rank([hidden, mask], [2, 1])
    counted = (mask > 0)[:, None]
    tokens = counted.sum()
    states = jnp.where(counted, hidden.astype(jnp.float32), 0.0)
    centred = jnp.where(counted, states - states.sum(0) / jnp.maximum(tokens, 1), 0.0)
    singular = jnp.linalg.svd(centred, compute_uv=False)
    p = singular / (singular.sum() + EPS)
    return jnp.where(tokens > 1, jnp.exp(-(p * jnp.log(p + EPS)).sum()), 0.0)


@ranged
def rank_dynamics(
    hidden: Float[Array, "B T D"], mask: Float[Array, "B T"], *, stride: Count = 40
) -> Float[Array, "B 3"]:
    """(acceleration, velocity, effective rank) of each answer.

    With m_j the effective rank of the first j * stride + 1 tokens, for j = 1, 2, ... as far as the answer reaches:

        velocity       mean over j of v_j,   v_j = m_j - mean_{i < j} m_i
        acceleration   mean over j of v_{j+1} - v_j

    and 0 where there are not enough of them. Costs T / stride singular value decompositions per row.

    Args:
      hidden: hidden state at each token, of the last layer of the policy that the update starts from.
      mask: non-zero on tokens that count.
      stride: tokens between two prefixes.

    Returns:
      Three numbers per row.

    Raises:
      ValueError: for a stride below 1.

    Reference: VERL, velocity-exploiting rank learning (2509.23808).
    Certainty: verified
    """
    chex.assert_rank([hidden, mask], [3, 2])
    counted = mask > 0
    position = jnp.cumsum(counted, axis=-1)
    tokens = position[:, -1]
    ranks = jax.vmap(effective_rank)
    whole = ranks(hidden, counted)
    prefixes = jnp.arange(stride, mask.shape[1], stride) + 1
    if not len(prefixes):
        return jnp.stack([jnp.zeros_like(whole), jnp.zeros_like(whole), whole], axis=-1)
    prefix_ranks = jax.lax.map(lambda k: ranks(hidden, counted & (position <= k)), prefixes).T
    reached = prefixes[None, :] <= tokens[:, None]
    earlier = jnp.cumsum(prefix_ranks, axis=-1)[:, :-1] / jnp.arange(1, len(prefixes))
    velocity = prefix_ranks[:, 1:] - earlier
    acceleration = velocity[:, 1:] - velocity[:, :-1]
    return jnp.stack([_mean(acceleration, reached[:, 2:]), _mean(velocity, reached[:, 1:]), whole], axis=-1)


@ranged
def rank_bonus(
    dynamics: Float[Array, "B 3"], centre: Float[Array, "3"], *, gain: NonNegative = 2.0
) -> Float[Array, "B"]:
    """The bonus before it is bounded by the advantage.

        d(x) = clip((x - centre) / |centre|, -5, 5),   beta = sigmoid(gain * d(acceleration))
        bonus = beta * tanh(d(effective rank)) + (1 - beta) * tanh(d(velocity))

    Where the rank accelerates, the bonus depends on the rank, elsewhere on its velocity.

    Args:
      dynamics: `rank_dynamics` of each row.
      centre: running means of the three.
      gain: how sharply the acceleration decides.

    Returns:
      One number per row in (-1, 1).

    Reference: VERL, velocity-exploiting rank learning (2509.23808).
    Certainty: verified
    """
    chex.assert_shape([dynamics, centre], [(None, 3), (3,)])
    deviation = jnp.clip((dynamics - centre) / (jnp.abs(centre) + EPS), -5.0, 5.0)
    acceleration, velocity, rank = deviation.T
    explore = jax.nn.sigmoid(gain * acceleration)
    return explore * jnp.tanh(rank) + (1 - explore) * jnp.tanh(velocity)


@ranged
def with_bounded_bonus(
    advantages: Float[Array, "B T"], bonus: Float[Array, "B T"], *, kappa: AboveOne = 2.0
) -> Float[Array, "B T"]:
    """A + min(max(bonus, 0), |A| / kappa): a bonus that never flips the sign of an advantage.

    >>> with_bounded_bonus(jnp.array([[1.0, -1.0, 0.0]]), jnp.array([[0.25, 0.9, 0.3]])).tolist()
    [[1.25, -0.5, 0.0]]
    """
    return advantages + jnp.minimum(jnp.maximum(bonus, 0.0), jnp.abs(advantages) / kappa)


@ranged
def rank_shaped(
    *,
    gain: NonNegative = 2.0,
    kappa: AboveOne = 2.0,
    rate: Share = 0.3,
    stride: Count = 40,
    spread: Spread = "all_tokens",
    start_at_first_batch: bool = True,
    scale_by_score: bool = False,
) -> Method:
    """VERL: advantages with a bonus for answers whose hidden states have a high, or a growing, effective rank.

    The centres of `rank_bonus` are running means of the earlier batches, so the first batch is not shaped.

        centre <- (1 - rate) * centre + rate * mean of the batch before

    Args:
      gain: how sharply the acceleration decides (see `rank_bonus`).
      kappa: the bonus is at most |A| / kappa, above 1.
      rate: share of the newest batch in the running means (0.7 is the default of the released code).
      stride: tokens between two prefixes.
      spread: 'all_tokens' adds the bonus along the answer; 'last_token' to its last token alone, as released.
      start_at_first_batch: start the means at the first batch; False starts them at 0 as released, which drives d to
        its bounds at first.
      scale_by_score: multiply the bonus by 1 - (s + 1) / 2, with s a running mean of rewards in [-1, 1].

    Returns:
      A method; its update takes the advantages, the `hidden` states, the rewards, the mask and the weight of the rows,
      and gives one advantage per token, 0 outside the mask and in absent rows.

    Raises:
      ValueError: for a rate outside [0, 1], a kappa not above 1, a stride below 1, or an unknown spread.

    Reference: VERL, velocity-exploiting rank learning (2509.23808).
    Certainty: verified
    """
    if spread not in get_args(Spread):
        raise ValueError(f"spread is {spread!r}; it must be one of {', '.join(get_args(Spread))}")

    def init():
        zeros = jnp.zeros(3, jnp.float32)
        return {"centre": zeros, "before": zeros, "batches": jnp.int32(0), "score": jnp.float32(0.0)}

    def update(
        memory,
        advantages: Float[Array, "B T"],
        hidden: Float[Array, "B T D"],
        rewards: Float[Array, "B"],
        mask: Float[Array, "B T"],
        weight: Float[Array, "B"],
    ):
        there = weight > 0
        counted = (mask > 0) & there[:, None]
        dynamics = rank_dynamics(hidden, counted, stride=stride)
        past = memory["batches"] > 0
        moved = (1 - rate) * memory["centre"] + rate * memory["before"]
        if start_at_first_batch:
            moved = jnp.where(memory["batches"] == 1, memory["before"], moved)
        centre = jnp.where(past, moved, memory["centre"])
        bonus = jnp.where(past, rank_bonus(dynamics, centre, gain=gain), 0.0)
        if scale_by_score:
            bonus = bonus * (1 - (memory["score"] + 1) / 2)
        where = counted
        if spread == "last_token":
            remaining = jnp.cumsum(counted[:, ::-1], axis=-1)[:, ::-1]
            where = counted & (remaining == 1)
        advantages = jnp.where(counted, advantages.astype(jnp.float32), 0.0)
        shaped = with_bounded_bonus(advantages, jnp.where(where, bonus[:, None], 0.0), kappa=kappa)
        batch = jnp.zeros(weight.shape, jnp.int32)
        means = jnp.stack([group_mean(column, batch, weight)[0] for column in dynamics.T])
        score = (1 - rate) * memory["score"] + rate * group_mean(rewards, batch, weight)[0]
        after = {"centre": centre, "before": means, "batches": memory["batches"] + 1, "score": score}
        # An empty batch leaves the memory unchanged.
        return shaped, jax.tree.map(lambda new, old: jnp.where(jnp.any(there), new, old), after, memory)

    return Method(init, update)


def _mean(values: Array, counted: Array) -> Float[Array, "B"]:
    return jnp.where(counted, values, 0.0).sum(-1) / jnp.maximum(counted.sum(-1), 1)
