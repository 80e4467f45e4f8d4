"""Exchange of batch rows for good extra answers, with their number set by an entropy target."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Natural, NonNegative, ranged
from jaxrl_llm.statistics import sampled_entropy


@ranged
def steered_batch(*, target: NonNegative = 0.5, cap: Natural = 60, threshold: float = 0.05) -> Method:
    """Weights that exchange rows of the batch for equally many good extra answers: AEPO.

    Extra answers are drawn at the steering temperature, with a separate group per prompt. Those with an advantage above
    `threshold` qualify. n = min(cap, number of qualified answers), halved and rounded down if the entropy of the
    previous step was above the target. The first n qualified answers are kept and the first n ordinary rows get weight
    0, so the batch keeps its size. Then `steered_advantages` sets the advantage of the extra answers to 1.

    Args:
      target: intended entropy, in nats per token.
      cap: largest n.
      threshold: value that the advantage of an extra answer must exceed.

    Returns:
      A method that remembers the entropy of the rows it kept; its update returns the new weight of each row. It reads
      `advantages`, computed within each group, and `extra`, which is True on extra answers.

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
