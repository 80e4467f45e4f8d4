"""Parameters that others are compared with: anchors that follow the policy at a distance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def ema(params: PyTree, anchor: PyTree, *, decay: float = 0.99) -> PyTree:
    """The anchor after one step towards the parameters: decay * anchor + (1 - decay) * params.

    As a reference policy it lets the divergence limit how fast the policy changes instead of how far it gets. Computed
    in float32 and returned in the anchor's dtype. Keep the anchor in float32 where decay is near 1: bfloat16 resolves
    one part in 256 at best, and smaller steps would leave it standing still.

    Args:
      params: the policy.
      anchor: the same pytree, from earlier steps.
      decay: share of the anchor that is kept.

    Returns:
      The new anchor.

    Raises:
      ValueError: for a decay outside [0, 1].

    Reference: T1 (2501.11651).
    Certainty: recalled
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it is the share of the anchor that is kept and must lie in [0, 1]")

    def follow(new, old):
        mixed = decay * old.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)
        return mixed.astype(old.dtype)

    return jax.tree.map(follow, params, anchor)
