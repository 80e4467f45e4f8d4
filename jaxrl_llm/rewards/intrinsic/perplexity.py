"""Rank rewards from the perplexity of the reference answer after each sample's thought."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Natural, NonNegative, ranged
from jaxrl_llm.rewards.intrinsic.thoughts import thought_length


@ranged
def reasoning_perplexity(
    proxy_answer_logprobs: Float[Array, "B A"],
    answer_mask: Float[Array, "B A"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    mark_id: Natural,
) -> Float[Array, "B"]:
    """Perplexity of the reference answer after the sampled thought, under a proxy, with a length discount.

        ppl = exp(nll / max(1, 1 + log_10(n)))

    with nll the mean of -log pi over the answer's tokens and n the tokens of the thought. Lower is better.

    Args:
      proxy_answer_logprobs: log-probability of each token of the view `answer` under the network `proxy`, a slowly
        moving copy of the policy.
      answer_mask: 1 on the tokens of the answer.
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      mark_id: id of the token that ends a thought, as in `answer_after_thought`.

    Returns:
      One number per row, at least 1; infinity in rows with an empty answer mask (truncated thought).

    Reference: NOVER (2505.16022).
    Certainty: verified
    """
    chex.assert_rank([proxy_answer_logprobs, answer_mask, tokens, length], [2, 2, 2, 1])
    chex.assert_equal_shape([proxy_answer_logprobs, answer_mask])
    counted = answer_mask > 0
    count = counted.sum(axis=1)
    total = -jnp.where(counted, proxy_answer_logprobs.astype(jnp.float32), 0.0).sum(axis=1)
    thought = jnp.maximum(thought_length(tokens, length, mark_id=mark_id), 1).astype(jnp.float32)
    discount = jnp.maximum(1.0, 1.0 + jnp.log10(thought))
    return jnp.where(count > 0, jnp.exp(total / jnp.maximum(count, 1) / discount), jnp.inf)


@ranged
def perplexity_ranks(
    perplexity: Float[Array, "B"],
    well_formed: Float[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    mark_id: Natural,
    format_weight: NonNegative = 1.0,
    reasoning_weight: NonNegative = 1.0,
    efficiency_weight: NonNegative = 1.0,
) -> Float[Array, "B"]:
    """Format reward, rank of the perplexity within the group, and an efficiency bonus for shorter thoughts.

        r = w_f + w_r (n - rank) / n + w_e wins / (n - 1)

    over the n valid samples of the group: well-formed ones with a finite perplexity. rank counts samples of lower
    perplexity (ties in batch order), wins samples with a longer thought and a higher perplexity. Ranks are insensitive
    to the scale of the perplexities.

    Args:
      perplexity: as from `reasoning_perplexity`.
      well_formed: 1 where the completion keeps the format.
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      mark_id: id of the token that ends a thought.
      format_weight: w_f.
      reasoning_weight: w_r.
      efficiency_weight: w_e.

    Returns:
      One reward per row, float32; 0 for samples that are not valid. The only valid sample of a group has no bonus.

    Reference: NOVER (2505.16022).
    Certainty: verified
    """
    chex.assert_rank([perplexity, well_formed, group, weight], 1)
    chex.assert_equal_shape([perplexity, well_formed, group, weight])
    valid = (well_formed > 0) & jnp.isfinite(perplexity) & (weight > 0)
    thought = thought_length(tokens, length, mark_id=mark_id)
    row = jnp.arange(len(perplexity))
    # [B, B]: the second index runs over the samples that a row is compared with.
    other = valid[:, None] & valid[None, :] & (group[:, None] == group[None, :])
    higher = perplexity[None, :] > perplexity[:, None]
    lower = perplexity[None, :] < perplexity[:, None]
    first = ~higher & ~lower & (row[None, :] < row[:, None])
    together = other.sum(axis=1)
    rank = (other & (lower | first)).sum(axis=1)
    wins = (other & higher & (thought[None, :] > thought[:, None])).sum(axis=1)
    reasoning = (together - rank) / jnp.maximum(together, 1)
    efficiency = wins / jnp.maximum(together - 1, 1)
    total = format_weight + reasoning_weight * reasoning + efficiency_weight * efficiency
    return jnp.where(valid, total, 0.0).astype(jnp.float32)
