"""From per-token losses to a sum and a count: the aggregation modes.

Every mode reads one float mask: non-zero entries mark the tokens that count, their value is the weight of the row. A
row of weight 0 has an all-zero mask and is absent from every sum and every count.
"""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.experience import Loss
from jaxrl_llm.ranges import Count, ranged

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_const", "dr_grpo"]


def row_weight(mask: Float[Array, "B T"]) -> Float[Array, "B"]:
    """Weight of each row as the mask carries it: its largest entry, 0 for an empty row."""
    return jnp.max(mask, axis=-1, initial=0.0)


@ranged
def aggregate(
    per_token: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    r"""Sum token losses into a numerator and a denominator.

    With n_b = sum_t mask, s_b = sum_t mask * x, w_b the weight of row b and C = `max_completion_tokens`:

        token_mean            sum_b s_b             / sum_b n_b
        seq_mean_token_mean   sum_b w_b * s_b / n_b / sum_b w_b
        seq_mean_token_sum    sum_b s_b             / sum_b w_b
        dr_grpo               sum_b s_b             / (C * sum_b w_b)
        token_sum_const       sum_b s_b             / C

    Args:
      per_token: loss of each token; entries outside the mask may hold anything finite.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      aggregation: one of the five modes.
      max_completion_tokens: the constant C of the last two modes, fixed for a whole run (never the padded length
        of a bucket); None takes T.

    Returns:
      The loss as (numerator, denominator); `token_sum_const` is a plain sum, so its denominator is None.

    Raises:
      ValueError: for an unknown mode.

    Reference: DAPO (2503.14476) for token_mean; GRPO (2402.03300) for seq_mean_token_mean; Dr.GRPO (2503.20783).
    """
    chex.assert_rank([per_token, mask], 2)
    chex.assert_equal_shape([per_token, mask])
    mask = mask.astype(jnp.float32)
    counted = jnp.where(mask > 0, per_token.astype(jnp.float32), 0.0) * mask
    weights = row_weight(mask)
    constant = float(max_completion_tokens or mask.shape[-1])
    match aggregation:
        case "token_mean":
            return Loss(counted.sum(), mask.sum())
        case "seq_mean_token_mean":
            tokens = mask.sum(-1)
            rows = weights * counted.sum(-1) / jnp.where(tokens == 0, 1.0, tokens)
            return Loss(rows.sum(), weights.sum())
        case "seq_mean_token_sum":
            return Loss(counted.sum(), weights.sum())
        case "dr_grpo":
            return Loss(counted.sum(), constant * weights.sum())
        case "token_sum_const":
            return Loss(counted.sum() / constant, None)
    raise ValueError(f"aggregation is {aggregation!r}; it must be one of {', '.join(get_args(Aggregation))}")
