"""Entropy kept near its own history at each turn, for agents whose entropy collapses in late turns."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss, Method
from jaxrl_llm.losses.aggregation import Aggregation, aggregate
from jaxrl_llm.losses.ratio import on_mask, token_share
from jaxrl_llm.ranges import Count, NonNegative, ranged

Penalty = Literal["hinge", "step"]


@ranged
def entropy_history(*, max_turns: Count = 1) -> Method:
    """The mean entropy of earlier batches at the turn of each token.

        history[s] = mean over earlier batches of (mean entropy of the batch's tokens at turn s)

    A batch in which no sample reaches turn max_turns // 2 enters the memory but gets history 0, as in the released
    code. Later turns than max_turns share the last entry. Without a `turn` all tokens are of turn 0.

    Args:
      max_turns: turns of the longest conversation.

    Returns:
      A method that remembers a sum and a count for each turn; its update gives the history of each token's turn [B, T]
      in nats, 0 where there is none.

    Raises:
      ValueError: for less than one turn.

    Reference: EPO (2509.22576).
    Certainty: verified
    """

    def init():
        return {"sum": jnp.zeros(max_turns, jnp.float32), "batches": jnp.zeros(max_turns, jnp.float32)}

    def update(
        memory,
        old_entropy: Float[Array, "B T"],
        mask: Float[Array, "B T"],
        weight: Float[Array, "B"],
        turn: Int[Array, "B T"] | None = None,
    ):
        chex.assert_rank([old_entropy, mask, weight], [2, 2, 1])
        chex.assert_equal_shape([old_entropy, mask])
        counts = jnp.where(mask > 0, weight.astype(jnp.float32)[:, None], 0.0)
        turn = jnp.zeros(mask.shape, jnp.int32) if turn is None else jnp.clip(turn, 0, max_turns - 1).astype(jnp.int32)
        known = memory["batches"] > 0
        history = jnp.where(known, memory["sum"] / jnp.where(known, memory["batches"], 1.0), 0.0)
        late = jnp.any((counts > 0) & (turn >= max_turns // 2))
        value = jnp.where((counts > 0) & late, history[turn], 0.0)
        nothing = jnp.zeros(max_turns, jnp.float32)
        tokens = nothing.at[turn].add(counts)
        total = nothing.at[turn].add(jnp.where(counts > 0, old_entropy.astype(jnp.float32), 0.0) * counts)
        memory = {
            "sum": memory["sum"] + total / jnp.where(tokens > 0, tokens, 1.0),
            "batches": memory["batches"] + (tokens > 0),
        }
        return stop_gradient(value), memory

    return Method(init, update)


@ranged
def entropy_history_penalty(
    entropy: Float[Array, "B T"],
    entropy_history: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    penalty: Penalty = "hinge",
    low: NonNegative = 0.5,
    high: NonNegative = 1.5,
    alpha: NonNegative = 0.1,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: Count | None = None,
) -> Loss:
    """A penalty on tokens whose entropy has left a range around its history.

        hinge   x = alpha * (max(H - high * history, 0) + max(low * history - H, 0))
        step    x = 0 where low * history < H < high * history, else alpha

    The paper has the step, which is piecewise constant: its gradient is 0 and the update is that of the objective
    without it. The hinge has the intended gradient. Tokens without a history (0) have no penalty. The paper's objective
    is a policy loss, `entropy_bonus` with coefficient lam, and this one with lam * `two_phase_decay`.

    Args:
      entropy: entropy of the current policy at each token, in nats.
      entropy_history: mean entropy of earlier updates at the token's turn; 0 is none.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      penalty: which form.
      low: lower end of the range, in units of the history.
      high: upper end.
      alpha: height of the step, or slope of the hinge.
      aggregation: how token losses are averaged.
      max_completion_tokens: the constant of the modes that divide by one.

    Returns:
      The loss, with the metric `outside_history_share` (tokens with a penalty).

    Raises:
      ValueError: for an unknown penalty, a negative alpha, or a range that is not 0 <= low < high.

    Reference: EPO (2509.22576).
    Certainty: verified
    """
    chex.assert_rank([entropy, entropy_history, mask], 2)
    chex.assert_equal_shape([entropy, entropy_history, mask])
    if penalty not in get_args(Penalty):
        raise ValueError(f"penalty is {penalty!r}; it must be one of {', '.join(get_args(Penalty))}")
    if not 0 <= low < high:
        raise ValueError(f"low is {low} and high is {high}; they bound a range around 1, with 0 <= low < high")
    current = on_mask(entropy, mask)
    history = stop_gradient(on_mask(entropy_history, mask))
    known = (history > 0) & (mask > 0)
    outside = known & ((current <= low * history) | (current >= high * history))
    if penalty == "step":
        per_token = jnp.where(outside, alpha, 0.0)
    else:
        distance = jnp.maximum(current - high * history, 0.0) + jnp.maximum(low * history - current, 0.0)
        per_token = jnp.where(known, alpha * distance, 0.0)
    loss = aggregate(per_token, mask, aggregation=aggregation, max_completion_tokens=max_completion_tokens)
    return loss._replace(metrics={"outside_history_share": token_share(outside, mask)})
