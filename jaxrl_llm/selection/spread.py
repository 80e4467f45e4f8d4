"""Which prompts are kept by how far their rewards lie apart, and which turns of a row are read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Count, NonNegative, ShareBelowOne, ranged
from jaxrl_llm.selection.subsets import row_uniforms
from jaxrl_llm.statistics import at_turns, group_leader, group_std


@ranged
def spread_filter(*, beta: NonNegative = 0.5, decay: ShareBelowOne = 0.99) -> Method:
    """Drops prompts whose rewards lie closer together than a share of what they did on average.

        e <- decay * e + (1 - decay) * mean_p s_p,   w = w where s_p >= beta * e, else 0

    with s_p the population deviation of the rewards of prompt p; the first batch has e = mean_p s_p. It removes prompts
    that are all easy or all hopeless under a reward that is no longer 0 or 1. Fill `weight` with it.

    Args:
      beta: share of the average that a prompt has to reach.
      decay: what the average keeps of its past at each batch.

    Returns:
      A method that remembers e; its update gives one weight per row.

    Raises:
      ValueError: for a decay outside [0, 1) or a negative beta.

    Reference: RLPR (2506.18254).
    Certainty: verified
    """

    def init():
        return {"spread": jnp.zeros((), jnp.float32), "begun": jnp.zeros((), bool)}

    def update(memory, rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]):
        spread, leader = group_std(rewards, group, weight, ddof=0), group_leader(group, weight)
        count = leader.sum()
        mean = (spread * leader).sum() / jnp.maximum(count, 1.0)
        moved = jnp.where(memory["begun"], decay * memory["spread"] + (1 - decay) * mean, mean)
        spread_now = jnp.where(count > 0, moved, memory["spread"])
        kept = jnp.where(spread >= beta * spread_now, weight.astype(jnp.float32), 0.0)
        return kept, {"spread": spread_now, "begun": memory["begun"] | (count > 0)}

    return Method(init, update)


@ranged
def drawn_turns(
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    prompt_id: Int[Array, "B"],
    sample: Int[Array, "B"],
    step: Int[Array, ""],
    *,
    max_turns: Count,
    count: Count,
) -> Float[Array, "B S"]:
    """1 for some of the turns that each row took, drawn without replacement; all of them where there are no more.

        d_s = [ u_s is among the `count` smallest ],   u uniform over the turns that were taken

    Args:
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count; a turn without any was not taken.
      prompt_id, sample, step: address the random numbers.
      max_turns: turns that are drawn from, S.
      count: turns that are drawn of each row.

    Returns:
      One number per turn.

    Reference: LaRe (2412.11120).
    Certainty: verified
    """
    taken = at_turns(mask, turn, mask, max_turns)[1]
    each = jax.vmap(lambda s: row_uniforms(step * max_turns + s, prompt_id, sample), out_axes=1)(jnp.arange(max_turns))
    place = jnp.argsort(jnp.argsort(jnp.where(taken, each, 2.0), axis=1), axis=1)
    return (taken & (place < count)).astype(jnp.float32)
