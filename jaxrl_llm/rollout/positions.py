"""Positions of tokens in their own sequence, from lengths alone; -1 on padding."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int


def prompt_positions(length: Int[Array, "B"], width: int) -> Int[Array, "B P"]:
    """Positions of left-padded prompts: 0, 1, ... on real tokens and -1 on padding."""
    return jnp.maximum(jnp.arange(width) - (width - length[:, None]), -1)


def completion_positions(prompt_length: Int[Array, "B"], length: Int[Array, "B"], width: int) -> Int[Array, "B T"]:
    """Positions of right-padded completions that follow their prompts; -1 on padding."""
    offsets = jnp.arange(width)
    return jnp.where(offsets < length[:, None], prompt_length[:, None] + offsets, -1)
