"""Good extra answers in the place of rows of the batch, as many as an entropy target asks for."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Natural, NonNegative, ranged
from jaxrl_llm.statistics import sampled_entropy


@ranged
def steered_batch(*, target: NonNegative = 0.5, cap: Natural = 60, threshold: float = 0.05) -> Method:
    """Weights that put good extra answers in the place of as many rows of the batch: AEPO.

    Of the extra answers (drawn at the steering temperature, each prompt's a group of its own) those with an advantage
    above `threshold` qualify. n = min(cap, how many qualify), halved and rounded down where the entropy of the step
    before was above the target. The first n of them are kept and the first n other rows leave, so that the batch keeps
    its size. Then `steered_advantages` sets the advantage of the extra answers to 1.

    Args:
      target: entropy to hold, in nats per token.
      cap: most answers that are exchanged.
      threshold: least advantage of an extra answer.

    Returns:
      A method that remembers the entropy of the rows it kept; its update gives the new weight of each row, from the
      advantages within each group and from `extra`, which is True on extra answers.

    Raises:
      ValueError: for a negative cap.

    Reference: AEPO, arbitrary entropy policy optimization (2510.08141).
    Certainty: verified
    """

    def init():
        return {"entropy": jnp.float32(0.0)}

    def update(
        memory,
        advantages: Float[Array, "B T"],
        extra: Bool[Array, "B"],
        old_logprobs: Float[Array, "B T"],
        mask: Float[Array, "B T"],
        weight: Float[Array, "B"],
    ):
        chex.assert_rank([advantages, extra, mask, weight], [2, 1, 2, 1])
        there, extra = weight > 0, extra.astype(bool)
        largest = jnp.max(jnp.where(mask > 0, advantages.astype(jnp.float32), -jnp.inf), axis=-1)
        qualifies = there & extra & (largest > threshold)
        exchanged = jnp.minimum(qualifies.sum(), cap)
        exchanged = jnp.where(memory["entropy"] > target, exchanged // 2, exchanged)
        ordinary = there & ~extra
        kept = qualifies & (jnp.cumsum(qualifies) <= exchanged)
        stays = ordinary & (jnp.cumsum(ordinary) > exchanged)
        new = jnp.where(kept | stays, weight.astype(jnp.float32), 0.0)
        return new, {"entropy": sampled_entropy(old_logprobs, mask, new)}

    return Method(init, update)
