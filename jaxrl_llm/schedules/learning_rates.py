"""Learning rates as a share of their peak, by the number of updates since the warm-up, for `training.schedule`."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import PositiveShare, Share, ranged


@ranged
def linear_decay(step: Int[Array, ""], *, total_updates: int, floor: Share = 0.0) -> Float[Array, ""]:
    """A factor that falls linearly from 1 to `floor` at the last update.

        factor = 1 - (1 - floor) * min(step / total_updates, 1)

    Args:
      step: updates made since the warm-up.
      total_updates: of the run after the warm-up; filled from the run.
      floor: share of the peak at the end.
    """
    return 1.0 - (1.0 - floor) * jnp.clip(step / total_updates, 0.0, 1.0)


@ranged
def stable_then_decay(
    step: Int[Array, ""], *, total_updates: int, decay_share: PositiveShare = 0.2, floor: Share = 0.0
) -> Float[Array, ""]:
    """1 for most of the run, and in the last `decay_share` of it falling in a straight line to `floor`.

        factor = 1 - (1 - floor) * clip((step / total_updates - (1 - decay_share)) / decay_share, 0, 1)

    Args:
      step: updates made since the warm-up.
      total_updates: of the run after the warm-up; filled from the run.
      decay_share: share of the updates in which it falls.
      floor: share of the peak at the end.

    Reference: MiniCPM, warmup-stable-decay (2404.06395).
    Certainty: recalled
    """
    done = step / total_updates
    return 1.0 - (1.0 - floor) * jnp.clip((done - (1.0 - decay_share)) / decay_share, 0.0, 1.0)
