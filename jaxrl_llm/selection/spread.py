"""A filter of prompts by the deviation of their rewards, and a random subset of the turns of a row."""

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
    """Weights without prompts whose reward deviation is below a share of its moving average.

        e <- decay * e + (1 - decay) * mean_p s_p,   w = w where s_p >= beta * e, else 0

    with s_p the population deviation of the rewards of prompt p; in the first batch e = mean_p s_p. For rewards on a
    continuous scale it removes prompts whose samples are all good or all bad. An entry of credit fills `weight` with
    it.

    Args:
      beta: share of the average that s_p must reach.
      decay: decay of the moving average per batch.

    Returns:
      A method that remembers e; its update returns one weight per row.

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
    """1 for `count` of the turns of each row, drawn without replacement; for all turns of a row that has no more.

        d_s = 1[u_s is among the `count` smallest],   u_s uniform, for the turns with tokens

    Args:
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count; a turn without such tokens is not drawn.
      prompt_id, sample, step: address the random numbers.
      max_turns: S; later turns are ignored.
      count: turns to draw per row.

    Returns:
      1 or 0 per turn.

    Reference: LaRe (2412.11120).
    Certainty: verified
    """
    taken = at_turns(mask, turn, mask, max_turns)[1]
    each = jax.vmap(lambda s: row_uniforms(step * max_turns + s, prompt_id, sample), out_axes=1)(jnp.arange(max_turns))
    place = jnp.argsort(jnp.argsort(jnp.where(taken, each, 2.0), axis=1), axis=1)
    return (taken & (place < count)).astype(jnp.float32)
